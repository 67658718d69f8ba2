// Quantiles in one sweep: a sample tells between which two numbers the quantile almost surely lies; the sweep counts what is below them and
// keeps what is between them, a few hundredths, among which the search goes on. Where the sample was wrong, digits are counted instead, so
// that the result is exact whatever the sample says.

#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>

#include "core/dtypes.h"
#include "cpu/ops.h"
#include "cpu/radix.h"

namespace fastcl::cpu {
namespace {

constexpr int64_t kSample = 65536;
constexpr double kDeviations = 4;  // of the sample's ranks, between the bounds and the quantile

template <class F>
struct Integer;
template <>
struct Integer<float> {
  using type = int32_t;
};
template <>
struct Integer<double> {
  using type = int64_t;
};
template <class F>
using integer_t = typename Integer<F>::type;

// The number's bits without the sign, which tell NaNs, and a signed integer in the numbers' order, 0 for both zeros.
template <class F>
FASTCL_HD integer_t<F> magnitude(F x) {
  return bit_cast<integer_t<F>>(x) & std::numeric_limits<integer_t<F>>::max();
}
template <class F>
FASTCL_HD integer_t<F> ordered(F x) {
  const integer_t<F> sign = bit_cast<integer_t<F>>(x) >> (8 * sizeof(F) - 1);
  return (magnitude(x) ^ sign) - sign;
}
template <class F>
F from_ordered(integer_t<F> key) {
  const F size = bit_cast<F>(key < 0 ? integer_t<F>(-key) : key);
  return key < 0 ? -size : size;
}

template <class F>
struct Bounds {
  integer_t<F> low, high;
};

struct Tally {
  int64_t below = 0;    // the lower bound
  int64_t at_low = 0;   // equal to it
  int64_t to_high = 0;  // not above the upper bound
  bool missing = false;
};

// flags: 1 where an element is between the bounds. In this loop -0 comes directly before +0: a bound of 0 is made of both.
template <class T, class F>
FASTCL_CLONES void tally_block(const T* __restrict x, int64_t n, Bounds<F> bounds, uint8_t* __restrict flags, Tally& tally) {
  using I = integer_t<F>;
  using U = std::make_unsigned_t<I>;
  constexpr I least = std::numeric_limits<I>::min(), most = std::numeric_limits<I>::max();
  const auto raw = [](I key) { return key < 0 && key > least ? key - 1 : key; };
  const I low = raw(bounds.low), high = raw(bounds.high);
  const I first = low - (low == 0), last = high - (high == 0);  // the least key of each bound
  const U after = U(low) + 1, between = last > low ? U(last) - after : 0;
  I below = 0, to_low = 0, to_high = 0, missing = 0;
  for (int64_t e = 0; e < n; ++e) {
    const F value = load<F>(x[e]);
    const I bits = bit_cast<I>(value), key = bits ^ ((bits >> (8 * sizeof(F) - 1)) & most);
    below += key < first;
    to_low += key <= low;
    to_high += key <= high;
    missing |= value != value;
    flags[e] = U(key) - after < between;
  }
  tally.below += below;
  tally.at_low += to_low - below;
  tally.to_high += to_high;
  tally.missing = tally.missing || missing != 0;
}

template <class T, class F>
void keep_flagged(const T* x, int64_t n, const uint8_t* flags, std::vector<F>& kept) {
  F own[kQuantileBlock];
  size_t count = 0;
  for (int64_t eight = 0; eight < n; eight += 8) {
    uint64_t set;
    memcpy(&set, flags + eight, 8);
    for (; set != 0; set &= set - 1) own[count++] = load<F>(x[eight + __builtin_ctzll(set) / 8]);
  }
  kept.insert(kept.end(), own, own + count);
}

// A part of a sweep.
template <class F>
struct Found {
  Tally tally;
  std::vector<F> kept;
};

template <class F>
class Selection {
 public:
  Selection(const Pool& pool, int64_t elements) : pool_(pool), most_(elements / 8) {}

