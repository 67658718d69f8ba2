// Appending vectors to a precision of low rank: products of all rows, and rows mixed from them, in double. Compiled with contraction.

#include <cmath>
#include <cstring>

#include "core/low_rank.h"
#include "cpu/blocks.h"
#include "cpu/gram.h"
#include "cpu/low_rank.h"
#include "cpu/ops.h"

namespace fastcl::cpu {
namespace {

constexpr int64_t kPart = 16384;

int64_t elements(const Views& views) {
  int64_t total = 0;
  for (const View& v : views) total += v.numel();
  return total;
}

constexpr int64_t padded(int64_t n) { return (n + kWide - 1) / kWide * kWide; }

// y[e] *= factor, or y[e] /= sqrt(diagonal[e])
FASTCL_CLONES void scale(double* y, int64_t n, double factor) {
  for (int64_t e = 0; e < n; ++e) y[e] *= factor;
}
FASTCL_CLONES void divide_by_root(double* __restrict y, const double* __restrict diagonal, int64_t n) {
  for (int64_t e = 0; e < n; ++e) y[e] /= std::sqrt(diagonal[e]);
}

// out[i] = sum_m mix[m, i] rows[m] for i < count, both [.][kGramBlock]; n is a multiple of kWide.
FASTCL_CLONES void mix_rows(const double* rows, int k, const double* mix, int count, int64_t n, double* out) {
  constexpr int R = 4;
  for (int first = 0; first < count; first += R)
    for (int64_t e = 0; e < n; e += kWide) {
      Wide sum[R] = {};
      for (int m = 0; m < k; ++m) {
        Wide y;
        memcpy(&y, rows + m * kGramBlock + e, sizeof(Wide));
        for (int i = 0; i < R; ++i) sum[i] += mix[m * count + std::min(first + i, count - 1)] * y;
      }
      for (int i = 0; i < R && first + i < count; ++i) memcpy(out + (first + i) * kGramBlock + e, &sum[i], sizeof(Wide));
    }
}

// The rows of a block that are squared and added to the diagonal, and the factor that makes up for it in the others.
FASTCL_CLONES void drop_rows(double* __restrict y, int rank, int k, int64_t n, double* __restrict diagonal) {
  for (int64_t e = 0; e < n; ++e) {
    double factor = 1;
    for (int j = rank; j < k; ++j) factor += y[j * kGramBlock + e] * y[j * kGramBlock + e];
    diagonal[e] *= factor;
    const double root = 1 / std::sqrt(factor);
    for (int j = 0; j < rank; ++j) y[j * kGramBlock + e] *= root;
  }
}

// Runs of all operands in blocks of doubles: the rows sigma_j q_j and D^-1/2 v_k, [r + K][kGramBlock], zeros behind the data.
class AppendSweep {
 public:
  AppendSweep(const Views& diagonal, const Views& basis, const double* sigma, const std::vector<Views>& vectors)
      : sigma_(sigma), vectors_(int(vectors.size())), rows_(lists_of(diagonal, vectors), basis, gram_part(elements(diagonal), kPart)) {}

  int rank() const { return rows_.rank(); }
  int count() const { return rank() + vectors_; }

  struct Block {
    double* y;
    double* diagonal;
    Operand first;      // diagonal
    RowSweep::Rows to;  // of the basis
    DType kept;
    int64_t done, n;

    // A row of the basis, as it is stored from then on.
    void write_row(int j, double* row) const {
      const Operand own{to.data + j * to.stride, kept};
      write_block<double>(row, own, 1, done, n);
      with_floating(kept, [&](auto t) { widen_strided<typename decltype(t)::type, double>(block_of(own, 1, done), 1, n, row); });
    }
  };

