// AdamW whose moments exist for the child network alone: a block's child is packed, the dense loop runs over it and over the moments as
// they lie, and the parameters go back to their places. Every form gives the same bits.

#include <type_traits>

#include "core/dtypes.h"
#include "cpu/optimizers.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(FASTCL_NO_CLONES)
#define FASTCL_AVX512 1
#include <immintrin.h>
#endif

namespace fastcl::cpu {
namespace {

constexpr int64_t kBlock = GradientSweep::kBlock;

// The bits of the elements [index, index + count), count at most 64; the first is the lowest.
FASTCL_HD uint64_t bits_at(const uint8_t* bits, int64_t index, int64_t count) {
  if (index % 8 == 0 && count == 64) {
    uint64_t word;
    memcpy(&word, bits + (index >> 3), 8);
    return word;
  }
  const int64_t first = index >> 3, bytes = ((index + count + 7) >> 3) - first;
  const int shift = int(index & 7);
  uint64_t word = 0;
  memcpy(&word, bits + first, size_t(std::min<int64_t>(bytes, 8)));
  word >>= shift;
  if (bytes > 8) word |= uint64_t(bits[first + 8]) << (64 - shift);
  return count < 64 ? word & ((uint64_t(1) << count) - 1) : word;
}

template <class P, class C, bool hf>
FASTCL_CLONES void decay_loop(P* p, int64_t n, const AdamW<C>& rule) {
  const AdamW<C> r = rule;
  for (int64_t e = 0; e < n; ++e) p[e] = store<P>(r.template decayed<hf>(load<C>(p[e])));
}

// Visits the elements of a block whose bit is set.
template <class Visit>
void each_child(const CompactBlock& block, Visit&& visit) {
  for (int64_t e = 0; e < block.n; e += 64)
    for (uint64_t word = bits_at(block.bits, block.index + e, std::min<int64_t>(64, block.n - e)); word != 0; word &= word - 1)
      visit(e + __builtin_ctzll(word));
}

template <class P, class C>
int64_t by_bits(P* param, C* m, C* v, const C* x, const CompactBlock& block, const AdamW<C>& rule, bool hf) {
  alignas(64) P packed[kBlock];
  alignas(64) C gradient[kBlock];
  int64_t count = 0;
  each_child(block, [&](int64_t e) {
    packed[count] = param[e];
    gradient[count++] = x[e];
  });
  adamw_dense(packed, m, v, gradient, 1, count, rule, hf);
  (hf ? decay_loop<P, C, true> : decay_loop<P, C, false>)(param, block.n, rule);
  int64_t at = 0;
  each_child(block, [&](int64_t e) { param[e] = packed[at++]; });
  return count;
}

#ifdef FASTCL_AVX512

#define FASTCL_V4 __attribute__((target("avx512f,avx512bw,avx512vl,popcnt")))

// 16 floats at a time are packed and put back within registers; a packed store to memory is slow on some processors.
FASTCL_V4 int64_t pack(const float* p, const float* x, const CompactBlock& block, float* packed, float* gradient) {
  int64_t count = 0;
  for (int64_t e = 0; e < block.n; e += 64) {
    uint64_t word = bits_at(block.bits, block.index + e, std::min<int64_t>(64, block.n - e));
    for (int64_t l = e; word != 0; l += 16, word >>= 16) {
      const auto child = __mmask16(word);  // no bit is set beyond the end
      _mm512_storeu_ps(packed + count, _mm512_maskz_compress_ps(child, _mm512_maskz_loadu_ps(child, p + l)));
      _mm512_storeu_ps(gradient + count, _mm512_maskz_compress_ps(child, _mm512_maskz_loadu_ps(child, x + l)));
      count += __builtin_popcount(child);
    }
  }
  return count;
}

template <bool hf, bool decays>
FASTCL_V4 void unpack(float* p, const CompactBlock& block, const float* packed, const AdamW<float>& rule) {
  const __m512 decay = _mm512_set1_ps(rule.decay);
  int64_t count = 0;
  for (int64_t e = 0; e < block.n; e += 64) {
    uint64_t word = bits_at(block.bits, block.index + e, std::min<int64_t>(64, block.n - e));
    for (int64_t l = e; l < std::min(e + 64, block.n); l += 16, word >>= 16) {
      const auto here = __mmask16(block.n - l < 16 ? (1u << (block.n - l)) - 1 : 0xffffu);
      const auto child = __mmask16(word);
      __m512 value = _mm512_maskz_loadu_ps(here, p + l);
      if (decays) value = hf ? _mm512_fmadd_ps(decay, value, value) : _mm512_mul_ps(value, decay);
      _mm512_mask_storeu_ps(p + l, here, _mm512_mask_expand_ps(value, child, _mm512_loadu_ps(packed + count)));
      count += __builtin_popcount(child);
    }
  }
}

int64_t by_registers(float* param, float* m, float* v, const float* x, const CompactBlock& block, const AdamW<float>& rule, bool hf) {
  alignas(64) float packed[kBlock + 16], gradient[kBlock + 16];
  const int64_t count = pack(param, x, block, packed, gradient);
  adamw_dense(packed, m, v, gradient, 1, count, rule, hf);
  if (hf)
    (rule.decay != 0 ? unpack<true, true> : unpack<true, false>)(param, block, packed, rule);
  else
    (rule.decay != 1 ? unpack<false, true> : unpack<false, false>)(param, block, packed, rule);
  return count;
}

bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return has;
}

#endif

}  // namespace

FASTCL_CLONES int64_t count_bits(const uint8_t* bits, int64_t begin, int64_t end) {
  int64_t count = 0;
  if (begin % 8 == 0)
    for (const uint8_t* from = bits + (begin >> 3); begin + 64 <= end; begin += 64, from += 8) {
      uint64_t word;
      memcpy(&word, from, 8);
      count += __builtin_popcountll(word);
    }
  for (; begin < end; begin += 64) count += __builtin_popcountll(bits_at(bits, begin, std::min<int64_t>(64, end - begin)));
  return count;
}

template <class P, class C>
int64_t adamw_compact(P* param, C* m, C* v, const C* x, const CompactBlock& block, const AdamW<C>& rule, bool hf) {
#ifdef FASTCL_AVX512
  if constexpr (std::is_same_v<P, float>)
    if (has_avx512()) return by_registers(param, m, v, x, block, rule, hf);
#endif
  return by_bits(param, m, v, x, block, rule, hf);
}
template int64_t adamw_compact(double*, double*, double*, const double*, const CompactBlock&, const AdamW<double>&, bool);
template int64_t adamw_compact(float*, float*, float*, const float*, const CompactBlock&, const AdamW<float>&, bool);
template int64_t adamw_compact(BFloat16*, float*, float*, const float*, const CompactBlock&, const AdamW<float>&, bool);
template int64_t adamw_compact(Float16*, float*, float*, const float*, const CompactBlock&, const AdamW<float>&, bool);

}  // namespace fastcl::cpu
