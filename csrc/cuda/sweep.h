// What one thread of a block does to its share of a chunk. Threads share nothing here, so that the host can run every thread of every block
// in turn and tests see the code that GPUs run.
#pragma once

#include "core/importance.h"
#include "cuda/packet.h"

namespace fastcl::cuda {

constexpr int kThreads = 256;

// Loads and stores of up to 16 bytes in one instruction. A vector is moved as machine words: from arrays of 8- and 16-bit elements the
// compiler would make narrower accesses.
template <int bytes>
struct Words;
template <>
struct Words<1> {
  using type = uint8_t;
};
template <>
struct Words<2> {
  using type = uint16_t;
};
template <>
struct Words<4> {
  using type = uint32_t;
};
struct alignas(8) Two {
  uint32_t a, b;
};
template <>
struct Words<8> {
  using type = Two;
};
struct alignas(16) Four {
  uint32_t a, b, c, d;
};
template <>
struct Words<16> {
  using type = Four;
};
struct alignas(16) Eight {
  Four a, b;
};
template <>
struct Words<32> {
  using type = Eight;
};
struct alignas(16) Sixteen {
  Eight a, b;
};
template <>
struct Words<64> {
  using type = Sixteen;
};

template <class T, int V>
struct Elements {
  T x[V];
};

// It stays in words until its elements are needed, since each element takes a register.
template <class T, int V>
struct Vector {
  using Word = typename Words<int(sizeof(T)) * V>::type;
  Word words;

  // Not through the read-only cache: what is read may be what is written, element for element.
  static FASTCL_HD Vector load(const T* p) { return {*reinterpret_cast<const Word*>(p)}; }
  static FASTCL_HD Vector of(const Elements<T, V>& e) { return {bit_cast<Word>(e)}; }
  FASTCL_HD void store(T* p) const { *reinterpret_cast<Word*>(p) = words; }
  FASTCL_HD Elements<T, V> elements() const { return bit_cast<Elements<T, V>>(words); }
};
template <int V, class T>
FASTCL_HD Vector<T, V> filled(T value) {
  Elements<T, V> e;
  FASTCL_UNROLL
  for (int k = 0; k < V; ++k) e.x[k] = value;
  return Vector<T, V>::of(e);
}
// op(a[k], b[k])
template <class W, class R, int V, class Op>
FASTCL_HD Vector<W, V> apply(const Vector<W, V>& a, const Vector<R, V>& b, const Op& op) {
  Elements<W, V> w = a.elements();
  const Elements<R, V> r = b.elements();
  FASTCL_UNROLL
  for (int k = 0; k < V; ++k) w.x[k] = op(w.x[k], r.x[k]);
  return Vector<W, V>::of(w);
}

// The chunk of a block, found in the packet.
struct Chunk {
  int tensor, entry;
  int64_t begin;
  int n;
  int64_t form;

