// The diagonal of the empirical Fisher information, each tensor's gradient clipped by its own norm.

#include <deque>

#include "core/dtypes.h"
#include "core/importance.h"
#include "cpu/lanes.h"
#include "cpu/ops.h"
#include "cpu/sweep.h"

namespace fastcl::cpu {
namespace {

// The unit of the reductions. Its boundaries depend on the tensor alone, never on the threads: that fixes the order of summation.
constexpr int64_t kChunk = 16384;
constexpr int64_t kBlock = 1024;
// A tensor that is at most this part of all, and this large, is one thread's work from the norm to the sum: what was read for the norm is
// still in the last-level cache.
constexpr int64_t kOwnedPart = 32, kOwnedBytes = 16 << 20;

template <class G>
FASTCL_CLONES double square_run(const char* data, int64_t stride, int64_t n) {
  const G* g = reinterpret_cast<const G*>(data);
  const auto square = [](G x) { return load<double>(x) * load<double>(x); };
  if (stride == 1) return lane_sum(g, n, square);
  double sum = 0;
  for (int64_t done = 0; done < n; done += kBlock) {
    G packed[kBlock];
    const int64_t m = std::min(kBlock, n - done);
    for (int64_t e = 0; e < m; ++e) packed[e] = g[(done + e) * stride];
    sum += lane_sum(packed, m, square);
  }
  return sum;
}

// The sum of chunk's squares.
double chunk_squares(const View& g, const Layout* layout, int64_t chunk) {
  const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, g.numel());
  return with_floating(g.dtype, [&](auto t) {
    using G = typename decltype(t)::type;
    if (layout == nullptr) return square_run<G>(g.data + begin * int64_t(sizeof(G)), 1, end - begin);
    double sum = 0;
    walk(*layout, begin, end,
         [&](const int64_t* at, int64_t n) { sum += square_run<G>(g.data + at[0] * int64_t(sizeof(G)), layout->stride(0)[0], n); });
    return sum;
  });
}

double all_squares(const View& g, const Layout* layout) {
  double sum = 0;
  for (int64_t c = 0; c * kChunk < g.numel(); ++c) sum += chunk_squares(g, layout, c);
  return sum;
}

// Null where memory is one run.
const Layout* layout_of(const View& g, std::deque<Layout>& layouts) {
  const View* one = &g;
  return is_contiguous(g) || g.numel() == 0 ? nullptr : &layouts.emplace_back(coalesce(&one, 1));
}

struct Factors {
  double weight, coefficient;
};

template <class F, class G>
FASTCL_CLONES void add_run(char* fisher, const char* grad, int64_t n, int64_t fisher_stride, int64_t grad_stride, Factors factors) {
  run_elements<F, G>(fisher, grad, n, fisher_stride, grad_stride, FisherAdd<F, G>::make(factors.weight, factors.coefficient));
}

RunWith<Factors> add_table(DType fisher, DType grad) {
  return with_floating(fisher, [&](auto f) {
    return with_floating(grad, [&](auto g) -> RunWith<Factors> { return add_run<typename decltype(f)::type, typename decltype(g)::type>; });
  });
}

// Tensors that each are one thread's work.
void add_owned(const Views& fisher, const Views& grads, double weight, double max_norm, const Pool& pool) {
  struct Item {
    int64_t start;  // of the tensor's first element in the range of all elements
    const Layout *grad, *both;
  };
  std::vector<Item> items;
  std::deque<Layout> layouts;
  int64_t total = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    const View* both[] = {&fisher[i], &grads[i]};
    const bool dense = is_contiguous(fisher[i]) && is_contiguous(grads[i]);
    items.push_back({total, layout_of(grads[i], layouts), dense ? nullptr : &layouts.emplace_back(coalesce(both, 2))});
    total += grads[i].numel();
  }
  pool.each(total, kChunk, [&](int64_t begin, int64_t end) {
    const auto from = std::lower_bound(items.begin(), items.end(), begin, [](const Item& i, int64_t at) { return i.start < at; });
    for (auto item = from; item != items.end() && item->start < end; ++item) {
      const View &f = fisher[size_t(item - items.begin())], &g = grads[size_t(item - items.begin())];
      const Factors factors{weight, clip_coefficient(all_squares(g, item->grad), max_norm)};
      const auto run = add_table(f.dtype, g.dtype);
      if (item->both == nullptr) {
        run(f.data, g.data, g.numel(), 1, 1, factors);
        continue;
      }
      const int64_t* strides = item->both->stride(0);
      walk(*item->both, 0, g.numel(), [&](const int64_t* at, int64_t n) {
        run(f.data + at[0] * size_of(f.dtype), g.data + at[1] * size_of(g.dtype), n, strides[0], strides[1], factors);
      });
    }
  });
}

}  // namespace

void fisher_squares(const Views& grads, double* squares, const Pool& pool) {
  std::vector<int64_t> starts{0};  // of each tensor's chunks
  std::deque<Layout> layouts;
  std::vector<const Layout*> layout;
  for (const View& g : grads) {
    starts.push_back(starts.back() + (g.numel() + kChunk - 1) / kChunk);
    layout.push_back(layout_of(g, layouts));
  }
  std::vector<double> sums(size_t(starts.back()));
  pool.each(starts.back(), 1, [&](int64_t begin, int64_t end) {
    size_t i = size_t(std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin()) - 1;
    for (int64_t c = begin; c < end; ++c) {
      while (c >= starts[i + 1]) ++i;
      sums[size_t(c)] = chunk_squares(grads[i], layout[i], c - starts[i]);
    }
  });
  for (size_t i = 0; i < grads.size(); ++i) {
    squares[i] = 0;
    for (int64_t c = starts[i]; c < starts[i + 1]; ++c) squares[i] += sums[size_t(c)];
  }
}

void fisher_update_(const Views& fisher, const Views& grads, double weight, const double* coefficients, const Pool& pool) {
  PairSweepWith<Factors>(fisher, grads, add_table).run_each([&](size_t i) -> Factors { return {weight, coefficients[i]}; }, pool);
}

void fisher_add_(const Views& fisher, const Views& grads, double weight, const double* max_norm, const Pool& pool) {
  if (max_norm == nullptr) {
    PairSweepWith<Factors>(fisher, grads, add_table).run({weight, 1}, pool);
    return;
  }
  int64_t total = 0;
  for (const View& g : grads) total += g.numel();
  Views owned[2], shared[2];  // fisher, grads
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t n = grads[i].numel();
    if (n == 0) continue;
    Views* lists = n * kOwnedPart <= total && n * size_of(grads[i].dtype) <= kOwnedBytes ? owned : shared;
    lists[0].push_back(fisher[i]);
    lists[1].push_back(grads[i]);
  }
  add_owned(owned[0], owned[1], weight, *max_norm, pool);
  std::vector<double> factors(shared[1].size());
  fisher_squares(shared[1], factors.data(), pool);
  for (double& f : factors) f = clip_coefficient(f, *max_norm);
  fisher_update_(shared[0], shared[1], weight, factors.data(), pool);
}

}  // namespace fastcl::cpu
