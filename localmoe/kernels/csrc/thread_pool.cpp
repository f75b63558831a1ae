#include "thread_pool.h"

#include <algorithm>

namespace localmoe {

namespace {

constexpr int kSpins = 2000;  // some microseconds: the next matrix of a token comes sooner than a wake-up takes

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { loop(); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(int64_t size, int64_t chunk, const std::function<void(int64_t, int64_t)>& work) {
  if (workers_.empty() || size <= chunk) {
    if (size > 0) work(0, size);
    return;
  }
  std::lock_guard caller(callers_);
  {
    std::lock_guard lock(mutex_);
    size_ = size;
    chunk_ = chunk;
    work_ = &work;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  take_chunks();
  for (int i = 0; i < kSpins && busy_.load(std::memory_order_acquire) != 0; ++i) relax();
  if (busy_.load(std::memory_order_acquire) != 0) {
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_.load(std::memory_order_acquire) == 0; });
  }
}

void ThreadPool::take_chunks() {
  for (;;) {
    const int64_t first = next_.fetch_add(chunk_, std::memory_order_relaxed);
    if (first >= size_) return;
    (*work_)(first, std::min(first + chunk_, size_));
  }
}

void ThreadPool::loop() {
  uint64_t seen = 0;
  for (;;) {
    for (int i = 0; i < kSpins && generation_.load(std::memory_order_acquire) == seen; ++i) relax();
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      if (stopping_) return;
      seen = generation_.load(std::memory_order_relaxed);
    }
    take_chunks();
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      std::lock_guard lock(mutex_);  // so that the caller is not between its check and its sleep
      done_.notify_one();
    }
  }
}

}  // namespace localmoe
