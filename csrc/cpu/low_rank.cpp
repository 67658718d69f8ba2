// Solve and step with a precision of low rank plus a diagonal: two sweeps, each of which reads a block of all rows of the basis while the
// vectors' block is in the cache. Compiled with contraction into fused multiply-adds: results are held to tolerances.

#include "cpu/low_rank.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "core/low_rank.h"
#include "cpu/blocks.h"
#include "cpu/gram.h"
#include "cpu/ops.h"

namespace fastcl::cpu {
namespace {

constexpr int64_t kPart = 16384;
// What is worked on at once: long enough for the hardware to follow a row, short enough for the first two caches.
constexpr int64_t kBlock = 4096;
// A sum in float is at most this long per lane, and goes on in double.
constexpr int kShort = 16;
constexpr int kTile = 4;
// Blocks of other lists that are fetched while a tile of rows is worked on.
constexpr int kMore = 3;

// What is read after the rows of a block, in the order in which it is; each tile of rows fetches the next few. More streams than the
// hardware follows take turns here.
struct Ahead {
  const char* at[2 * kMore] = {};
  int count = 0;
  void add(const Operand& operand, int64_t stride, int64_t done) {
    if (stride == 1 && size_of(operand.dtype) >= 4) at[count++] = block_of(operand, 1, done);
  }
};

template <class C>
struct LaneOf;
template <>
struct LaneOf<float> {
  typedef float type __attribute__((vector_size(64)));
};
template <>
struct LaneOf<double> {
  typedef double type __attribute__((vector_size(64)));
};
template <class C>
constexpr int kLane = int(64 / sizeof(C));

FASTCL_HD void add_lane(const LaneOf<double>::type& lane, Wide& sum) { sum += lane; }
FASTCL_HD void add_lane(const LaneOf<float>::type& lane, Wide& sum) {
  typedef float Half __attribute__((vector_size(32)));
  Half half[2];
  memcpy(half, &lane, sizeof(half));
  sum += __builtin_convertvector(half[0], Wide) + __builtin_convertvector(half[1], Wide);
}

// out[i] += row i . z, and with both out_y[i] += row i . y, of R rows; the lines at next are fetched meanwhile.
template <class C, int R, bool both>
FASTCL_HD void dot_tile(const C* const* row, const C* z, const C* y, int64_t n, const char* const* next, double* out, double* out_y) {
  using Lane = typename LaneOf<C>::type;
  constexpr int W = kLane<C>;
  constexpr int64_t step = int64_t(W) * kShort;
  Wide sum[R] = {}, sum_y[R] = {};
  int64_t e = 0;
  while (e + W <= n) {
    const int64_t stop = std::min(e + step, n - n % W);
    Lane lane[R] = {}, lane_y[R] = {};
    for (; e < stop; e += W) {
      Lane x, w;
      memcpy(&x, z + e, sizeof(Lane));
      if constexpr (both) memcpy(&w, y + e, sizeof(Lane));
      for (int i = 0; i < R; ++i) {
        Lane q;
        memcpy(&q, row[i] + e, sizeof(Lane));
        lane[i] += q * x;
        if constexpr (both) lane_y[i] += q * w;
      }
      for (int i = 0; i < R + kMore; ++i) __builtin_prefetch(next[i] + e * int64_t(sizeof(C)), 0, 2);
    }
    for (int i = 0; i < R; ++i) {
      add_lane(lane[i], sum[i]);
      if constexpr (both) add_lane(lane_y[i], sum_y[i]);
    }
  }
  for (int i = 0; i < R; ++i) {
    out[i] += fold_wide(sum[i]);
    if constexpr (both) out_y[i] += fold_wide(sum_y[i]);
    for (int64_t t = e; t < n; ++t) {
      out[i] += double(row[i][t]) * double(z[t]);
      if constexpr (both) out_y[i] += double(row[i][t]) * double(y[t]);
    }
  }
}

// Calls tile(first, count) for rows by fours, then one by one; next are the rows that come after these, here or in the next block.
template <int R, class C, class Visit>
FASTCL_HD void rows_at(const RowSweep::Rows& rows, int rank, int64_t done, int first, const Ahead& ahead, const C** row, const char** next,
                       Visit&& visit) {
  for (int i = 0; i < R; ++i) {
    const char* own = rows.data + (first + i) * rows.stride + done * int64_t(sizeof(C));
    row[i] = reinterpret_cast<const C*>(own);
    const int after = first + R + i;
    next[i] = after < rank ? own + R * rows.stride : rows.data + i * rows.stride + (done + kBlock) * int64_t(sizeof(C));
  }
  for (int i = 0; i < kMore; ++i) {
    const int stream = first / kTile * kMore + i;
    next[R + i] = R == kTile && stream < ahead.count ? ahead.at[stream] : next[0];
  }
  visit();
}

template <class C, bool both>
FASTCL_CLONES void dot_rows(const RowSweep::Rows& rows, int rank, int64_t done, const Ahead& ahead, const C* z, const C* y, int64_t n,
                            double* out) {
  const C* row[kTile];
  const char* next[kTile + kMore];
  int j = 0;
  for (; j + kTile <= rank; j += kTile)
    rows_at<kTile, C>(rows, rank, done, j, ahead, row, next,
                      [&] { dot_tile<C, kTile, both>(row, z, y, n, next, out + j, out + rank + j); });
  for (; j < rank; ++j)
    rows_at<1, C>(rows, rank, done, j, ahead, row, next, [&] { dot_tile<C, 1, both>(row, z, y, n, next, out + j, out + rank + j); });
}

template <class C>
FASTCL_CLONES double dot_pair(const C* a, const C* b, int64_t n) {
  const char* next[1 + kMore];
  std::fill(next, next + 1 + kMore, reinterpret_cast<const char*>(a));
  double out = 0;
  dot_tile<C, 1, false>(&a, b, nullptr, n, next, &out, nullptr);
  return out;
}

// x -= sum_j c_j row j
template <class C>
FASTCL_CLONES void subtract_rows(const RowSweep::Rows& rows, int rank, int64_t done, const Ahead& ahead, const C* coefficients, int64_t n,
                                 C* x) {
  using Lane = typename LaneOf<C>::type;
  constexpr int W = kLane<C>;
  const C* row[kTile];
  const char* next[kTile + kMore];
  const auto tile = [&](auto count, int first) {
    constexpr int R = decltype(count)::value;
    rows_at<R, C>(rows, rank, done, first, ahead, row, next, [&] {
      int64_t e = 0;
      for (; e + W <= n; e += W) {
        Lane sum;
        memcpy(&sum, x + e, sizeof(Lane));
        for (int i = 0; i < R; ++i) {
          Lane q;
          memcpy(&q, row[i] + e, sizeof(Lane));
          sum -= coefficients[first + i] * q;
        }
        for (int i = 0; i < R + kMore; ++i) __builtin_prefetch(next[i] + e * int64_t(sizeof(C)), 0, 2);
        memcpy(x + e, &sum, sizeof(Lane));
      }
      for (; e < n; ++e)
        for (int i = 0; i < R; ++i) x[e] -= coefficients[first + i] * row[i][e];
    });
  };
  int j = 0;
  for (; j + kTile <= rank; j += kTile) tile(std::integral_constant<int, kTile>{}, j);
  for (; j < rank; ++j) tile(std::integral_constant<int, 1>{}, j);
}

// out may be the vector.
template <class C>
FASTCL_CLONES void scale(const C* vector, const C* diagonal, int64_t n, bool inverse, C* out) {
#pragma GCC ivdep
  for (int64_t e = 0; e < n; ++e) {
    const C root = std::sqrt(diagonal[e]);
    out[e] = inverse ? vector[e] / root : vector[e] * root;
  }
}

// Null: what is not read counts as 0.
template <class C>
FASTCL_CLONES void keep(const C* __restrict velocity, const C* __restrict param, const C* __restrict anchor, int64_t n, Kept<C> kept,
                        C* __restrict out) {
  if (velocity != nullptr && anchor != nullptr)
    for (int64_t e = 0; e < n; ++e) out[e] = kept(velocity[e], param[e], anchor[e]);
  else if (velocity != nullptr)
    for (int64_t e = 0; e < n; ++e) out[e] = kept.momentum * velocity[e];
  else if (anchor != nullptr)
    for (int64_t e = 0; e < n; ++e) out[e] = kept.strength * (param[e] - anchor[e]);
  else
    std::fill(out, out + n, C(0));
}

// root = diagonal^-1/2, out = vector root; out may be the vector.
template <class C>
FASTCL_CLONES void scale_by_root(const C* vector, const C* diagonal, int64_t n, C* __restrict root, C* out) {
#pragma GCC ivdep
  for (int64_t e = 0; e < n; ++e) {
    root[e] = C(1) / std::sqrt(diagonal[e]);
    out[e] = vector[e] * root[e];
  }
}

template <class C>
FASTCL_CLONES void multiply(const C* __restrict root, int64_t n, C* __restrict x) {
  for (int64_t e = 0; e < n; ++e) x[e] *= root[e];
}

// The direction u + x root into velocity and x, or with applies straight to the parameters.
template <class C, bool moves, bool pulls, bool applies>
FASTCL_CLONES void finish(C* __restrict velocity, C* __restrict param, const C* __restrict anchor, const C* __restrict root, int64_t n,
                          Kept<C> kept, C step, C* __restrict x) {
  for (int64_t e = 0; e < n; ++e) {
    C direction = x[e] * root[e];
    if constexpr (moves) direction += kept.momentum * velocity[e];
    if constexpr (pulls) direction += kept.strength * (param[e] - anchor[e]);
    if constexpr (moves) velocity[e] = direction;
    if constexpr (applies)
      param[e] = stepped(param[e], step, direction);
    else
      x[e] = direction;
  }
}

template <class P, class C>
FASTCL_CLONES void move(char* params, int64_t stride, int64_t n, C step, const C* __restrict direction) {
  P* p = reinterpret_cast<P*>(params);
  if (stride == 1)
#pragma GCC ivdep
    for (int64_t e = 0; e < n; ++e) p[e] = stepped(p[e], step, direction[e]);
  else
    for (int64_t e = 0; e < n; ++e) p[e * stride] = stepped(p[e * stride], step, direction[e]);
}

// Runs body(part, type) for every part, in the type of the diagonal.
template <class Body>
void each_part(const Views& diagonal, const RowSweep& sweep, const Pool& pool, Body&& body) {
  const bool wide = !diagonal.empty() && diagonal[0].dtype == DType::f64;
  pool.each(sweep.parts(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      if (wide)
        body(p, Type<double>{});
      else
        body(p, Type<float>{});
  });
}

template <class Body>
void each_block(int64_t n, Body&& body) {
  for (int64_t done = 0; done < n; done += kBlock) body(done, std::min(kBlock, n - done));
}

// The lists of a step as operands; those that a factor of 0 leaves out are not there.
struct StepSweep {
  static constexpr int kDiagonal = 0, kGrads = 1, kParams = 2;
  int momenta = -1, anchors = -1;
  RowSweep rows;