  // body(block, triangle of products to add to); the products of all parts are added up in out [size, size].
  template <class Body>
  void each(int size, double* out, const Pool& pool, Body&& body) const {
    const int64_t entries = triangle(size, 0);
    std::vector<double> parts(size_t(std::max<int64_t>(rows_.parts(), 1) * entries));
    pool.each(rows_.parts(), 1, [&](int64_t begin, int64_t end) {
      std::vector<double> y(size_t(count()) * kGramBlock), diagonal(kGramBlock);
      for (int64_t p = begin; p < end; ++p)
        rows_.part(p, [&](const Operand* at, const int64_t* strides, const RowSweep::Rows& rows, int64_t n) {
          for (int64_t done = 0; done < n; done += kGramBlock) {
            const Block block{y.data(), diagonal.data(), at[0], rows, at[0].dtype, done, std::min(kGramBlock, n - done)};
            read(block, at, strides);
            body(block, parts.data() + p * entries);
          }
        });
    });
    unfold_gram(parts, rows_.parts(), size, out);
  }

 private:
  const double* sigma_;
  int vectors_;
  RowSweep rows_;

  static std::vector<const Views*> lists_of(const Views& diagonal, const std::vector<Views>& vectors) {
    std::vector<const Views*> lists{&diagonal};
    for (const Views& v : vectors) lists.push_back(&v);
    return lists;
  }

  static void copy(const Operand& from, int64_t stride, int64_t done, int64_t n, double* out) {
    const double* own = read_block<double>(from, stride, done, n, out);
    if (own != out) std::copy(own, own + n, out);
  }

  void read(const Block& block, const Operand* at, const int64_t* strides) const {
    const int64_t n = block.n;
    copy(at[0], 1, block.done, n, block.diagonal);
    for (int row = 0; row < count(); ++row) {
      double* y = block.y + row * kGramBlock;
      if (row < rank()) {
        copy({block.to.data + row * block.to.stride, block.kept}, 1, block.done, n, y);
        if (sigma_ != nullptr) scale(y, n, sigma_[row]);
      } else {
        const int list = 1 + row - rank();
        copy(at[list], strides[list], block.done, n, y);
        divide_by_root(y, block.diagonal, n);
      }
      std::fill(y + n, y + padded(n), 0.0);
    }
  }
};

}  // namespace

void low_rank_gram(const Views& diagonal, const Views& basis, const double* sigma, const std::vector<Views>& vectors, double* products,
                   const Pool& pool) {
  const AppendSweep sweep(diagonal, basis, sigma, vectors);
  sweep.each(sweep.count(), products, pool,
             [&](const AppendSweep::Block& block, double* sums) { gram_block(block.y, sweep.count(), padded(block.n), sums); });
}

void low_rank_compress_(const Views& diagonal, const Views& basis, const double* sigma, const std::vector<Views>& vectors,
                        const double* mix, double* products, const Pool& pool) {
  const AppendSweep sweep(diagonal, basis, sigma, vectors);
  const int k = sweep.count(), rank = sweep.rank();
  sweep.each(rank, products, pool, [&](const AppendSweep::Block& block, double* sums) {
    std::vector<double> mixed(size_t(k) * kGramBlock);
    mix_rows(block.y, k, mix, k, padded(block.n), mixed.data());
    drop_rows(mixed.data(), rank, k, block.n, block.diagonal);
    for (int j = 0; j < rank; ++j) block.write_row(j, mixed.data() + j * kGramBlock);
    write_block<double>(block.diagonal, block.first, 1, block.done, block.n);
    gram_block(mixed.data(), rank, padded(block.n), sums);
  });
}

void low_rank_rotate_(const Views& basis, const double* mix, double* products, const Pool& pool) {
  if (basis.empty() || basis[0].shape[0] == 0) return;
  Views first;  // rows give shapes and order here
  for (const View& b : basis) first.emplace_back(b.data, b.shape + 1, b.strides + 1, b.ndim - 1, b.dtype, b.device, b.device_index);
  const AppendSweep sweep(first, basis, nullptr, {});
  const int rank = sweep.rank();
  sweep.each(rank, products, pool, [&](const AppendSweep::Block& block, double* sums) {
    std::vector<double> mixed(size_t(rank) * kGramBlock);
    mix_rows(block.y, rank, mix, rank, padded(block.n), mixed.data());
    for (int j = 0; j < rank; ++j) block.write_row(j, mixed.data() + j * kGramBlock);
    gram_block(mixed.data(), rank, padded(block.n), sums);
  });
}

}  // namespace fastcl::cpu
