// fastcl._C: the CPU ops. Every function returns None, or a string that says why the gate refused and that nothing was written.

#include <pybind11/pybind11.h>

#include "bind/gate.h"
#include "bind/torch_runtime.h"
#include "cpu/ops.h"

namespace py = pybind11;

namespace fastcl::bind {
namespace {

py::object soft_mask_(const py::object& grads, const py::object& importance, const py::object& strength, bool grad_mode) {
  Gate gate(Device::cpu, grad_mode);
  Views g, i;
  double s = 0;
  if (gate.take("grads", grads, Access::writes, false, g) && gate.take("importance", importance, Access::reads, true, i) &&
      gate.take_number("strength", strength, s) && gate.broadcast("importance", i, g) && gate.apart(g, {&i})) {
    py::gil_scoped_release release;
    cpu::soft_mask_(g, i, s, torch_pool());
  }
  return gate.verdict();
}

py::object emax_(const py::object& importance, const py::object& fresh, bool grad_mode) {
  Gate gate(Device::cpu, grad_mode);
  Views i, n;
  if (gate.take("importance", importance, Access::writes, true, i) && gate.take("new", fresh, Access::reads, true, n) &&
      gate.broadcast("new", n, i) && gate.apart(i, {&n})) {
    py::gil_scoped_release release;
    cpu::emax_(i, n, torch_pool());
  }
  return gate.verdict();
}

// Returns the mean as a tensor, or a string.
py::object spg_importance_(const py::object& accumulated, const py::list& grads_by_head, bool grad_mode) {
  Gate gate(Device::cpu, grad_mode);
  Views a;
  std::vector<Views> heads(py::len(grads_by_head));
  std::vector<const Views*> reads;
  bool passed = gate.take("accumulated", accumulated, Access::writes, true, a);
  for (size_t h = 0; h < heads.size(); ++h) {
    passed = passed && gate.take("grads_by_head", grads_by_head[h], Access::reads, false, heads[h]) &&
             gate.same_shapes("grads_by_head", heads[h], a);
    reads.push_back(&heads[h]);
  }
  if (!passed || !gate.apart(a, reads)) return gate.verdict();
  NewTensor mean(dlpack::kCPU, 0, {dlpack::kFloat, 64, 1}, 1, true);
  {
    py::gil_scoped_release release;
    *mean.data<double>() = cpu::spg_importance_(a, heads, torch_pool());
  }
  return mean.to_python();
}

py::object yardstick_(const py::object& written, const py::object& read) {
  Gate gate(Device::cpu, false);
  Views w, r;
  if (gate.take("written", written, Access::writes, true, w) && gate.take("read", read, Access::reads, true, r) &&
      gate.same_shapes("read", r, w) && gate.apart(w, {&r})) {
    py::gil_scoped_release release;
    cpu::yardstick_(w, r, torch_pool());
  }
  return gate.verdict();
}

py::object yardstick_read(const py::object& read) {
  Gate gate(Device::cpu, false);
  Views r;
  if (!gate.take("read", read, Access::reads, true, r)) return gate.verdict();
  py::gil_scoped_release release;
  const uint64_t folded = cpu::yardstick_read(r, torch_pool());
  py::gil_scoped_acquire acquire;
  return py::int_(folded);
}

const char* cpu_capability() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) return "x86-64-v4";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "x86-64-v3";
#endif
  return "baseline";
}

}  // namespace
}  // namespace fastcl::bind

PYBIND11_MODULE(_C, m) {
  using namespace fastcl::bind;
  define_connect(m);
  m.def("soft_mask_", &soft_mask_, py::arg("grads"), py::arg("importance"), py::arg("strength"), py::arg("grad_mode"));
  m.def("emax_", &emax_, py::arg("importance"), py::arg("new"), py::arg("grad_mode"));
  m.def("spg_importance_", &spg_importance_, py::arg("accumulated"), py::arg("grads_by_head"), py::arg("grad_mode"));
  m.def("yardstick_", &yardstick_, py::arg("written"), py::arg("read"), "written ^= read on uint8 tensors: the same bytes, no arithmetic");
  m.def("yardstick_read", &yardstick_read, py::arg("read"), "read every byte of contiguous tensors once");
  m.def("threads", &torch_threads);
  m.def("cpu_capability", &cpu_capability);
}
