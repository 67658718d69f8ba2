// What the files of the optimizers share.
#pragma once

#include "core/optimizers.h"
#include "cpu/transforms.h"

namespace fastcl::cpu {

// Where a block's compact state begins, and what of the block it belongs to.
struct CompactBlock {
  const uint8_t* bits;
  int64_t index;  // of the first element
  int64_t n;
};

// How many bits are set in [begin, end).
int64_t count_bits(const uint8_t* bits, int64_t begin, int64_t end);

// AdamW on a contiguous block of which only the elements with their bit set have moments, next to each other. Returns how many.
template <class P, class C>
int64_t adamw_compact(P* param, C* m, C* v, const C* x, const CompactBlock& block, const AdamW<C>& rule, bool hf);

// What AdamW adds to the parameters of a block.
template <class C>
void adamw_changes(C* change, C* m, C* v, const C* x, int64_t n, const AdamW<C>& rule, bool hf);

// AdamW on a block; of stride the parameter and its moments.
template <class P, class C>
void adamw_dense(P* param, C* m, C* v, const C* x, int64_t stride, int64_t n, const AdamW<C>& rule, bool hf);

}  // namespace fastcl::cpu
