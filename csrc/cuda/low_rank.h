// Precisions of low rank plus a diagonal. Sweeps in which a thread keeps some elements of the vectors while it goes through the rows of the
// basis, so that every element of it is read once; and, by blocks whose threads wait for each other between phases, products of many rows
// and their mixtures. Inside a phase threads share nothing: the host can run them in turn.
#pragma once

#include "core/low_rank.h"
#include "cuda/operands.h"
#include "cuda/projection.h"

namespace fastcl::cuda {

// The operands of an entry: the diagonal, which gives the order, the basis as an index along it, whose note tells whether its rows are
// aligned for vectors, and then what the op has.
constexpr int kDiagonal = 0, kBasis = 1, kOperand = 2;

template <class C, class P>
struct BasisRows {
  const C* first;  // element 0 of row 0
  int64_t stride;

  static FASTCL_HD BasisRows of(const P& p, int entry) { return {p.template address<const C>(entry, kBasis), p.words[entry + kNumel]}; }
  FASTCL_HD const C* at(int row, int64_t element) const { return first + (row * stride + element); }
};

// ---- the solve and the step

FASTCL_HD float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FASTCL_HD double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// What makes z (and y) of an entry's operands: x alone, or parameter, gradient and where they count momentum and anchor.
struct LowRankRule {
  double momentum, strength;
  int momenta, anchors;  // operands; 0: not read
  bool inverse;          // of x: z = D^-1/2 x, else D^1/2 x
};
constexpr int kVector = kOperand, kParam = kOperand, kStepGrad = kOperand + 1;

constexpr int kRowsAtOnce = 4;
template <int V>
constexpr int kRunsAtOnce = V > 1 ? 2 : 4;

// u = momentum V + strength (W - mu); what a factor of 0 multiplies is not read.
template <class C, int V, class S>
FASTCL_HD void read_kept(const S& site, const LowRankRule& rule, C (&u)[V]) {
  const Kept<C> kept{C(rule.momentum), C(rule.strength)};
  C velocity[V] = {}, param[V] = {}, anchor[V] = {};
  if (rule.momenta != 0) site.read(rule.momenta, velocity);
  if (rule.anchors != 0) {
    site.read(kParam, param);
    site.read(rule.anchors, anchor);
  }
  FASTCL_UNROLL
  for (int k = 0; k < V; ++k) u[k] = kept(velocity[k], param[k], anchor[k]);
}

// The chunk's elements [begin, end) by rounds of kThreads x U runs of V. All threads go through all rounds, and what lies behind the end
// counts as 0: threads of a warp add up together. sums.add(slot, values, count) takes a thread's parts of `count` neighbouring sums.
template <class C, bool kStep, int V, class P, class Sums>
FASTCL_HD void low_rank_sums(const P& p, const Chunk& c, int begin, int end, int thread, int rank, const LowRankRule& rule, Sums& sums) {
  constexpr int U = kRunsAtOnce<V>, R = kRowsAtOnce;
  const auto basis = BasisRows<C, P>::of(p, c.entry);
  FASTCL_ROLLED
  for (int round = begin; round < end; round += kThreads * U * V) {
    C z[U][V] = {}, y[kStep ? U : 1][kStep ? V : 1] = {};
    int64_t place[U];
    FASTCL_UNROLL
    for (int u = 0; u < U; ++u) {
      const int at = round + (u * kThreads + thread) * V;
      place[u] = c.begin + (at < end ? at : begin);
      if (at >= end) continue;
      const Site<V, P> site{p, c.entry, c.form, c.begin + at};
      C d[V];
      site.read(kDiagonal, d);
      site.read(kStep ? kStepGrad : kVector, z[u]);
      FASTCL_UNROLL
      for (int k = 0; k < V; ++k) {
        d[k] = sqrt(d[k]);
        z[u][k] = kStep || rule.inverse ? z[u][k] / d[k] : z[u][k] * d[k];
      }
      if constexpr (kStep) {
        read_kept<C>(site, rule, y[u]);
        FASTCL_UNROLL
        for (int k = 0; k < V; ++k) y[u][k] *= d[k];
      }
    }
    double own[3] = {};
    FASTCL_UNROLL
    for (int u = 0; u < U; ++u) {
      FASTCL_UNROLL
      for (int k = 0; k < V; ++k) {
        own[0] = fma(double(z[u][k]), double(z[u][k]), own[0]);
        if constexpr (kStep) {
          own[1] = fma(double(z[u][k]), double(y[u][k]), own[1]);
          own[2] = fma(double(y[u][k]), double(y[u][k]), own[2]);
        }
      }
    }
    sums.add((kStep ? 2 : 1) * rank, own, kStep ? 3 : 1);
    FASTCL_ROLLED
    for (int row = 0; row < rank; row += R) {
      Vector<C, V> q[R][U];
      FASTCL_UNROLL
      for (int r = 0; r < R; ++r) {
        FASTCL_UNROLL
        for (int u = 0; u < U; ++u) {
          // Without conditions, so that all of them are on their way at once: rows and runs behind the end are other ones again.
          q[r][u] = Vector<C, V>::load(basis.at(row + r < rank ? row + r : row, place[u]));
        }
      }
      double along_z[R], along_y[R];
      FASTCL_UNROLL
      for (int r = 0; r < R; ++r) {
        C sum_z = 0, sum_y = 0;  // so few terms that the type of the elements does
        FASTCL_UNROLL
        for (int u = 0; u < U; ++u) {
          const Elements<C, V> e = q[r][u].elements();
          FASTCL_UNROLL
          for (int k = 0; k < V; ++k) {
            sum_z = multiply_add(e.x[k], z[u][k], sum_z);
            if constexpr (kStep) sum_y = multiply_add(e.x[k], y[u][k], sum_y);
          }
        }
        along_z[r] = double(sum_z);
        along_y[r] = double(sum_y);
      }
      const int count = rank - row < R ? rank - row : R;
      sums.add(row, along_z, count);
      if constexpr (kStep) sums.add(rank + row, along_y, count);
    }
  }
}

// Whether a chunk's runs lie in vectors in every operand, rows of the basis too.
template <class P>
FASTCL_HD bool in_runs(const P& p, const Chunk& c) {
  return p.note(c.entry, kBasis) != 0 && ((c.form & kDimsMask) == 0 || (c.form & kVectors) != 0);
}

template <class C, bool kStep, class P, class Sums>
FASTCL_HD void low_rank_sums_thread(const P& p, const Chunk& c, int thread, int rank, const LowRankRule& rule, Sums& sums) {
  const int runs = in_runs(p, c) ? c.n / kRun<C> * kRun<C> : 0;
  low_rank_sums<C, kStep, kRun<C>>(p, c, 0, runs, thread, rank, rule, sums);
  low_rank_sums<C, kStep, 1>(p, c, runs, c.n, thread, rank, rule, sums);
}

// One that is stepped keeps its own precision.
template <class T, class C, int V>
FASTCL_HD void step_as(T* param, C step, const C (&direction)[V]) {
  Elements<T, V> e = Vector<T, V>::load(param).elements();
  FASTCL_UNROLL
  for (int k = 0; k < V; ++k) e.x[k] = stepped(e.x[k], step, direction[k]);
  Vector<T, V>::of(e).store(param);
}

// x <- D^-1/2 (z - sum_j c_j q_j), or with a step V <- u + that, W <- W - s V, where V is stored if there is a momentum.
template <class C, bool kStep, int V, class P>
FASTCL_HD void low_rank_update(const P& p, const Chunk& c, int begin, int end, int thread, int rank, const LowRankRule& rule,
                               const C* coefficients, C step) {
  constexpr int R = kRowsAtOnce;
  const auto basis = BasisRows<C, P>::of(p, c.entry);
  FASTCL_ROLLED
  for (int at = begin + thread * V; at < end; at += kThreads * V) {
    const Site<V, P> site{p, c.entry, c.form, c.begin + at};
    C d[V], x[V];
    site.read(kDiagonal, d);
    const int64_t own = site.at(kStep ? kStepGrad : kVector);
    site.read(kStep ? kStepGrad : kVector, own, x);
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) {
      d[k] = sqrt(d[k]);
      x[k] /= d[k];
    }
    FASTCL_ROLLED
    for (int row = 0; row < rank; row += 2 * R) {
      Vector<C, V> q[2 * R];
      FASTCL_UNROLL
      for (int r = 0; r < 2 * R; ++r) q[r] = Vector<C, V>::load(basis.at(row + r < rank ? row + r : row, site.first));
      FASTCL_UNROLL
      for (int r = 0; r < 2 * R; ++r) {
        if (row + r >= rank) continue;
        const C coefficient = -coefficients[row + r];
        const Elements<C, V> e = q[r].elements();
        FASTCL_UNROLL
        for (int k = 0; k < V; ++k) x[k] = multiply_add(coefficient, e.x[k], x[k]);
      }
    }
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) x[k] /= d[k];
    if constexpr (kStep) {
      C u[V];
      read_kept<C>(site, rule, u);
      FASTCL_UNROLL
      for (int k = 0; k < V; ++k) x[k] += u[k];
      if (rule.momenta != 0) site.write(rule.momenta, site.at(rule.momenta), x);
      const DType t = site.dtype(kParam);
      const int64_t to = site.at(kParam);
      if (t == DType::f32) {
        step_as(site.template address<float>(kParam, to), step, x);
      } else if (t == DType::bf16) {
        step_as(site.template address<BFloat16>(kParam, to), step, x);
      } else if (t == DType::f16) {
        step_as(site.template address<Float16>(kParam, to), step, x);
      } else {
        step_as(site.template address<double>(kParam, to), step, x);
      }
    } else {
      site.write(kVector, own, x);
    }
  }
}

