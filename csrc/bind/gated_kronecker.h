// The stages of the Kronecker-factored precision behind the gate. Functions return None or a float64 tensor, or a string that says why the
// call was refused and that nothing was written. A layer is a weight, whose first dimension is that of the outputs, and a bias, without an
// element where there is none: X = [W | b] is [m, n].
#pragma once

#include "bind/gated_projection.h"
#include "core/kronecker.h"

namespace fastcl::bind {

// Takes the lists of a call one by one; each function returns whether all is well so far. The first list of layers or of matrices says how
// many layers there are and of which sizes; the others have to fit.
class KroneckerArguments {
 public:
  using Object = pybind11::object;

  Gate gate;

  KroneckerArguments(Device device, bool grad_mode) : gate(device, grad_mode) {}

  bool take_layers(const char* weights_name, const Object& weights, const char* biases_name, const Object& biases, Access access, Views& w,
                   Views& b);
  // [m, n] of the type that the layer computes in, with rows of unit stride.
  bool take_matrices(const char* name, const Object& list, Access access, Views& out);
  // [n, n] and [m, m], of small layers.
  bool take_factors(const char* a_name, const Object& a, const char* g_name, const Object& g, Views& a_out, Views& g_out);
  bool take_numbers(const Object& momentum, const Object& strength, double& rho, double& lambda);
  bool apart(const std::vector<const Views*>& written, const std::vector<const Views*>& reads) { return gate.apart(written, reads); }

 private:
  struct Size {
    int64_t rows = -1, inputs = -1, columns = -1;  // -1: not known yet
    bool biased = false;
    DType type = DType::other;
  };
  std::vector<Size> sizes_;
  bool counted_ = false;

  bool count(const char* name, size_t length);
  bool fits(const char* name, size_t i, const View& v, int64_t rows, int64_t columns);
};

template <class Backend>
struct GatedKronecker {
  using Object = pybind11::object;

  static Object kron_small_(const Object& weights, const Object& biases, const Object& a, const Object& g, bool grad_mode) {
    KroneckerArguments in(Backend::kind, grad_mode);
    Views w, b, left, right;
    if (!(in.take_layers("weights", weights, "biases", biases, Access::writes, w, b) && in.take_factors("A", a, "G", g, right, left) &&
          in.apart({&w, &b}, {&right, &left})))
      return in.gate.verdict();
    return Gated<Backend>::run(in.gate, [&](Backend& backend) { backend.kron_small_(w, b, right, left); });
  }

  // [1]
  static Object kron_small_quadratic(const Object& weights, const Object& biases, const Object& a, const Object& g, bool grad_mode) {
    KroneckerArguments in(Backend::kind, grad_mode);
    Views w, b, left, right;
    if (!(in.take_layers("weights", weights, "biases", biases, Access::reads, w, b) && in.take_factors("A", a, "G", g, right, left)))
      return in.gate.verdict();
    return GatedProjection<Backend>::result(in.gate, {1},
                                            [&](Backend& backend, double* out) { backend.kron_small_quadratic(w, b, right, left, out); });
  }

  static Object ncl_small_step_(const Object& weights, const Object& biases, const Object& weight_grads, const Object& bias_grads,
                                const Object& m, const Object& h, const Object& a_inv, const Object& g_inv, const Object& lr,
                                const Object& momentum, const Object& strength, bool grad_mode) {
    KroneckerArguments in(Backend::kind, grad_mode);
    Views w, b, wg, bg, dual, pull, left, right;
    double step = 0, rho = 0, lambda = 0;
    if (!(in.take_layers("weights", weights, "biases", biases, Access::writes, w, b) &&
          in.take_layers("weight_grads", weight_grads, "bias_grads", bias_grads, Access::reads, wg, bg) &&
          in.take_matrices("M", m, Access::writes, dual) && in.take_matrices("H", h, Access::writes, pull) &&
          in.take_factors("A_inv", a_inv, "G_inv", g_inv, right, left) &&
          in.gate.take_number("lr", lr, GatedProjection<Backend>::kAny, step) && in.take_numbers(momentum, strength, rho, lambda) &&
          in.apart({&w, &b, &dual, &pull}, {&wg, &bg, &right, &left})))
      return in.gate.verdict();
    return Gated<Backend>::run(
        in.gate, [&](Backend& backend) { backend.ncl_small_step_(w, b, wg, bg, dual, pull, right, left, step, rho, lambda); });
  }

