// What one thread does in a sweep of the radix select.
#pragma once

#include "core/quantile.h"
#include "cuda/operands.h"

namespace fastcl::cuda {

constexpr int64_t kRadixChunk = 1 << 16;  // a block's counts fit into 32 bits, and there are many elements for each that it hands on

// What is counted: the digits at a level of the keys whose digits above it are a prefix. The two prefixes are often one, and above the
// first level there are none.
struct RadixQuery {
  uint64_t prefixes[2];
  int level;
  bool one;
  static FASTCL_HD RadixQuery make(const int64_t* prefixes, int level) {
    const bool one = level == 0 || prefixes[0] == prefixes[1];
    return {{level == 0 ? 0 : uint64_t(prefixes[0]), level == 0 ? 0 : uint64_t(prefixes[1])}, level, one};
  }
};

// increment(slot) for each element that counts; slots: row * kRadixColumns + column.
template <class Key, class P, class Increment>
FASTCL_HD void radix_thread(const P& p, const Chunk& c, int thread, const RadixQuery& query, const Increment& increment) {
  using F = key_float_t<Key>;
  each_run<kRun<F>>(p, c, thread, [&](const auto& site) {
    constexpr int V = std::decay_t<decltype(site)>::width;
    F x[V];
    site.read(0, x);
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) {
      if (is_nan_bits(x[k])) {
        if (query.level == 0) increment(kRadixBins);
        continue;
      }
      const Key key = radix_key<Key>(x[k]);
      const int digit = Radix<Key>::digit(key, query.level);
      const Key prefix = query.level == 0 ? 0 : Radix<Key>::prefix(key, query.level);
      if (prefix == Key(query.prefixes[0])) increment(digit);
      if (!query.one && prefix == Key(query.prefixes[1])) increment(kRadixColumns + digit);
    }
  });
}

}  // namespace fastcl::cuda