template <class C, bool kStep, class P>
FASTCL_HD void low_rank_update_thread(const P& p, const Chunk& c, int thread, int rank, const LowRankRule& rule, const C* coefficients,
                                      C step) {
  const int runs = in_runs(p, c) ? c.n / kRun<C> * kRun<C> : 0;
  low_rank_update<C, kStep, kRun<C>>(p, c, 0, runs, thread, rank, rule, coefficients, step);
  low_rank_update<C, kStep, 1>(p, c, runs, c.n, thread, rank, rule, coefficients, step);
}

// ---- products of many rows
//
// Rows 0, 1, ..., rank - 1 are those of the basis, the others D^-1/2 times the vectors. One launch multiplies all pairs of two panels of
// rows by GEM's tiles; up to kMostTogether rows are one panel, and everything is read once.

constexpr int kMostTogether = 64, kPanel = kMostTogether / 2;
static_assert(kMostTogether <= kMostLists, "the stages have room");

struct RowPanels {
  int rank, first, count, second, lists;  // rows [first, first + count), and from `second` on up to `lists` of them together
  FASTCL_HD int row(int list) const { return list < count ? first + list : second + list - count; }
  // Of the lists; the basis' rows come first, and so do the vectors in an entry.
  FASTCL_HD int operand(int list) const {
    const int a = rank < first ? 0 : rank - first < count ? rank - first : count;
    const int others = lists - count;
    const int b = rank < second ? 0 : rank - second < others ? rank - second : others;
    return kOperand + list - a - b;
  }
};