  // The numbers at two ranks of the tensors' elements. False: there are NaNs, or else (lost()) the sample was wrong.
  bool find(const Views& tensors, int64_t elements, int64_t first, int64_t second, F& below, F& above) {
    if (elements <= kSample) return find_few(tensors, first, second, below, above);
    const Bounds<F> bounds = sampled(tensors, elements, first, second);
    const JointSweep sweep({&tensors}, kQuantilePart);
    std::vector<Found<F>> parts(static_cast<size_t>(sweep.parts()));
    std::atomic<int64_t> kept{0};
    pool_.each(sweep.parts(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end && kept.load(std::memory_order_relaxed) <= most_; ++p) {
        sweep_part(sweep, p, bounds, parts[size_t(p)]);
        kept.fetch_add(int64_t(parts[size_t(p)].kept.size()), std::memory_order_relaxed);
      }
    });
    Tally total;
    for (const Found<F>& part : parts) {
      total.below += part.tally.below;
      total.at_low += part.tally.at_low;
      total.to_high += part.tally.to_high;
      total.missing = total.missing || part.tally.missing;
    }
    if (total.missing) return false;
    if (kept > most_ || first < total.below || second >= total.to_high) return lose();
    most_ = kept / 2;
    return among(parts, kept, bounds, first - total.below - total.at_low, second - total.below - total.at_low, below, above);
  }

  bool lost() const { return lost_; }

 private:
  const Pool& pool_;
  int64_t most_;  // elements that are kept before digits are counted instead
  bool lost_ = false;

  bool lose() {
    lost_ = true;
    return false;
  }

  static void sweep_part(const JointSweep& sweep, int64_t index, Bounds<F> bounds, Found<F>& out) {
    alignas(64) uint8_t flags[kQuantileBlock];
    sweep.part(index, [&](const Operand* at, const int64_t* strides, int64_t n) {
      with_floating(at->dtype, [&](auto t) {
        using T = typename decltype(t)::type;
        blocks<T>(at->data, strides == nullptr ? 1 : strides[0], n, [&](const T* x, int64_t m) {
          if (m < kQuantileBlock) memset(flags, 0, sizeof(flags));
          tally_block<T, F>(x, m, bounds, flags, out.tally);
          keep_flagged<T, F>(x, m, flags, out.kept);
        });
      });
    });
  }

  // Ranks are counted from the first kept number: smaller ones are at the lower bound, larger ones at the upper.
  bool among(const std::vector<Found<F>>& parts, int64_t kept, Bounds<F> bounds, int64_t first, int64_t second, F& below, F& above) {
    const bool first_kept = first >= 0 && first < kept, second_kept = second >= 0 && second < kept;
    if (first_kept || second_kept) {
      std::vector<int64_t> sizes(parts.size());
      const int64_t one = 1;
      Views views;
      for (size_t p = 0; p < parts.size(); ++p) {
        if (parts[p].kept.empty()) continue;
        sizes[p] = int64_t(parts[p].kept.size());
        char* data = reinterpret_cast<char*>(const_cast<F*>(parts[p].kept.data()));
        views.emplace_back(data, &sizes[p], &one, 1, sizeof(F) == 8 ? DType::f64 : DType::f32, Device::cpu, 0);
      }
      if (!find(views, kept, first_kept ? first : second, second_kept ? second : first, below, above)) return false;
    }
    if (!first_kept) below = from_ordered<F>(first < 0 ? bounds.low : bounds.high);
    if (!second_kept) above = from_ordered<F>(second < 0 ? bounds.low : bounds.high);
    return true;
  }

