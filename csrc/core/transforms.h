// What a gradient goes through on its way into an optimizer: each transform on one element, in the type that the parameter computes in. The
// gradient is not rounded to its own type in between.
#pragma once

#include <vector>

#include "core/bit_mask.h"
#include "core/child_mask.h"
#include "core/pull.h"
#include "core/view.h"

namespace fastcl {

enum class TransformKind : uint8_t { soft_mask, child_mask, fixed_mask, project, pull };

// An operand without elements, where the parameter has some, leaves its tensor out.
struct Transform {
  TransformKind kind;
  double number = 0;  // strength; the child mask's probability
  uint64_t seed = 0;
  Views operand;      // importance, bits, reference, precision: one per parameter
  Views anchor;       // the pull's
  Views coefficient;  // the projection's: one double
};

// What an optimizer is called with besides its numbers. Lists stand for parameters one by one; what is optional is empty.
struct OptimizerInputs {
  Views params, grads;
  Views first, second;  // moments, or first alone: momentum buffers
  Views steps;          // counters of the steps so far
  std::vector<Transform> transforms;
  std::vector<Place> places;  // empty: every tensor is whole
  Views bits, ranks;          // compact state: the moments of the elements whose bit is set, and nothing of the others
  Views scale, found_inf, lr;
};

// The number of a step as draws count it, from the counter in a state.
FASTCL_HD uint32_t draw_step(float step) { return step >= 0 && step < 4294967296.0f ? uint32_t(step) : 0u; }

template <class C>
struct Softened {
  C strength;
  template <class I>
  FASTCL_HD C operator()(C x, I importance) const {
    return x * (C(1) - strength * load<C>(importance));
  }
};

template <class C>
struct Drawn {
  C scale;
  FASTCL_HD C operator()(C x, bool kept) const { return x * (kept ? scale : C(0)); }
};

// What is left out is not looked at.
template <class C>
struct Selected {
  FASTCL_HD C operator()(C x, bool bit) const { return bit ? x : C(0); }
};

// Bit of the element with this row-major index.
FASTCL_HD bool bit_at(const uint8_t* bits, int64_t element) { return bits[element >> 3] >> (element & 7) & 1; }

// Used where the coefficient is not 0: with 0 the gradient keeps its bits.
template <class C>
struct Projected {
  double coefficient;
  template <class R>
  FASTCL_HD C operator()(C x, R reference) const {
    return C(double(x) + coefficient * load<double>(reference));
  }
};

}  // namespace fastcl
