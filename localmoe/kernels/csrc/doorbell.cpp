#include "doorbell.h"

#include "relax.h"

namespace localmoe {

Doorbell::Doorbell(const CudaDriver& driver, Words* words) : driver_(driver), words_(words) {
  if (!driver.writes_and_waits()) throw std::runtime_error("the CUDA driver has no stream memory operations");
  *words_ = {};
  thread_ = std::thread([this] { answer(); });
}

void Doorbell::stop() {
  stopping_ = true;
  if (thread_.joinable()) thread_.join();
}

void Doorbell::call(void* stream, HostWork work) {
  uint32_t number;
  {
    std::lock_guard lock(mutex_);
    const auto [known, is_new] = numbers_.try_emplace(work.data, static_cast<uint32_t>(works_.size() + 1));
    if (is_new) works_.push_back(work);
    number = known->second;
  }
  driver_.ask(stream, &words_->asked, &words_->answered, number);
}

void Doorbell::let_go() {
  uint32_t last;
  {
    std::lock_guard lock(mutex_);
    last = static_cast<uint32_t>(works_.size());
  }
  std::atomic_ref(words_->answered).store(last, std::memory_order_release);
}

void Doorbell::answer() {
  // Longer than a device computes between two layers: a stream that waits for ever would never let a process end
  constexpr auto kGrace = std::chrono::milliseconds(50);
  auto busy = Clock::now(), now = busy;
  while (!stopping_.load(std::memory_order_relaxed) || now - busy < kGrace) {
    if (answered_one())
      busy = now = Clock::now();
    else
      rest((now = Clock::now()) - busy);
  }
}

bool Doorbell::answered_one() {
  std::atomic_ref asked(words_->asked), answered(words_->answered);
  const uint32_t number = asked.load(std::memory_order_acquire);
  if (number == 0) return false;
  // The device asks again only when this was answered
  asked.store(0, std::memory_order_relaxed);
  HostWork work;
  {
    std::lock_guard lock(mutex_);
    work = works_.at(number - 1);
  }
  work.run(work.data);
  answered.store(number, std::memory_order_release);
  return true;
}

// Between two layers of a token, and two tokens, it spins: asleep, it would hear up to a tenth of a millisecond too late.
// Beside a chat that waits for its user it must cost nothing that anybody sees.
void Doorbell::rest(Clock::duration idle) {
  using namespace std::chrono_literals;
  if (idle < 5ms)
    for (int i = 0; i < 16; ++i) relax();
  else
    std::this_thread::sleep_for(idle < 1s ? 50us : 5ms);
}

}  // namespace localmoe
