#pragma once

#include <thread>

namespace localmoe {

// Inside a loop that waits for another thread or a device.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace localmoe
