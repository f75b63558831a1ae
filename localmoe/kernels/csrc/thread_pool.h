// A persistent pool: threads are started once, wait briefly spinning and then asleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace localmoe {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // the calling thread is one of them
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls work(first, last) until [0, size) is covered, on every thread, and returns when all is done.
  // One caller at a time: others wait.
  void run(int64_t size, int64_t chunk, const std::function<void(int64_t, int64_t)>& work);

 private:
  void loop();
  void take_chunks();

  std::vector<std::thread> workers_;
  std::mutex callers_;  // held for a whole run
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
  bool stopping_ = false;
  int64_t size_ = 0, chunk_ = 1;
  const std::function<void(int64_t, int64_t)>* work_ = nullptr;
};

}  // namespace localmoe
