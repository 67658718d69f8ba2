#include "cuda/device.h"

#include <algorithm>

#include "cuda/check.cuh"

#define FASTCL_TEXT_(...) #__VA_ARGS__
#define FASTCL_TEXT(...) FASTCL_TEXT_(__VA_ARGS__)

namespace fastcl::cuda {
namespace {

constexpr int kBuiltFor[] = {__CUDA_ARCH_LIST__};

std::string dotted(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

std::string find_problem(Info& info) {
  cudaError_t error = cudaRuntimeGetVersion(&info.runtime);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&info.driver);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (info.driver == 0) return "no NVIDIA driver is loaded";
  if (info.driver / 1000 < info.runtime / 1000)
    return "the NVIDIA driver supports CUDA " + dotted(info.driver) + " and fastcl was built with CUDA " + dotted(info.runtime) +
           "; update the driver, or reinstall fastcl with a CUDA toolkit of the driver's version";
  int devices = 0;
  error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int oldest = *std::min_element(std::begin(kBuiltFor), std::end(kBuiltFor)) / 10;
  for (int d = 0; d < devices; ++d) {
    int major = 0, minor = 0;
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, d);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, d);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    info.capabilities.push_back(std::to_string(major) + "." + std::to_string(minor));
    if (major * 10 + minor < oldest)
      return "GPU " + std::to_string(d) + " has compute capability " + info.capabilities.back() + ", and fastcl was built for " +
             std::to_string(oldest / 10) + "." + std::to_string(oldest % 10) + " and newer";
  }
  return devices > 0 ? "" : "CUDA sees no GPU";
}

}  // namespace

DeviceGuard::DeviceGuard(const Stream& stream, const char* op) : device_(stream.device), before_(stream.device) {
  check(cudaGetDevice(&before_), op);
  if (before_ != stream.device) check(cudaSetDevice(stream.device), op);
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), op);
  capture_mode_ = int(mode);
}

DeviceGuard::~DeviceGuard() {
  auto mode = cudaStreamCaptureMode(capture_mode_);
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  if (before_ != device_) (void)cudaSetDevice(before_);
}

Info info() {
  Info out;
  out.built_for = FASTCL_TEXT(__CUDA_ARCH_LIST__);
  out.problem = find_problem(out);
  (void)cudaGetLastError();
  return out;
}

}  // namespace fastcl::cuda
