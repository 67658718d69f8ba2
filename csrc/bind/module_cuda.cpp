// fastcl._C_cuda: the CUDA ops. Every function returns None, or a string that says why the gate refused and that nothing was written.
// Nothing here waits for the GPU.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <deque>
#include <stdexcept>

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
#include "cuda/ops.h"

namespace py = pybind11;

namespace fastcl::bind {
namespace {

cuda::Stream current_stream(int32_t device) {
  cuda::Stream stream;
  stream.device = device;
  const auto query = torch_runtime().api->current_stream;
  if (query == nullptr) throw std::runtime_error("torch's DLPack exchange API does not tell its current stream");
  if (query(dlpack::kCUDA, device, &stream.handle) != 0) {
    if (PyErr_Occurred()) throw py::error_already_set();
    throw std::runtime_error("torch did not tell its current stream");
  }
  return stream;
}

class Cuda {
 public:
  static constexpr Device kind = Device::cuda;
  static constexpr int32_t device_type = dlpack::kCUDA;

  explicit Cuda(int32_t device) : stream_(current_stream(std::max(device, 0))) {}
  void soft_mask_(const Views& grads, const Views& importance, double strength) { cuda::soft_mask_(grads, importance, strength, stream_); }
  void emax_(const Views& importance, const Views& fresh) { cuda::emax_(importance, fresh, stream_); }
  void spg_importance_(const Views& accumulated, const std::vector<Views>& grads_by_head, double* mean) {
    cuda::spg_importance_(accumulated, grads_by_head, mean, workspace(), stream_);
  }
  void grad_dot(const Views& a, const Views& b, double* out) { cuda::grad_dot(a, b, out, workspace(), stream_); }
  void gram(const std::vector<Views>& vectors, double* out) { cuda::gram(vectors, out, workspace(), stream_); }
  void project_(const Views& grads, const Views& reference, double* out) { cuda::project_(grads, reference, out, workspace(), stream_); }
  void gem_project_(const Views& grads, const std::vector<Views>& memories, double margin, double ridge, double* out) {
    cuda::gem_project_(grads, memories, margin, ridge, out, workspace(), stream_);
  }
  void gem_coefficients(const double* products, int k, double margin, double ridge, double* out) {
    cuda::gem_coefficients(products, k, margin, ridge, out, stream_);
  }
  void combine_(const Views& grads, const std::vector<Views>& memories, const double* coefficients) {
    cuda::combine_(grads, memories, coefficients, stream_);
  }
  void spg_moments(const Views& accumulated, const std::vector<Views>& grads_by_head, Statistics* rows) {
    cuda::spg_moments(accumulated, grads_by_head, rows, workspace(), stream_);
  }
  void spg_update_(const Views& accumulated, const std::vector<Views>& grads_by_head, const Statistics* rows, double* mean) {
    cuda::spg_update_(accumulated, grads_by_head, rows, mean, workspace(), stream_);
  }
  void fisher_add_(const Views& fisher, const Views& grads, double weight, const double* max_norm) {
    cuda::fisher_add_(fisher, grads, weight, max_norm, workspace(), stream_);
  }
  void fisher_squares(const Views& grads, double* squares) { cuda::fisher_squares(grads, squares, workspace(), stream_); }
  void fisher_update_(const Views& fisher, const Views& grads, double weight, const double* coefficients) {
    cuda::fisher_update_(fisher, grads, weight, coefficients, stream_);
  }
  void child_mask_at_(const Views& grads, double keep, uint64_t seed, uint32_t step, const std::vector<Place>& places) {
    cuda::child_mask_at_(grads, keep, seed, step, places, stream_);
  }
  void ewc_pull_(const Views& grads, const Views& params, const Views& precision, const Views& anchor, double strength) {
    cuda::ewc_pull_(grads, params, precision, anchor, strength, stream_);
  }
  void bit_mask_(const Views& grads, const Views& bits) { cuda::bit_mask_(grads, bits, stream_); }
  void threshold_bits_(const Views& bits, const Views& tensors, const double* threshold) {
    cuda::threshold_bits_(bits, tensors, threshold, stream_);
  }
  void radix_counts(const Views& tensors, const int64_t* prefixes, int level, bool wide, int64_t* counts) {
    cuda::radix_counts(tensors, prefixes, level, wide, counts, stream_);
  }
  void adamw_(const OptimizerInputs& inputs, const AdamWRule& rule) { cuda::adamw_(inputs, rule, workspace(), stream_); }
  void sgd_(const OptimizerInputs& inputs, const SGDRule& rule) { cuda::sgd_(inputs, rule, workspace(), stream_); }
  void transformed_dot(const OptimizerInputs& inputs, const Views& reference, double* out) {
    cuda::transformed_dot(inputs, reference, out, workspace(), stream_);
  }
  void low_rank_products(const Views& vectors, const Views& diagonal, const Views& basis, bool inverse, double* out) {
    cuda::low_rank_products(vectors, diagonal, basis, inverse, out, workspace(), stream_);
  }
  void low_rank_update_(const Views& grads, const Views& diagonal, const Views& basis, const double* coefficients) {
    cuda::low_rank_update_(grads, diagonal, basis, coefficients, stream_);
  }
  void low_rank_step_products(const LowRankStep& step, double* out) { cuda::low_rank_step_products(step, out, workspace(), stream_); }
  void low_rank_step_update_(const LowRankStep& step, const double* coefficients, const double* size) {
    cuda::low_rank_step_update_(step, coefficients, size, stream_);
  }
  void low_rank_gram(const Views& diagonal, const Views& basis, const double* sigma, const std::vector<Views>& vectors, double* products) {
    cuda::low_rank_gram(diagonal, basis, sigma, vectors, products, workspace(), stream_);
  }
  void low_rank_compress_(const Views& diagonal, const Views& basis, const double* sigma, const std::vector<Views>& vectors,
                          const double* mix, double* products) {
    cuda::low_rank_compress_(diagonal, basis, sigma, vectors, mix, products, workspace(), stream_);
  }
  void low_rank_rotate_(const Views& basis, const double* mix, double* products) {
    cuda::low_rank_rotate_(basis, mix, products, workspace(), stream_);
  }
  void kron_small_(const Views& w, const Views& b, const Views& a, const Views& g) { cuda::kron_small_(w, b, a, g, workspace(), stream_); }
  void kron_small_quadratic(const Views& w, const Views& b, const Views& a, const Views& g, double* out) {
    cuda::kron_small_quadratic(w, b, a, g, out, workspace(), stream_);
  }
  void ncl_small_step_(const Views& w, const Views& b, const Views& wg, const Views& bg, const Views& m, const Views& h, const Views& a,
                       const Views& g, double lr, double momentum, double strength) {
    cuda::ncl_small_step_(w, b, wg, bg, m, h, a, g, lr, momentum, strength, workspace(), stream_);
  }
  void ncl_small_direction_(const Views& m, const Views& v, const Views& wg, const Views& bg, const Views& h, const Views& a,
                            const Views& g, double momentum, double strength, double* products) {
    cuda::ncl_small_direction_(m, v, wg, bg, h, a, g, momentum, strength, products, workspace(), stream_);
  }
  void ncl_momentum_(const Views& m, const Views& h, const Views& wg, const Views& bg, double momentum, double strength, const double* lr) {
    cuda::ncl_momentum_(m, h, wg, bg, momentum, strength, lr, stream_);
  }
  void ncl_apply_(const Views& w, const Views& b, const Views& h, const Views& v, const Views& m, const double* step) {
    cuda::ncl_apply_(w, b, h, v, m, step, stream_);
  }
  void yardstick_(const Views& written, const Views& read) { cuda::yardstick_(written, read, stream_); }
  void yardstick_read(const Views& read, uint64_t* folded) { cuda::yardstick_read(read, folded, workspace(), stream_); }

