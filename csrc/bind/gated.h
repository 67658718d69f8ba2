// The ops behind the gate, for every backend the same. A backend has a device, is made from the index of the tensors' device (-1: there
// are no tensors), and runs ops without Python's lock. Functions return None, or a string that says why the call was refused and that
// nothing was written.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>

#include "bind/gate.h"
#include "bind/torch_runtime.h"
#include "core/importance.h"

namespace fastcl::bind {

template <class Backend>
struct Gated {
  template <class Run>
  static pybind11::object run(const Gate& gate, Run&& run) {
    Backend backend(gate.device_index());
    try {
      pybind11::gil_scoped_release release;
      run(backend);
    } catch (const Refusal& refusal) {
      return pybind11::str(refusal.what());
    }
    return pybind11::none();
  }

  static pybind11::object soft_mask_(const pybind11::object& grads, const pybind11::object& importance, const pybind11::object& strength,
                                     bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views g, i;
    double s = 0;
    if (!(gate.take("grads", grads, Access::writes, false, g) && gate.take("importance", importance, Access::reads, true, i) &&
          gate.take_number("strength", strength, s) && gate.broadcast("importance", i, g) && gate.apart(g, {&i})))
      return gate.verdict();
    return run(gate, [&](Backend& backend) { backend.soft_mask_(g, i, s); });
  }

  static pybind11::object emax_(const pybind11::object& importance, const pybind11::object& fresh, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views i, n;
    if (!(gate.take("importance", importance, Access::writes, true, i) && gate.take("new", fresh, Access::reads, true, n) &&
          gate.broadcast("new", n, i) && gate.apart(i, {&n})))
      return gate.verdict();
    return run(gate, [&](Backend& backend) { backend.emax_(i, n); });
  }

  // SPG's arguments, behind the gate.
  struct Spg {
    Gate gate;
    Views accumulated;
    std::vector<Views> heads;
    bool passed;

    Spg(const pybind11::object& stored, Access access, const pybind11::list& grads_by_head, bool grad_mode)
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
    size_t rows() const { return heads.size() * accumulated.size(); }
    NewTensor doubles(int64_t count, bool zero_dim) const {
      return {Backend::device_type, std::max(gate.device_index(), 0), {dlpack::kFloat, 64, 1}, count, zero_dim};
    }
  };

  // Returns the mean as a 0-d tensor, or a string.
  static pybind11::object spg_importance_(const pybind11::object& accumulated, const pybind11::list& grads_by_head, bool grad_mode) {
    const Spg spg(accumulated, Access::writes, grads_by_head, grad_mode);
    if (!spg.passed) return spg.gate.verdict();
    NewTensor mean = spg.doubles(1, true);
    const pybind11::object refused =
        run(spg.gate, [&](Backend& backend) { backend.spg_importance_(spg.accumulated, spg.heads, mean.template data<double>()); });
    return refused.is_none() ? mean.to_python() : refused;
  }

  // Returns rows of statistics, [heads * tensors * 4], or a string. There is a head and a tensor.
  static pybind11::object spg_moments(const pybind11::object& accumulated, const pybind11::list& grads_by_head, bool grad_mode) {
    const Spg spg(accumulated, Access::reads, grads_by_head, grad_mode);
    if (!spg.passed) return spg.gate.verdict();
    NewTensor rows = spg.doubles(int64_t(4 * spg.rows()), false);
    const pybind11::object refused =
        run(spg.gate, [&](Backend& backend) { backend.spg_moments(spg.accumulated, spg.heads, rows.template data<Statistics>()); });
    return refused.is_none() ? rows.to_python() : refused;
  }

  // moments: one contiguous tensor of such rows, in a list. Returns the mean as a 0-d tensor, or a string.
  static pybind11::object spg_update_(const pybind11::object& accumulated, const pybind11::list& grads_by_head,
                                      const pybind11::object& moments, bool grad_mode) {
    Spg spg(accumulated, Access::writes, grads_by_head, grad_mode);
    Views m;
    if (!spg.passed || !spg.gate.take("moments", moments, Access::reads, false, m) || !spg.gate.contiguous("moments", m) ||
        !spg.gate.apart(spg.accumulated, {&m}))
      return spg.gate.verdict();
    if (m.size() != 1 || m[0].dtype != DType::f64 || size_t(m[0].numel()) != 4 * spg.rows())
      return pybind11::str("moments must be one float64 tensor with a row of 4 for each head and tensor");
    NewTensor mean = spg.doubles(1, true);
    const pybind11::object refused = run(spg.gate, [&](Backend& backend) {
      backend.spg_update_(spg.accumulated, spg.heads, reinterpret_cast<const Statistics*>(m[0].data), mean.template data<double>());
    });
    return refused.is_none() ? mean.to_python() : refused;
  }

  static pybind11::object yardstick_(const pybind11::object& written, const pybind11::object& read) {
    Gate gate(Backend::kind, false);
    Views w, r;
    if (!(gate.take("written", written, Access::writes, true, w) && gate.take("read", read, Access::reads, true, r) &&
          gate.same_shapes("read", r, w) && gate.contiguous("written", w) && gate.contiguous("read", r) && gate.apart(w, {&r})))
      return gate.verdict();
    return run(gate, [&](Backend& backend) { backend.yardstick_(w, r); });
  }
};

}  // namespace fastcl::bind
