// What one thread does in the sweeps of the projection family. Between two points at which a block's threads wait for each other they share
// nothing, so that the host can run them in turn, as it does with sweep.h.
#pragma once

#include "core/projection.h"
#include "cuda/sweep.h"

namespace fastcl::cuda {

// ---- a . b and b . b over pairs, as wide and as many at once as the element-wise ops

struct Products {
  double dot, square;
};
FASTCL_HD Products combine(Products a, Products b) { return {a.dot + b.dot, a.square + b.square}; }

// A product of two narrow numbers is exact in double, fused or not; of two doubles, fused is the better one.
template <class A, class B, int V>
FASTCL_HD void add_products(const Vector<A, V>& a, const Vector<B, V>& b, bool squares, Products& sum) {
  const Elements<A, V> x = a.elements();
  const Elements<B, V> y = b.elements();
  FASTCL_UNROLL
  for (int k = 0; k < V; ++k) {
    const double own = load<double>(y.x[k]);
    sum.dot = fma(load<double>(x.x[k]), own, sum.dot);
    if (squares) sum.square = fma(own, own, sum.square);
  }
}

template <class A, class B>
FASTCL_HD Products dot_dense(const A* a, const B* b, int n, bool one, int thread, bool squares) {
  constexpr int V = pair_run<A, B>, U = pair_rows<A, B>;
  Products sum[U];
  Vector<A, V> x[U];
  Vector<B, V> y[U];
  FASTCL_UNROLL
  for (int u = 0; u < U; ++u) {
    sum[u] = {0, 0};
    x[u] = {};
    y[u] = {};
    if (one) y[u] = filled<V>(*b);
  }
  const int vectors = n / V;
  for (int first = thread; first < vectors; first += U * kThreads) {
    FASTCL_UNROLL
    for (int u = 0; u < U; ++u)
      if (first + u * kThreads < vectors) x[u] = Vector<A, V>::load(a + (first + u * kThreads) * V);
    if (!one) {
      FASTCL_UNROLL
      for (int u = 0; u < U; ++u)
        if (first + u * kThreads < vectors) y[u] = Vector<B, V>::load(b + (first + u * kThreads) * V);
    }
    FASTCL_UNROLL
    for (int u = 0; u < U; ++u)
      if (first + u * kThreads < vectors) add_products(x[u], y[u], squares, sum[u]);
  }
  const int last = vectors * V + thread;
  if (last < n) add_products(Vector<A, 1>::load(a + last), Vector<B, 1>::load(one ? b : b + last), squares, sum[0]);
  FASTCL_UNROLL
  for (int u = 1; u < U; ++u) sum[0] = combine(sum[0], sum[u]);
  return sum[0];
}

template <int V, class A, class B, class P>
FASTCL_HD Products dot_walked(const P& p, const Chunk& c, const A* a, const B* b, int thread, bool squares) {
  constexpr int U = 2;
  const bool one = V > 1 && p.words[p.dims(c.entry) + 2] == 0;
  const int vectors = c.n / V;
  Products sum[U];
  FASTCL_UNROLL
  for (int u = 0; u < U; ++u) sum[u] = {0, 0};
  for (int first = thread; first < vectors; first += U * kThreads) {
    Vector<A, V> x[U];
    Vector<B, V> y[U];
    FASTCL_UNROLL
    for (int u = 0; u < U; ++u) {
      if (first + u * kThreads >= vectors) continue;
      int64_t at[2];
      p.offsets(c.entry, c.begin + int64_t(first + u * kThreads) * V, 0, at);
      x[u] = Vector<A, V>::load(a + at[0]);
      y[u] = one ? filled<V>(b[at[1]]) : Vector<B, V>::load(b + at[1]);
    }
    FASTCL_UNROLL
    for (int u = 0; u < U; ++u)
      if (first + u * kThreads < vectors) add_products(x[u], y[u], squares, sum[u]);
  }
  return combine(sum[0], sum[1]);
}

template <class A, class B, class P>
FASTCL_HD Products dot_thread(const P& p, uint32_t block, int thread, bool squares) {
  const Chunk c = Chunk::find(p, block, pair_chunk<A, B>);
  const A* a = p.template address<const A>(c.entry, 0);
  const B* b = p.template address<const B>(c.entry, 1);
  if ((c.form & kDimsMask) == 0) {
    const bool one = (c.form & kOne) != 0;
    return dot_dense(a + c.begin, one ? b : b + c.begin, c.n, one, thread, squares);
  }
  if ((c.form & kVectors) != 0) return dot_walked<pair_run<A, B>>(p, c, a, b, thread, squares);
  return dot_walked<1>(p, c, a, b, thread, squares);
}

// The second sweep of A-GEM.
template <class G, class R>
struct AddScaled {
  double coefficient;
  FASTCL_HD G operator()(G g, R r) const { return store<G>(add_scaled(load<double>(g), coefficient, r)); }
};

// ---- many operands: the gradient and then the memories, whose dtypes are in the notes. One list serves both of GEM's sweeps.

// float moves in 16 bytes. Vectors of another length for narrower types would give a thread other elements of one operand than of another.
constexpr int kJointRun = 4;
constexpr int64_t kJointChunk = 2048;
constexpr int kMostLists = kMostMemories + 1;
static_assert(LargePacket::max_words >= kAddress + 2 * kMostLists + kMaxDims * (1 + kMostLists), "any one entry fits");

template <int V, int U, class T, class Visit>
FASTCL_HD void visit_as(const T* data, const int64_t* at, const bool* valid, const Visit& visit) {
  Vector<T, V> x[U];
  FASTCL_UNROLL
  for (int u = 0; u < U; ++u)
    if (valid[u]) x[u] = Vector<T, V>::load(data + at[u]);
  FASTCL_UNROLL
  for (int u = 0; u < U; ++u)
    if (valid[u]) {
      const Elements<T, V> e = x[u].elements();
      FASTCL_UNROLL
      for (int k = 0; k < V; ++k) visit(u, k, load<double>(e.x[k]));
    }
}

// visit(u, k, value) for V elements from each of U places of an operand.
template <int V, int U, class P, class Visit>
FASTCL_HD void visit_operand(const P& p, int entry, int operand, const int64_t* at, const bool* valid, const Visit& visit) {
  const DType dtype = DType(p.note(entry, operand));
  if (dtype == DType::f32) {
    visit_as<V, U>(p.template address<const float>(entry, operand), at, valid, visit);
  } else if (dtype == DType::bf16) {
    visit_as<V, U>(p.template address<const BFloat16>(entry, operand), at, valid, visit);
  } else if (dtype == DType::f16) {
    visit_as<V, U>(p.template address<const Float16>(entry, operand), at, valid, visit);
  } else {
    visit_as<V, U>(p.template address<const double>(entry, operand), at, valid, visit);
  }
}

template <class T, int V, int U>
FASTCL_HD void store_as(T* data, const int64_t* at, const bool* valid, const double (&sum)[U][V]) {
  FASTCL_UNROLL
  for (int u = 0; u < U; ++u) {
    if (!valid[u]) continue;
    Elements<T, V> e;
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) e.x[k] = store<T>(sum[u][k]);
    Vector<T, V>::of(e).store(data + at[u]);
  }
}

