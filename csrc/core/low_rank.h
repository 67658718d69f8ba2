// Precision of low rank plus a diagonal, Lambda = D^1/2 (I + Q^T sigma^2 Q) D^1/2: what one element does.
#pragma once

#include "core/scalar.h"
#include "core/view.h"

namespace fastcl {

// Rows of the basis and vectors to append, together.
constexpr int kMostRows = 256;

// The arguments of a step. The precision's lists, momenta and anchors are contiguous and of one dtype, the basis has r rows in front of
// each tensor's shape.
struct LowRankStep {
  Views params, grads, momenta, anchors, diagonal, basis;  // without momenta if momentum is 0, without anchors if strength is
  double momentum, strength;
};

// What a step keeps of the last one and of the distance to the anchor, in the type that computes.
template <class C>
struct Kept {
  C momentum, strength;
  FASTCL_HD C operator()(C velocity, C param, C anchor) const { return momentum * velocity + strength * (param - anchor); }
};

// A parameter after a step along the direction; doubles lose nothing to a narrower direction.
template <class P, class C>
FASTCL_HD P stepped(P param, C step, C direction) {
  using W = compute_t<P, C>;
  return store<P>(load<W>(param) - W(step) * W(direction));
}

}  // namespace fastcl