  static std::vector<const Views*> lists_of(const LowRankStep& in) {
    std::vector<const Views*> lists{&in.diagonal, &in.grads, &in.params};
    if (in.momentum != 0) lists.push_back(&in.momenta);
    if (in.strength != 0) lists.push_back(&in.anchors);
    return lists;
  }
  explicit StepSweep(const LowRankStep& in) : rows(lists_of(in), in.basis, kPart) {
    if (in.momentum != 0) momenta = 3;
    if (in.strength != 0) anchors = momenta < 0 ? 3 : 4;
  }

  int lists() const { return 3 + (momenta >= 0) + (anchors >= 0); }

  // The end of a block: V and W from x root.
  template <class C>
  void finish_block(const LowRankStep& in, const Operand* at, const int64_t* strides, int64_t done, int64_t m, C step, const C* root,
                    C* x) const {
    const Operand& params = at[kParams];
    const int64_t stride = strides[kParams];
    char* data = block_of(params, stride, done);
    const bool applies = params.dtype == dtype_of<C> && stride == 1;
    alignas(64) C copy[kBlock];
    C* w = applies ? reinterpret_cast<C*>(data) : copy;
    if (!applies && anchors >= 0) read_block<C>(params, stride, done, m, copy);
    const auto own = [&](int list) { return list < 0 ? nullptr : reinterpret_cast<C*>(block_of(at[list], 1, done)); };
    const auto run = [&](auto moves, auto pulls, auto straight) {
      finish<C, decltype(moves)::value, decltype(pulls)::value, decltype(straight)::value>(own(momenta), w, own(anchors), root, m,
                                                                                           {C(in.momentum), C(in.strength)}, step, x);
    };
    const auto with = [&](bool flag, auto&& f) { return flag ? f(std::true_type{}) : f(std::false_type{}); };
    with(momenta >= 0,
         [&](auto moves) { with(anchors >= 0, [&](auto pulls) { with(applies, [&](auto straight) { run(moves, pulls, straight); }); }); });
    if (!applies) with_floating(params.dtype, [&](auto t) { move<typename decltype(t)::type, C>(data, stride, m, step, x); });
  }

