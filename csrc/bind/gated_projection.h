// The projection family behind the gate. Functions return a float64 tensor (combine_: None), or a string that says why the call was refused
// and that nothing was written.
#pragma once

#include <limits>

#include "bind/gated.h"
#include "core/projection.h"

namespace fastcl::bind {

template <class Backend>
struct GatedProjection {
  using Object = pybind11::object;
  static constexpr double kAny = std::numeric_limits<double>::max();

  template <class Run>
  static Object result(const Gate& gate, std::vector<int64_t> shape, Run&& run) {
    NewTensor out(Backend::device_type, std::max(gate.device_index(), 0), {dlpack::kFloat, 64, 1}, std::move(shape));
    const Object refused = Gated<Backend>::run(gate, [&](Backend& backend) { run(backend, out.template data<double>()); });
    return refused.is_none() ? out.to_python() : refused;
  }

  static Object grad_dot(const Object& a, const Object& b, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views x, y;
    if (!(gate.take("a", a, Access::reads, false, x) && gate.take("b", b, Access::reads, false, y) && gate.same_shapes("b", y, x)))
      return gate.verdict();
    return result(gate, {}, [&](Backend& backend, double* out) { backend.grad_dot(x, y, out); });
  }

  static Object gram(const Object& vectors, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    std::vector<Views> v;
    bool passed = gate.take_lists("vectors", vectors, kMostMemories + 1, v);
    for (const Views& list : v) passed = passed && gate.same_shapes("vectors", list, v[0]);
    if (!passed) return gate.verdict();
    const auto k = int64_t(v.size());
    return result(gate, {k, k}, [&](Backend& backend, double* out) { backend.gram(v, out); });
  }

  static Object project_(const Object& grads, const Object& reference, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views g, r;
    if (!(gate.take("grads", grads, Access::writes, false, g) && gate.take("reference", reference, Access::reads, false, r) &&
          gate.same_shapes("reference", r, g) && gate.apart(g, {&r}, false)))
      return gate.verdict();
    return result(gate, {3}, [&](Backend& backend, double* out) { backend.project_(g, r, out); });
  }

  static bool take_memories(Gate& gate, const Object& grads, const Object& memories, Views& g, std::vector<Views>& m) {
    if (!(gate.take("grads", grads, Access::writes, false, g) && gate.take_lists("memories", memories, kMostMemories, m))) return false;
    std::vector<const Views*> reads;
    for (const Views& list : m) {
      if (!gate.same_shapes("memories", list, g)) return false;
      reads.push_back(&list);
    }
    return gate.apart(g, reads, false);
  }

  static Object gem_project_(const Object& grads, const Object& memories, const Object& margin, const Object& ridge, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views g;
    std::vector<Views> m;
    double least = 0, added = 0;
    if (!(take_memories(gate, grads, memories, g, m) && gate.take_number("margin", margin, kAny, least) &&
          gate.take_number("ridge", ridge, kAny, added)))
      return gate.verdict();
    return result(gate, {int64_t(2 * m.size() + 1)}, [&](Backend& backend, double* out) { backend.gem_project_(g, m, least, added, out); });
  }

  // One tensor of doubles.
  static bool take_doubles(Gate& gate, const char* name, const Object& tensor, int64_t elements, Views& out) {
    return gate.take(name, pybind11::make_tuple(tensor), Access::reads, false, out) && gate.contiguous(name, out) &&
           gate.same_length(name, out[0].dtype == DType::f64 ? size_t(out[0].numel()) : 0, size_t(elements));
  }

  static Object gem_coefficients(const Object& products, double margin, double ridge, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views p;
    const auto k = int64_t(pybind11::len(products)) - 1;
    if (k < 1 || k > kMostMemories) return pybind11::str("products has no memory or too many");
    if (!take_doubles(gate, "products", products, (k + 1) * (k + 1), p)) return gate.verdict();
    return result(gate, {2 * k + 1}, [&](Backend& backend, double* out) {
      backend.gem_coefficients(reinterpret_cast<const double*>(p[0].data), int(k), margin, ridge, out);
    });
  }

  static Object combine_(const Object& grads, const Object& memories, const Object& coefficients, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views g, c;
    std::vector<Views> m;
    if (!(take_memories(gate, grads, memories, g, m) && take_doubles(gate, "coefficients", coefficients, int64_t(m.size()), c)))
      return gate.verdict();
    return Gated<Backend>::run(gate, [&](Backend& backend) { backend.combine_(g, m, reinterpret_cast<const double*>(c[0].data)); });
  }
};

template <class Backend>
void define_projection(pybind11::module_& m) {
  using pybind11::arg;
  using Family = GatedProjection<Backend>;
  m.def("grad_dot", &Family::grad_dot, arg("a"), arg("b"), arg("grad_mode"));
  m.def("gram", &Family::gram, arg("vectors"), arg("grad_mode"));
  m.def("project_", &Family::project_, arg("grads"), arg("reference"), arg("grad_mode"));
  m.def("gem_project_", &Family::gem_project_, arg("grads"), arg("memories"), arg("margin"), arg("ridge"), arg("grad_mode"));
  m.def("gem_coefficients", &Family::gem_coefficients, arg("products"), arg("margin"), arg("ridge"), arg("grad_mode"));
  m.def("combine_", &Family::combine_, arg("grads"), arg("memories"), arg("coefficients"), arg("grad_mode"));
}

}  // namespace fastcl::bind
