// The calls of the CUDA driver that the CPU's side makes. The driver is opened at run time: the extension builds and
// loads where there is none.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace localmoe {

// What the CPU does for a stream: `run` of `data`. It must not throw.
struct HostWork {
  void (*run)(void* data);
  void* data;
};

class CudaDriver {
 public:
  // Throws runtime_error where the library or its host functions are missing.
  explicit CudaDriver(const std::string& library) : library_(dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) throw std::runtime_error("the CUDA driver " + library + " cannot be opened");
    launch_ = reinterpret_cast<Launch>(dlsym(library_, "cuLaunchHostFunc"));
    if (launch_ == nullptr) throw std::runtime_error("the CUDA driver " + library + " has no host functions");
    batch_ = reinterpret_cast<Batch>(dlsym(library_, "cuStreamBatchMemOp_v2"));
  }
  CudaDriver(const CudaDriver&) = delete;
  CudaDriver& operator=(const CudaDriver&) = delete;
  // Never closed: a driver does not expect to be

  // Has work done once what is in `stream` is done; a stream that is being captured gets it into its graph.
  void call(void* stream, HostWork work) const {
    check(launch_(stream, work.run, work.data), "cuLaunchHostFunc");
  }

  // Whether it has stream memory operations (version 2). Having the function does not mean that a device can: WSL2 may not.
  bool writes_and_waits() const { return batch_ != nullptr; }

  // `*answered = 0; *asked = number;` and then waits until `*answered == number`, in `stream` or the graph that it is
  // captured into. Both lie in pinned memory, which the device knows by the same addresses.
  void ask(void* stream, const uint32_t* asked, const uint32_t* answered, uint32_t number) const {
    Operation operations[] = {write(answered, 0), write(asked, number), wait_equal(answered, number)};
    check(batch_(stream, 3, operations, 0), "cuStreamBatchMemOp");
  }

 private:
  // CUstreamBatchMemOpParams of cuda.h (CUDA 12): the fields that a wait and a write have in common
  union Operation {
    struct {
      uint32_t kind;
      uint64_t address;
      uint64_t value;  // of 32 bits
      uint32_t flags;
      uint64_t alias;  // the driver's own
    } of;
    uint64_t room[6];
  };
  static_assert(sizeof(Operation) == 48);

  using Launch = int (*)(void* stream, void (*function)(void*), void* data);
  using Batch = int (*)(void* stream, unsigned count, Operation* operations, unsigned flags);

  // What was in the stream before is visible to everybody before the value is: the default of writes
  static Operation write(const uint32_t* word, uint32_t value) {
    constexpr uint32_t kWrite32 = 2;
    return {{kWrite32, reinterpret_cast<uint64_t>(word), value, 0, 0}};
  }
  static Operation wait_equal(const uint32_t* word, uint32_t value) {
    constexpr uint32_t kWait32 = 1, kEqual = 1;
    return {{kWait32, reinterpret_cast<uint64_t>(word), value, kEqual, 0}};
  }
  static void check(int status, const char* call) {
    if (status != 0) throw std::runtime_error(std::string(call) + " failed with CUDA error " + std::to_string(status));
  }

  void* library_;
  Launch launch_;
  Batch batch_;  // or null
};

}  // namespace localmoe
