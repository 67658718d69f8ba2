// Lists of a precision of low rank plus a diagonal. Host code.
#pragma once

#include "cuda/lists.h"
#include "cuda/low_rank.h"

namespace fastcl::cuda {

static_assert(mix_doubles(kMostRows) * sizeof(double) <= 96 * 1024, "every GPU since sm_80 grants a block as many bytes");

inline int rank_of(const Views& basis) { return basis.empty() ? 0 : int(basis[0].shape[0]); }

// A tensor of a row of the basis.
inline View row_of(const View& basis) {
  return {basis.data, basis.shape + 1, basis.strides + 1, basis.ndim - 1, basis.dtype, basis.device, basis.device_index};
}

// An entry for each tensor with elements: the first list's, in whose order they are, the basis and the others'.
inline List precision_list(const char* argument, const Views& diagonal, const Views& basis, const std::vector<const Views*>& others,
                           int64_t chunk, int run) {
  List list(kOperand + int(others.size()), chunk, true, true);
  std::vector<const View*> views(size_t(list.operands()));
  std::vector<int64_t> notes(views.size());
  for (size_t i = 0; i < diagonal.size(); ++i) {
    const View& d = diagonal[i];
    if (d.numel() == 0) continue;
    const Index rows(d, basis[i].data);
    const bool aligned = basis[i].shape[0] == 0 || (reinterpret_cast<uintptr_t>(basis[i].data) % 16 == 0 &&
                                                    (basis[i].shape[0] == 1 || d.numel() * size_of(d.dtype) % 16 == 0));
    views[kDiagonal] = &d;
    views[kBasis] = &rows.view();
    notes[kDiagonal] = operand_note(d.dtype);
    notes[kBasis] = aligned;
    for (size_t o = 0; o < others.size(); ++o) {
      views[kOperand + o] = &(*others[o])[i];
      notes[kOperand + o] = operand_note(views[kOperand + o]->dtype);
    }
    add_or_refuse(list, argument, i, views, run, notes);
    if (list.entries().back().words > size_t(LargePacket::max_words))
      throw Refusal(argument, i, "has too many dimensions for so many vectors");
  }
  return list;
}

inline bool computes_in_double(const Views& basis) { return !basis.empty() && basis[0].dtype == DType::f64; }
inline int run_of(const Views& basis) { return computes_in_double(basis) ? kRun<double> : kRun<float>; }

// The step's operands behind the precision's, and its rule.
struct LowRankStepPlan {
  LowRankRule rule;
  List list;

  explicit LowRankStepPlan(const LowRankStep& s)
      : rule{s.momentum, s.strength, s.momenta.empty() ? 0 : kStepGrad + 1, s.anchors.empty() ? 0 : kStepGrad + 1 + !s.momenta.empty(),
             true},
        list(precision_list("params", s.diagonal, s.basis, operands(s), kRunChunk, run_of(s.basis))) {}

 private:
  static std::vector<const Views*> operands(const LowRankStep& s) {
    std::vector<const Views*> out{&s.params, &s.grads};
    if (!s.momenta.empty()) out.push_back(&s.momenta);
    if (!s.anchors.empty()) out.push_back(&s.anchors);
    return out;
  }
};

// The launches that together have all pairs of `rows` rows, the vectors of which are not the basis'.
inline std::vector<RowPanels> row_panels(int rank, int rows) {
  if (rows <= kMostTogether) return {{rank, 0, rows, rows, rows}};
  std::vector<RowPanels> out;
  for (int second = kPanel; second < rows; second += kPanel)
    for (int first = 0; first < second; first += kPanel)
      out.push_back({rank, first, kPanel, second, kPanel + std::min(kPanel, rows - second)});
  return out;
}

inline List products_list(const Views& diagonal, const Views& basis, const std::vector<Views>& vectors, const RowPanels& panels) {
  std::vector<const Views*> others;
  for (int l = 0; l < panels.lists; ++l)
    if (panels.row(l) >= panels.rank) others.push_back(&vectors[size_t(panels.row(l) - panels.rank)]);
  return precision_list("diagonal", diagonal, basis, others, kJointChunk, kJointRun);
}

inline int64_t products_blocks(const List& list) {
  int64_t most = 0;
  for (const List::Launch& part : list.launches(LargePacket::max_tensors, LargePacket::max_words)) most = std::max(most, part.chunks);
  return std::min(most, kGramBlocks);
}

}  // namespace fastcl::cuda
