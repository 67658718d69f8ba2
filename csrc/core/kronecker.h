// Natural continual learning (Kao, Jensen et al., NeurIPS 2021) with a Kronecker-factored precision: the element-wise part, and how a
// layer's weight and bias are one matrix. The products G X A are the backends' own. Results are held to tolerances, so multiply-adds may
// fuse.
#pragma once

#include "core/scalar.h"
#include "core/view.h"

namespace fastcl {

// The largest layer whose two products are one thread's, or one block's, work.
constexpr int64_t kSmallRows = 128, kSmallColumns = 129;

// M <- rho M + g + lambda H: the momentum in the dual space, where no inverse is applied yet.
template <class C>
struct DualMomentum {
  C momentum, strength;
  static FASTCL_HD DualMomentum make(double momentum, double strength) { return {C(momentum), C(strength)}; }
  FASTCL_HD C operator()(C m, C g, C h) const { return momentum * m + g + strength * h; }
};

// W <- W - s V and H <- H - s M.
template <class C>
struct Descent {
  C step;
  static FASTCL_HD Descent make(double step) { return {C(step)}; }
  FASTCL_HD C operator()(C x, C direction) const { return x - step * direction; }
};

// How many columns W.flatten(1) has.
inline int64_t inputs_of(const View& weight) {
  int64_t inputs = 1;
  for (int d = 1; d < weight.ndim; ++d) inputs *= weight.shape[d];
  return inputs;
}

// A row of W.flatten(1) in its logical order, whatever the order in memory, in as few dimensions as its strides allow, innermost first.
inline Layout row_layout(const View& weight) {
  Layout out{1, {}, {}};
  for (int d = weight.ndim - 1; d >= 1; --d) {
    if (weight.shape[d] == 1) continue;
    if (!out.sizes.empty() && weight.strides[d] == out.sizes.back() * out.strides.back()) {
      out.sizes.back() *= weight.shape[d];
    } else {
      out.sizes.push_back(weight.shape[d]);
      out.strides.push_back(weight.strides[d]);
    }
  }
  if (out.sizes.empty()) {
    out.sizes.push_back(1);
    out.strides.push_back(1);
  }
  return out;
}

}  // namespace fastcl
