// Where kernels run: a device and torch's current stream on it. No CUDA header, so that the binding compiles without one.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace fastcl::cuda {

struct Stream {
  int device = 0;
  void* handle = nullptr;  // a cudaStream_t; null is the legacy default stream, where torch says so
};

// For its lifetime the device is current in this thread, and a first launch may load its kernel while the stream is being captured.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Stream& stream, const char* op);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_, capture_mode_;
};

struct Info {
  int runtime = 0, driver = 0;  // as CUDA counts: 13000 is 13.0
  std::vector<std::string> capabilities;
  std::string built_for;
  std::string problem;  // why the kernels cannot run here; empty if they can
};
Info info();

}  // namespace fastcl::cuda
