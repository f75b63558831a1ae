#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <utility>

namespace localmoe {

namespace {

// About a millisecond: between two calls for a token lie some tens of microseconds, and waking a thread of a virtual
// machine takes longer than that.
constexpr int kSpins = 40000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// A container may forbid it or hide the processor: then the thread runs where the system puts it.
void pin(pthread_t thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread, sizeof(set), &set);
}

// Keeps the calling thread on a processor of its own while the others work: left free, it may share a worker's, and
// both then wait for each other a scheduler's tick long. Afterwards it is free again, since the threads that other
// libraries start from it inherit its place.
class PinnedHere {
 public:
  explicit PinnedHere(int cpu) : known_(pthread_getaffinity_np(pthread_self(), sizeof(before_), &before_) == 0) {
    if (known_) pin(pthread_self(), cpu);
  }
  ~PinnedHere() {
    if (known_) pthread_setaffinity_np(pthread_self(), sizeof(before_), &before_);
  }

 private:
  cpu_set_t before_;
  bool known_;
};

}  // namespace

void wait_while_equal(const std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

void wait_for_zero(const std::atomic<int64_t>& count) {
  for (int i = 0; i < kSpins; ++i) {
    if (count.load(std::memory_order_acquire) == 0) return;
    relax();
  }
  for (int64_t left = count.load(std::memory_order_acquire); left != 0; left = count.load(std::memory_order_acquire))
    count.wait(left, std::memory_order_acquire);
}

ThreadPool::ThreadPool(int threads, std::vector<int> cpus)
    : threads_(threads), caller_cpu_(cpus.size() >= static_cast<size_t>(threads) ? cpus[0] : -1) {
  for (int i = 1; i < threads; ++i) {
    workers_.emplace_back([this, i] { loop(i); });
    if (caller_cpu_ >= 0) pin(workers_.back().native_handle(), cpus[i]);
  }
}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::start_and_join() {
  if (threads_ > 1) {
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  }
  if (caller_cpu_ >= 0 && threads_ > 1) {
    const PinnedHere pinned(caller_cpu_);
    call_(context_, 0);
    barrier();
  } else {
    call_(context_, 0);
    barrier();
  }
}

void ThreadPool::barrier() {
  if (threads_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
  } else {
    wait_while_equal(phase_, phase);
  }
}

void ThreadPool::loop(int thread) {
  uint32_t seen = 0;
  for (;;) {
    wait_while_equal(generation_, seen);
    ++seen;
    if (stopping_) return;
    call_(context_, thread);
    barrier();
  }
}

}  // namespace localmoe
