// Masks of one bit per element behind the gate. Functions return None, or a string that says why the call was refused and that nothing was
// written.
#pragma once

#include "bind/gated.h"

namespace fastcl::bind {

template <class Backend>
struct GatedBitMask {
  using Object = pybind11::object;

  static Object bit_mask_(const Object& grads, const Object& bits, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views g, b;
    if (!(gate.take("grads", grads, Access::writes, false, g) && gate.take("bits", bits, Access::reads, true, b) &&
          gate.bits_of("bits", b, g) && gate.apart(g, {&b}, false)))
      return gate.verdict();
    return Gated<Backend>::run(gate, [&](Backend& backend) { backend.bit_mask_(g, b); });
  }

  // The threshold is a tensor of one double on the tensors' device, where it is read.
  static Object threshold_bits_(const Object& bits, const Object& tensors, const Object& threshold, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views b, t, one;
    if (!(gate.take("bits", bits, Access::writes, true, b) && gate.take("tensors", tensors, Access::reads, true, t) &&
          gate.take("threshold", pybind11::make_tuple(threshold), Access::reads, false, one) && gate.bits_of("bits", b, t) &&
          gate.apart(b, {&t, &one}, false)))
      return gate.verdict();
    if (one[0].dtype != DType::f64 || one[0].numel() != 1) return pybind11::str("threshold is not one float64");
    return Gated<Backend>::run(gate,
                               [&](Backend& backend) { backend.threshold_bits_(b, t, reinterpret_cast<const double*>(one[0].data)); });
  }
};

template <class Backend>
void define_bit_mask(pybind11::module_& m) {
  using pybind11::arg;
  using Family = GatedBitMask<Backend>;
  m.def("bit_mask_", &Family::bit_mask_, arg("grads"), arg("bits"), arg("grad_mode"));
  m.def("threshold_bits_", &Family::threshold_bits_, arg("bits"), arg("tensors"), arg("threshold"), arg("grad_mode"));
}

}  // namespace fastcl::bind
