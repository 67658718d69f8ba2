// The CPU ops. Their arguments have been checked: shapes fit, dtypes are accepted, no written memory is shared.
#pragma once

#include <vector>

#include "core/child_mask.h"
#include "core/importance.h"
#include "core/low_rank.h"
#include "core/optimizers.h"
#include "core/parallel.h"
#include "core/transforms.h"
#include "core/view.h"

namespace fastcl::cpu {

void soft_mask_(const Views& grads, const Views& importance, double strength, const Pool& pool);

void emax_(const Views& importance, const Views& fresh, const Pool& pool);

// Returns the mean of accumulated after the update; 0 if there is no element.
double spg_importance_(const Views& accumulated, const std::vector<Views>& grads_by_head, const Pool& pool);

// The two sweeps of spg_importance_ apart, for tensors that are shards: rows[head][tensor] are this part's moments, and later the whole
// tensor's. A row of a tensor without elements is zero.
void spg_moments(const Views& accumulated, const std::vector<Views>& grads_by_head, Statistics* rows, const Pool& pool);
double spg_update_(const Views& accumulated, const std::vector<Views>& grads_by_head, const Statistics* rows, const Pool& pool);

// fisher += weight (c g)^2; c is 1, or clips each tensor to max_norm.
void fisher_add_(const Views& fisher, const Views& grads, double weight, const double* max_norm, const Pool& pool);

// Its parts, for tensors that are shards: sum g^2 of each tensor, in a fixed order; and the update with each tensor's coefficient.
void fisher_squares(const Views& grads, double* squares, const Pool& pool);
void fisher_update_(const Views& fisher, const Views& grads, double weight, const double* coefficients, const Pool& pool);

// One place for each gradient.
void child_mask_at_(const Views& grads, double keep, uint64_t seed, uint32_t step, const std::vector<Place>& places, const Pool& pool);

// grads += 2 strength precision (params - anchor)
void ewc_pull_(const Views& grads, const Views& params, const Views& precision, const Views& anchor, double strength, const Pool& pool);

// Dot product over all tensors, in a fixed order.
double grad_dot(const Views& a, const Views& b, const Pool& pool);

// The symmetric matrix [k, k] of all dot products of k lists.
void gram(const std::vector<Views>& vectors, double* products, const Pool& pool);

// out: g.r, r.r and what was added of the reference.
void project_(const Views& grads, const Views& reference, double* out, const Pool& pool);

// out: as core's gem_coefficients.
void gem_project_(const Views& grads, const std::vector<Views>& memories, double margin, double ridge, double* out, const Pool& pool);
void gem_coefficients(const double* products, int k, double margin, double ridge, double* out);

// grads += sum_k coefficients[k] memories[k]; nothing is read or written if all coefficients are 0.
void combine_(const Views& grads, const std::vector<Views>& memories, const double* coefficients, const Pool& pool);

// z = D^-1/2 x if inverse, else D^1/2 x. out: q_j . z, z . z; r + 1 of them. The precision's lists are contiguous and of one dtype, the
// basis has r rows in front of each tensor's shape.
void low_rank_products(const Views& vectors, const Views& diagonal, const Views& basis, bool inverse, double* out, const Pool& pool);
// grads = D^-1/2 (z - sum_j coefficients_j q_j), z = D^-1/2 grads
void low_rank_update_(const Views& grads, const Views& diagonal, const Views& basis, const double* coefficients, const Pool& pool);

// u = momentum V + strength (W - mu), z = D^-1/2 g, y = D^1/2 u. out: q_j . z, q_j . y, z . z, z . y, y . y; 2 r + 3 of them.
void low_rank_step_products(const LowRankStep& step, double* out, const Pool& pool);
// V = u + D^-1/2 (z - sum_j coefficients_j q_j), W -= size V; V is stored with a momentum alone.
void low_rank_step_update_(const LowRankStep& step, const double* coefficients, double size, const Pool& pool);

// Products [r + K, r + K] of the rows sigma_j q_j and D^-1/2 v_k.
void low_rank_gram(const Views& diagonal, const Views& basis, const double* sigma, const std::vector<Views>& vectors, double* products,
                   const Pool& pool);
// y' = mix^T y for these rows; D' = D (1 + sum_j>=r y'_j^2), q_j = y'_j sqrt(D / D'). products: [r, r], of the new rows.
void low_rank_compress_(const Views& diagonal, const Views& basis, const double* sigma, const std::vector<Views>& vectors,
                        const double* mix, double* products, const Pool& pool);
// q' = mix^T q
void low_rank_rotate_(const Views& basis, const double* mix, double* products, const Pool& pool);

// One step in one sweep: the gradients through the transforms, then the optimizer. Nothing is written if found_inf is not 0.
void adamw_(const OptimizerInputs& inputs, const AdamWRule& rule, const Pool& pool);
void sgd_(const OptimizerInputs& inputs, const SGDRule& rule, const Pool& pool);

// out: T(g).r, r.r of the transformed gradients, in a fixed order.
void transformed_dot(const OptimizerInputs& inputs, const Views& reference, double* out, const Pool& pool);
// grads = bit ? grads : +0. Bits: uint8, a bit per element in the tensor's row-major order.
void bit_mask_(const Views& grads, const Views& bits, const Pool& pool);
// bit = value >= threshold in double.
void threshold_bits_(const Views& bits, const Views& tensors, double threshold, const Pool& pool);

// The quantile of all elements, of which there is at least one; NaN if one is NaN.
double quantile(const Views& tensors, double q, const Pool& pool);
// counts: [2, kRadixColumns], see core/quantile.h; wide: keys of doubles.
void radix_counts(const Views& tensors, const int64_t* prefixes, int level, bool wide, int64_t* counts, const Pool& pool);
// As quantile, by radix_counts alone: what quantile does where a sample misleads it.
double quantile_by_counts(const Views& tensors, double q, const Pool& pool);

// Layers of a Kronecker-factored precision: X = [W | b], a bias of no element where there is none; A on the side of the inputs, G of the
// outputs. m, h and v are matrices of the factors' dtype with rows of unit stride.
// X <- G X A, of layers of at most kSmallRows x kSmallColumns.
void kron_small_(const Views& weights, const Views& biases, const Views& a, const Views& g, const Pool& pool);
// sum <X, G X A>
double kron_small_quadratic(const Views& weights, const Views& biases, const Views& a, const Views& g, const Pool& pool);
// m <- momentum m + grad + strength h, v = G m A, X <- X - lr v, h <- h - lr m; a and g are the inverse factors.
void ncl_small_step_(const Views& weights, const Views& biases, const Views& weight_grads, const Views& bias_grads, const Views& m,
                     const Views& h, const Views& a, const Views& g, double lr, double momentum, double strength, const Pool& pool);
// m and v of the same; products: <m, v> of each layer.
void ncl_small_direction_(const Views& m, const Views& v, const Views& weight_grads, const Views& bias_grads, const Views& h,
                          const Views& a, const Views& g, double momentum, double strength, double* products, const Pool& pool);
// Layers of any size: m <- momentum m + grad + strength h; with a learning rate, h <- h - lr m.
void ncl_momentum_(const Views& m, const Views& h, const Views& weight_grads, const Views& bias_grads, double momentum, double strength,
                   const double* lr, const Pool& pool);
// X <- X - step v, h <- h - step m.
void ncl_apply_(const Views& weights, const Views& biases, const Views& h, const Views& v, const Views& m, const double* step,
                const Pool& pool);

// What benchmarks compare with: the same bytes, and nothing computed. written ^= read, word by word; and a sweep that only reads.
void yardstick_(const Views& written, const Views& read, const Pool& pool);
uint64_t yardstick_read(const Views& read, const Pool& pool);

}  // namespace fastcl::cpu
