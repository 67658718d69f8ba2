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

// Thread 0 gets all threads' parts, combined as a tree in each warp and over the warps: a chain would round more often.
template <int threads, class T>
__device__ T combine_block(T part) {
  constexpr int count = threads / 32;
  static_assert(count <= 32 && (count & (count - 1)) == 0, "one warp combines the warps");
  __shared__ T warps[count];
  FASTCL_UNROLL
  for (int step = 16; step > 0; step /= 2) part = combine(part, shifted_down(part, step));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = part;
  __syncthreads();
  if (threadIdx.x >= 32) return part;
  part = warps[threadIdx.x % count];
  FASTCL_UNROLL
  for (int step = count / 2; step > 0; step /= 2) part = combine(part, shifted_down(part, step));
  return part;
}

}  // namespace fastcl::cuda
