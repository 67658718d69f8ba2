// Quantiles behind the gate. Functions return a tensor, or a string that says why the call was refused.
#pragma once

#include "bind/gated.h"
#include "core/quantile.h"

namespace fastcl::bind {

template <class Backend>
struct GatedQuantile {
  using Object = pybind11::object;
  static constexpr uint8_t kInt = 0;

  static bool take(Gate& gate, const Object& tensors, Views& t, bool& wide, int64_t& elements) {
    if (!gate.take("tensors", tensors, Access::reads, false, t)) return false;
    wide = false;
    elements = 0;
    for (const View& v : t) {
      wide = wide || v.dtype == DType::f64;
      elements += v.numel();
    }
    return true;
  }

  // [2, kRadixColumns], see core/quantile.h.
  static Object radix_counts(const Object& tensors, const Object& prefixes, int level, bool wide, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views t;
    bool doubles = false;
    int64_t elements = 0;
    const int64_t* p = nullptr;
    if (!(take(gate, tensors, t, doubles, elements) && gate.take_int64("prefixes", prefixes, 2, p))) return gate.verdict();
    if (doubles && !wide) return pybind11::str("tensors holds float64, whose keys are wide");
    const int levels = wide ? Radix<uint64_t>::kLevels : Radix<uint32_t>::kLevels;
    if (level < 0 || level >= levels) return pybind11::str("level is outside its range");
    NewTensor out(Backend::device_type, std::max(gate.device_index(), 0), {kInt, 64, 1}, {2, kRadixColumns});
    const Object refused =
        Gated<Backend>::run(gate, [&](Backend& backend) { backend.radix_counts(t, p, level, wide, out.template data<int64_t>()); });
    return refused.is_none() ? out.to_python() : refused;
  }

  // 0-d float64; on devices whose memory the host reads.
  static Object quantile(const Object& tensors, const Object& q, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views t;
    bool wide = false;
    int64_t elements = 0;
    double share = 0;
    if (!(take(gate, tensors, t, wide, elements) && gate.take_number("q", q, 1, share))) return gate.verdict();
    if (elements == 0) return pybind11::str("tensors has no element");
    NewTensor out(Backend::device_type, std::max(gate.device_index(), 0), {dlpack::kFloat, 64, 1}, {});
    const Object refused = Gated<Backend>::run(gate, [&](Backend& backend) { backend.quantile(t, share, out.template data<double>()); });
    return refused.is_none() ? out.to_python() : refused;
  }
};

// The stage alone: where the counts stay on a device, fastcl.ops selects there.
template <class Backend>
void define_quantile(pybind11::module_& m) {
  using pybind11::arg;
  m.def("radix_counts", &GatedQuantile<Backend>::radix_counts, arg("tensors"), arg("prefixes"), arg("level"), arg("wide"),
        arg("grad_mode"));
}

}  // namespace fastcl::bind
