// AdamW whose moments exist for the child network alone: the gradients of a block's child are packed, the loop runs over them and over the
// moments as they lie, and what it adds goes to the parameters' places. Every form gives the same bits.

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

// Visits the elements of a block: those whose bit is set, and the others.
template <class Child, class Other>
void each_element(const CompactBlock& block, Child&& child, Other&& other) {
  for (int64_t e = 0; e < block.n; e += 64) {
    const int64_t end = std::min(e + 64, block.n);
    uint64_t word = bits_at(block.bits, block.index + e, end - e);
    for (int64_t l = e; l < end; ++l, word >>= 1)
      if (word & 1)
        child(l);
      else
        other(l);
  }
}

template <class P, class C, bool hf>
int64_t by_bits(P* param, C* m, C* v, const C* x, const CompactBlock& block, const AdamW<C>& rule) {
  alignas(64) C gradient[kBlock], change[kBlock];
  int64_t count = 0, at = 0;
  each_element(block, [&](int64_t e) { gradient[count++] = x[e]; }, [](int64_t) {});
  adamw_changes(change, m, v, gradient, count, rule, hf);
  each_element(
      block, [&](int64_t e) { param[e] = store<P>(rule.template moved<hf>(load<C>(param[e]), change[at++])); },
      [&](int64_t e) { param[e] = store<P>(rule.template decayed<hf>(load<C>(param[e]))); });
  return count;
}

#ifdef FASTCL_AVX512

#define FASTCL_V4 __attribute__((target("avx512f,avx512bw,avx512vl,popcnt")))

// 16 floats at a time are packed and put in their places within registers; a packed store to memory is slow on some processors.
FASTCL_V4 int64_t pack(const float* x, const CompactBlock& block, float* gradient) {
  int64_t count = 0;
  for (int64_t e = 0; e < block.n; e += 64) {
    uint64_t word = bits_at(block.bits, block.index + e, std::min<int64_t>(64, block.n - e));
    for (int64_t l = e; word != 0; l += 16, word >>= 16) {
      const auto child = __mmask16(word);  // no bit is set beyond the end
      _mm512_storeu_ps(gradient + count, _mm512_maskz_compress_ps(child, _mm512_maskz_loadu_ps(child, x + l)));
      count += __builtin_popcount(child);
    }
  }
  return count;
}

template <bool hf, bool decays>
FASTCL_V4 void unpack(float* p, const CompactBlock& block, const float* change, const AdamW<float>& rule) {
  const __m512 decay = _mm512_set1_ps(rule.decay);
  const auto decayed = [&](__m512 value) FASTCL_V4 {
    return !decays ? value : hf ? _mm512_fmadd_ps(decay, value, value) : _mm512_mul_ps(value, decay);
  };
  int64_t count = 0;
  for (int64_t e = 0; e < block.n; e += 64) {
    uint64_t word = bits_at(block.bits, block.index + e, std::min<int64_t>(64, block.n - e));
    for (int64_t l = e; l < std::min(e + 64, block.n); l += 16, word >>= 16) {
      const auto here = __mmask16(block.n - l < 16 ? (1u << (block.n - l)) - 1 : 0xffffu);
      const auto child = __mmask16(word);
      const __m512 more = _mm512_maskz_expand_ps(child, _mm512_loadu_ps(change + count));
      __m512 value = _mm512_maskz_loadu_ps(here, p + l);
      if (!hf) value = decayed(value);
      value = _mm512_mask_add_ps(value, child, value, more);  // the others keep the sign of their zeros
      if (hf) value = decayed(value);
      _mm512_mask_storeu_ps(p + l, here, value);
      count += __builtin_popcount(child);
    }
  }
}

template <bool hf>
int64_t by_registers(float* param, float* m, float* v, const float* x, const CompactBlock& block, const AdamW<float>& rule) {
  alignas(64) float gradient[kBlock + 16], change[kBlock + 16];
  const int64_t count = pack(x, block, gradient);
  adamw_changes(change, m, v, gradient, count, rule, hf);
  (rule.decay != (hf ? 0 : 1) ? unpack<hf, true> : unpack<hf, false>)(param, block, change, rule);
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
    if (has_avx512()) return (hf ? by_registers<true> : by_registers<false>)(param, m, v, x, block, rule);
#endif
  return (hf ? by_bits<P, C, true> : by_bits<P, C, false>)(param, m, v, x, block, rule);
}
template int64_t adamw_compact(double*, double*, double*, const double*, const CompactBlock&, const AdamW<double>&, bool);
template int64_t adamw_compact(float*, float*, float*, const float*, const CompactBlock&, const AdamW<float>&, bool);
template int64_t adamw_compact(BFloat16*, float*, float*, const float*, const CompactBlock&, const AdamW<float>&, bool);
template int64_t adamw_compact(Float16*, float*, float*, const float*, const CompactBlock&, const AdamW<float>&, bool);

}  // namespace fastcl::cpu