  template <class P>
  static FASTCL_HD Chunk find(const P& p, uint32_t block, int64_t chunk) {
    Chunk c;
    c.tensor = p.find(block);
    c.entry = p.at[c.tensor];
    c.begin = int64_t(block - p.first_chunk[c.tensor]) * chunk;
    const int64_t left = p.words[c.entry + kNumel] - c.begin;
    c.n = int(left < chunk ? left : chunk);
    c.form = p.words[c.entry + kForm];
    return c;
  }
};

// ---- pairs: written[e] = op(written[e], read[e])

constexpr int widest(int a, int b) { return a > b ? a : b; }
// The wider of the two types moves in 16-byte vectors, the other in what then is next to each other: both are coalesced.
template <class W, class R>
constexpr int pair_run = 16 / widest(sizeof(W), sizeof(R));
// Vectors per thread in flight; bytes unpack into many registers.
template <class W, class R>
constexpr int pair_rows = pair_run<W, R> > 8 ? 2 : 4;
// 32 KB of the wider type: two rounds of four vectors per thread, enough bytes in flight to fill the memory's latency.
template <class W, class R>
constexpr int64_t pair_chunk = 8 * kThreads * pair_run<W, R>;

template <class W, class R, class Op>
FASTCL_HD void pair_dense(W* w, const R* r, int n, bool one, int thread, const Op& op) {
  constexpr int V = pair_run<W, R>, U = pair_rows<W, R>;
  Vector<W, V> a[U];
  Vector<R, V> b[U];
  FASTCL_UNROLL
  for (int u = 0; u < U; ++u) {
    a[u] = {};
    b[u] = {};
    if (one) b[u] = filled<V>(*r);
  }
  const int vectors = n / V;
  for (int first = thread; first < vectors; first += U * kThreads) {
    FASTCL_UNROLL
    for (int u = 0; u < U; ++u)
      if (first + u * kThreads < vectors) a[u] = Vector<W, V>::load(w + (first + u * kThreads) * V);
    if (!one) {
      FASTCL_UNROLL
      for (int u = 0; u < U; ++u)
        if (first + u * kThreads < vectors) b[u] = Vector<R, V>::load(r + (first + u * kThreads) * V);
    }
    FASTCL_UNROLL
    for (int u = 0; u < U; ++u)
      if (first + u * kThreads < vectors) apply(a[u], b[u], op).store(w + (first + u * kThreads) * V);
  }
  const int last = vectors * V + thread;
  if (last < n) w[last] = op(w[last], one ? *r : r[last]);
}

template <int V, class W, class R, class P, class Op>
FASTCL_HD void pair_walked(const P& p, const Chunk& c, W* w, const R* r, int thread, const Op& op) {
  constexpr int U = V > 8 ? 1 : 2;
  const bool one = V > 1 && p.words[p.dims(c.entry) + 2] == 0;
  const int vectors = c.n / V;
  for (int first = thread; first < vectors; first += U * kThreads) {
    int64_t at[U][2];
    Vector<W, V> a[U];
    Vector<R, V> b[U];
    FASTCL_UNROLL
    for (int u = 0; u < U; ++u) {
      if (first + u * kThreads >= vectors) continue;
      p.offsets(c.entry, c.begin + int64_t(first + u * kThreads) * V, 0, at[u]);
      a[u] = Vector<W, V>::load(w + at[u][0]);
      b[u] = one ? filled<V>(r[at[u][1]]) : Vector<R, V>::load(r + at[u][1]);
    }
    FASTCL_UNROLL
    for (int u = 0; u < U; ++u)
      if (first + u * kThreads < vectors) apply(a[u], b[u], op).store(w + at[u][0]);
  }
}

template <class W, class R, class P, class Op>
FASTCL_HD void pair_thread(const P& p, uint32_t block, int thread, const Op& op) {
  const Chunk c = Chunk::find(p, block, pair_chunk<W, R>);
  W* w = p.template address<W>(c.entry, 0);
  const R* r = p.template address<const R>(c.entry, 1);
  if ((c.form & kDimsMask) == 0) {
    const bool one = (c.form & kOne) != 0;
    pair_dense(w + c.begin, one ? r : r + c.begin, c.n, one, thread, op);
  } else if ((c.form & kVectors) != 0) {
    pair_walked<pair_run<W, R>>(p, c, w, r, thread, op);
  } else {
    pair_walked<1>(p, c, w, r, thread, op);
  }
}

// ---- SPG, first sweep: moments

constexpr int64_t kSpgChunk = 16384;

// Why plain double precision: the rule is an error of at most twice torch's, and for a tensor whose first element lies far from the others
// even one float rounding of g - shift can break it. The cost per element is one conversion and about six double operations (two passes
// over sixteen elements in registers, their moments then combined); on data-centre GPUs, which do double at half rate, that hides behind
// the loads, on others this sweep, which runs once per task, is up to some three times slower than its bytes.
template <class G, int U, int V>
FASTCL_HD Moments run_moments(const Vector<G, V> (&x)[U], const bool (&valid)[U], double shift) {
  double sum = 0;
  int count = 0;
  FASTCL_UNROLL
  for (int u = 0; u < U; ++u) {
    if (!valid[u]) continue;
    count += V;
    const Elements<G, V> g = x[u].elements();
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) sum += load<double>(g.x[k]) - shift;
  }
  const double mean = sum / count;
  double m2 = 0;
  FASTCL_UNROLL
  for (int u = 0; u < U; ++u) {
    if (!valid[u]) continue;
    const Elements<G, V> g = x[u].elements();
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) {
      const double d = (load<double>(g.x[k]) - shift) - mean;
      m2 += d * d;
    }
  }
  return {double(count), mean, m2};
}

template <class G>
constexpr int moments_run = 16 / sizeof(G);

template <class G, class P>
FASTCL_HD Moments moments_thread(const P& p, const Chunk& c, int thread, double shift) {
  const G* g = p.template address<const G>(c.entry, 0);
  Moments m{0, 0, 0};
  if ((c.form & kDimsMask) == 0) {
    constexpr int V = moments_run<G>, U = 16 / V;
    g += c.begin;
    const int vectors = c.n / V;
    for (int first = thread; first < vectors; first += U * kThreads) {
      Vector<G, V> x[U];
      bool valid[U];
      FASTCL_UNROLL
      for (int u = 0; u < U; ++u) {
        valid[u] = first + u * kThreads < vectors;
        if (valid[u]) x[u] = Vector<G, V>::load(g + (first + u * kThreads) * V);
      }
      m = combine(m, run_moments(x, valid, shift));
    }
    const int last = vectors * V + thread;
    if (last < c.n) m = combine(m, {1, load<double>(g[last]) - shift, 0});
  } else {
    constexpr int U = 4;
    for (int first = thread; first < c.n; first += U * kThreads) {
      Vector<G, 1> x[U];
      bool valid[U];
      FASTCL_UNROLL
      for (int u = 0; u < U; ++u) {
        valid[u] = first + u * kThreads < c.n;
        if (!valid[u]) continue;
        int64_t at[1];
        p.offsets(c.entry, c.begin + first + u * kThreads, 0, at);
        x[u] = Vector<G, 1>::load(g + at[0]);
      }
      m = combine(m, run_moments(x, valid, shift));
    }
  }
  return m;
}

