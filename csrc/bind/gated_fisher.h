// The Fisher information behind the gate, whole and as its two sweeps apart. Functions return None or a float64 tensor, or a string that
// says why the call was refused and that nothing was written.
#pragma once

#include <limits>

#include "bind/gated_projection.h"

namespace fastcl::bind {

template <class Backend>
struct GatedFisher {
  using Object = pybind11::object;
  static constexpr double kAny = std::numeric_limits<double>::max();

  static bool take(Gate& gate, const Object& fisher, const Object& grads, const Object& weight, Views& f, Views& g, double& w) {
    return gate.take("fisher", fisher, Access::writes, false, f) && gate.take("grads", grads, Access::reads, false, g) &&
           gate.take_number("weight", weight, kAny, w) && gate.same_shapes("grads", g, f) && gate.apart(f, {&g});
  }

  static Object add_(const Object& fisher, const Object& grads, const Object& weight, const Object& max_norm, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views f, g;
    double w = 0, most = 0;
    if (!(take(gate, fisher, grads, weight, f, g, w) && (max_norm.is_none() || gate.take_positive("max_norm", max_norm, kAny, most))))
      return gate.verdict();
    return Gated<Backend>::run(gate, [&](Backend& backend) { backend.fisher_add_(f, g, w, max_norm.is_none() ? nullptr : &most); });
  }

  // The sum of squares of each gradient.
  static Object squares(const Object& grads, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views g;
    if (!gate.take("grads", grads, Access::reads, false, g)) return gate.verdict();
    return GatedProjection<Backend>::result(gate, {int64_t(g.size())},
                                            [&](Backend& backend, double* out) { backend.fisher_squares(g, out); });
  }

  // With what each gradient is multiplied by.
  static Object update_(const Object& fisher, const Object& grads, const Object& weight, const Object& coefficients, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views f, g, c;
    double w = 0;
    if (!(take(gate, fisher, grads, weight, f, g, w) &&
          GatedProjection<Backend>::take_doubles(gate, "coefficients", coefficients, int64_t(g.size()), c) && gate.apart(f, {&c}, false)))
      return gate.verdict();
    return Gated<Backend>::run(gate,
                               [&](Backend& backend) { backend.fisher_update_(f, g, w, reinterpret_cast<const double*>(c[0].data)); });
  }
};

template <class Backend>
void define_fisher(pybind11::module_& m) {
  using pybind11::arg;
  using Family = GatedFisher<Backend>;
  m.def("fisher_add_", &Family::add_, arg("fisher"), arg("grads"), arg("weight"), arg("max_norm"), arg("grad_mode"));
  m.def("fisher_squares", &Family::squares, arg("grads"), arg("grad_mode"));
  m.def("fisher_update_", &Family::update_, arg("fisher"), arg("grads"), arg("weight"), arg("coefficients"), arg("grad_mode"));
}

}  // namespace fastcl::bind
