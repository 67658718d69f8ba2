// EWC's pull behind the gate. Returns None, or a string that says why the call was refused and that nothing was written.
#pragma once

#include <limits>

#include "bind/gated.h"

namespace fastcl::bind {

template <class Backend>
struct GatedPull {
  using Object = pybind11::object;

  static Object ewc_pull_(const Object& grads, const Object& params, const Object& precision, const Object& anchor, const Object& strength,
                          bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views g, p, a, c;
    double s = 0;
    if (!(gate.take("grads", grads, Access::writes, false, g) && gate.take("params", params, Access::reads, false, p) &&
          gate.take("precision", precision, Access::reads, false, a) && gate.take("anchor", anchor, Access::reads, false, c) &&
          gate.take_number("strength", strength, std::numeric_limits<double>::max(), s) && gate.same_shapes("params", p, g) &&
          gate.same_shapes("precision", a, g) && gate.same_shapes("anchor", c, g) && gate.apart(g, {&p, &a, &c})))
      return gate.verdict();
    return Gated<Backend>::run(gate, [&](Backend& backend) { backend.ewc_pull_(g, p, a, c, s); });
  }
};

template <class Backend>
void define_pull(pybind11::module_& m) {
  using pybind11::arg;
  m.def("ewc_pull_", &GatedPull<Backend>::ewc_pull_, arg("grads"), arg("params"), arg("precision"), arg("anchor"), arg("strength"),
        arg("grad_mode"));
}

}  // namespace fastcl::bind