// Where the elements lie in operand o tells locate(o, places).
template <int V, int U, class P, class Locate>
FASTCL_HD void combine_run(const P& p, int entry, const bool (&valid)[U], const double* coefficients, const Locate& locate) {
  int64_t own[U], at[U];
  double sum[U][V];
  locate(0, own);
  visit_operand<V, U>(p, entry, 0, own, valid, [&](int u, int k, double x) { sum[u][k] = x; });
  for (int o = 1; o < p.operands; ++o) {
    const double coefficient = coefficients[o - 1];
    if (coefficient == 0) continue;
    locate(o, at);
    visit_operand<V, U>(p, entry, o, at, valid, [&](int u, int k, double x) { sum[u][k] = add_scaled(sum[u][k], coefficient, x); });
  }
  const DType dtype = DType(p.note(entry, 0));
  if (dtype == DType::f32) {
    store_as(p.template address<float>(entry, 0), own, valid, sum);
  } else if (dtype == DType::bf16) {
    store_as(p.template address<BFloat16>(entry, 0), own, valid, sum);
  } else if (dtype == DType::f16) {
    store_as(p.template address<Float16>(entry, 0), own, valid, sum);
  } else {
    store_as(p.template address<double>(entry, 0), own, valid, sum);
  }
}

// The gradient is read and written once and every memory with a coefficient read once, however many there are.
template <class P>
FASTCL_HD void combine_thread(const P& p, const Chunk& c, int thread, const double* coefficients) {
  if ((c.form & kDimsMask) == 0) {
    constexpr int V = kJointRun, U = 2;
    const int vectors = c.n / V;
    for (int first = thread; first < vectors; first += U * kThreads) {
      bool valid[U];
      FASTCL_UNROLL
      for (int u = 0; u < U; ++u) valid[u] = first + u * kThreads < vectors;
      combine_run<V, U>(p, c.entry, valid, coefficients, [&](int, int64_t (&at)[U]) {
        FASTCL_UNROLL
        for (int u = 0; u < U; ++u) at[u] = c.begin + int64_t(first + u * kThreads) * V;
      });
    }
    const bool valid[1] = {vectors * V + thread < c.n};
    if (valid[0])
      combine_run<1, 1>(p, c.entry, valid, coefficients, [&](int, int64_t (&at)[1]) { at[0] = c.begin + vectors * V + thread; });
  } else {
    const bool valid[1] = {true};
    for (int e = thread; e < c.n; e += kThreads)
      combine_run<1, 1>(p, c.entry, valid, coefficients, [&](int o, int64_t (&at)[1]) { p.offsets(c.entry, c.begin + e, o, at); });
  }
}

