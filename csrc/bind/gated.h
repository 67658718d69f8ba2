// The ops behind the gate, for every backend the same. A backend has a device, is made from the index of the tensors' device (-1: there
// are no tensors), and runs ops without Python's lock. Functions return None, or a string that says why the call was refused and that
// nothing was written.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>

#include "bind/gate.h"
#include "bind/torch_runtime.h"

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
          gate.take_number("strength", strength, 1, s) && gate.broadcast("importance", i, g) && gate.apart(g, {&i})))
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
