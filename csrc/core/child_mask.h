// Child-Tuning-F's random mask (Xu et al., EMNLP 2021): a Bernoulli draw for each element, from a counter and not from a state.
#pragma once

#include <cmath>

#include "core/scalar.h"

namespace fastcl {

// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3, SC 2011).
struct Philox {
  static constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  static constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  static constexpr int kRounds = 10;

  uint32_t word[4];

  static FASTCL_HD Philox draw(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    FASTCL_UNROLL
    for (int r = 0; r < kRounds; ++r) {
      const uint64_t p0 = uint64_t(kMultiplier0) * c0, p1 = uint64_t(kMultiplier1) * c2;
      c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
      c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
      c1 = uint32_t(p1);
      c3 = uint32_t(p0);
      k0 += kWeyl0;
      k1 += kWeyl1;
    }
    return {{c0, c1, c2, c3}};
  }
};

// 16 random bits for each element: one draw serves the 8 elements of a block. The probability is held to 2^-48 all the same: where the 16
// bits equal the probability's own, which is rare, 32 bits of a second draw decide.
struct ChildDraw {
  static constexpr uint32_t kSecondDraw = 0x80000000u;  // no block's index reaches this bit of the counter

  uint32_t limit;  // kept below it: 65536 keeps all
  uint32_t rest;   // and at the limit, if the second draw is below this
  uint32_t k0, k1;
  double scale;  // 1 / keep

  static FASTCL_HD ChildDraw make(double keep, uint64_t seed) {
    const uint64_t threshold = uint64_t(rint(keep * 0x1p48));  // to nearest even, as Python's round
    return {uint32_t(threshold >> 32), uint32_t(threshold), uint32_t(seed), uint32_t(seed >> 32), 1 / keep};
  }

  // The block of elements 8 * block ... 8 * block + 7 of the tensor with this index, in this step.
  FASTCL_HD Philox draw8(uint64_t block, uint32_t tensor, uint32_t step) const {
    return Philox::draw(uint32_t(block), uint32_t(block >> 32), tensor, step, k0, k1);
  }
  static FASTCL_HD uint32_t bits(const Philox& drawn, int lane) {
    const uint32_t word = drawn.word[lane >> 1];
    return lane & 1 ? word >> 16 : word & 0xffffu;
  }
  // Whether an element whose 16 bits equal the limit is kept.
  FASTCL_HD bool kept_at_limit(uint64_t element, uint32_t tensor, uint32_t step) const {
    const uint64_t block = element >> 2;
    const Philox drawn = Philox::draw(uint32_t(block), uint32_t(block >> 32) | kSecondDraw, tensor, step, k0, k1);
    return drawn.word[element & 3] < rest;
  }
  FASTCL_HD bool kept(uint32_t u, uint64_t element, uint32_t tensor, uint32_t step) const {
    return u < limit || (u == limit && kept_at_limit(element, tensor, step));
  }
  // One element, in any order: its row-major index in the whole parameter, the parameter's index, the step.
  FASTCL_HD bool kept(uint64_t element, uint32_t tensor, uint32_t step) const {
    return kept(bits(draw8(element >> 3, tensor, step), int(element & 7)), element, tensor, step);
  }
};

// Where a tensor lies in its whole parameter: element (j0, j1, ...) has there the row-major index offset + sum j_d * strides[d].
struct Place {
  int64_t tensor;  // the parameter's index in the list
  int64_t offset;
  const int64_t* strides;  // null: those of a contiguous tensor of its shape
};

// g * (kept ? 1 / keep : 0) in the compute type: a multiplication, so that NaN, and Inf where it is left out, become NaN.
template <class G>
struct ChildMask {
  using compute = compute_t<G, G>;
  compute scale;
  FASTCL_HD G operator()(G g, bool kept) const { return store<G>(load<compute>(g) * (kept ? scale : compute(0))); }
};

}  // namespace fastcl
