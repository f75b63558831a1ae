// A persistent team of threads that run the same body and meet at barriers.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace localmoe {

class ThreadPool {
 public:
  // The calling thread is one of the team. Each is pinned to one of `cpus`, the caller only while it works; where
  // there are fewer of them than threads, none is.
  ThreadPool(int threads, std::vector<int> cpus);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Calls body(thread) on every thread of the team and returns when all have ended. It must not throw.
  // One caller at a time: others wait.
  template <typename Body>
  void run(Body&& body) {
    std::lock_guard caller(callers_);
    call_ = [](void* context, int thread) { (*static_cast<std::remove_reference_t<Body>*>(context))(thread); };
    context_ = &body;
    start_and_join();
  }

  // Keeps the calling thread on a processor of its own while the others work: left free, it may share a worker's, and
  // both then wait for each other a scheduler's tick long. Afterwards it is free again, since the threads that other
  // libraries start from it inherit its place. `run` does so itself; held over many runs, it is done once. One caller at a time here too.
  class Stay {
   public:
    explicit Stay(ThreadPool& pool);
    ~Stay();
    Stay(const Stay&) = delete;
    Stay& operator=(const Stay&) = delete;

   private:
    ThreadPool& pool_;
    const bool pins_;
    cpu_set_t before_;
  };

  // Inside a body: waits until every thread of the team is here.
  void barrier();

 private:
  void start_and_join();
  void loop(int thread);

  const int threads_;
  const int caller_cpu_;  // or -1: nobody is pinned
  std::vector<std::thread> workers_;
  std::mutex callers_;  // held for a whole run
  void (*call_)(void*, int) = nullptr;
  void* context_ = nullptr;
  bool stopping_ = false;
  bool stays_ = false;  // the caller is pinned already
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int> arrived_{0};
};

// Hands out [0, size) in chunks to the threads of a body. Reset it where a barrier separates it from its use.
class Chunks {
 public:
  void reset(int64_t size, int64_t chunk) {
    size_ = size;
    chunk_ = chunk;
    next_.store(0, std::memory_order_relaxed);
  }

  // Calls work(first, last) until nothing is left.
  template <typename Work>
  void take(Work&& work) {
    for (;;) {
      const int64_t first = next_.fetch_add(chunk_, std::memory_order_relaxed);
      if (first >= size_) return;
      work(first, first + chunk_ < size_ ? first + chunk_ : size_);
    }
  }

 private:
  alignas(64) std::atomic<int64_t> next_{0};
  int64_t size_ = 0, chunk_ = 1;
};

// Waits for `value` to leave `old`: spinning briefly, then asleep.
void wait_while_equal(const std::atomic<uint32_t>& value, uint32_t old);

// Waits for a count that other threads bring down.
void wait_for_zero(const std::atomic<int64_t>& count);

}  // namespace localmoe
