// What the threads of a block make together.
#pragma once

#include "cuda/sweep.h"

namespace fastcl::cuda {

FASTCL_HD double combine(double a, double b) { return a + b; }

// T is a double or a struct of doubles.
template <class T>
__device__ T shifted_down(const T& x, int step) {
  constexpr int count = int(sizeof(T) / sizeof(double));
  Elements<double, count> words = bit_cast<Elements<double, count>>(x);
  FASTCL_UNROLL
  for (int w = 0; w < count; ++w) words.x[w] = __shfl_down_sync(0xffffffffu, words.x[w], step);
  return bit_cast<T>(words);
}

// Thread 0 gets all threads' parts, combined as a tree in each warp and then warp by warp.
template <int threads, class T>
__device__ T combine_block(T part) {
  __shared__ T warps[threads / 32];
  FASTCL_UNROLL
  for (int step = 16; step > 0; step /= 2) part = combine(part, shifted_down(part, step));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = part;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < threads / 32; ++w) part = combine(part, warps[w]);
  return part;
}

}  // namespace fastcl::cuda
