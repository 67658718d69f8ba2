// The counting sweep of the radix select, and the select by counts alone.

#include <limits>
#include <mutex>
#include <vector>

#include "core/dtypes.h"
#include "cpu/ops.h"
#include "cpu/radix.h"

namespace fastcl::cpu {
namespace {

// Neighbours with equal digits would wait for each other's stores, so they count in histograms of their own.
constexpr int kHistograms = 4;

class Histograms {
 public:
  Histograms() : bins_(2 * size_t(kHistograms) * kRadixColumns) {}
  uint32_t* row(int r) { return bins_.data() + size_t(r) * kHistograms * kRadixColumns; }

  // Adds them to the counts and starts anew.
  void flush(int64_t* counts, std::mutex& mutex) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (int r = 0; r < 2; ++r)
      for (int h = 0; h < kHistograms; ++h)
        for (int b = 0; b < kRadixColumns; ++b) counts[r * kRadixColumns + b] += row(r)[h * kRadixColumns + b];
    std::fill(bins_.begin(), bins_.end(), 0);
  }

 private:
  std::vector<uint32_t> bins_;
};

// At level 0: every element's digit, NaNs in the last column.
template <class T, class Key>
FASTCL_CLONES void first_block(const T* x, int64_t n, uint32_t* histograms) {
  uint16_t digits[kQuantileBlock];
  for (int64_t e = 0; e < n; ++e) {
    const auto value = load<key_float_t<Key>>(x[e]);
    digits[e] = is_nan_bits(value) ? uint16_t(kRadixBins) : uint16_t(Radix<Key>::digit(radix_key<Key>(value), 0));
  }
  int64_t e = 0;
  for (; e + kHistograms <= n; e += kHistograms)
    for (int h = 0; h < kHistograms; ++h) ++histograms[h * kRadixColumns + digits[e + h]];
  for (; e < n; ++e) ++histograms[digits[e]];
}

// At other levels: only elements with one of the prefixes, usually few.
template <class T, class Key>
FASTCL_CLONES void later_block(const T* x, int64_t n, int level, Key first, Key second, uint32_t* first_row, uint32_t* second_row) {
  using K = Radix<Key>;
  uint8_t flags[kQuantileBlock];
  const int shift = K::shift(level), above = shift + K::width(level);
  for (int64_t e = 0; e < n; ++e) {
    const auto value = load<key_float_t<Key>>(x[e]);
    const Key prefix = radix_key<Key>(value) >> above;
    flags[e] = is_nan_bits(value) ? 0 : uint8_t((prefix == first) | ((prefix == second) << 1));
  }
  for (int64_t e = n; e < (n + 7) / 8 * 8; ++e) flags[e] = 0;
  for (int64_t eight = 0; eight < n; eight += 8) {
    uint64_t codes;
    memcpy(&codes, flags + eight, 8);
    for (uint64_t set = (codes | codes >> 1) & 0x0101010101010101ull; set != 0; set &= set - 1) {
      const int64_t e = eight + __builtin_ctzll(set) / 8;
      const int64_t bin = (e % kHistograms) * kRadixColumns + K::digit(radix_key<Key>(load<key_float_t<Key>>(x[e])), level);
      first_row[bin] += flags[e] & 1;
      second_row[bin] += flags[e] >> 1;
    }
  }
}

template <class Key>
void count(const Views& tensors, const int64_t* prefixes, int level, int64_t* counts, const Pool& pool) {
  constexpr int64_t kMostParts = (int64_t(1) << 31) / kQuantilePart;  // before a bin of 32 bits could be full
  std::fill(counts, counts + 2 * kRadixColumns, 0);
  const JointSweep sweep({&tensors}, kQuantilePart);
  const bool equal = level == 0 || prefixes[0] == prefixes[1];
  const auto first = level == 0 ? Key(0) : Key(prefixes[0]), second = level == 0 ? Key(0) : Key(prefixes[1]);
  std::mutex mutex;
  pool.each(sweep.parts(), 1, [&](int64_t begin, int64_t end) {
    Histograms own;
    for (int64_t p = begin; p < end; ++p) {
      sweep.part(p, [&](const Operand* at, const int64_t* strides, int64_t n) {
        with_floating(at->dtype, [&](auto t) {
          using T = typename decltype(t)::type;
          blocks<T>(at->data, strides == nullptr ? 1 : strides[0], n, [&](const T* x, int64_t m) {
            if (level == 0)
              first_block<T, Key>(x, m, own.row(0));
            else
              later_block<T, Key>(x, m, level, first, equal ? ~Key(0) : second, own.row(0), own.row(1));
          });
        });
      });
      if ((p - begin + 1) % kMostParts == 0) own.flush(counts, mutex);
    }
    own.flush(counts, mutex);
  });
  if (equal) std::copy(counts, counts + kRadixColumns, counts + kRadixColumns);
}

template <class Key>
bool find(const Views& tensors, const Ranks& ranks, double& below, double& above, const Pool& pool) {
  std::vector<int64_t> counts(2 * kRadixColumns);
  int64_t rank[2] = {ranks.below, ranks.above}, prefixes[2] = {0, 0};
  for (int level = 0; level < Radix<Key>::kLevels; ++level) {
    count<Key>(tensors, prefixes, level, counts.data(), pool);
    if (level == 0 && counts[kRadixBins] > 0) return false;
    for (int r = 0; r < 2; ++r) {
      const int64_t* row = counts.data() + r * kRadixColumns;
      int digit = 0;
      for (; rank[r] >= row[digit]; ++digit) rank[r] -= row[digit];
      prefixes[r] = int64_t(uint64_t(prefixes[r]) << Radix<Key>::width(level) | uint64_t(digit));
    }
  }
  below = double(from_radix_key<Key>(Key(prefixes[0])));
  above = double(from_radix_key<Key>(Key(prefixes[1])));
  return true;
}

}  // namespace

void radix_counts(const Views& tensors, const int64_t* prefixes, int level, bool wide, int64_t* counts, const Pool& pool) {
  (wide ? count<uint64_t> : count<uint32_t>)(tensors, prefixes, level, counts, pool);
}

double quantile_by_counts(const Views& tensors, double q, const Pool& pool) {
  bool wide = false;
  int64_t elements = 0;
  for (const View& t : tensors) wide = wide || t.dtype == DType::f64, elements += t.numel();
  const Ranks ranks = quantile_ranks(elements, q);
  double below = 0, above = 0;
  const bool found = (wide ? find<uint64_t> : find<uint32_t>)(tensors, ranks, below, above, pool);
  return found ? interpolate(below, above, ranks.weight) : std::numeric_limits<double>::quiet_NaN();
}

}  // namespace fastcl::cpu