  static bool find_few(const Views& tensors, int64_t first, int64_t second, F& below, F& above) {
    std::vector<integer_t<F>> keys;
    bool missing = false;
    const JointSweep sweep({&tensors}, kQuantilePart);
    for (int64_t p = 0; p < sweep.parts(); ++p)
      sweep.part(p, [&](const Operand* at, const int64_t* strides, int64_t n) {
        with_floating(at->dtype, [&](auto t) {
          using T = typename decltype(t)::type;
          const int64_t stride = strides == nullptr ? 1 : strides[0];
          for (int64_t e = 0; e < n; ++e) {
            const F value = load<F>(reinterpret_cast<const T*>(at->data)[e * stride]);
            missing = missing || is_nan_bits(value);
            keys.push_back(ordered(value));
          }
        });
      });
    if (missing) return false;
    std::nth_element(keys.begin(), keys.begin() + first, keys.end());
    below = from_ordered<F>(keys[size_t(first)]);
    above = first == second ? below : from_ordered<F>(*std::min_element(keys.begin() + second, keys.end()));
    return true;
  }

  // Two numbers of a sample, one of every stretch of elements / kSample, some deviations of a random sample's ranks apart from the
  // quantile.
  Bounds<F> sampled(const Views& tensors, int64_t elements, int64_t first, int64_t second) {
    std::vector<int64_t> starts;
    int64_t total = 0;
    for (const View& t : tensors) {
      starts.push_back(total);
      total += t.numel();
    }
    std::vector<integer_t<F>> keys(kSample);
    const double stretch = double(elements) / double(kSample);
    pool_.each(kSample, kSample / 8, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const double jitter = double((uint64_t(k) * 0x9E3779B97F4A7C15ull) >> 11) * 0x1p-53;  // no period meets that of a layer
        const int64_t at = std::min(int64_t((double(k) + jitter) * stretch), elements - 1);
        const auto t = size_t(std::upper_bound(starts.begin(), starts.end(), at) - starts.begin() - 1);
        keys[size_t(k)] = ordered(value_at(tensors[t], at - starts[t]));
      }
    });
    const double share = double(kSample) / double(elements), q = double(first) / double(elements);
    const double apart = kDeviations * std::sqrt(double(kSample) * q * (1 - q)) + 8;
    const auto low = int64_t(double(first) * share - apart), high = int64_t(double(second) * share + apart) + 1;
    Bounds<F> bounds{std::numeric_limits<integer_t<F>>::min(), std::numeric_limits<integer_t<F>>::max()};
    if (high < kSample) {
      std::nth_element(keys.begin(), keys.begin() + high, keys.end());
      bounds.high = keys[size_t(high)];
    }
    if (low >= 0) {
      std::nth_element(keys.begin(), keys.begin() + low, high < kSample ? keys.begin() + high : keys.end());
      bounds.low = keys[size_t(low)];
    }
    return bounds;
  }

  static F value_at(const View& v, int64_t index) {
    int64_t offset = v.contiguous ? index : 0;
    for (int d = v.ndim - 1; d >= 0 && !v.contiguous; --d) {
      offset += index % v.shape[d] * v.strides[d];
      index /= v.shape[d];
    }
    return with_floating(v.dtype, [&](auto t) { return load<F>(reinterpret_cast<const typename decltype(t)::type*>(v.data)[offset]); });
  }
};

template <class F>
double quantile_of(const Views& tensors, int64_t elements, double q, const Pool& pool) {
  const Ranks ranks = quantile_ranks(elements, q);
  Selection<F> selection(pool, elements);
  F below = 0, above = 0;
  if (selection.find(tensors, elements, ranks.below, ranks.above, below, above))
    return interpolate(double(below), double(above), ranks.weight);
  return selection.lost() ? quantile_by_counts(tensors, q, pool) : std::numeric_limits<double>::quiet_NaN();
}

}  // namespace

double quantile(const Views& tensors, double q, const Pool& pool) {
  bool wide = false;
  int64_t elements = 0;
  for (const View& t : tensors) wide = wide || t.dtype == DType::f64, elements += t.numel();
  return wide ? quantile_of<double>(tensors, elements, q, pool) : quantile_of<float>(tensors, elements, q, pool);
}

}  // namespace fastcl::cpu
