// The sweeps of the low_rank family: the lists of a call, and with them the rows of the basis.
#pragma once

#include "cpu/joint.h"

namespace fastcl::cpu {

// Lists as operands 0, 1, ..., of which the first gives the order, then the basis. A row of it is as far from the next as its tensor has
// elements, which two operands tell: the first two rows.
class RowSweep {
 public:
  RowSweep(std::vector<const Views*> lists, const Views& basis, int64_t part_size)
      : rank_(basis.empty() ? 0 : int(basis[0].shape[0])), first_(lists.size()), rows_{rows_of(basis, 0), rows_of(basis, 1)} {
    if (rank_ > 0) lists.insert(lists.end(), {&rows_[0], &rows_[1]});
    sweep_.emplace_back(lists, part_size);
  }

  struct Rows {
    char* data;
    int64_t stride;  // in bytes
  };

  int rank() const { return rank_; }
  int64_t parts() const { return sweep_[0].parts(); }

  // visit(operands, strides, rows, n), strides never null.
  template <class Visit>
  void part(int64_t index, Visit&& visit) const {
    const std::vector<int64_t> ones(first_ + 2, 1);
    sweep_[0].part(index, [&](const Operand* at, const int64_t* strides, int64_t n) {
      const Rows rows = rank_ > 0 ? Rows{at[first_].data, at[first_ + 1].data - at[first_].data} : Rows{nullptr, 0};
      visit(at, strides != nullptr ? strides : ones.data(), rows, n);
    });
  }

 private:
  int rank_;
  size_t first_;
  Views rows_[2];
  std::vector<JointSweep> sweep_;  // one, made after the rows that it points to

  static Views rows_of(const Views& basis, int64_t row) {
    Views out;
    for (const View& b : basis) {
      const int64_t elements = b.shape[0] > 0 ? b.numel() / b.shape[0] : 0;
      char* data = b.data + std::min<int64_t>(row, std::max<int64_t>(b.shape[0] - 1, 0)) * elements * size_of(b.dtype);
      out.emplace_back(data, b.shape + 1, b.strides + 1, b.ndim - 1, b.dtype, b.device, b.device_index);
    }
    return out;
  }
};

}  // namespace fastcl::cpu
