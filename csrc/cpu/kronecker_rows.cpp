// The element-wise loops of the kronecker family, on blocks of rows. Compiled with contraction into fused multiply-adds.

#include <algorithm>

#include "core/dtypes.h"
#include "cpu/blocks.h"
#include "cpu/kronecker.h"

namespace fastcl::cpu {
namespace {

constexpr int64_t kBlock = 512;

template <class C>
FASTCL_CLONES void accumulate(Rows<C> m, Rows<C> h, Rows<C> g, const C* bias, int64_t bias_stride, int64_t rows, int64_t n, double momentum,
                              double strength) {
  const auto op = DualMomentum<C>::make(momentum, strength);
  for (int64_t i = 0; i < rows; ++i) {
    C* __restrict own = m.row(i);
    const C* __restrict pull = h.row(i);
    const C* __restrict grad = g.row(i);
    for (int64_t j = 0; j < n; ++j) own[j] = op(own[j], grad[j], pull[j]);
    if (bias != nullptr) own[n] = op(own[n], bias[i * bias_stride], pull[n]);
  }
}

template <class C>
FASTCL_CLONES void accumulate_and_descend(Rows<C> m, Rows<C> h, Rows<C> g, const C* bias, int64_t bias_stride, int64_t rows, int64_t n,
                                          double momentum, double strength, double step) {
  const auto op = DualMomentum<C>::make(momentum, strength);
  const auto descent = Descent<C>::make(step);
  for (int64_t i = 0; i < rows; ++i) {
    C* __restrict own = m.row(i);
    C* __restrict pull = h.row(i);
    const C* __restrict grad = g.row(i);
    for (int64_t j = 0; j < n; ++j) {
      const C next = op(own[j], grad[j], pull[j]);
      own[j] = next;
      pull[j] = descent(pull[j], next);
    }
    if (bias != nullptr) {
      own[n] = op(own[n], bias[i * bias_stride], pull[n]);
      pull[n] = descent(pull[n], own[n]);
    }
  }
}

// Both descents at once where the weight is a matrix of the compute type too.
template <class C>
FASTCL_CLONES void descend_both(Rows<C> w, C* bias, int64_t bias_stride, Rows<C> h, Rows<C> v, Rows<C> m, int64_t rows, int64_t n,
                                double step) {
  const auto op = Descent<C>::make(step);
  for (int64_t i = 0; i < rows; ++i) {
    C* __restrict weight = w.row(i);
    C* __restrict pull = h.row(i);
    const C* __restrict direction = v.row(i);
    const C* __restrict dual = m.row(i);
    for (int64_t j = 0; j < n; ++j) {
      weight[j] = op(weight[j], direction[j]);
      pull[j] = op(pull[j], dual[j]);
    }
    if (bias != nullptr) {
      bias[i * bias_stride] = op(bias[i * bias_stride], direction[n]);
      pull[n] = op(pull[n], dual[n]);
    }
  }
}

template <class C>
FASTCL_CLONES void descend(Rows<C> x, Rows<C> by, int64_t rows, int64_t n, double step) {
  const auto op = Descent<C>::make(step);
  for (int64_t i = 0; i < rows; ++i) {
    C* __restrict own = x.row(i);
    const C* __restrict direction = by.row(i);
    for (int64_t j = 0; j < n; ++j) own[j] = op(own[j], direction[j]);
  }
}

// A parameter of float64 keeps its digits over factors of float32.
template <class T, class C>
FASTCL_CLONES void descend_run(char* data, int64_t stride, const C* direction, int64_t n, double step) {
  using D = compute_t<T, C>;
  const auto op = Descent<D>::make(step);
  T* x = reinterpret_cast<T*>(data);
  if (stride == 1)
    for (int64_t e = 0; e < n; ++e) x[e] = store<T>(op(load<D>(x[e]), D(direction[e])));
  else
    for (int64_t e = 0; e < n; ++e) x[e * stride] = store<T>(op(load<D>(x[e * stride]), D(direction[e])));
}

// visit(data, dtype, stride, n, columns since begin) for the runs of a part of one row.
template <class Visit>
void runs(const Homogeneous& x, int64_t i, int64_t begin, int64_t end, Visit&& visit) {
  const int64_t stop = std::min(end, x.inputs);
  if (begin < stop) {
    char* row = x.weight + i * x.row_stride * size_of(x.weight_type);
    if (x.layout.sizes.empty())
      visit(row + begin * x.column_stride * size_of(x.weight_type), x.weight_type, x.column_stride, stop - begin, int64_t(0));
    else {
      int64_t done = 0;
      walk(x.layout, begin, stop, [&](const int64_t* at, int64_t n) {
        visit(row + at[0] * size_of(x.weight_type), x.weight_type, x.layout.stride(0)[0], n, done);
        done += n;
      });
    }
  }
  if (end > x.inputs) visit(x.bias + i * x.bias_stride * size_of(x.bias_type), x.bias_type, int64_t(1), int64_t(1), x.inputs - begin);
}

}  // namespace

Homogeneous::Homogeneous(const View& w, const View& b)
    : weight(w.data),
      bias(b.elements > 0 ? b.data : nullptr),
      weight_type(w.dtype),
      bias_type(b.dtype),
      rows(w.shape[0]),
      inputs(inputs_of(w)),
      columns(inputs + (bias != nullptr)),
      row_stride(w.strides[0]),
      column_stride(1),
      bias_stride(bias != nullptr ? b.strides[0] : 0) {
  if (w.ndim == 2) {
    if (w.shape[1] > 1) column_stride = w.strides[1];
    return;
  }
  layout = row_layout(w);
  if (layout.ndim() > 1) {
    column_stride = 0;
    return;
  }
  column_stride = layout.strides[0];
  layout = {};
}

template <class C>
void read_rows(const Homogeneous& x, const Block& block, Rows<C> out) {
  for (int64_t i = 0; i < block.rows; ++i)
    runs(x, block.row + i, block.begin, block.end, [&](const char* data, DType type, int64_t stride, int64_t n, int64_t done) {
      with_floating(type, [&](auto t) { widen_strided<typename decltype(t)::type, C>(data, stride, n, out.row(i) + done); });
    });
}

template <class C>
void write_rows(const Homogeneous& x, const Block& block, Rows<C> from) {
  for (int64_t i = 0; i < block.rows; ++i)
    runs(x, block.row + i, block.begin, block.end, [&](char* data, DType type, int64_t stride, int64_t n, int64_t done) {
      with_floating(type, [&](auto t) { narrow_strided<typename decltype(t)::type, C>(from.row(i) + done, data, stride, n); });
    });
}

template <class C>
void momentum_rows(Rows<C> m, Rows<C> h, const Homogeneous& grad, const Block& block, double momentum, double strength,
                   const double* step) {
  const auto run = [&](int64_t row, int64_t begin, Rows<C> g, const C* bias, int64_t rows, int64_t n) {
    const Rows<C> own{m.row(row) + begin, m.stride}, pull{h.row(row) + begin, h.stride};
    if (step == nullptr)
      accumulate<C>(own, pull, g, bias, grad.bias_stride, rows, n, momentum, strength);
    else
      accumulate_and_descend<C>(own, pull, g, bias, grad.bias_stride, rows, n, momentum, strength, *step);
  };
  if (grad.dense(DTypeOf<C>::value)) {
    const int64_t stop = std::min(block.end, grad.inputs);
    const C* bias = block.end > grad.inputs ? grad.bias_at<C>(block.row) : nullptr;
    run(block.row, block.begin, {grad.row<C>(block.row) + block.begin, grad.row_stride}, bias, block.rows, stop - block.begin);
    return;
  }
  C buffer[kBlock];
  for (int64_t i = block.row; i < block.row + block.rows; ++i)
    for (int64_t begin = block.begin; begin < block.end; begin += kBlock) {
      const int64_t n = std::min(kBlock, block.end - begin);
      read_rows<C>(grad, {i, 1, begin, begin + n}, {buffer, kBlock});
      run(i, begin, {buffer, kBlock}, nullptr, 1, n);
    }
}

template <class C>
void descend_rows(const Homogeneous& w, Rows<C> h, Rows<C> v, Rows<C> m, const Block& block, double step) {
  const Rows<C> pull{h.row(block.row) + block.begin, h.stride};
  v.data += block.begin;
  m.data += block.begin;
  if (w.dense(DTypeOf<C>::value)) {
    const int64_t stop = std::min(block.end, w.inputs);
    C* bias = block.end > w.inputs ? w.bias_at<C>(block.row) : nullptr;
    descend_both<C>({w.row<C>(block.row) + block.begin, w.row_stride}, bias, w.bias_stride, pull, v, m, block.rows, stop - block.begin,
                    step);
    return;
  }
  descend<C>(pull, m, block.rows, block.end - block.begin, step);
  for (int64_t i = 0; i < block.rows; ++i)
    runs(w, block.row + i, block.begin, block.end, [&](char* data, DType type, int64_t stride, int64_t n, int64_t done) {
      with_floating(type, [&](auto t) { descend_run<typename decltype(t)::type, C>(data, stride, v.row(i) + done, n, step); });
    });
}

#define FASTCL_ROWS(C)                                                                                               \
  template void read_rows<C>(const Homogeneous&, const Block&, Rows<C>);                                             \
  template void write_rows<C>(const Homogeneous&, const Block&, Rows<C>);                                            \
  template void momentum_rows<C>(Rows<C>, Rows<C>, const Homogeneous&, const Block&, double, double, const double*); \
  template void descend_rows<C>(const Homogeneous&, Rows<C>, Rows<C>, Rows<C>, const Block&, double);
FASTCL_ROWS(float)
FASTCL_ROWS(double)
#undef FASTCL_ROWS

}  // namespace fastcl::cpu
