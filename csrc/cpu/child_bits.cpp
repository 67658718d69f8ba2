#include "cpu/child_bits.h"

namespace fastcl::cpu {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the 16 bits of neighbours lie side by side in a word");

constexpr int kWide = 32;  // counters at a time: enough to hide the multiplier's latency

// Philox on kLanes counters: 32-bit words in 64-bit lanes, whose upper halves hold what the multiplications leave there and do not read.
template <int kLanes>
struct PhiloxLanes {
  uint64_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];

  FASTCL_HD void start(int lane, uint64_t block, uint32_t tensor, uint32_t step) {
    c0[lane] = block & 0xffffffffu;
    c1[lane] = block >> 32;
    c2[lane] = tensor;
    c3[lane] = step;
  }
  FASTCL_HD void rounds(uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
    for (int r = 0; r < Philox::kRounds; ++r) {
      for (int l = 0; l < kLanes; ++l) {
        const uint64_t p0 = (c0[l] & 0xffffffffu) * Philox::kMultiplier0, p1 = (c2[l] & 0xffffffffu) * Philox::kMultiplier1;
        c0[l] = (p1 >> 32) ^ c1[l] ^ k0;
        c2[l] = (p0 >> 32) ^ c3[l] ^ k1;
        c1[l] = p1;
        c3[l] = p0;
      }
      k0 += Philox::kWeyl0;
      k1 += Philox::kWeyl1;
    }
  }
};

template <int kLanes>
FASTCL_HD void draw_group(const ChildDraw& draw, uint64_t block, uint32_t tensor, uint32_t step, uint16_t* bits) {
  PhiloxLanes<kLanes> p;
  for (int l = 0; l < kLanes; ++l) p.start(l, block + l, tensor, step);
  p.rounds(draw.k0, draw.k1);
  uint64_t words[2 * kLanes];
  for (int l = 0; l < kLanes; ++l) {
    words[2 * l] = (p.c0[l] & 0xffffffffu) | p.c1[l] << 32;
    words[2 * l + 1] = (p.c2[l] & 0xffffffffu) | p.c3[l] << 32;
  }
  memcpy(bits, words, sizeof(words));
}

}  // namespace

FASTCL_CLONES void draw_blocks(const ChildDraw& draw, uint64_t block, int64_t blocks, uint32_t tensor, uint32_t step, uint16_t* bits) {
  int64_t b = 0;
  for (; b + kWide <= blocks; b += kWide) draw_group<kWide>(draw, block + b, tensor, step, bits + 8 * b);
  for (; b < blocks; b += kBlocksAtOnce) draw_group<kBlocksAtOnce>(draw, block + b, tensor, step, bits + 8 * b);
}

FASTCL_CLONES void draw_scattered(const ChildDraw& draw, int64_t element, int64_t stride, int64_t n, uint32_t tensor, uint32_t step,
                                  uint16_t* bits) {
  for (int64_t done = 0; done < n; done += kWide) {
    PhiloxLanes<kWide> p;
    for (int l = 0; l < kWide; ++l) p.start(l, uint64_t(element + (done + l) * stride) >> 3, tensor, step);
    p.rounds(draw.k0, draw.k1);
    for (int l = 0; l < kWide; ++l) {
      const int lane = int(element + (done + l) * stride) & 7;
      const uint64_t word = lane & 4 ? (lane & 2 ? p.c3[l] : p.c2[l]) : (lane & 2 ? p.c1[l] : p.c0[l]);
      bits[done + l] = uint16_t(lane & 1 ? word >> 16 : word);
    }
  }
}

}  // namespace fastcl::cpu