// ---- the Gram matrix of K lists
//
// A block stages some columns (elements) of all lists in shared memory as doubles, and each thread multiplies kTile x kTile lists over some
// of the columns in registers. So every element is read from global memory once, converted once and read kTile-fold less often than it is
// used from shared memory: for K = 10 or 64 memories and the gradient in float32 the sweep moves 44 or 260 bytes per column, as few as
// there are. What it computes are 96 or 2448 multiply-adds and 48 or 1224 loads from shared memory per column; estimated for an H100 from
// its data sheet, K = 10 is bound by memory and K = 64 takes about four times its bytes' time, in shared memory and double precision.

constexpr int kTile = 4;
constexpr int kSlots = 4;  // of kJointRun columns of one list, per thread and stage
constexpr int kStageSlots = kSlots * kThreads;
constexpr int kStageDoubles = kStageSlots * kJointRun + kMostLists;
constexpr int kKeptDoubles = kThreads * kTile * kTile;
// After so many columns a thread adds its products to what it keeps in shared memory: a chain of a whole chunk would round too often.
constexpr int kGramChain = 64;
// Blocks of all launches together leave at most so many partial matrices. The number does not depend on the GPU, so the bits do not either;
// with two blocks on each of 108 or 132 multiprocessors the last round of blocks is nearly full.
constexpr int64_t kGramBlocks = 1024;

constexpr FASTCL_HD int64_t gram_entries(int64_t lists) { return lists * (lists + 1) / 2; }

// How K lists share a block. Tile (I, J) with I >= J has the lists I + r * tile_rows and J + s * tile_rows, r, s < kTile: threads with
// neighbouring tiles read neighbouring rows, which an odd row length puts into different banks.
struct GramShape {
  int lists, tile_rows, tiles, groups, slots, row;

  static FASTCL_HD GramShape of(int lists) {
    GramShape g;
    g.lists = lists;
    g.tile_rows = (lists + kTile - 1) / kTile;
    g.tiles = g.tile_rows * (g.tile_rows + 1) / 2;
    g.groups = kThreads / g.tiles;    // of threads that have a tile in common and share the columns
    g.slots = kStageSlots / lists;    // of one list and stage
    g.row = g.slots * kJointRun + 1;  // in doubles
    return g;
  }
  FASTCL_HD int columns() const { return slots * kJointRun; }
};

struct TilePlace {
  int row, column;
  static FASTCL_HD TilePlace of(int tile) {
    int row = 0;
    FASTCL_ROLLED
    while (tile > row) tile -= ++row;
    return {row, tile};
  }
};

// A stage of a block: columns of one chunk. The block takes the chunks block, block + blocks, ...
template <class P>
struct GramStage {
  Chunk chunk;
  uint32_t at, chunks;
  int begin;

