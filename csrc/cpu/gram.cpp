#include "cpu/gram.h"

#include <cstring>

namespace fastcl::cpu {

FASTCL_CLONES void gram_block(const double* rows, int k, int64_t n, double* products) {
  for (int top = 0; top < k; top += kTileRows)
    for (int left = 0; left <= std::min(top + kTileRows, k) - 1; left += kTileColumns) {
      const double *a[kTileRows], *b[kTileColumns];
      for (int r = 0; r < kTileRows; ++r) a[r] = rows + std::min(top + r, k - 1) * kGramBlock;
      for (int c = 0; c < kTileColumns; ++c) b[c] = rows + std::min(left + c, k - 1) * kGramBlock;
      Wide sum[kTileRows][kTileColumns] = {};
      for (int64_t e = 0; e < n; e += kWide) {
        Wide x[kTileRows], y[kTileColumns];
        for (int r = 0; r < kTileRows; ++r) memcpy(&x[r], a[r] + e, sizeof(Wide));
        for (int c = 0; c < kTileColumns; ++c) memcpy(&y[c], b[c] + e, sizeof(Wide));
        for (int r = 0; r < kTileRows; ++r)
          for (int c = 0; c < kTileColumns; ++c) sum[r][c] += x[r] * y[c];
      }
      for (int r = 0; r < kTileRows; ++r)
        for (int c = 0; c < kTileColumns; ++c)
          if (top + r < k && left + c <= top + r) products[triangle(top + r, left + c)] += fold_wide(sum[r][c]);
    }
}

}  // namespace fastcl::cpu
