// No CUDA call goes unchecked.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastcl::cuda {

inline void check(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // the next call must not find this error
  throw std::runtime_error(std::string(op) + ": CUDA reported " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

}  // namespace fastcl::cuda