template <class C, int V, class P>
FASTCL_HD void read_row(const P& p, const Chunk& c, int row, int operand, int rank, int64_t element, double* out) {
  if (row < rank) {
    const Elements<C, V> e = Vector<C, V>::load(BasisRows<C, P>::of(p, c.entry).at(row, element)).elements();
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) out[k] = double(e.x[k]);
    return;
  }
  const Site<V, P> site{p, c.entry, c.form, element};
  double d[V], x[V];
  site.read(kDiagonal, d);
  site.read(operand, x);
  FASTCL_UNROLL
  for (int k = 0; k < V; ++k) out[k] = x[k] / sqrt(d[k]);
}

template <class C, class P>
FASTCL_HD void put_rows(const P& p, const GramShape& g, const GramStage<P>& s, const RowPanels& panels, int thread, double* rows) {
  const int columns = s.columns(g), slots = s.slots(g);
  const bool dense = (s.chunk.form & kDimsMask) == 0 && p.note(s.chunk.entry, kBasis) != 0;
  FASTCL_ROLLED
  for (int u = 0; u < kSlots; ++u) {
    const int list = (thread + u * kThreads) / g.slots, slot = thread + u * kThreads - list * g.slots;
    if (list >= g.lists || slot >= slots) continue;
    const int row = panels.row(list), operand = panels.operand(list);
    const int64_t element = s.chunk.begin + s.begin + slot * kJointRun;
    double x[kJointRun] = {};
    if (dense && (slot + 1) * kJointRun <= columns) {
      read_row<C, kJointRun>(p, s.chunk, row, operand, panels.rank, element, x);
    } else {
      FASTCL_UNROLL
      for (int k = 0; k < kJointRun; ++k)
        if (slot * kJointRun + k < columns) read_row<C, 1>(p, s.chunk, row, operand, panels.rank, element + k, x + k);
    }
    FASTCL_UNROLL
    for (int k = 0; k < kJointRun; ++k) rows[list * g.row + k * slots + slot] = x[k];
  }
}

