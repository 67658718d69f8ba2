// The Kronecker-factored precision on small layers: everything that a layer needs, both products, the momentum, the norm and the update,
// while the layer is in the cache; layers in parallel.

#include "cpu/kronecker.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "core/dtypes.h"
#include "cpu/kronecker_tiles.h"
#include "cpu/ops.h"

namespace fastcl::cpu {
namespace {

// Multiply-adds that are worth a thread's start.
constexpr int64_t kGrain = 1 << 17;

struct Layer {
  size_t index;
  int64_t rows, columns, stride;  // of G X A; of rows in scratch, in elements
  bool wide;                      // computed in double
  int64_t work;
  int64_t scratch;  // bytes
};

std::vector<Layer> largest_first(const Views& a, const Views& g) {
  std::vector<Layer> layers;
  layers.reserve(a.size());
  for (size_t i = 0; i < a.size(); ++i) {
    const int64_t m = g[i].shape[0], n = a[i].shape[0], size = size_of(a[i].dtype);
    if (m == 0 || n == 0) continue;
    const int64_t lanes = kVectorBytes / size, stride = (n + lanes - 1) / lanes * lanes;
    layers.push_back({i, m, n, stride, size == 8, m * n * (m + n) * size / 4, (m + n + 2 * kTallest) * stride * size});
  }
  std::stable_sort(layers.begin(), layers.end(), [](const Layer& x, const Layer& y) { return x.work > y.work; });
  return layers;
}

class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(static_cast<char*>(::operator new(size_t(bytes), std::align_val_t(kVectorBytes)))) {
    memset(data_.get(), 0, size_t(bytes));  // the columns beyond a matrix's own are computed with
  }
  char* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(kVectorBytes)); }
  };
  std::unique_ptr<char, Free> data_;
};

// Threads take layer after layer; which one takes which shows nowhere.
template <class F>
void each_layer(const Views& a, const Views& g, const Pool& pool, F&& f) {
  const std::vector<Layer> layers = largest_first(a, g);
  int64_t work = 0, bytes = 0;
  for (const Layer& l : layers) {
    work += l.work;
    bytes = std::max(bytes, l.scratch);
  }
  std::atomic<size_t> next{0};
  pool.each(work, kGrain, [&](int64_t, int64_t) {
    size_t k = next.fetch_add(1, std::memory_order_relaxed);
    if (k >= layers.size()) return;
    const Scratch scratch(bytes);
    for (; k < layers.size(); k = next.fetch_add(1, std::memory_order_relaxed)) {
      if (layers[k].wide)
        f(Type<double>{}, layers[k], reinterpret_cast<double*>(scratch.data()));
      else
        f(Type<float>{}, layers[k], reinterpret_cast<float*>(scratch.data()));
    }
  });
}

template <class C>
FASTCL_CLONES void copy_rows(Rows<C> from, Rows<C> to, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; ++i) {
    const C* __restrict x = from.row(i);
    C* __restrict out = to.row(i);
    for (int64_t j = 0; j < n; ++j) out[j] = x[j];
  }
}

// <X, Y> in double, in an order that depends on the sizes alone.
template <class C>
FASTCL_CLONES double dot_rows(Rows<C> x, Rows<C> y, int64_t rows, int64_t n) {
  constexpr int kLanes = 16;
  double lane[kLanes] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const C *u = x.row(i), *v = y.row(i);
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes)
      for (int l = 0; l < kLanes; ++l) lane[l] += double(u[j + l]) * double(v[j + l]);
    for (int l = 0; j < n; ++j, ++l) lane[l] += double(u[j]) * double(v[j]);
  }
  double sum = 0;
  for (double one : lane) sum += one;
  return sum;
}

// G X A by blocks of rows. stage(x) fills X; finish(first row, rows, rows of G X A, the same rows of X) gets each block while it is in the
// first-level cache.
template <class C, class Stage, class Finish>
void sandwich(const Layer& layer, const View& a, const View& g, C* scratch, Stage&& stage, Finish&& finish) {
  const int64_t m = layer.rows, n = layer.columns, stride = layer.stride;
  const Rows<C> x{scratch, stride}, right{x.row(m), stride}, half{right.row(n), stride}, out{half.row(kTallest), stride};
  const Rows<C> left = rows_of<C>(g);
  stage(x);
  copy_rows<C>(rows_of<C>(a), right, n, n);
  for (int64_t i = 0; i < m;) {
    const Tiles<C> tile = tiles<C>(m - i);
    const C* row[kTallest];
    // Rows beyond the last one are the last one again.
    for (int r = 0; r < tile.rows; ++r) row[r] = left.row(std::min(i + r, m - 1));
    tile.product(row, m, x.data, stride, n, half.data);
    for (int r = 0; r < tile.rows; ++r) row[r] = half.row(r);
    tile.product(row, n, right.data, stride, n, out.data);
    const int64_t rows = std::min<int64_t>(tile.rows, m - i);
    finish(i, rows, out, Rows<C>{x.row(i), stride});
    i += rows;
  }
}

}  // namespace

