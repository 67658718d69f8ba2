// Importance: element-wise maximum, the moments of a tensor, and SPG's normalised gradient.
#pragma once

#include <cmath>

#include "core/scalar.h"
#include "core/tanh.h"

namespace fastcl {

// max(a, b) in which a NaN of either side wins, as in torch.maximum.
template <class C>
FASTCL_HD C nan_max(C a, C b) {
  return a > b || a != a ? a : b;
}

template <class S, class N>
struct EMax {
  using compute = compute_t<S, N>;
  FASTCL_HD S operator()(S stored, N value) const { return store<S>(nan_max(load<compute>(stored), load<compute>(value))); }
};

// Fisher information: F + weight (c g)^2 with the c that clips g's tensor, each operation rounded, none contracted.
template <class F, class G>
struct FisherAdd {
  using compute = compute_t<F, G>;
  compute weight, coefficient;
  static FASTCL_HD FisherAdd make(double weight, double coefficient) { return {compute(weight), compute(coefficient)}; }
  FASTCL_HD F operator()(F fisher, G g) const {
    const compute x = load<compute>(g) * coefficient;
    return store<F>(load<compute>(fisher) + weight * (x * x));
  }
};

// min(1, max_norm / (norm + 1e-6)), as torch's clip_grad_norm_; a NaN stays.
FASTCL_HD double clip_coefficient(double squares, double max_norm) {
  const double c = max_norm / (sqrt(squares) + 1e-6);
  return c > 1 ? 1 : c;
}

// Count, mean and sum of squared deviations of a part of a tensor, all relative to the tensor's first element ("shift"): a constant
// tensor then has a deviation of exactly zero, and no digits cancel when the mean is large against the spread.
struct Moments {
  double count, mean, m2;
};

// Chan, Golub, LeVeque (1979): the moments of two parts together.
FASTCL_HD Moments combine(Moments a, Moments b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double count = a.count + b.count;
  const double delta = b.mean - a.mean;
  return {count, a.mean + delta * (b.count / count), a.m2 + b.m2 + delta * delta * (a.count * (b.count / count))};
}

// A tensor's moments with the shift that they are relative to. Rows of these travel between ranks.
struct Statistics {
  double shift;
  Moments moments;
};
static_assert(sizeof(Statistics) == 4 * sizeof(double), "tables of statistics are counted in doubles");

// What turns a gradient element into SPG's importance |tanh((g - mean) / std)|.
template <class C>
struct Normaliser {
  C lift;        // a power of two that keeps extreme gradients inside C's range; 1 nearly always
  C mean, rest;  // the mean in two parts: subtracting it costs no digits however large it is against the spread
  C scale;       // 1 / std

  // A tensor whose deviation is zero gets importance 0; a NaN or an Inf in it makes the moments NaN and reaches every element.
  static FASTCL_HD Normaliser make(double shift, Moments m) {
    const double std = sqrt(m.m2 / (m.count > 1 ? m.count - 1 : 1));
    const double lift = std > 0x1p60 ? 0x1p-64 : std > 0 && std < 0x1p-60 ? 0x1p64 : 1;
    const C mean = C((shift + m.mean) * lift);
    const C rest = C((shift * lift - double(mean)) + m.mean * lift);
    return {C(lift), mean, rest, std == 0 ? C(0) : C(1 / (std * lift))};
  }
  FASTCL_HD C operator()(C g) const { return abs_tanh(((g * lift - mean) - rest) * scale); }
};

}  // namespace fastcl