  // <M, V> of each layer.
  static Object ncl_small_direction_(const Object& m, const Object& v, const Object& weight_grads, const Object& bias_grads,
                                     const Object& h, const Object& a_inv, const Object& g_inv, const Object& momentum,
                                     const Object& strength, bool grad_mode) {
    KroneckerArguments in(Backend::kind, grad_mode);
    Views dual, direction, wg, bg, pull, left, right;
    double rho = 0, lambda = 0;
    if (!(in.take_layers("weight_grads", weight_grads, "bias_grads", bias_grads, Access::reads, wg, bg) &&
          in.take_matrices("M", m, Access::writes, dual) && in.take_matrices("V", v, Access::writes, direction) &&
          in.take_matrices("H", h, Access::reads, pull) && in.take_factors("A_inv", a_inv, "G_inv", g_inv, right, left) &&
          in.take_numbers(momentum, strength, rho, lambda) && in.apart({&dual, &direction}, {&wg, &bg, &pull, &right, &left})))
      return in.gate.verdict();
    return GatedProjection<Backend>::result(in.gate, {int64_t(dual.size())}, [&](Backend& backend, double* out) {
      backend.ncl_small_direction_(dual, direction, wg, bg, pull, right, left, rho, lambda, out);
    });
  }

  static Object ncl_momentum_(const Object& m, const Object& h, const Object& weight_grads, const Object& bias_grads,
                              const Object& momentum, const Object& strength, const Object& lr, bool grad_mode) {
    KroneckerArguments in(Backend::kind, grad_mode);
    Views dual, pull, wg, bg;
    double step = 0, rho = 0, lambda = 0;
    const bool descends = !lr.is_none();
    if (!(in.take_layers("weight_grads", weight_grads, "bias_grads", bias_grads, Access::reads, wg, bg) &&
          in.take_matrices("M", m, Access::writes, dual) && in.take_matrices("H", h, descends ? Access::writes : Access::reads, pull) &&
          in.take_numbers(momentum, strength, rho, lambda) &&
          (!descends || in.gate.take_number("lr", lr, GatedProjection<Backend>::kAny, step)) &&
          (descends ? in.apart({&dual, &pull}, {&wg, &bg}) : in.apart({&dual}, {&pull, &wg, &bg}))))
      return in.gate.verdict();
    return Gated<Backend>::run(
        in.gate, [&](Backend& backend) { backend.ncl_momentum_(dual, pull, wg, bg, rho, lambda, descends ? &step : nullptr); });
  }

  // The step is one float64 on the tensors' device, where it is read.
  static Object ncl_apply_(const Object& weights, const Object& biases, const Object& h, const Object& v, const Object& m,
                           const Object& step, bool grad_mode) {
    KroneckerArguments in(Backend::kind, grad_mode);
    Views w, b, pull, direction, dual, one;
    if (!(in.take_layers("weights", weights, "biases", biases, Access::writes, w, b) && in.take_matrices("H", h, Access::writes, pull) &&
          in.take_matrices("V", v, Access::reads, direction) && in.take_matrices("M", m, Access::reads, dual) &&
          GatedProjection<Backend>::take_doubles(in.gate, "step", step, 1, one) && in.apart({&w, &b, &pull}, {&direction, &dual, &one})))
      return in.gate.verdict();
    return Gated<Backend>::run(
        in.gate, [&](Backend& backend) { backend.ncl_apply_(w, b, pull, direction, dual, reinterpret_cast<const double*>(one[0].data)); });
  }
};

template <class Backend>
void define_kronecker(pybind11::module_& m) {
  using pybind11::arg;
  using Family = GatedKronecker<Backend>;
  m.def("kron_small_", &Family::kron_small_, arg("weights"), arg("biases"), arg("A"), arg("G"), arg("grad_mode"));
  m.def("kron_small_quadratic", &Family::kron_small_quadratic, arg("weights"), arg("biases"), arg("A"), arg("G"), arg("grad_mode"));
  m.def("ncl_small_step_", &Family::ncl_small_step_, arg("weights"), arg("biases"), arg("weight_grads"), arg("bias_grads"), arg("M"),
        arg("H"), arg("A_inv"), arg("G_inv"), arg("lr"), arg("momentum"), arg("strength"), arg("grad_mode"));
  m.def("ncl_small_direction_", &Family::ncl_small_direction_, arg("M"), arg("V"), arg("weight_grads"), arg("bias_grads"), arg("H"),
        arg("A_inv"), arg("G_inv"), arg("momentum"), arg("strength"), arg("grad_mode"));
  m.def("ncl_momentum_", &Family::ncl_momentum_, arg("M"), arg("H"), arg("weight_grads"), arg("bias_grads"), arg("momentum"),
        arg("strength"), arg("lr"), arg("grad_mode"));
  m.def("ncl_apply_", &Family::ncl_apply_, arg("weights"), arg("biases"), arg("H"), arg("V"), arg("M"), arg("step"), arg("grad_mode"));
}

}  // namespace fastcl::bind
