// One bit per element: element e of a tensor, counted row by row, is bit e & 7 of byte e >> 3.
#pragma once

#include "core/view.h"

namespace fastcl {

constexpr int64_t kRankBlock = 2048;  // elements; BitMask.ranks counts the set bits before each block

constexpr int64_t bit_bytes(int64_t elements) { return (elements + 7) / 8; }

FASTCL_HD bool bit_of(const uint8_t* bits, int64_t e) { return (bits[e >> 3] >> (e & 7)) & 1; }

// Selection: what the mask leaves out is not looked at and becomes +0.
template <class T>
FASTCL_HD T selected(T value, bool kept) {
  return kept ? value : T{};
}

// Compared in double, in which every stored value is exact; false where either is NaN.
template <class T>
FASTCL_HD bool reaches(T value, double threshold) {
  return load<double>(value) >= threshold;
}

// The elements of one tensor row by row, in as few dimensions as that order allows, innermost first.
inline Layout row_major(const View& v) {
  Layout out{1, {}, {}};
  for (int d = v.ndim - 1; d >= 0; --d) {
    if (v.shape[d] == 1) continue;
    if (!out.sizes.empty() && v.strides[d] == out.sizes.back() * out.strides.back()) {
      out.sizes.back() *= v.shape[d];
    } else {
      out.sizes.push_back(v.shape[d]);
      out.strides.push_back(v.strides[d]);
    }
  }
  if (out.sizes.empty()) {
    out.sizes.push_back(1);
    out.strides.push_back(1);
  }
  return out;
}

}  // namespace fastcl
