// Sums in a fixed order that vectorises.
#pragma once

#include "core/platform.h"

namespace fastcl::cpu {

// Sums run in interleaved lanes: the order is fixed, and it vectorises without reassociation.
constexpr int kLanes = 16;

FASTCL_HD double fold_lanes(double* lane) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

template <class T, class Term>
FASTCL_HD double lane_sum(const T* x, int64_t n, Term&& term) {
  double lane[kLanes] = {};
  int64_t e = 0;
  for (; e + kLanes <= n; e += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] += term(x[e + l]);
  for (int l = 0; e < n; ++e, ++l) lane[l] += term(x[e]);
  return fold_lanes(lane);
}

}  // namespace fastcl::cpu
