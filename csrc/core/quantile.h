// Radix select: keys whose unsigned order is the order of the numbers, and how they are cut into digits.
#pragma once

#include "core/scalar.h"

namespace fastcl {

constexpr int kRadixBins = 2048;
constexpr int kRadixColumns = kRadixBins + 1;  // the last one counts NaNs

// Key: uint32_t of floats (and of narrower types, widened), uint64_t of doubles. The digits, most significant first: 11, 11, 10 bits, and
// 11, 11, 11, 11, 11, 9.
template <class Key>
struct Radix {
  static constexpr int kBits = int(8 * sizeof(Key));
  static constexpr int kLevels = sizeof(Key) == 4 ? 3 : 6;
  static constexpr FASTCL_HD int shift(int level) { return level == kLevels - 1 ? 0 : kBits - 11 * (level + 1); }
  static constexpr FASTCL_HD int width(int level) { return level == kLevels - 1 ? kBits - 11 * level : 11; }
  static FASTCL_HD int digit(Key key, int level) { return int((key >> shift(level)) & ((Key(1) << width(level)) - 1)); }
  // The digits above a level, as one number; there are none above level 0.
  static FASTCL_HD Key prefix(Key key, int level) { return key >> (shift(level) + width(level)); }
};

template <class Key>
struct KeyFloat;
template <>
struct KeyFloat<uint32_t> {
  using type = float;
};
template <>
struct KeyFloat<uint64_t> {
  using type = double;
};
template <class Key>
using key_float_t = typename KeyFloat<Key>::type;

// Negative numbers inverted, all others with the sign bit set; -0 is taken for +0. By integers, so that denormals survive flush-to-zero
// modes.
template <class Key>
FASTCL_HD Key radix_key(key_float_t<Key> x) {
  constexpr Key sign = Key(1) << (Radix<Key>::kBits - 1);
  const Key bits = bit_cast<Key>(x);
  const Key ordinary = bits == sign ? 0 : bits;
  return (ordinary & sign) != 0 ? Key(~ordinary) : Key(ordinary | sign);
}

template <class Key>
FASTCL_HD key_float_t<Key> from_radix_key(Key key) {
  constexpr Key sign = Key(1) << (Radix<Key>::kBits - 1);
  return bit_cast<key_float_t<Key>>((key & sign) != 0 ? Key(key ^ sign) : Key(~key));
}

FASTCL_HD bool is_nan_bits(float x) { return (bit_cast<uint32_t>(x) & 0x7fffffffu) > 0x7f800000u; }
FASTCL_HD bool is_nan_bits(double x) { return (bit_cast<uint64_t>(x) & 0x7fffffffffffffffull) > 0x7ff0000000000000ull; }

// The quantile q of count elements lies between two neighbouring ranks, weight of the way from below to above.
struct Ranks {
  int64_t below, above;
  double weight;
};

inline Ranks quantile_ranks(int64_t count, double q) {
  const double rank = double(count - 1) * q;
  if (rank >= double(count - 1)) return {count - 1, count - 1, 1.0};
  const auto below = int64_t(rank);
  return {below, below + 1, rank - double(below)};
}

// From the nearer neighbour, each operation rounded; two equal infinities give NaN, as they do in NumPy.
FASTCL_HD double interpolate(double below, double above, double weight) {
  const double step = above - below;
  return weight >= 0.5 ? above - step * (1 - weight) : below + step * weight;
}

}  // namespace fastcl
