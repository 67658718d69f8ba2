// The random bits of the child mask for many elements at once: the same numbers as core's ChildDraw, drawn side by side.
#pragma once

#include <algorithm>

#include "core/child_mask.h"

namespace fastcl::cpu {

constexpr int64_t kMostChildBits = 1024;  // elements at a time: the bits stay in the first-level cache
constexpr int64_t kBlocksAtOnce = 8;      // more blocks than asked for may be drawn, up to a multiple of this

// The bits of the elements 8 * block ... 8 * (block + blocks) - 1, in order.
void draw_blocks(const ChildDraw& draw, uint64_t block, int64_t blocks, uint32_t tensor, uint32_t step, uint16_t* bits);
// Of the elements element, element + stride, ...: each from a draw of its own. n up to a multiple of 32 are drawn.
void draw_scattered(const ChildDraw& draw, int64_t element, int64_t stride, int64_t n, uint32_t tensor, uint32_t step, uint16_t* bits);

class ChildBits {
 public:
  explicit ChildBits(const ChildDraw& draw) : draw_(draw), bound_(draw.limit > 0 ? draw.limit : 1) {}

  // Draws for n <= kMostChildBits elements, whose indices in the whole parameter are element, element + stride, ...: the e-th of them is
  // kept if the e-th number returned is below bound().
  FASTCL_HD const uint16_t* draw(int64_t element, int64_t stride, int64_t n, uint32_t tensor, uint32_t step) {
    uint16_t* bits = bits_;
    if (stride == 1) {
      bits += element & 7;
      draw_blocks(draw_, uint64_t(element) >> 3, ((element & 7) + n + 7) >> 3, tensor, step, bits_);
    } else {
      draw_scattered(draw_, element, stride, n, tensor, step, bits_);
    }
    if (draw_.limit < 65536) decide(bits, element, stride, n, tensor, step);
    return bits;
  }
  uint32_t bound() const { return bound_; }

 private:
  ChildDraw draw_;
  uint32_t bound_;  // the limit; but 1 if that is 0, so that what the second draw keeps can be below it
  alignas(64) uint16_t bits_[kMostChildBits + 8 * (kBlocksAtOnce + 1)];

  // Where the bits equal the limit.
  FASTCL_HD void decide(uint16_t* bits, int64_t element, int64_t stride, int64_t n, uint32_t tensor, uint32_t step) {
    uint16_t undecided = 0;
    for (int64_t e = 0; e < n; ++e) undecided |= bits[e] == uint16_t(draw_.limit);
    if (undecided == 0) return;
    for (int64_t e = 0; e < n; ++e)
      if (bits[e] == uint16_t(draw_.limit))
        bits[e] = draw_.kept_at_limit(uint64_t(element + e * stride), tensor, step) ? 0 : uint16_t(bound_);
  }
};

}  // namespace fastcl::cpu
