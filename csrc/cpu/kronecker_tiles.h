// The matrix product of layers that fit into the cache.
#pragma once

#include <cstdint>

namespace fastcl::cpu {

constexpr int kTallest = 8;

// Rows of matrices in scratch memory begin at multiples of this many bytes, and are read and written in whole vectors.
constexpr int64_t kVectorBytes = 64;

// out[r, j] = sum_k left[r][k] right[k, j] for r < rows and j < columns: row r of the left factor begins at left[r], rows of right and of
// out are stride elements apart. Up to the next multiple of a vector, columns beyond are read too, and written with numbers of no use.
template <class C>
struct Tiles {
  int rows;
  void (*product)(const C* const* left, int64_t depth, const C* right, int64_t stride, int64_t columns, C* out);
};

// What multiplies the next rows best, when this many are left, at least one.
template <class C>
Tiles<C> tiles(int64_t rows_left);

}  // namespace fastcl::cpu
