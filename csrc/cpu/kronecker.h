// What the kronecker family's sweeps and products share: rows of matrices that lie in two tensors, and of matrices of the compute type.
#pragma once

#include "core/kronecker.h"
#include "core/parallel.h"
#include "core/view.h"

namespace fastcl::cpu {

// X = [W | b]: the weight's row-major order, and the bias as the last column. Nothing is copied.
struct Homogeneous {
  char *weight, *bias;  // bias is null where there is none
  DType weight_type, bias_type;
  int64_t rows, inputs, columns, row_stride, column_stride, bias_stride;
  Layout layout;  // of a row of the weight; empty where column_stride says all

  Homogeneous(const View& w, const View& b);
  bool dense(DType type) const { return column_stride == 1 && weight_type == type && (bias == nullptr || bias_type == type); }
  template <class C>
  C* row(int64_t i) const {
    return reinterpret_cast<C*>(weight) + i * row_stride;
  }
  template <class C>
  C* bias_at(int64_t i) const {
    return bias == nullptr ? nullptr : reinterpret_cast<C*>(bias) + i * bias_stride;
  }
};

// A matrix of the compute type with rows of unit stride.
template <class C>
struct Rows {
  C* data;
  int64_t stride;
  C* row(int64_t i) const { return data + i * stride; }
};

template <class C>
Rows<C> rows_of(const View& v) {
  return {reinterpret_cast<C*>(v.data), v.strides[0]};
}

template <class C>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::f64;
};

// Rows [row, row + rows), columns [begin, end).
struct Block {
  int64_t row, rows, begin, end;
};

// These are instantiated for float and double. out and from are matrices whose row 0 is the block's first row.
template <class C>
void read_rows(const Homogeneous& x, const Block& block, Rows<C> out);
template <class C>
void write_rows(const Homogeneous& x, const Block& block, Rows<C> from);
// m <- momentum m + g + strength h; with a step, h <- h - step m. m and h are whole matrices.
template <class C>
void momentum_rows(Rows<C> m, Rows<C> h, const Homogeneous& grad, const Block& block, double momentum, double strength, const double* step);
// w <- w - step v and h <- h - step m. h is a whole matrix; row 0 of v and m is the block's first row, column 0 the matrix's.
template <class C>
void descend_rows(const Homogeneous& w, Rows<C> h, Rows<C> v, Rows<C> m, const Block& block, double step);

}  // namespace fastcl::cpu