  static FASTCL_HD GramStage first(const P& p, uint32_t block) {
    GramStage s;
    s.at = block;
    s.chunks = p.first_chunk[p.tensors];
    s.begin = 0;
    if (s.left()) s.chunk = Chunk::find(p, block, kJointChunk);
    return s;
  }
  FASTCL_HD bool left() const { return at < chunks; }
  FASTCL_HD void advance(const P& p, const GramShape& g, uint32_t blocks) {
    begin += g.columns();
    if (begin < chunk.n) return;
    begin = 0;
    at = chunks - at > blocks ? at + blocks : chunks;
    if (left()) chunk = Chunk::find(p, at, kJointChunk);
  }
  FASTCL_HD int columns(const GramShape& g) const { return chunk.n - begin < g.columns() ? chunk.n - begin : g.columns(); }
  FASTCL_HD int slots(const GramShape& g) const { return (columns(g) + kJointRun - 1) / kJointRun; }
};

// What a thread has on the way from global to shared memory.
struct GramFetch {
  Four words[kSlots];
};

// Whether a slot's columns are next to each other and complete.
template <class P>
FASTCL_HD bool in_vector(const GramStage<P>& s, int slot, int columns) {
  return (s.chunk.form & kDimsMask) == 0 && (slot + 1) * kJointRun <= columns;
}

// Loads that nothing waits for yet. What needs more than a vector load, and double, is left to gram_put.
template <class P>
FASTCL_HD void gram_fetch(const P& p, const GramShape& g, const GramStage<P>& s, int thread, GramFetch& f) {
  const int columns = s.columns(g);
  FASTCL_UNROLL
  for (int u = 0; u < kSlots; ++u) {
    const int list = (thread + u * kThreads) / g.slots, slot = thread + u * kThreads - list * g.slots;
    if (list >= g.lists || !in_vector(s, slot, columns)) continue;
    const DType dtype = DType(p.note(s.chunk.entry, list));
    const int64_t first = s.chunk.begin + s.begin + slot * kJointRun;
    if (dtype == DType::f32) {
      f.words[u] = Vector<float, kJointRun>::load(p.template address<const float>(s.chunk.entry, list) + first).words;
    } else if (dtype != DType::f64) {
      const Two two = Vector<uint16_t, kJointRun>::load(p.template address<const uint16_t>(s.chunk.entry, list) + first).words;
      f.words[u] = {two.a, two.b, 0, 0};
    }
  }
}

template <class T, class P>
FASTCL_HD void gram_put_singly(const P& p, const GramStage<P>& s, int list, int slot, int columns, double (&x)[kJointRun]) {
  const T* data = p.template address<const T>(s.chunk.entry, list);
  FASTCL_UNROLL
  for (int k = 0; k < kJointRun; ++k) {
    const int column = slot * kJointRun + k;
    if (column >= columns) continue;
    const int64_t element = s.chunk.begin + s.begin + column;
    int64_t at[1] = {element};
    if ((s.chunk.form & kDimsMask) != 0) p.offsets(s.chunk.entry, element, list, at);
    x[k] = load<double>(data[at[0]]);
  }
}

template <class T>
FASTCL_HD void widen_slot(const Vector<T, kJointRun>& v, double (&x)[kJointRun]) {
  const Elements<T, kJointRun> e = v.elements();
  FASTCL_UNROLL
  for (int k = 0; k < kJointRun; ++k) x[k] = load<double>(e.x[k]);
}

