// The stored types: how each is widened to the type that computes, and rounded back.
#pragma once

#include <cmath>

#include "core/platform.h"

namespace fastcl {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

enum class DType : uint8_t { f64, f32, bf16, f16, u8, i64, other };

constexpr int64_t size_of(DType t) { return t == DType::f64 || t == DType::i64 ? 8 : t == DType::f32 ? 4 : t == DType::u8 ? 1 : 2; }

// The type in which a pair of stored values is computed: double if one of them is double, else float.
template <class A, class B>
struct Compute {
  using type = float;
};
template <class B>
struct Compute<double, B> {
  using type = double;
};
template <class A>
struct Compute<A, double> {
  using type = double;
};
template <>
struct Compute<double, double> {
  using type = double;
};
template <class A, class B>
using compute_t = typename Compute<A, B>::type;

FASTCL_HD float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

// Integer arithmetic, so that loops vectorise without half-precision instructions and denormals survive flush-to-zero modes. GPUs have one
// instruction for each of these conversions, with the same results.
FASTCL_HD float widen(Float16 x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t shifted = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = shifted & 0x0f800000u;
  const uint32_t normal = shifted + (112u << 23);
  const uint32_t special = shifted + (224u << 23);
  const float denormal = bit_cast<float>(shifted + (113u << 23)) - bit_cast<float>(113u << 23);
  const uint32_t magnitude = exponent == 0x0f800000u ? special : exponent == 0 ? bit_cast<uint32_t>(denormal) : normal;
  return bit_cast<float>(magnitude | (uint32_t(x.bits & 0x8000u) << 16));
#endif
}

FASTCL_HD BFloat16 to_bfloat16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
  return narrow;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return BFloat16{uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
#endif
}

FASTCL_HD Float16 to_float16(float x) {
#ifdef __CUDA_ARCH__
  Float16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
  return narrow;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding this power of two leaves a denormal half in the low bits, rounded to nearest even by the addition itself.
  const float shift = bit_cast<float>(126u << 23);
  const uint32_t denormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + shift) - (126u << 23);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude >= (143u << 23) ? special : magnitude < (113u << 23) ? denormal : normal;
  return Float16{uint16_t(half | ((bits >> 16) & 0x8000u))};
#endif
}

// Gradients.
template <class C>
FASTCL_HD C load(double x) {
  return C(x);
}
template <class C>
FASTCL_HD C load(float x) {
  return C(x);
}
template <class C>
FASTCL_HD C load(BFloat16 x) {
  return C(widen(x));
}
template <class C>
FASTCL_HD C load(Float16 x) {
  return C(widen(x));
}
// u / 255 for u in 0..255 by multiplication with 1/255 in two parts: the correctly rounded quotient for each of these numbers, as the tests
// check one by one, and on a GPU much less work than a division.
FASTCL_HD float over_255(float u) { return fmaf(u, 0x1.010102p-8f, u * -0x1.fdfdfep-33f); }
FASTCL_HD double over_255(double u) { return fma(u, 0x1.0101010101010p-8, u * 0x1.0101010101010p-64); }

// Importance in steps of 1/255.
template <class C>
FASTCL_HD C load(uint8_t x) {
#ifdef __CUDA_ARCH__
  return over_255(C(x));
#else
  return C(x) / C(255);
#endif
}

template <class S, class C>
struct Store;
template <class C>
struct Store<double, C> {
  static FASTCL_HD double from(C x) { return double(x); }
};
template <class C>
struct Store<float, C> {
  static FASTCL_HD float from(C x) { return float(x); }
};
template <>
struct Store<BFloat16, float> {
  static FASTCL_HD BFloat16 from(float x) { return to_bfloat16(x); }
};
template <>
struct Store<Float16, float> {
  static FASTCL_HD Float16 from(float x) { return to_float16(x); }
};

// By way of float, as torch converts.
template <>
struct Store<BFloat16, double> {
  static FASTCL_HD BFloat16 from(double x) { return to_bfloat16(float(x)); }
};
template <>
struct Store<Float16, double> {
  static FASTCL_HD Float16 from(double x) { return to_float16(float(x)); }
};

// uint8 importance: the smallest u with u / 255 >= x, so that protection never weakens and a stored value is written back unchanged.
template <class C>
struct Store<uint8_t, C> {
  static FASTCL_HD uint8_t from(C x) {
    const C below = x < C(1) ? x : C(1);  // a NaN protects fully
    const C inside = below > C(0) ? below : C(0);
    const int floor = int(inside * C(255));
    return uint8_t(floor + (load<C>(uint8_t(floor)) < inside));
  }
};

template <class S, class C>
FASTCL_HD S store(C x) {
  return Store<S, C>::from(x);
}

}  // namespace fastcl
