// A thread that does a stream's work when the device rings: by stream memory operations, where host functions have the
// driver wake a thread of its own.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "driver.h"

namespace localmoe {

class Doorbell {
 public:
  // Where the two sides meet, in pinned memory, a cache line each: what the device asks for, and what was done last.
  struct Words {
    alignas(64) uint32_t asked;
    alignas(64) uint32_t answered;
  };

  // `words` outlive this object. Throws runtime_error where the driver has no stream memory operations.
  Doorbell(const CudaDriver& driver, Words* words);
  ~Doorbell() { stop(); }
  Doorbell(const Doorbell&) = delete;
  Doorbell& operator=(const Doorbell&) = delete;

  // As CudaDriver::call; the stream goes on when the work is done. It is known by its data from then on, for graphs.
  void call(void* stream, HostWork work);

  // Answers what is still asked for, until nothing was for a while; then nobody answers any more. May be called again.
  void stop();

  // Lets a stream go on that nobody has answered, as if its last work were done.
  void let_go();

 private:
  using Clock = std::chrono::steady_clock;

  void answer();
  bool answered_one();
  static void rest(Clock::duration idle);

  const CudaDriver& driver_;
  Words* const words_;
  std::mutex mutex_;  // of what is below
  std::vector<HostWork> works_;  // number n is the one before place n
  std::map<void*, uint32_t> numbers_;  // by data
  std::atomic<bool> stopping_ = false;
  std::thread thread_;
};

}  // namespace localmoe