 private:
  cuda::Stream stream_;
  // Given back to torch's allocator when the call returns: what runs next on this stream runs after these kernels.
  std::deque<NewTensor> memory_;

  cuda::Workspace workspace() {
    return [this](int64_t doubles) {
      py::gil_scoped_acquire acquire;
      const std::vector<int64_t> shape{std::max<int64_t>(doubles, 1)};
      return memory_.emplace_back(device_type, stream_.device, dlpack::DataType{dlpack::kFloat, 64, 1}, shape).data<double>();
    };
  }
};

// The folded words as a 0-d int64 tensor, so that nothing waits.
py::object yardstick_read(const py::object& read) {
  Gate gate(Device::cuda, false);
  Views r;
  if (!gate.take("read", read, Access::reads, true, r) || !gate.contiguous("read", r)) return gate.verdict();
  constexpr uint8_t kInt = 0;
  NewTensor folded(dlpack::kCUDA, std::max(gate.device_index(), 0), {kInt, 64, 1}, {});
  const py::object refused = Gated<Cuda>::run(gate, [&](Cuda& backend) { backend.yardstick_read(r, folded.data<uint64_t>()); });
  return refused.is_none() ? folded.to_python() : refused;
}

py::dict info() {
  const cuda::Info i = cuda::info();
  py::dict out;
  out["runtime"] = i.runtime;
  out["driver"] = i.driver;
  out["capabilities"] = i.capabilities;
  out["built_for"] = i.built_for;
  out["problem"] = i.problem.empty() ? py::object(py::none()) : py::object(py::str(i.problem));
  return out;
}

void connect_where_it_runs(const py::type& tensor, const py::type& parameter, const py::capsule& api, uintptr_t parallel_for,
                           uintptr_t num_threads) {
  const std::string problem = cuda::info().problem;
  if (!problem.empty()) throw std::runtime_error(problem);
  connect(tensor, parameter, api, parallel_for, num_threads);
}

}  // namespace
}  // namespace fastcl::bind

PYBIND11_MODULE(_C_cuda, m) {
  using namespace fastcl::bind;
  define_connect(m, &connect_where_it_runs);
  m.def("soft_mask_", &Gated<Cuda>::soft_mask_, py::arg("grads"), py::arg("importance"), py::arg("strength"), py::arg("grad_mode"));
  m.def("emax_", &Gated<Cuda>::emax_, py::arg("importance"), py::arg("new"), py::arg("grad_mode"));
  define_spg<Cuda>(m);
  define_projection<Cuda>(m);
  define_child_mask<Cuda>(m);
  define_fisher<Cuda>(m);
  define_pull<Cuda>(m);
  define_bit_mask<Cuda>(m);
  define_quantile<Cuda>(m);
  define_optimizers<Cuda>(m);
  define_low_rank<Cuda>(m);
  define_kronecker<Cuda>(m);
  m.def("yardstick_", &Gated<Cuda>::yardstick_, py::arg("written"), py::arg("read"),
        "written ^= read on uint8 tensors: the same bytes, no arithmetic");
  m.def("yardstick_read", &yardstick_read, py::arg("read"), "read every byte of contiguous tensors once");
  m.def("info", &info, "versions as CUDA counts them (13000 is 13.0), and the problem that keeps the kernels from running, or None");
}
