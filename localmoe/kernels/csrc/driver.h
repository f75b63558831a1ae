// The one call of the CUDA driver that the CPU's side makes. The driver is opened at run time: the extension builds and
// loads where there is none.
#pragma once

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace localmoe {

class CudaDriver {
 public:
  // Throws runtime_error where the library or the function is missing.
  explicit CudaDriver(const std::string& library) : library_(dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) throw std::runtime_error("the CUDA driver " + library + " cannot be opened");
    launch_ = reinterpret_cast<Launch>(dlsym(library_, "cuLaunchHostFunc"));
    if (launch_ == nullptr) throw std::runtime_error("the CUDA driver " + library + " has no host functions");
  }
  CudaDriver(const CudaDriver&) = delete;
  CudaDriver& operator=(const CudaDriver&) = delete;
  // Never closed: a driver does not expect to be

  // Have `function` called once what is in `stream` is done; a stream that is being captured gets it into its graph.
  void launch(void* stream, void (*function)(void*), void* data) const {
    const int status = launch_(stream, function, data);
    if (status != 0) throw std::runtime_error("cuLaunchHostFunc failed with CUDA error " + std::to_string(status));
  }

 private:
  using Launch = int (*)(void* stream, void (*function)(void*), void* data);

  void* library_;
  Launch launch_;
};

}  // namespace localmoe
