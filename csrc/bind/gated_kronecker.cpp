#include "bind/gated_kronecker.h"

#include <limits>

namespace fastcl::bind {

bool KroneckerArguments::count(const char* name, size_t length) {
  if (!counted_) {
    counted_ = true;
    sizes_.resize(length);
  }
  return gate.same_length(name, length, sizes_.size());
}

bool KroneckerArguments::take_layers(const char* weights_name, const Object& weights, const char* biases_name, const Object& biases,
                                     Access access, Views& w, Views& b) {
  if (!(gate.take(weights_name, weights, access, false, w) && count(weights_name, w.size()) &&
        gate.take(biases_name, biases, access, false, b) && gate.same_length(biases_name, b.size(), w.size())))
    return false;
  for (size_t i = 0; i < w.size(); ++i) {
    if (w[i].ndim < 2) return gate.refuse(weights_name, i, "has fewer than two dimensions");
    const int64_t rows = w[i].shape[0], inputs = inputs_of(w[i]);
    // Of a layer without outputs the bias has no element in any case.
    const bool biased = b[i].elements > 0;
    if (biased && (b[i].ndim != 1 || b[i].elements != rows)) return gate.refuse(biases_name, i, "has not one element for each row");
    Size& size = sizes_[i];
    if (size.rows < 0) size = {rows, inputs, inputs + biased, biased, DType::other};
    if (size.rows != rows || size.inputs != inputs) return gate.refuse(weights_name, i, "has another shape");
    if (size.biased != biased) return gate.refuse(biases_name, i, "is there or not, unlike its partner");
  }
  return true;
}

bool KroneckerArguments::fits(const char* name, size_t i, const View& v, int64_t rows, int64_t columns) {
  Size& size = sizes_[i];
  if (v.ndim != 2 || v.shape[0] != rows || v.shape[1] != columns) return gate.refuse(name, i, "has another shape");
  if (v.shape[1] > 1 && v.strides[1] != 1) return gate.refuse(name, i, "has a last stride that is not 1");
  if (v.dtype != DType::f32 && v.dtype != DType::f64) return gate.refuse(name, i, "is not float32 or float64");
  if (size.type == DType::other) size.type = v.dtype;
  return v.dtype == size.type || gate.refuse(name, i, "is not of the dtype that its layer computes in");
}

bool KroneckerArguments::take_matrices(const char* name, const Object& list, Access access, Views& out) {
  if (!(gate.take(name, list, access, false, out) && count(name, out.size()))) return false;
  for (size_t i = 0; i < out.size(); ++i) {
    Size& size = sizes_[i];
    // Whether a layer without outputs has a bias does not show elsewhere.
    if (size.rows == 0 && out[i].ndim == 2 && out[i].shape[1] == size.inputs + 1) size.columns = size.inputs + 1;
    if (!fits(name, i, out[i], size.rows, size.columns)) return false;
    if (size.rows > 1 && out[i].strides[0] < size.columns) return gate.refuse(name, i, "has rows that overlap");
  }
  return true;
}

bool KroneckerArguments::take_factors(const char* a_name, const Object& a, const char* g_name, const Object& g, Views& a_out,
                                      Views& g_out) {
  if (!(gate.take(a_name, a, Access::reads, false, a_out) && count(a_name, a_out.size()) &&
        gate.take(g_name, g, Access::reads, false, g_out) && count(g_name, g_out.size())))
    return false;
  for (size_t i = 0; i < a_out.size(); ++i) {
    Size& size = sizes_[i];
    if (size.rows == 0 && a_out[i].ndim == 2 && a_out[i].shape[0] == size.inputs + 1) size.columns = size.inputs + 1;
    if (!fits(a_name, i, a_out[i], size.columns, size.columns) || !fits(g_name, i, g_out[i], size.rows, size.rows)) return false;
    if (size.rows > kSmallRows || size.columns > kSmallColumns) return gate.refuse(g_name, i, "belongs to a layer that is not small");
  }
  return true;
}

bool KroneckerArguments::take_numbers(const Object& momentum, const Object& strength, double& rho, double& lambda) {
  constexpr double kAny = std::numeric_limits<double>::max();
  return gate.take_number("momentum", momentum, kAny, rho) && gate.take_number("strength", strength, kAny, lambda);
}

}  // namespace fastcl::bind
