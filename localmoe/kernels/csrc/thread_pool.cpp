#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <utility>

#include "relax.h"

namespace localmoe {

namespace {

// About a millisecond: between two calls for a token lie some tens of microseconds, and waking a thread of a virtual
// machine takes longer than that.
constexpr int kSpins = 40000;

// A container may forbid it or hide the processor: then the thread runs where the system puts it.
void pin(pthread_t thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread, sizeof(set), &set);
}

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

ThreadPool::Stay::Stay(ThreadPool& pool)
    : pool_(pool), pins_(pool.caller_cpu_ >= 0 && pool.threads_ > 1 && !pool.stays_ &&
                         pthread_getaffinity_np(pthread_self(), sizeof(before_), &before_) == 0) {
  if (!pins_) return;
  pool_.stays_ = true;
  pin(pthread_self(), pool_.caller_cpu_);
}

ThreadPool::Stay::~Stay() {
  if (!pins_) return;
  pool_.stays_ = false;
  pthread_setaffinity_np(pthread_self(), sizeof(before_), &before_);
}

void ThreadPool::start_and_join() {
  if (threads_ > 1) {
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  }
  const Stay stay(*this);
  call_(context_, 0);
  barrier();
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
