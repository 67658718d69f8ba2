// SPG's importance behind the gate, whole and as its two sweeps apart. Functions return a float64 tensor, or a string that says why the
// call was refused and that nothing was written.
#pragma once

#include "bind/gated.h"
#include "core/importance.h"

namespace fastcl::bind {

template <class Backend>
struct GatedSpg {
  using Object = pybind11::object;

  struct Arguments {
    Gate gate;
    Views accumulated;
    std::vector<Views> heads;
    bool passed;

    Arguments(const Object& stored, Access access, const pybind11::list& grads_by_head, bool grad_mode)
        : gate(Backend::kind, grad_mode), heads(pybind11::len(grads_by_head)) {
      std::vector<const Views*> reads;
      passed = gate.take("accumulated", stored, access, true, accumulated);
      for (size_t h = 0; h < heads.size(); ++h) {
        passed = passed && gate.take("grads_by_head", grads_by_head[h], Access::reads, false, heads[h]) &&
                 gate.same_shapes("grads_by_head", heads[h], accumulated);
        reads.push_back(&heads[h]);
      }
      passed = passed && gate.apart(accumulated, reads);
    }
  };

  template <class Run>
  static Object result(const Gate& gate, std::vector<int64_t> shape, Run&& run) {
    NewTensor out(Backend::device_type, std::max(gate.device_index(), 0), {dlpack::kFloat, 64, 1}, std::move(shape));
    const Object refused = Gated<Backend>::run(gate, [&](Backend& backend) { run(backend, out.template data<double>()); });
    return refused.is_none() ? out.to_python() : refused;
  }

  // Returns the mean of accumulated after the update, 0-d.
  static Object importance_(const Object& accumulated, const pybind11::list& grads_by_head, bool grad_mode) {
    const Arguments a(accumulated, Access::writes, grads_by_head, grad_mode);
    if (!a.passed) return a.gate.verdict();
    return result(a.gate, {}, [&](Backend& backend, double* mean) { backend.spg_importance_(a.accumulated, a.heads, mean); });
  }

  // Returns a row of Statistics for each head and tensor, [heads, tensors, 4].
  static Object moments(const Object& accumulated, const pybind11::list& grads_by_head, bool grad_mode) {
    const Arguments a(accumulated, Access::reads, grads_by_head, grad_mode);
    if (!a.passed) return a.gate.verdict();
    return result(a.gate, {int64_t(a.heads.size()), int64_t(a.accumulated.size()), 4}, [&](Backend& backend, double* rows) {
      backend.spg_moments(a.accumulated, a.heads, reinterpret_cast<Statistics*>(rows));
    });
  }

  // Takes such rows, as the one tensor of a list; returns the mean of accumulated after the update, 0-d.
  static Object update_(const Object& accumulated, const pybind11::list& grads_by_head, const Object& rows, bool grad_mode) {
    Arguments a(accumulated, Access::writes, grads_by_head, grad_mode);
    Views r;
    if (!(a.passed && a.gate.take("rows", rows, Access::reads, false, r) && a.gate.same_length("rows", r.size(), 1) &&
          a.gate.contiguous("rows", r) && a.gate.apart(a.accumulated, {&r})))
      return a.gate.verdict();
    if (r[0].dtype != DType::f64 || size_t(r[0].numel()) != 4 * a.heads.size() * a.accumulated.size())
      return pybind11::str("rows is not float64 with a row for each head and tensor");
    return result(a.gate, {}, [&](Backend& backend, double* mean) {
      backend.spg_update_(a.accumulated, a.heads, reinterpret_cast<const Statistics*>(r[0].data), mean);
    });
  }
};

template <class Backend>
void define_spg(pybind11::module_& m) {
  using pybind11::arg;
  using Spg = GatedSpg<Backend>;
  m.def("spg_importance_", &Spg::importance_, arg("accumulated"), arg("grads_by_head"), arg("grad_mode"));
  m.def("spg_moments", &Spg::moments, arg("accumulated"), arg("grads_by_head"), arg("grad_mode"));
  m.def("spg_update_", &Spg::update_, arg("accumulated"), arg("grads_by_head"), arg("rows"), arg("grad_mode"));
}

}  // namespace fastcl::bind
