// One sweep over several lists of tensors at once: the elements of all places are one range, cut into parts whose boundaries depend on the
// sizes alone. Sums over a part, added up in the order of the parts, are the same for any number of threads.
#pragma once

#include <algorithm>
#include <deque>
#include <vector>

#include "core/parallel.h"
#include "core/view.h"

namespace fastcl::cpu {

struct Operand {
  char* data;
  DType dtype;
};

class JointSweep {
 public:
  JointSweep(const std::vector<const Views*>& lists, int64_t part_size) : lists_(lists.size()), part_size_(part_size) {
    const size_t n = lists[0]->size();
    items_.reserve(n);
    operands_.reserve(n * lists_);
    std::vector<const View*> row(lists_);
    for (size_t i = 0; i < n; ++i) {
      const int64_t elements = (*lists[0])[i].numel();
      if (elements == 0) continue;
      bool dense = true;
      for (size_t l = 0; l < lists_; ++l) {
        row[l] = &(*lists[l])[i];
        dense = dense && row[l]->contiguous;
        operands_.push_back({row[l]->data, row[l]->dtype});
      }
      items_.push_back({total_, dense ? nullptr : layout_of(row)});
      total_ += elements;
    }
  }

  int64_t parts() const { return (total_ + part_size_ - 1) / part_size_; }

  // Calls visit(operands, strides, n) for runs of one part at constant strides, in order. The operands point to the run's first elements;
  // strides is null where all are 1.
  template <class Visit>
  void part(int64_t index, Visit&& visit) const {
    int64_t begin = index * part_size_;
    const int64_t end = std::min(begin + part_size_, total_);
    std::vector<Operand> at(lists_);
    auto item = std::upper_bound(items_.begin(), items_.end(), begin, [](int64_t b, const Item& i) { return b < i.start; }) - 1;
    for (; begin < end; ++item) {
      const int64_t stop = std::min(end, item + 1 == items_.end() ? total_ : (item + 1)->start);
      const Operand* own = operands_.data() + size_t(item - items_.begin()) * lists_;
      prefetch(item);
      if (item->layout == nullptr) {
        for (size_t l = 0; l < lists_; ++l) at[l] = {own[l].data + (begin - item->start) * size_of(own[l].dtype), own[l].dtype};
        visit(at.data(), static_cast<const int64_t*>(nullptr), stop - begin);
      } else {
        walk(*item->layout, begin - item->start, stop - item->start, [&](const int64_t* offset, int64_t n) {
          for (size_t l = 0; l < lists_; ++l) at[l] = {own[l].data + offset[l] * size_of(own[l].dtype), own[l].dtype};
          visit(at.data(), item->layout->stride(0), n);
        });
      }
      begin = stop;
    }
  }

 private:
  struct Item {
    int64_t start;
    const Layout* layout;  // null: all are contiguous
  };
  size_t lists_;
  int64_t part_size_, total_ = 0;
  std::vector<Item> items_;
  std::vector<Operand> operands_;  // [item][list]
  std::deque<Layout> layouts_;     // a deque: the items point into it

  // Null also for other layouts whose elements lie in one common order, as channels_last.
  const Layout* layout_of(const std::vector<const View*>& row) {
    const Layout& layout = layouts_.emplace_back(coalesce(row.data(), int(lists_)));
    const auto ones = std::count(layout.strides.begin(), layout.strides.end(), 1);
    return layout.ndim() == 1 && ones == std::ptrdiff_t(lists_) ? nullptr : &layout;
  }

  // Between small tensors the hardware sees no pattern.
  void prefetch(std::vector<Item>::const_iterator item) const {
    constexpr int ahead = 6;
    if (items_.end() - item <= ahead || item[1].start - item->start > 1024) return;
    const Operand* soon = operands_.data() + size_t(item - items_.begin() + ahead) * lists_;
    for (size_t l = 0; l < lists_; ++l)
      for (int64_t line = 0; line < 4; ++line) __builtin_prefetch(soon[l].data + 64 * line);
  }
};

}  // namespace fastcl::cpu