  // u of a block, in out.
  template <class C>
  void kept(const LowRankStep& in, const Operand* at, const int64_t* strides, int64_t done, int64_t m, C* out) const {
    alignas(64) C param[kBlock];
    const auto own = [&](int list) { return list < 0 ? nullptr : reinterpret_cast<const C*>(block_of(at[list], 1, done)); };
    const C* w = anchors < 0 ? nullptr : read_block<C>(at[kParams], strides[kParams], done, m, param);
    keep<C>(own(momenta), w, own(anchors), m, {C(in.momentum), C(in.strength)}, out);
  }
};

// A block of D^-1/2 x or D^1/2 x.
template <class C>
void scaled(const Operand* at, const int64_t* strides, int vector, int64_t done, int64_t m, bool inverse, C* out) {
  const C* x = read_block<C>(at[vector], strides[vector], done, m, out);
  scale<C>(x, reinterpret_cast<const C*>(block_of(at[0], 1, done)), m, inverse, out);
}

// The same with D^-1/2 itself.
template <class C>
void scaled_by_root(const Operand* at, const int64_t* strides, int vector, int64_t done, int64_t m, C* root, C* out) {
  const C* x = read_block<C>(at[vector], strides[vector], done, m, out);
  scale_by_root<C>(x, reinterpret_cast<const C*>(block_of(at[0], 1, done)), m, root, out);
}

template <class C>
std::vector<C> narrowed(const double* values, int count) {
  return std::vector<C>(values, values + count);
}

}  // namespace

void low_rank_products(const Views& vectors, const Views& diagonal, const Views& basis, bool inverse, double* out, const Pool& pool) {
  const RowSweep sweep({&diagonal, &vectors}, basis, kPart);
  const int rank = sweep.rank(), width = rank + 1;
  std::vector<double> parts(size_t(std::max<int64_t>(sweep.parts(), 1) * width));
  each_part(diagonal, sweep, pool, [&](int64_t p, auto type) {
    using C = typename decltype(type)::type;
    double* sums = parts.data() + p * width;
    alignas(64) C z[kBlock];
    sweep.part(p, [&](const Operand* at, const int64_t* strides, const RowSweep::Rows& rows, int64_t n) {
      each_block(n, [&](int64_t done, int64_t m) {
        scaled<C>(at, strides, 1, done, m, inverse, z);
        Ahead ahead;
        for (int list : {0, 1}) ahead.add(at[list], strides[list], done + kBlock);
        dot_rows<C, false>(rows, rank, done, ahead, z, nullptr, m, sums);
        sums[rank] += dot_pair<C>(z, z, m);
      });
    });
  });
  add_pairwise(parts.data(), sweep.parts(), width);
  std::copy(parts.begin(), parts.begin() + width, out);
}

void low_rank_update_(const Views& grads, const Views& diagonal, const Views& basis, const double* coefficients, const Pool& pool) {
  const RowSweep sweep({&diagonal, &grads}, basis, kPart);
  const int rank = sweep.rank();
  each_part(diagonal, sweep, pool, [&](int64_t p, auto type) {
    using C = typename decltype(type)::type;
    const std::vector<C> c = narrowed<C>(coefficients, rank);
    alignas(64) C x[kBlock], root[kBlock];
    sweep.part(p, [&](const Operand* at, const int64_t* strides, const RowSweep::Rows& rows, int64_t n) {
      each_block(n, [&](int64_t done, int64_t m) {
        scaled_by_root<C>(at, strides, 1, done, m, root, x);
        Ahead ahead;
        for (int list : {0, 1}) ahead.add(at[list], strides[list], done + kBlock);
        subtract_rows<C>(rows, rank, done, ahead, c.data(), m, x);
        multiply<C>(root, m, x);
        write_block<C>(x, at[1], strides[1], done, m);
      });
    });
  });
}

void low_rank_step_products(const LowRankStep& in, double* out, const Pool& pool) {
  const StepSweep sweep(in);
  const int rank = sweep.rows.rank(), width = 2 * rank + 3;
  std::vector<double> parts(size_t(std::max<int64_t>(sweep.rows.parts(), 1) * width));
  each_part(in.diagonal, sweep.rows, pool, [&](int64_t p, auto type) {
    using C = typename decltype(type)::type;
    double* sums = parts.data() + p * width;
    alignas(64) C z[kBlock], y[kBlock];
    sweep.rows.part(p, [&](const Operand* at, const int64_t* strides, const RowSweep::Rows& rows, int64_t n) {
      each_block(n, [&](int64_t done, int64_t m) {
        scaled<C>(at, strides, StepSweep::kGrads, done, m, true, z);
        sweep.kept<C>(in, at, strides, done, m, y);
        scale<C>(y, reinterpret_cast<const C*>(block_of(at[0], 1, done)), m, false, y);
        Ahead ahead;
        for (int list = 0; list < sweep.lists(); ++list) ahead.add(at[list], strides[list], done + kBlock);
        dot_rows<C, true>(rows, rank, done, ahead, z, y, m, sums);
        sums[2 * rank] += dot_pair<C>(z, z, m);
        sums[2 * rank + 1] += dot_pair<C>(z, y, m);
        sums[2 * rank + 2] += dot_pair<C>(y, y, m);
      });
    });
  });
  add_pairwise(parts.data(), sweep.rows.parts(), width);
  std::copy(parts.begin(), parts.begin() + width, out);
}

void low_rank_step_update_(const LowRankStep& in, const double* coefficients, double step, const Pool& pool) {
  const StepSweep sweep(in);
  const int rank = sweep.rows.rank();
  each_part(in.diagonal, sweep.rows, pool, [&](int64_t p, auto type) {
    using C = typename decltype(type)::type;
    const std::vector<C> c = narrowed<C>(coefficients, rank);
    alignas(64) C x[kBlock], root[kBlock];
    sweep.rows.part(p, [&](const Operand* at, const int64_t* strides, const RowSweep::Rows& rows, int64_t n) {
      each_block(n, [&](int64_t done, int64_t m) {
        scaled_by_root<C>(at, strides, StepSweep::kGrads, done, m, root, x);
        Ahead ahead;
        for (int list = StepSweep::kParams; list < sweep.lists(); ++list) ahead.add(at[list], strides[list], done);
        for (int list : {StepSweep::kDiagonal, StepSweep::kGrads}) ahead.add(at[list], strides[list], done + kBlock);
        subtract_rows<C>(rows, rank, done, ahead, c.data(), m, x);
        sweep.finish_block<C>(in, at, strides, done, m, C(step), root, x);
      });
    });
  });
}

}  // namespace fastcl::cpu