// The order of columns in shared memory is one for all lists: a slot's elements stand as far apart as there are slots, so that a warp's
// stores lie side by side. Columns behind the end are zero.
template <class P>
FASTCL_HD void gram_put(const P& p, const GramShape& g, const GramStage<P>& s, int thread, const GramFetch& f, double* rows) {
  const int columns = s.columns(g), slots = s.slots(g);
  FASTCL_UNROLL
  for (int u = 0; u < kSlots; ++u) {
    const int list = (thread + u * kThreads) / g.slots, slot = thread + u * kThreads - list * g.slots;
    if (list >= g.lists || slot >= slots) continue;
    const DType dtype = DType(p.note(s.chunk.entry, list));
    double x[kJointRun] = {};
    if (in_vector(s, slot, columns) && dtype != DType::f64) {
      const Two two{f.words[u].a, f.words[u].b};
      if (dtype == DType::f32) {
        widen_slot(Vector<float, kJointRun>{f.words[u]}, x);
      } else if (dtype == DType::bf16) {
        widen_slot(Vector<BFloat16, kJointRun>{two}, x);
      } else {
        widen_slot(Vector<Float16, kJointRun>{two}, x);
      }
    } else if (dtype == DType::f32) {
      gram_put_singly<float>(p, s, list, slot, columns, x);
    } else if (dtype == DType::bf16) {
      gram_put_singly<BFloat16>(p, s, list, slot, columns, x);
    } else if (dtype == DType::f16) {
      gram_put_singly<Float16>(p, s, list, slot, columns, x);
    } else {
      gram_put_singly<double>(p, s, list, slot, columns, x);
    }
    FASTCL_UNROLL
    for (int k = 0; k < kJointRun; ++k) rows[list * g.row + k * slots + slot] = x[k];
  }
}

// A thread's part of its tile's products.
struct GramTile {
  double x[kTile][kTile];
};

FASTCL_HD void gram_multiply(const GramShape& g, int columns, int thread, const double* rows, GramTile& sum) {
  const int group = thread / g.tiles;
  if (group >= g.groups) return;
  const TilePlace t = TilePlace::of(thread - group * g.tiles);
  const double *a[kTile], *b[kTile];
  FASTCL_UNROLL
  for (int r = 0; r < kTile; ++r) {  // what is behind the last list is multiplied and not used
    const int i = t.row + r * g.tile_rows, j = t.column + r * g.tile_rows;
    a[r] = rows + (i < g.lists ? i : 0) * g.row;
    b[r] = rows + (j < g.lists ? j : 0) * g.row;
  }
  for (int c = group; c < columns; c += g.groups) {
    double x[kTile], y[kTile];
    FASTCL_UNROLL
    for (int r = 0; r < kTile; ++r) {
      x[r] = a[r][c];
      y[r] = b[r][c];
    }
    FASTCL_UNROLL
    for (int r = 0; r < kTile; ++r) {
      FASTCL_UNROLL
      for (int q = 0; q < kTile; ++q) sum.x[r][q] = fma(x[r], y[q], sum.x[r][q]);
    }
  }
}

// What a thread keeps is its own until all have finished: kept[product][group][tile].
FASTCL_HD void gram_keep(int thread, GramTile& sum, double* kept) {
  FASTCL_UNROLL
  for (int r = 0; r < kTile; ++r) {
    FASTCL_UNROLL
    for (int q = 0; q < kTile; ++q) {
      kept[(r * kTile + q) * kThreads + thread] += sum.x[r][q];
      sum.x[r][q] = 0;
    }
  }
}
// Then the groups' sums are added, half onto half.
FASTCL_HD void gram_fold(const GramShape& g, int groups, int half, int thread, double* kept) {
  const int width = (groups - half) * g.tiles;
  for (int e = thread; e < width * kTile * kTile; e += kThreads) {
    double* own = kept + e / width * kThreads + e % width;
    *own += own[half * g.tiles];
  }
}
// Leaves the lower triangle's products, row by row, in part; further launches add to it.
FASTCL_HD void gram_leave(const GramShape& g, int thread, const double* kept, bool add, double* part) {
  for (int e = thread; e < g.tiles * kTile * kTile; e += kThreads) {
    const int product = e / g.tiles, tile = e - product * g.tiles;
    const TilePlace t = TilePlace::of(tile);
    const int i = t.row + product / kTile * g.tile_rows, j = t.column + product % kTile * g.tile_rows;
    if (i >= g.lists || j >= g.lists || (t.row == t.column && i < j)) continue;
    const int high = i > j ? i : j, low = i > j ? j : i;
    double* own = part + high * (high + 1) / 2 + low;
    *own = kept[product * kThreads + tile] + (add ? *own : 0);
  }
}

// The row or column of a list in the matrix. With last, the first list comes last: the gradient, as GEM's solver wants it.
FASTCL_HD int gram_place(int list, int lists, bool last) { return !last ? list : list == 0 ? lists - 1 : list - 1; }

}  // namespace fastcl::cuda
