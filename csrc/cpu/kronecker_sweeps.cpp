// NCL's two element-wise sweeps over layers of any size: the dual momentum before the solve, and the descent after it.

#include <algorithm>

#include "cpu/kronecker.h"
#include "cpu/ops.h"

namespace fastcl::cpu {
namespace {

constexpr int64_t kGrain = 32768;

// The elements of all layers are one range, split evenly over the threads: a thread may begin and end inside a row.
class RowSweep {
 public:
  RowSweep(const Views& weights, const Views& biases) {
    items_.reserve(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) {
      Homogeneous x(weights[i], biases[i]);
      const int64_t elements = x.rows * x.columns;
      if (elements == 0) continue;
      items_.push_back({total_, i, std::move(x)});
      total_ += elements;
    }
  }

  // Calls visit(index of the layer, its [W | b], block).
  template <class Visit>
  void run(const Pool& pool, Visit&& visit) const {
    pool.each(total_, kGrain, [&](int64_t begin, int64_t end) {
      auto item = std::upper_bound(items_.begin(), items_.end(), begin, [](int64_t at, const Item& i) { return at < i.start; }) - 1;
      for (; begin < end; ++item) {
        const int64_t stop = std::min(end, item->start + item->x.rows * item->x.columns);
        blocks(item->x.columns, begin - item->start, stop - item->start, [&](const Block& b) { visit(item->index, item->x, b); });
        begin = stop;
      }
    });
  }

 private:
  struct Item {
    int64_t start;  // of the layer's first element in the range of all elements
    size_t index;
    Homogeneous x;
  };
  std::vector<Item> items_;
  int64_t total_ = 0;

  // Whole rows together, and what is left of the first and the last row.
  template <class Visit>
  static void blocks(int64_t columns, int64_t begin, int64_t end, Visit&& visit) {
    while (begin < end) {
      const int64_t row = begin / columns, column = begin % columns;
      const int64_t rows = column == 0 ? (end - begin) / columns : 0;
      if (rows > 0) {
        visit(Block{row, rows, 0, columns});
        begin += rows * columns;
      } else {
        const int64_t n = std::min(end - begin, columns - column);
        visit(Block{row, 1, column, column + n});
        begin += n;
      }
    }
  }
};

template <class C>
void momentum(const View& m, const View& h, const Homogeneous& grad, const Block& block, double momentum, double strength,
              const double* step) {
  momentum_rows<C>(rows_of<C>(m), rows_of<C>(h), grad, block, momentum, strength, step);
}

template <class C>
void apply(const Homogeneous& x, const View& h, const View& v, const View& m, const Block& block, double step) {
  const Rows<C> direction = rows_of<C>(v), dual = rows_of<C>(m);
  descend_rows<C>(x, rows_of<C>(h), {direction.row(block.row), direction.stride}, {dual.row(block.row), dual.stride}, block, step);
}

}  // namespace

void ncl_momentum_(const Views& m, const Views& h, const Views& weight_grads, const Views& bias_grads, double rho, double strength,
                   const double* lr, const Pool& pool) {
  RowSweep(weight_grads, bias_grads).run(pool, [&](size_t i, const Homogeneous& grad, const Block& block) {
    (m[i].dtype == DType::f64 ? momentum<double> : momentum<float>)(m[i], h[i], grad, block, rho, strength, lr);
  });
}

void ncl_apply_(const Views& weights, const Views& biases, const Views& h, const Views& v, const Views& m, const double* step,
                const Pool& pool) {
  RowSweep(weights, biases).run(pool, [&](size_t i, const Homogeneous& x, const Block& block) {
    (m[i].dtype == DType::f64 ? apply<double> : apply<float>)(x, h[i], v[i], m[i], block, *step);
  });
}

}  // namespace fastcl::cpu