// ---- SPG, second sweep: normalise, take the maximum over heads and into the accumulator

constexpr int kUpdateRun = 4;

// A gradient's note: the number of its statistics, and its dtype.
constexpr int64_t update_note(int64_t item, DType t) { return item * 8 + int64_t(t); }
FASTCL_HD int64_t note_item(int64_t note) { return note / 8; }
FASTCL_HD DType note_dtype(int64_t note) { return DType(note % 8); }

template <class S>
FASTCL_HD double sum_term(S x) {
  return load<double>(x);
}
// uint8 is summed as integers and divided once at the end.
FASTCL_HD double sum_term(uint8_t x) { return x; }
template <class S>
constexpr double sum_unit = 1;
template <>
constexpr double sum_unit<uint8_t> = 255;

template <int V, int U, class G, class C>
FASTCL_HD void raise_to(const G* g, const int64_t* at, const bool* valid, const Normaliser<C>& normalise, C (&value)[U][V]) {
  Vector<G, V> x[U];
  FASTCL_UNROLL
  for (int u = 0; u < U; ++u)
    if (valid[u]) x[u] = Vector<G, V>::load(g + at[u]);
  FASTCL_UNROLL
  for (int u = 0; u < U; ++u)
    if (valid[u]) {
      const Elements<G, V> e = x[u].elements();
      FASTCL_UNROLL
      for (int k = 0; k < V; ++k) value[u][k] = nan_max(value[u][k], normalise(load<C>(e.x[k])));
    }
}

// Elements at[] of the stored tensor and of every head's gradient; where they lie in operand o tells locate(o, places).
template <int V, int U, class S, class C, class P, class Locate>
FASTCL_HD double update_run(const P& p, int entry, const bool* valid, const Normaliser<C>* normalisers, const Locate& locate) {
  S* s = p.template address<S>(entry, 0);
  int64_t own[U], at[U];
  Vector<S, V> stored[U];
  C value[U][V];
  locate(0, own);
  FASTCL_UNROLL
  for (int u = 0; u < U; ++u)
    if (valid[u]) stored[u] = Vector<S, V>::load(s + own[u]);
  FASTCL_UNROLL
  for (int u = 0; u < U; ++u)
    if (valid[u]) {
      const Elements<S, V> e = stored[u].elements();
      FASTCL_UNROLL
      for (int k = 0; k < V; ++k) value[u][k] = load<C>(e.x[k]);
    }
  for (int o = 1; o < p.operands; ++o) {
    locate(o, at);
    const Normaliser<C> normalise = normalisers[o - 1];
    const DType dtype = note_dtype(p.note(entry, o));
    if (dtype == DType::f32) {
      raise_to<V, U>(p.template address<const float>(entry, o), at, valid, normalise, value);
    } else if (dtype == DType::bf16) {
      raise_to<V, U>(p.template address<const BFloat16>(entry, o), at, valid, normalise, value);
    } else if (dtype == DType::f16) {
      raise_to<V, U>(p.template address<const Float16>(entry, o), at, valid, normalise, value);
    } else if constexpr (sizeof(C) == sizeof(double)) {  // a double gradient is computed in double
      raise_to<V, U>(p.template address<const double>(entry, o), at, valid, normalise, value);
    }
  }
  double sum = 0;
  FASTCL_UNROLL
  for (int u = 0; u < U; ++u) {
    if (!valid[u]) continue;
    Elements<S, V> e;
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) {
      e.x[k] = store<S>(value[u][k]);
      sum += sum_term(e.x[k]);
    }
    Vector<S, V>::of(e).store(s + own[u]);
  }
  return sum;
}

// Returns the thread's part of the sum of what is stored, in units of 1 / sum_unit.
template <class S, class C, class P>
FASTCL_HD double update_thread(const P& p, const Chunk& c, int thread, const Normaliser<C>* normalisers) {
  double sum = 0;
  if ((c.form & kDimsMask) == 0) {
    constexpr int V = kUpdateRun, U = 2;
    const int vectors = c.n / V;
    for (int first = thread; first < vectors; first += U * kThreads) {
      bool valid[U];
      FASTCL_UNROLL
      for (int u = 0; u < U; ++u) valid[u] = first + u * kThreads < vectors;
      sum += update_run<V, U, S>(p, c.entry, valid, normalisers, [&](int, int64_t (&at)[U]) {
        FASTCL_UNROLL
        for (int u = 0; u < U; ++u) at[u] = c.begin + int64_t(first + u * kThreads) * V;
      });
    }
    const bool valid[1] = {vectors * V + thread < c.n};
    if (valid[0])
      sum += update_run<1, 1, S>(p, c.entry, valid, normalisers, [&](int, int64_t (&at)[1]) { at[0] = c.begin + vectors * V + thread; });
  } else {
    const bool valid[1] = {true};
    for (int e = thread; e < c.n; e += kThreads)
      sum += update_run<1, 1, S>(p, c.entry, valid, normalisers, [&](int o, int64_t (&at)[1]) { p.offsets(c.entry, c.begin + e, o, at); });
  }
  return sum;
}

}  // namespace fastcl::cuda
