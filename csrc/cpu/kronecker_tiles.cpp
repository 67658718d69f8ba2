// Register-blocked products. A tile of the result stays in registers while both factors stream by: R rows whose elements are broadcast,
// times up to Units vectors of 64 bytes. The vectors are GCC's own, which become whatever the processor has. Compiled with contraction into
// fused multiply-adds.

#include "cpu/kronecker_tiles.h"

#include <cstring>

#include "core/platform.h"

namespace fastcl::cpu {
namespace {

template <class C>
struct Vectors;
template <>
struct Vectors<float> {
  typedef float Full __attribute__((vector_size(64)));
  typedef float Half __attribute__((vector_size(32)));
};
template <>
struct Vectors<double> {
  typedef double Full __attribute__((vector_size(64)));
  typedef double Half __attribute__((vector_size(32)));
};
template <class C>
constexpr int kLanes = kVectorBytes / int(sizeof(C));

// R rows, F whole vectors, and half a vector more if there is one.
template <class C, int R, int F, bool half>
FASTCL_HD void tile(const C* const* left, int64_t depth, const C* right, int64_t stride, C* out) {
  using Full = typename Vectors<C>::Full;
  using Half = typename Vectors<C>::Half;
  constexpr int kFull = F > 0 ? F : 1;
  const C* row[R];
  Full sum[R][kFull];
  Half rest[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    row[r] = left[r];
    rest[r] = Half{};
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) sum[r][f] = Full{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Full x[kFull];
    Half y;
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) memcpy(&x[f], right + k * stride + f * kLanes<C>, sizeof(Full));
    if constexpr (half) memcpy(&y, right + k * stride + F * kLanes<C>, sizeof(Half));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      // One broadcast from memory for both widths; a second one would be a shuffle, which shares a port with the multiply-adds.
      const Full a = row[r][k] - Full{};
#pragma GCC unroll 8
      for (int f = 0; f < F; ++f) sum[r][f] += a * x[f];
      if constexpr (half) {
        Half low;
        memcpy(&low, &a, sizeof(Half));
        rest[r] += low * y;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) memcpy(out + r * stride + f * kLanes<C>, &sum[r][f], sizeof(Full));
    if constexpr (half) memcpy(out + r * stride + F * kLanes<C>, &rest[r], sizeof(Half));
  }
}

template <class C, int R, int Units>
FASTCL_CLONES void product(const C* const* left, int64_t depth, const C* right, int64_t stride, int64_t columns, C* out) {
  const int64_t over = columns % kLanes<C>;
  int64_t full = columns / kLanes<C> + (2 * over > kLanes<C>);
  const bool half = over > 0 && 2 * over <= kLanes<C>;
  // Tiles as equal as they can be; half a vector goes with the last one.
  for (int64_t count = (full + half + Units - 1) / Units; count > 0; --count) {
    const int64_t take = (full + count - 1) / count;
    const bool with_half = half && count == 1;
    if constexpr (Units >= 3) {
      if (take == 3) tile<C, R, 3, false>(left, depth, right, stride, out);
      if (take == 2 && with_half) tile<C, R, 2, true>(left, depth, right, stride, out);
      if (take == 2 && !with_half) tile<C, R, 2, false>(left, depth, right, stride, out);
      if (take == 1 && with_half) tile<C, R, 1, true>(left, depth, right, stride, out);
    }
    if (take == 1 && !with_half) tile<C, R, 1, false>(left, depth, right, stride, out);
    if (take == 0) tile<C, R, 0, true>(left, depth, right, stride, out);
    full -= take;
    right += take * kLanes<C>;
    out += take * kLanes<C>;
  }
}

// Whether the widest version of the loops runs, which has 32 registers of 64 bytes.
bool has_wide_registers() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(FASTCL_NO_CLONES)
  static const bool has = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  }();
  return has;
#else
  return false;
#endif
}

}  // namespace

template <class C>
Tiles<C> tiles(int64_t rows_left) {
  if (!has_wide_registers()) return {4, product<C, 4, 1>};
  if (rows_left > 4) return {8, product<C, 8, 3>};
  return {4, product<C, 4, 3>};
}

template Tiles<float> tiles<float>(int64_t);
template Tiles<double> tiles<double>(int64_t);

}  // namespace fastcl::cpu
