// The CUDA ops. Their arguments have been checked: shapes fit, dtypes are accepted, one device, no written memory is shared. Each only
// launches kernels on the given stream. Throws Refusal before anything is written, std::runtime_error when CUDA fails.
#pragma once

#include <functional>

#include "core/child_mask.h"
#include "core/importance.h"
#include "core/low_rank.h"
#include "core/optimizers.h"
#include "core/transforms.h"
#include "cuda/device.h"
#include "cuda/packet.h"

namespace fastcl::cuda {

// Memory from torch's allocator that later work on the same stream may reuse when the call has returned.
using Workspace = std::function<double*(int64_t doubles)>;

void soft_mask_(const Views& grads, const Views& importance, double strength, const Stream& stream);

void emax_(const Views& importance, const Views& fresh, const Stream& stream);

// Writes the mean of accumulated after the update to device memory; 0 if there is no element.
void spg_importance_(const Views& accumulated, const std::vector<Views>& grads_by_head, double* mean, const Workspace& workspace,
                     const Stream& stream);

// The two sweeps of spg_importance_ apart, for tensors that are shards: rows[head][tensor] in device memory are this part's moments, and
// later the whole tensor's. No tensor is without elements.
void spg_moments(const Views& accumulated, const std::vector<Views>& grads_by_head, Statistics* rows, const Workspace& workspace,
                 const Stream& stream);
void spg_update_(const Views& accumulated, const std::vector<Views>& grads_by_head, const Statistics* rows, double* mean,
                 const Workspace& workspace, const Stream& stream);

// Fisher information; see cpu/ops.h. squares and coefficients are in device memory, max_norm is null or a number.
void fisher_add_(const Views& fisher, const Views& grads, double weight, const double* max_norm, const Workspace& workspace,
                 const Stream& stream);
void fisher_squares(const Views& grads, double* squares, const Workspace& workspace, const Stream& stream);
void fisher_update_(const Views& fisher, const Views& grads, double weight, const double* coefficients, const Stream& stream);

void child_mask_at_(const Views& grads, double keep, uint64_t seed, uint32_t step, const std::vector<Place>& places, const Stream& stream);
void ewc_pull_(const Views& grads, const Views& params, const Views& precision, const Views& anchor, double strength, const Stream& stream);

void bit_mask_(const Views& grads, const Views& bits, const Stream& stream);
// The threshold is in device memory, and so are prefixes and counts.
void threshold_bits_(const Views& bits, const Views& tensors, const double* threshold, const Stream& stream);
void radix_counts(const Views& tensors, const int64_t* prefixes, int level, bool wide, int64_t* counts, const Stream& stream);

// The optimizers. found_inf, scale, lr, steps and coefficients are read on the device.
void adamw_(const OptimizerInputs& inputs, const AdamWRule& rule, const Workspace& workspace, const Stream& stream);
void sgd_(const OptimizerInputs& inputs, const SGDRule& rule, const Workspace& workspace, const Stream& stream);
void transformed_dot(const OptimizerInputs& inputs, const Views& reference, double* out, const Workspace& workspace, const Stream& stream);

// The projection family: results and coefficients are in device memory; see cpu/ops.h for what they are.
void grad_dot(const Views& a, const Views& b, double* out, const Workspace& workspace, const Stream& stream);
void gram(const std::vector<Views>& vectors, double* products, const Workspace& workspace, const Stream& stream);
void project_(const Views& grads, const Views& reference, double* out, const Workspace& workspace, const Stream& stream);
void gem_project_(const Views& grads, const std::vector<Views>& memories, double margin, double ridge, double* out,
                  const Workspace& workspace, const Stream& stream);
void gem_coefficients(const double* products, int k, double margin, double ridge, double* out, const Stream& stream);
void combine_(const Views& grads, const std::vector<Views>& memories, const double* coefficients, const Stream& stream);

// Layers of a Kronecker-factored precision; see cpu/ops.h. out, products and step are in device memory, lr is null or a number.
void kron_small_(const Views& weights, const Views& biases, const Views& a, const Views& g, const Workspace& workspace,
                 const Stream& stream);
void kron_small_quadratic(const Views& weights, const Views& biases, const Views& a, const Views& g, double* out,
                          const Workspace& workspace, const Stream& stream);
void ncl_small_step_(const Views& weights, const Views& biases, const Views& weight_grads, const Views& bias_grads, const Views& m,
                     const Views& h, const Views& a, const Views& g, double lr, double momentum, double strength,
                     const Workspace& workspace, const Stream& stream);
void ncl_small_direction_(const Views& m, const Views& v, const Views& weight_grads, const Views& bias_grads, const Views& h,
                          const Views& a, const Views& g, double momentum, double strength, double* products, const Workspace& workspace,
                          const Stream& stream);
void ncl_momentum_(const Views& m, const Views& h, const Views& weight_grads, const Views& bias_grads, double momentum, double strength,
                   const double* lr, const Stream& stream);
void ncl_apply_(const Views& weights, const Views& biases, const Views& h, const Views& v, const Views& m, const double* step,
                const Stream& stream);

// A precision of low rank plus a diagonal; see cpu/ops.h. What is a pointer is in device memory.
void low_rank_products(const Views& vectors, const Views& diagonal, const Views& basis, bool inverse, double* out,
                       const Workspace& workspace, const Stream& stream);
void low_rank_update_(const Views& grads, const Views& diagonal, const Views& basis, const double* coefficients, const Stream& stream);
void low_rank_step_products(const LowRankStep& step, double* out, const Workspace& workspace, const Stream& stream);
void low_rank_step_update_(const LowRankStep& step, const double* coefficients, const double* size, const Stream& stream);
void low_rank_gram(const Views& diagonal, const Views& basis, const double* sigma, const std::vector<Views>& vectors, double* products,
                   const Workspace& workspace, const Stream& stream);
void low_rank_compress_(const Views& diagonal, const Views& basis, const double* sigma, const std::vector<Views>& vectors,
                        const double* mix, double* products, const Workspace& workspace, const Stream& stream);
void low_rank_rotate_(const Views& basis, const double* mix, double* products, const Workspace& workspace, const Stream& stream);

// What benchmarks compare with: the same bytes, and nothing computed. written ^= read on uint8 tensors; and a sweep that only reads
// contiguous tensors, whose words it folds into one.
void yardstick_(const Views& written, const Views& read, const Stream& stream);
void yardstick_read(const Views& read, uint64_t* folded, const Workspace& workspace, const Stream& stream);

}  // namespace fastcl::cuda
