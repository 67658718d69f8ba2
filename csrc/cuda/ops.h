// The CUDA ops. Their arguments have been checked: shapes fit, dtypes are accepted, one device, no written memory is shared. Each only
// launches kernels on the given stream. Throws Refusal before anything is written, std::runtime_error when CUDA fails.
#pragma once

#include <functional>

#include "core/importance.h"
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

// The projection family: results and coefficients are in device memory; see cpu/ops.h for what they are.
void grad_dot(const Views& a, const Views& b, double* out, const Workspace& workspace, const Stream& stream);
void gram(const std::vector<Views>& vectors, double* products, const Workspace& workspace, const Stream& stream);
void project_(const Views& grads, const Views& reference, double* out, const Workspace& workspace, const Stream& stream);
void gem_project_(const Views& grads, const std::vector<Views>& memories, double margin, double ridge, double* out,
                  const Workspace& workspace, const Stream& stream);
void gem_coefficients(const double* products, int k, double margin, double ridge, double* out, const Stream& stream);
void combine_(const Views& grads, const std::vector<Views>& memories, const double* coefficients, const Stream& stream);

// What benchmarks compare with: the same bytes, and nothing computed. written ^= read on uint8 tensors; and a sweep that only reads
// contiguous tensors, whose words it folds into one.
void yardstick_(const Views& written, const Views& read, const Stream& stream);
void yardstick_read(const Views& read, uint64_t* folded, const Workspace& workspace, const Stream& stream);

}  // namespace fastcl::cuda