// A block's partial products of the lower triangle. team.each(phase) runs phase(thread, own) for every thread and waits for all.
template <class C, class P, class Team>
FASTCL_HD void products_block(const P& p, uint32_t block, uint32_t blocks, const RowPanels& panels, double* memory, double* part,
                              Team& team) {
  double *rows = memory, *kept = memory + kStageDoubles;
  const GramShape g = GramShape::of(panels.lists);
  team.each([&](int thread, GramTile& sum) {
    sum = {};
    for (int e = thread; e < kKeptDoubles; e += kThreads) kept[e] = 0;
  });
  int chain = 0;
  for (auto stage = GramStage<P>::first(p, block); stage.left();) {
    team.each([&](int thread, GramTile&) { put_rows<C>(p, g, stage, panels, thread, rows); });
    const int columns = stage.slots(g) * kJointRun;
    stage.advance(p, g, blocks);
    chain += columns / g.groups + 1;
    const bool keep = chain >= kGramChain || !stage.left();
    team.each([&](int thread, GramTile& sum) {
      gram_multiply(g, columns, thread, rows, sum);
      if (keep) gram_keep(thread, sum, kept);
    });
    if (keep) chain = 0;
  }
  for (int groups = g.groups; groups > 1; groups = (groups + 1) / 2)
    team.each([&](int thread, GramTile&) { gram_fold(g, groups, (groups + 1) / 2, thread, kept); });
  team.each([&](int thread, GramTile&) { gram_leave(g, thread, kept, p.base > 0, part); });
}

// ---- mixtures of the rows: y' = mix^T y. The rows behind the first `rank` go into the diagonal, if there is one.

constexpr int kMixColumns = 32, kMixWarps = kThreads / kMixColumns, kMixTile = 4;
constexpr int64_t kMixChunk = 512;

struct RowMix {
  int rank, rows;
  const double *sigma, *mix;  // null: 1; [rows, rows]
  bool widens;                // the diagonal
};

constexpr FASTCL_HD int64_t mix_doubles(int64_t rows) { return (rows + kMixWarps) * kMixColumns; }

// visit(j, y'_j) of the thread's column, for its share of the rows [begin, end).
template <class Visit>
FASTCL_HD void mix_rows(const RowMix& m, int begin, int end, int warp, const double* y, const Visit& visit) {
  FASTCL_ROLLED
  for (int first = begin + warp * kMixTile; first < end; first += kMixWarps * kMixTile) {
    double sum[kMixTile] = {};
    for (int i = 0; i < m.rows; ++i) {
      const double x = y[i * kMixColumns];
      FASTCL_UNROLL
      for (int t = 0; t < kMixTile; ++t)
        if (first + t < end) sum[t] = fma(m.mix[int64_t(i) * m.rows + first + t], x, sum[t]);
    }
    FASTCL_UNROLL
    for (int t = 0; t < kMixTile; ++t)
      if (first + t < end) visit(first + t, sum[t]);
  }
}

struct NothingKept {};

template <class C, class P, class Team>
FASTCL_HD void mix_block(const P& p, uint32_t block, const RowMix& m, double* memory, Team& team) {
  const Chunk c = Chunk::find(p, block, kMixChunk);
  const auto basis = BasisRows<C, P>::of(p, c.entry);
  double *y = memory, *squares = memory + int64_t(m.rows) * kMixColumns;
  for (int first = 0; first < c.n; first += kMixColumns) {
    team.each([&](int thread, NothingKept&) {
      const int column = thread % kMixColumns;
      for (int row = thread / kMixColumns; row < m.rows; row += kMixWarps) {
        double x = 0;
        if (first + column < c.n) {
          read_row<C, 1>(p, c, row, kOperand + row - m.rank, m.rank, c.begin + first + column, &x);
          if (row < m.rank && m.sigma != nullptr) x *= m.sigma[row];
        }
        y[row * kMixColumns + column] = x;
      }
    });
    if (m.widens)
      team.each([&](int thread, NothingKept&) {
        const int column = thread % kMixColumns, warp = thread / kMixColumns;
        double sum = 0;
        mix_rows(m, m.rank, m.rows, warp, y + column, [&](int, double x) { sum = fma(x, x, sum); });
        squares[warp * kMixColumns + column] = sum;
      });
    team.each([&](int thread, NothingKept&) {
      const int column = thread % kMixColumns, warp = thread / kMixColumns;
      const int64_t element = c.begin + first + column;
      double factor = 1;
      if (m.widens) {
        double sum = 0;
        for (int w = 0; w < kMixWarps; ++w) sum += squares[w * kMixColumns + column];
        factor += sum;
      }
      const double root = sqrt(factor);
      const bool valid = first + column < c.n;
      mix_rows(m, 0, m.rank, warp, y + column, [&](int row, double x) {
        if (valid) *const_cast<C*>(basis.at(row, element)) = C(x / root);
      });
      if (m.widens && warp == 0 && valid) {
        C* d = p.template address<C>(c.entry, kDiagonal) + element;
        *d = C(double(*d) * factor);
      }
    });
  }
}

}  // namespace fastcl::cuda