void kron_small_(const Views& weights, const Views& biases, const Views& a, const Views& g, const Pool& pool) {
  each_layer(a, g, pool, [&](auto type, const Layer& l, auto* scratch) {
    using C = typename decltype(type)::type;
    const Homogeneous own(weights[l.index], biases[l.index]);
    sandwich<C>(
        l, a[l.index], g[l.index], scratch, [&](Rows<C> x) { read_rows<C>(own, {0, l.rows, 0, l.columns}, x); },
        [&](int64_t i, int64_t rows, Rows<C> product, Rows<C>) { write_rows<C>(own, {i, rows, 0, l.columns}, product); });
  });
}

double kron_small_quadratic(const Views& weights, const Views& biases, const Views& a, const Views& g, const Pool& pool) {
  std::vector<double> sums(a.size());
  each_layer(a, g, pool, [&](auto type, const Layer& l, auto* scratch) {
    using C = typename decltype(type)::type;
    const Homogeneous own(weights[l.index], biases[l.index]);
    double sum = 0;
    sandwich<C>(
        l, a[l.index], g[l.index], scratch, [&](Rows<C> x) { read_rows<C>(own, {0, l.rows, 0, l.columns}, x); },
        [&](int64_t, int64_t rows, Rows<C> product, Rows<C> x) { sum += dot_rows<C>(x, product, rows, l.columns); });
    sums[l.index] = sum;
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

void ncl_small_step_(const Views& weights, const Views& biases, const Views& weight_grads, const Views& bias_grads, const Views& m,
                     const Views& h, const Views& a, const Views& g, double lr, double momentum, double strength, const Pool& pool) {
  each_layer(a, g, pool, [&](auto type, const Layer& l, auto* scratch) {
    using C = typename decltype(type)::type;
    const Homogeneous own(weights[l.index], biases[l.index]), grad(weight_grads[l.index], bias_grads[l.index]);
    const Rows<C> dual = rows_of<C>(m[l.index]), pull = rows_of<C>(h[l.index]);
    sandwich<C>(
        l, a[l.index], g[l.index], scratch,
        [&](Rows<C> x) {
          momentum_rows<C>(dual, pull, grad, {0, l.rows, 0, l.columns}, momentum, strength, nullptr);
          copy_rows<C>(dual, x, l.rows, l.columns);
        },
        [&](int64_t i, int64_t rows, Rows<C> product, Rows<C> x) { descend_rows<C>(own, pull, product, x, {i, rows, 0, l.columns}, lr); });
  });
}

void ncl_small_direction_(const Views& m, const Views& v, const Views& weight_grads, const Views& bias_grads, const Views& h,
                          const Views& a, const Views& g, double momentum, double strength, double* products, const Pool& pool) {
  std::fill(products, products + a.size(), 0.0);
  each_layer(a, g, pool, [&](auto type, const Layer& l, auto* scratch) {
    using C = typename decltype(type)::type;
    const Homogeneous grad(weight_grads[l.index], bias_grads[l.index]);
    const Rows<C> dual = rows_of<C>(m[l.index]), out = rows_of<C>(v[l.index]);
    double sum = 0;
    sandwich<C>(
        l, a[l.index], g[l.index], scratch,
        [&](Rows<C> x) {
          momentum_rows<C>(dual, rows_of<C>(h[l.index]), grad, {0, l.rows, 0, l.columns}, momentum, strength, nullptr);
          copy_rows<C>(dual, x, l.rows, l.columns);
        },
        [&](int64_t i, int64_t rows, Rows<C> product, Rows<C> x) {
          copy_rows<C>(product, {out.row(i), out.stride}, rows, l.columns);
          sum += dot_rows<C>(x, product, rows, l.columns);
        });
    products[l.index] = sum;
  });
}

}  // namespace fastcl::cpu
