// What one thread does in the sweeps of child_mask, bit_mask, pull and Fisher.
#pragma once

#include "core/importance.h"
#include "core/pull.h"
#include "cuda/operands.h"

namespace fastcl::cuda {

// ---- child_mask: the gradient, and the index of its elements in the whole parameter, whose note is the parameter's

constexpr int kChildVectors = 2;  // in a run: eight floats are what one draw serves

template <class C, class P>
FASTCL_HD void child_mask_thread(const P& p, const Chunk& c, int thread, const ChildDraw& draw, uint32_t step) {
  const ChildMask<C> op{C(draw.scale)};
  each_run<kChildVectors * kRun<C>>(p, c, thread, [&](const auto& site) {
    constexpr int V = std::decay_t<decltype(site)>::width;
    const int64_t own = site.at(0);
    const auto element = uint64_t(site.origin(1) + site.at(1));
    C g[V];
    site.read(0, own, g);
    const uint32_t kept = kept_bits<V>(draw, element, uint32_t(p.note(c.entry, 1)), step);
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) g[k] = op(g[k], (kept >> k & 1) != 0);
    site.write(0, own, g);
  });
}

// ---- bit_mask: the gradient as words of its size, and the index of its bits

template <class W>
constexpr int kBitRun = 16 / int(sizeof(W));

template <class W, class P>
FASTCL_HD void bit_mask_thread(const P& p, const Chunk& c, int thread) {
  each_run<kBitRun<W>>(p, c, thread, [&](const auto& site) {
    constexpr int V = std::decay_t<decltype(site)>::width;
    const uint32_t bits = mask_bits<V>(site.template address<const uint8_t>(1, 0), site.at(1));
    if (bits == (1u << V) - 1) return;  // nothing changes
    W* g = site.template address<W>(0, site.at(0));
    Elements<W, V> e = Vector<W, V>::load(g).elements();
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) e.x[k] = selected(e.x[k], (bits >> k & 1) != 0);
    Vector<W, V>::of(e).store(g);
  });
}

// ---- threshold_bits: bytes of bits are written, each by one thread, from eight elements in the order of rows: the first operand is the
// index of the bits, the second the tensor

constexpr int kByteRun = 8;

template <class P>
FASTCL_HD void threshold_thread(const P& p, const Chunk& c, int thread, double threshold) {
  auto* bytes = p.template address<uint8_t>(c.entry, 0);
  const bool runs = (c.form & kDimsMask) == 0 || (c.form & kVectors) != 0;
  for (int first = thread * kByteRun; first < c.n; first += kThreads * kByteRun) {
    uint32_t byte = 0;
    if (runs && first + kByteRun <= c.n) {
      const Site<kByteRun, P> site{p, c.entry, c.form, c.begin + first};
      double x[kByteRun];
      site.read(1, x);
      FASTCL_UNROLL
      for (int k = 0; k < kByteRun; ++k) byte |= uint32_t(reaches(x[k], threshold)) << k;
    } else {
      FASTCL_ROLLED
      for (int k = 0; k < kByteRun && first + k < c.n; ++k) {
        double x[1];
        Site<1, P>{p, c.entry, c.form, c.begin + first + k}.read(1, x);
        byte |= uint32_t(reaches(x[0], threshold)) << k;
      }
    }
    bytes[(c.begin + first) / kByteRun] = uint8_t(byte);
  }
}

// ---- pull: gradient, parameter, precision, anchor

template <class C, class P>
FASTCL_HD void pull_thread(const P& p, const Chunk& c, int thread, const Pull<C>& op) {
  each_run<kRun<C>>(p, c, thread, [&](const auto& site) {
    constexpr int V = std::decay_t<decltype(site)>::width;
    const int64_t own = site.at(0);
    C g[V], theta[V], precision[V], anchor[V];
    site.read(0, own, g);
    site.read(1, theta);
    site.read(2, precision);
    site.read(3, anchor);
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) g[k] = op(g[k], theta[k], precision[k], anchor[k]);
    site.write(0, own, g);
  });
}

// ---- Fisher information

// The thread's part of the sum of squares, in one chain per element of a run.
template <class P>
FASTCL_HD double squares_thread(const P& p, const Chunk& c, int thread) {
  constexpr int kChains = kRun<float>;
  double sum[kChains] = {};
  each_run<kChains>(p, c, thread, [&](const auto& site) {
    constexpr int V = std::decay_t<decltype(site)>::width;
    double x[V];
    site.read(0, x);
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) sum[k] += x[k] * x[k];
  });
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class C, class P>
FASTCL_HD void fisher_thread(const P& p, const Chunk& c, int thread, double weight, double coefficient) {
  const auto op = FisherAdd<C, C>::make(weight, coefficient);
  each_run<kRun<C>>(p, c, thread, [&](const auto& site) {
    constexpr int V = std::decay_t<decltype(site)>::width;
    const int64_t own = site.at(0);
    C f[V], g[V];
    site.read(0, own, f);
    site.read(1, g);
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) f[k] = op(f[k], g[k]);
    site.write(0, own, f);
  });
}

}  // namespace fastcl::cuda
