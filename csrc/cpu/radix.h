// Blocks of elements of any dtype and stride for the quantile's sweeps, and the counting sweep of the radix select.
#pragma once

#include <algorithm>

#include "core/quantile.h"
#include "cpu/joint.h"

namespace fastcl::cpu {

// A part is what a thread takes at once; a block is worked on in the first-level cache.
constexpr int64_t kQuantilePart = 65536;
constexpr int64_t kQuantileBlock = 512;

// Calls visit(x, n) for blocks of at most kQuantileBlock neighbouring elements; strided ones are copied together first.
template <class T, class Visit>
void blocks(const char* data, int64_t stride, int64_t n, Visit&& visit) {
  const T* x = reinterpret_cast<const T*>(data);
  T gathered[kQuantileBlock];
  for (int64_t done = 0; done < n; done += kQuantileBlock) {
    const int64_t m = std::min(kQuantileBlock, n - done);
    if (stride == 1) {
      visit(x + done, m);
    } else {
      for (int64_t e = 0; e < m; ++e) gathered[e] = x[(done + e) * stride];
      visit(static_cast<const T*>(gathered), m);
    }
  }
}

}  // namespace fastcl::cpu
