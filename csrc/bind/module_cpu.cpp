// fastcl._C: the CPU ops. Every function returns None, or a string that says why the gate refused and that nothing was written.

#include <pybind11/pybind11.h>

#include "bind/gated.h"
#include "bind/gated_bit_mask.h"
#include "bind/gated_child_mask.h"
#include "bind/gated_fisher.h"
#include "bind/gated_kronecker.h"
#include "bind/gated_low_rank.h"
#include "bind/gated_optimizers.h"
#include "bind/gated_projection.h"
#include "bind/gated_pull.h"
#include "bind/gated_quantile.h"
#include "bind/gated_spg.h"
#include "bind/torch_runtime.h"
#include "cpu/ops.h"

namespace py = pybind11;

namespace fastcl::bind {
namespace {

struct Cpu {
  static constexpr Device kind = Device::cpu;
  static constexpr int32_t device_type = dlpack::kCPU;
  const Pool pool = torch_pool();

  explicit Cpu(int32_t) {}
  void soft_mask_(const Views& grads, const Views& importance, double strength) { cpu::soft_mask_(grads, importance, strength, pool); }
  void emax_(const Views& importance, const Views& fresh) { cpu::emax_(importance, fresh, pool); }
  void spg_importance_(const Views& accumulated, const std::vector<Views>& grads_by_head, double* mean) {
    *mean = cpu::spg_importance_(accumulated, grads_by_head, pool);
  }
  void spg_moments(const Views& accumulated, const std::vector<Views>& grads_by_head, Statistics* rows) {
    cpu::spg_moments(accumulated, grads_by_head, rows, pool);
  }
  void spg_update_(const Views& accumulated, const std::vector<Views>& grads_by_head, const Statistics* rows, double* mean) {
    *mean = cpu::spg_update_(accumulated, grads_by_head, rows, pool);
  }
  void grad_dot(const Views& a, const Views& b, double* out) { *out = cpu::grad_dot(a, b, pool); }
  void gram(const std::vector<Views>& vectors, double* out) { cpu::gram(vectors, out, pool); }
  void project_(const Views& grads, const Views& reference, double* out) { cpu::project_(grads, reference, out, pool); }
  void gem_project_(const Views& grads, const std::vector<Views>& memories, double margin, double ridge, double* out) {
    cpu::gem_project_(grads, memories, margin, ridge, out, pool);
  }
  void gem_coefficients(const double* products, int k, double margin, double ridge, double* out) {
    cpu::gem_coefficients(products, k, margin, ridge, out);
  }
  void combine_(const Views& grads, const std::vector<Views>& memories, const double* coefficients) {
    cpu::combine_(grads, memories, coefficients, pool);
  }
  void fisher_add_(const Views& fisher, const Views& grads, double weight, const double* max_norm) {
    cpu::fisher_add_(fisher, grads, weight, max_norm, pool);
  }
  void fisher_squares(const Views& grads, double* squares) { cpu::fisher_squares(grads, squares, pool); }
  void fisher_update_(const Views& fisher, const Views& grads, double weight, const double* coefficients) {
    cpu::fisher_update_(fisher, grads, weight, coefficients, pool);
  }
  void child_mask_at_(const Views& grads, double keep, uint64_t seed, uint32_t step, const std::vector<Place>& places) {
    cpu::child_mask_at_(grads, keep, seed, step, places, pool);
  }
  void ewc_pull_(const Views& grads, const Views& params, const Views& precision, const Views& anchor, double strength) {
    cpu::ewc_pull_(grads, params, precision, anchor, strength, pool);
  }
  void low_rank_products(const Views& vectors, const Views& diagonal, const Views& basis, bool inverse, double* out) {
    cpu::low_rank_products(vectors, diagonal, basis, inverse, out, pool);
  }
  void low_rank_update_(const Views& grads, const Views& diagonal, const Views& basis, const double* coefficients) {
    cpu::low_rank_update_(grads, diagonal, basis, coefficients, pool);
  }
  void low_rank_step_products(const LowRankStep& a, double* out) { cpu::low_rank_step_products(a, out, pool); }
  void low_rank_step_update_(const LowRankStep& a, const double* coefficients, const double* step) {
    cpu::low_rank_step_update_(a, coefficients, *step, pool);
  }
  void low_rank_gram(const Views& diagonal, const Views& basis, const double* sigma, const std::vector<Views>& vectors, double* products) {
    cpu::low_rank_gram(diagonal, basis, sigma, vectors, products, pool);
  }
  void low_rank_compress_(const Views& diagonal, const Views& basis, const double* sigma, const std::vector<Views>& vectors,
                          const double* mix, double* products) {
    cpu::low_rank_compress_(diagonal, basis, sigma, vectors, mix, products, pool);
  }
  void low_rank_rotate_(const Views& basis, const double* mix, double* products) { cpu::low_rank_rotate_(basis, mix, products, pool); }
  void adamw_(const OptimizerInputs& inputs, const AdamWRule& rule) { cpu::adamw_(inputs, rule, pool); }
  void sgd_(const OptimizerInputs& inputs, const SGDRule& rule) { cpu::sgd_(inputs, rule, pool); }
  void transformed_dot(const OptimizerInputs& inputs, const Views& reference, double* out) {
    cpu::transformed_dot(inputs, reference, out, pool);
  }
  void bit_mask_(const Views& grads, const Views& bits) { cpu::bit_mask_(grads, bits, pool); }
  void threshold_bits_(const Views& bits, const Views& tensors, const double* threshold) {
    cpu::threshold_bits_(bits, tensors, *threshold, pool);
  }
  void radix_counts(const Views& tensors, const int64_t* prefixes, int level, bool wide, int64_t* counts) {
    cpu::radix_counts(tensors, prefixes, level, wide, counts, pool);
  }
  void quantile(const Views& tensors, double q, double* out) { *out = cpu::quantile(tensors, q, pool); }
  void kron_small_(const Views& w, const Views& b, const Views& a, const Views& g) { cpu::kron_small_(w, b, a, g, pool); }
  void kron_small_quadratic(const Views& w, const Views& b, const Views& a, const Views& g, double* out) {
    *out = cpu::kron_small_quadratic(w, b, a, g, pool);
  }
  void ncl_small_step_(const Views& w, const Views& b, const Views& wg, const Views& bg, const Views& m, const Views& h, const Views& a,
                       const Views& g, double lr, double momentum, double strength) {
    cpu::ncl_small_step_(w, b, wg, bg, m, h, a, g, lr, momentum, strength, pool);
  }
  void ncl_small_direction_(const Views& m, const Views& v, const Views& wg, const Views& bg, const Views& h, const Views& a,
                            const Views& g, double momentum, double strength, double* products) {
    cpu::ncl_small_direction_(m, v, wg, bg, h, a, g, momentum, strength, products, pool);
  }
  void ncl_momentum_(const Views& m, const Views& h, const Views& wg, const Views& bg, double momentum, double strength, const double* lr) {
    cpu::ncl_momentum_(m, h, wg, bg, momentum, strength, lr, pool);
  }
  void ncl_apply_(const Views& w, const Views& b, const Views& h, const Views& v, const Views& m, const double* step) {
    cpu::ncl_apply_(w, b, h, v, m, step, pool);
  }
  void yardstick_(const Views& written, const Views& read) { cpu::yardstick_(written, read, pool); }
};

py::object yardstick_read(const py::object& read) {
  Gate gate(Device::cpu, false);
  Views r;
  if (!gate.take("read", read, Access::reads, true, r) || !gate.contiguous("read", r)) return gate.verdict();
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
  m.def("soft_mask_", &Gated<Cpu>::soft_mask_, py::arg("grads"), py::arg("importance"), py::arg("strength"), py::arg("grad_mode"));
  m.def("emax_", &Gated<Cpu>::emax_, py::arg("importance"), py::arg("new"), py::arg("grad_mode"));
  define_spg<Cpu>(m);
  define_projection<Cpu>(m);
  define_child_mask<Cpu>(m);
  define_fisher<Cpu>(m);
  define_pull<Cpu>(m);
  define_optimizers<Cpu>(m);
  define_low_rank<Cpu>(m);
  define_bit_mask<Cpu>(m);
  define_quantile<Cpu>(m);
  define_kronecker<Cpu>(m);
  m.def("quantile", &GatedQuantile<Cpu>::quantile, py::arg("tensors"), py::arg("q"), py::arg("grad_mode"));
  m.def("yardstick_", &Gated<Cpu>::yardstick_, py::arg("written"), py::arg("read"),
        "written ^= read on uint8 tensors: the same bytes, no arithmetic");
  m.def("yardstick_read", &yardstick_read, py::arg("read"), "read every byte of contiguous tensors once");
  m.def("threads", &torch_threads);
  m.def("cpu_capability", &cpu_capability);
}
