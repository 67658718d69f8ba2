// Products of all pairs of rows, in double and in a fixed order.
#pragma once

#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "core/platform.h"

namespace fastcl::cpu {

// Eight doubles whatever the processor has.
typedef double Wide __attribute__((vector_size(64)));
constexpr int kWide = 8;

FASTCL_HD double fold_wide(const Wide& s) { return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])); }

// A tile of products stays in registers.
constexpr int kTileRows = 4, kTileColumns = 2;
constexpr int64_t kGramBlock = 256;
// Few, so that the partial matrices stay small against the vectors.
constexpr int64_t kGramParts = 128;

constexpr int64_t triangle(int64_t row, int64_t column) { return row * (row + 1) / 2 + column; }

inline int64_t gram_part(int64_t elements, int64_t least) {
  return std::max(least, (elements / kGramParts + kGramBlock) / kGramBlock * kGramBlock);
}

// products[i >= j] += rows i . j of k rows of n doubles, [k][kGramBlock]; n is a multiple of kWide, what is behind the data being zero.
void gram_block(const double* rows, int k, int64_t n, double* products);

// Neighbours are added first, so that the error grows with the logarithm of the count.
inline void add_pairwise(double* parts, int64_t count, int64_t width) {
  for (int64_t step = 1; step < count; step *= 2)
    for (int64_t p = 0; p + step < count; p += 2 * step)
      for (int64_t w = 0; w < width; ++w) parts[p * width + w] += parts[(p + step) * width + w];
}

// The matrix [k, k] from the triangles of all parts.
inline void unfold_gram(std::vector<double>& parts, int64_t count, int k, double* products) {
  add_pairwise(parts.data(), count, triangle(k, 0));
  for (int i = 0; i < k; ++i)
    for (int j = 0; j <= i; ++j) products[i * k + j] = products[j * k + i] = parts[size_t(triangle(i, j))];
}

}  // namespace fastcl::cpu
