// The stages of the low_rank family behind the gate. Functions return None or a float64 tensor, or a string that says why the call was
// refused and that nothing was written.
#pragma once

#include <limits>

#include "bind/gated_projection.h"
#include "core/low_rank.h"

namespace fastcl::bind {

template <class Backend>
struct GatedLowRank {
  using Object = pybind11::object;
  using Lists = std::vector<const Views*>;
  using Projection = GatedProjection<Backend>;
  static constexpr double kAny = std::numeric_limits<double>::max();

  static const double* doubles(const Views& one) { return reinterpret_cast<const double*>(one[0].data); }

  // Contiguous, all of the dtype of the diagonal, float64 or float32.
  static bool kept(Gate& gate, const char* name, const Views& views, const Views& diagonal) {
    for (size_t i = 0; i < views.size(); ++i)
      if (views[i].dtype != diagonal[0].dtype || size_of(views[i].dtype) < 4) return gate.refuse(name, i, "has not the diagonal's dtype");
    return gate.contiguous(name, views);
  }

  static bool take_basis(Gate& gate, const Object& basis, Access access, Views& b) {
    if (!(gate.take("basis", basis, access, false, b) && gate.contiguous("basis", b))) return false;
    for (size_t i = 0; i < b.size(); ++i)
      if (b[i].ndim == 0 || b[i].shape[0] != b[0].shape[0] || b[i].shape[0] > kMostRows || b[i].dtype != b[0].dtype ||
          size_of(b[i].dtype) < 4)
        return gate.refuse("basis", i, "has other rows or another dtype");
    return true;
  }

  // The diagonal and the basis.
  static bool take_precision(Gate& gate, const Object& diagonal, const Object& basis, Access access, Views& d, Views& b) {
    if (!(gate.take("diagonal", diagonal, access, false, d) && kept(gate, "diagonal", d, d) && take_basis(gate, basis, access, b) &&
          gate.same_length("basis", b.size(), d.size())))
      return false;
    for (size_t i = 0; i < b.size(); ++i) {
      const bool fits =
          b[i].dtype == d[0].dtype && b[i].ndim == d[i].ndim + 1 && std::equal(d[i].shape, d[i].shape + d[i].ndim, b[i].shape + 1);
      if (!fits) return gate.refuse("basis", i, "has another shape or dtype than the diagonal");
    }
    return true;
  }

  static int64_t rank_of(const Views& basis) { return basis.empty() ? 0 : basis[0].shape[0]; }

  static Object products(const Object& vectors, const Object& diagonal, const Object& basis, bool inverse, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views x, d, b;
    if (!(gate.take("vectors", vectors, Access::reads, false, x) && take_precision(gate, diagonal, basis, Access::reads, d, b) &&
          gate.same_shapes("diagonal", d, x)))
      return gate.verdict();
    return Projection::result(gate, {rank_of(b) + 1},
                              [&](Backend& backend, double* out) { backend.low_rank_products(x, d, b, inverse, out); });
  }

  static Object update_(const Object& grads, const Object& diagonal, const Object& basis, const Object& coefficients, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views g, d, b, c;
    if (!(gate.take("grads", grads, Access::writes, false, g) && take_precision(gate, diagonal, basis, Access::reads, d, b) &&
          gate.same_shapes("diagonal", d, g) && Projection::take_doubles(gate, "coefficients", coefficients, rank_of(b), c) &&
          gate.apart(Lists{&g}, Lists{&d, &b, &c})))
      return gate.verdict();
    return Gated<Backend>::run(gate, [&](Backend& backend) { backend.low_rank_update_(g, d, b, doubles(c)); });
  }

  static bool take_step(Gate& gate, const Object& params, Access access, const Object& grads, const Object& momenta, const Object& anchors,
                        const Object& diagonal, const Object& basis, const Object& momentum, const Object& strength, LowRankStep& s) {
    if (!(gate.take("params", params, access, false, s.params) && gate.take("grads", grads, Access::reads, false, s.grads) &&
          gate.take("momenta", momenta, access, false, s.momenta) && gate.take("anchors", anchors, Access::reads, false, s.anchors) &&
          take_precision(gate, diagonal, basis, Access::reads, s.diagonal, s.basis) &&
          gate.take_number("momentum", momentum, kAny, s.momentum) && gate.take_number("strength", strength, kAny, s.strength) &&
          gate.same_shapes("grads", s.grads, s.params) && gate.same_shapes("diagonal", s.diagonal, s.params)))
      return false;
    const bool moves = s.momentum != 0, pulls = s.strength != 0;
    return (moves ? gate.same_shapes("momenta", s.momenta, s.params) && kept(gate, "momenta", s.momenta, s.diagonal)
                  : gate.same_length("momenta", s.momenta.size(), 0)) &&
           (pulls ? gate.same_shapes("anchors", s.anchors, s.params) && kept(gate, "anchors", s.anchors, s.diagonal)
                  : gate.same_length("anchors", s.anchors.size(), 0));
  }

