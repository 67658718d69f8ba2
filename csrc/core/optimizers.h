// AdamW and SGD on one element. Multiply-adds are fused where torch's own kernels fuse them, by name and not by the compiler's choice, so
// that the bits are torch's on every processor.
#pragma once

#include <cmath>

#include "core/scalar.h"

namespace fastcl {

FASTCL_HD float fused(float a, float b, float c) { return fmaf(a, b, c); }
FASTCL_HD double fused(double a, double b, double c) { return fma(a, b, c); }
FASTCL_HD float root(float x) { return sqrtf(x); }
FASTCL_HD double root(double x) { return sqrt(x); }

// A square root as Python's x ** 0.5 takes it: in double now and then one ulp from sqrt(x), and torch's bias correction is taken so.
FASTCL_HD double half_power(double x) {
#ifdef __CUDA_ARCH__
  return sqrt(x);
#else
  volatile double half = 0.5;  // or the compiler may call sqrt
  return pow(x, half);
#endif
}

// Decoupled weight decay (Loshchilov and Hutter, ICLR 2019). hf: the order of transformers' former AdamW, which Child-Tuning's authors use:
// eps is added before the bias correction, and the updated parameter decays.
struct AdamWRule {
  double lr, beta1, beta2, eps, weight_decay;
  bool hf, maximize;
};

// What a step multiplies by: worked out in double once per tensor, whose step counter is its own.
struct AdamWScalars {
  double decay;   // of the parameter: a factor in torch's order, what is added of it in hf's
  double blend;   // of the gradient in the first moment, from the moment's side; from the gradient's if towards_gradient
  double fresh1;  // 1 - beta1
  double beta1, beta2;
  double fresh2;  // 1 - beta2
  double bias;    // what the second moment's root is divided by
  double eps;
  double size;  // of the step, negative
  bool towards_gradient, hf, maximize;

  // step: the number of this one, the first is 1.
  static FASTCL_HD AdamWScalars make(const AdamWRule& rule, double step) {
    const double bias1 = 1 - pow(rule.beta1, step), bias2 = 1 - pow(rule.beta2, step);
    AdamWScalars s;
    s.fresh1 = 1 - rule.beta1;
    s.towards_gradient = s.fresh1 >= 0.5;  // as torch's lerp, which starts from the nearer end
    s.blend = s.fresh1;
    s.beta1 = rule.beta1;
    s.beta2 = rule.beta2;
    s.fresh2 = 1 - rule.beta2;
    s.eps = rule.eps;
    s.hf = rule.hf;
    s.maximize = rule.maximize;
    s.decay = rule.hf ? -rule.lr * rule.weight_decay : 1 - rule.lr * rule.weight_decay;
    s.bias = rule.hf ? 1 : half_power(bias2);
    s.size = rule.hf ? -(rule.lr * sqrt(bias2) / bias1) : -(rule.lr / bias1);
    return s;
  }
};

template <class C>
struct AdamW {
  C decay, blend, fresh1, beta1, beta2, fresh2, bias, eps, size;
  bool towards_gradient, maximize;

  static FASTCL_HD AdamW make(const AdamWScalars& s) {
    // The far end's weight is taken of the rounded one.
    const C blend = s.towards_gradient ? C(s.blend) - C(1) : C(s.blend);
    return {C(s.decay), blend,    C(s.fresh1), C(s.beta1),         C(s.beta2), C(s.fresh2),
            C(s.bias),  C(s.eps), C(s.size),   s.towards_gradient, s.maximize};
  }

  // What the step on gradient g adds to the parameter; m and v are its moments.
  template <bool hf>
  FASTCL_HD C change(C g, C& m, C& v) const {
    const C x = maximize ? -g : g;
    m = hf ? fused(fresh1, x, m * beta1) : fused(blend, x - m, towards_gradient ? x : m);
    v = fused(fresh2 * x, x, v * beta2);
    return (size * m) / (hf ? root(v) + eps : root(v) / bias + eps);
  }

  template <bool hf>
  FASTCL_HD C moved(C p, C change) const {
    return hf ? decayed<hf>(p + change) : decayed<hf>(p) + change;
  }

  // The parameter after the step.
  template <bool hf>
  FASTCL_HD C updated(C p, C g, C& m, C& v) const {
    return moved<hf>(p, change<hf>(g, m, v));
  }

  // The parameter of an element without gradient and moments.
  template <bool hf>
  FASTCL_HD C decayed(C p) const {
    return hf ? (decay != C(0) ? fused(decay, p, p) : p) : p * decay;
  }
};

// Stochastic gradient descent with momentum as torch has it (Sutskever et al., ICML 2013, with the learning rate outside the buffer).
struct SGDRule {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize, first;  // first: the buffers begin as the gradient
};

template <class C>
struct SGD {
  C size, momentum, fresh, decay;
  bool has_decay, nesterov, maximize, first;

  static FASTCL_HD SGD make(const SGDRule& r) {
    return {C(-r.lr), C(r.momentum), C(1 - r.dampening), C(r.weight_decay), r.weight_decay != 0, r.nesterov, r.maximize, r.first};
  }

  template <bool with_momentum>
  FASTCL_HD C updated(C p, C g, C& buffer) const {
    C x = maximize ? -g : g;
    x = has_decay ? fused(decay, p, x) : x;
    if constexpr (with_momentum) {
      buffer = first ? x : fused(fresh, x, buffer * momentum);
      x = nesterov ? fused(momentum, buffer, x) : buffer;
    }
    return fused(size, x, p);
  }
};

}  // namespace fastcl