  static Object step_products(const Object& params, const Object& grads, const Object& momenta, const Object& anchors,
                              const Object& diagonal, const Object& basis, const Object& momentum, const Object& strength, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    LowRankStep s{};
    if (!take_step(gate, params, Access::reads, grads, momenta, anchors, diagonal, basis, momentum, strength, s)) return gate.verdict();
    return Projection::result(gate, {2 * rank_of(s.basis) + 3},
                              [&](Backend& backend, double* out) { backend.low_rank_step_products(s, out); });
  }

  static Object step_update_(const Object& params, const Object& grads, const Object& momenta, const Object& anchors,
                             const Object& diagonal, const Object& basis, const Object& coefficients, const Object& step,
                             const Object& momentum, const Object& strength, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    LowRankStep s{};
    Views c, size;
    if (!(take_step(gate, params, Access::writes, grads, momenta, anchors, diagonal, basis, momentum, strength, s) &&
          Projection::take_doubles(gate, "coefficients", coefficients, rank_of(s.basis), c) &&
          Projection::take_doubles(gate, "step", step, 1, size) &&
          gate.apart(Lists{&s.params, &s.momenta}, Lists{&s.grads, &s.anchors, &s.diagonal, &s.basis, &c, &size})))
      return gate.verdict();
    return Gated<Backend>::run(gate, [&](Backend& backend) { backend.low_rank_step_update_(s, doubles(c), doubles(size)); });
  }

  static bool take_rows(Gate& gate, const Object& diagonal, const Object& basis, Access access, const Object& sigma, const Object& vectors,
                        Views& d, Views& b, Views& s, std::vector<Views>& v) {
    if (!(take_precision(gate, diagonal, basis, access, d, b) && Projection::take_doubles(gate, "sigma", sigma, rank_of(b), s) &&
          gate.take_lists("vectors", vectors, size_t(kMostRows - rank_of(b)), v)))
      return false;
    for (const Views& list : v)
      if (!gate.same_shapes("vectors", list, d)) return false;
    return true;
  }

  static Object gram(const Object& diagonal, const Object& basis, const Object& sigma, const Object& vectors, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views d, b, s;
    std::vector<Views> v;
    if (!take_rows(gate, diagonal, basis, Access::reads, sigma, vectors, d, b, s, v)) return gate.verdict();
    const int64_t rows = rank_of(b) + int64_t(v.size());
    return Projection::result(gate, {rows, rows}, [&](Backend& backend, double* out) { backend.low_rank_gram(d, b, doubles(s), v, out); });
  }

  static Object compress_(const Object& diagonal, const Object& basis, const Object& sigma, const Object& vectors, const Object& mix,
                          bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views d, b, s, m;
    std::vector<Views> v;
    if (!take_rows(gate, diagonal, basis, Access::writes, sigma, vectors, d, b, s, v)) return gate.verdict();
    const int64_t rank = rank_of(b), rows = rank + int64_t(v.size());
    Lists reads{&s, &m};
    for (const Views& list : v) reads.push_back(&list);
    if (!(Projection::take_doubles(gate, "mix", mix, rows * rows, m) && gate.apart(Lists{&d, &b}, reads))) return gate.verdict();
    return Projection::result(gate, {rank, rank},
                              [&](Backend& backend, double* out) { backend.low_rank_compress_(d, b, doubles(s), v, doubles(m), out); });
  }

  static Object rotate_(const Object& basis, const Object& mix, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views b, m;
    if (!take_basis(gate, basis, Access::writes, b)) return gate.verdict();
    const int64_t rank = rank_of(b);
    if (!(Projection::take_doubles(gate, "mix", mix, rank * rank, m) && gate.apart(Lists{&b}, Lists{&m}))) return gate.verdict();
    return Projection::result(gate, {rank, rank}, [&](Backend& backend, double* out) { backend.low_rank_rotate_(b, doubles(m), out); });
  }
};

template <class Backend>
void define_low_rank(pybind11::module_& m) {
  using pybind11::arg;
  using Family = GatedLowRank<Backend>;
  m.def("low_rank_products", &Family::products, arg("vectors"), arg("diagonal"), arg("basis"), arg("inverse"), arg("grad_mode"));
  m.def("low_rank_update_", &Family::update_, arg("grads"), arg("diagonal"), arg("basis"), arg("coefficients"), arg("grad_mode"));
  m.def("low_rank_step_products", &Family::step_products, arg("params"), arg("grads"), arg("momenta"), arg("anchors"), arg("diagonal"),
        arg("basis"), arg("momentum"), arg("strength"), arg("grad_mode"));
  m.def("low_rank_step_update_", &Family::step_update_, arg("params"), arg("grads"), arg("momenta"), arg("anchors"), arg("diagonal"),
        arg("basis"), arg("coefficients"), arg("step"), arg("momentum"), arg("strength"), arg("grad_mode"));
  m.def("low_rank_gram", &Family::gram, arg("diagonal"), arg("basis"), arg("sigma"), arg("vectors"), arg("grad_mode"));
  m.def("low_rank_compress_", &Family::compress_, arg("diagonal"), arg("basis"), arg("sigma"), arg("vectors"), arg("mix"),
        arg("grad_mode"));
  m.def("low_rank_rotate_", &Family::rotate_, arg("basis"), arg("mix"), arg("grad_mode"));
}

}  // namespace fastcl::bind
