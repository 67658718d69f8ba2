// The gradients of an optimizer's step on their way through the transforms: block by block, in memory that stays in the first-level cache.
#pragma once

#include <deque>
#include <vector>

#include "core/parallel.h"
#include "core/transforms.h"

namespace fastcl::cpu {

// One sweep over everything that an optimizer's step touches. The elements of all parameters are one range, cut into parts whose boundaries
// depend on the sizes alone.
class GradientSweep {
 public:
  static constexpr int64_t kPart = 16384;
  static constexpr int64_t kBlock = 1024;
  enum { kParam, kGrad, kFirst, kSecond, kFixed };  // the slots; operands of transforms follow, and what is dotted with is last

  struct Slot {
    char* data;  // null: left out, or an index that the transform counts itself
    DType dtype;
  };
  struct Item {
    int64_t start;
    size_t tensor;
    const Layout* layout;  // null: every slot has stride 1
    int64_t offset;        // of the tensor in its whole parameter
    uint32_t place, step;  // what draws ask for
    bool compact;
  };
  // Elements at constant strides, in the parameter's order.
  struct Run {
    const Item& item;
    const Slot* slots;
    const int64_t* offsets;  // of each slot's first element
    const int64_t* strides;  // null: 1
    int64_t n;

    int64_t stride(int slot) const { return strides != nullptr ? strides[slot] : 1; }
    int64_t index(int slot, int64_t done) const { return offsets[slot] + done * stride(slot); }
    char* at(int slot, int64_t done) const { return slots[slot].data + index(slot, done) * size_of(slots[slot].dtype); }
    // How far a block from here goes: the following ones then begin at multiples of its size.
    int64_t block(int64_t done) const { return std::min(kBlock - (offsets[kParam] + done) % kBlock, n - done); }
  };

  GradientSweep(const OptimizerInputs& inputs, const Views* dotted);

  int64_t parts() const { return (total_ + kPart - 1) / kPart; }
  int slots() const { return slots_; }
  const OptimizerInputs& inputs() const { return inputs_; }

  template <class Visit>
  void part(int64_t index, Visit&& visit) const {
    int64_t begin = index * kPart;
    const int64_t end = std::min(begin + kPart, total_);
    std::vector<int64_t> offsets(static_cast<size_t>(slots_));
    auto item = std::upper_bound(items_.begin(), items_.end(), begin, [](int64_t b, const Item& i) { return b < i.start; }) - 1;
    for (; begin < end; ++item) {
      const int64_t stop = std::min(end, item + 1 == items_.end() ? total_ : (item + 1)->start);
      const Slot* own = table_.data() + (item - items_.begin()) * slots_;
      prefetch(item);
      const int64_t from = begin - item->start, to = stop - item->start;
      if (item->layout == nullptr) {
        std::fill(offsets.begin(), offsets.end(), from);
        visit(Run{*item, own, offsets.data(), nullptr, to - from});
      } else {
        walk(*item->layout, from, to, [&](const int64_t* at, int64_t n) { visit(Run{*item, own, at, item->layout->stride(0), n}); });
      }
      begin = stop;
    }
  }

 private:
  const OptimizerInputs& inputs_;
  int slots_;
  int64_t total_ = 0;
  std::vector<Item> items_;
  std::vector<Slot> table_;     // [item][slot]
  std::deque<Layout> layouts_;  // deques: their contents are pointed into
  std::deque<std::vector<int64_t>> strides_;

  // Between small tensors the hardware sees no pattern.
  void prefetch(std::vector<Item>::const_iterator item) const {
    constexpr int ahead = 4;
    if (items_.end() - item <= ahead || item[1].start - item->start > kBlock) return;
    const Slot* soon = table_.data() + (item - items_.begin() + ahead) * slots_;
    for (int s = 0; s < slots_; ++s)
      for (int64_t line = 0; line < 4 && soon[s].data != nullptr; ++line) __builtin_prefetch(soon[s].data + 64 * line);
  }
};

// What the next block reads, asked for while this one is worked on: streams that take turns are more than the hardware follows.
class Ahead {
 public:
  static constexpr int kMost = 8;
  static constexpr int64_t kGroup = 64;  // elements of this block for which as many of the next are asked for

  Ahead() = default;
  Ahead(const GradientSweep::Run& run, int slots, int64_t next) {
    if (run.strides != nullptr || next >= run.n) return;
    for (int s = 0; s < slots && count_ < kMost; ++s) {
      const GradientSweep::Slot& slot = run.slots[s];
      if (slot.data == nullptr || slot.dtype == DType::other) continue;
      data_[count_] = run.at(s, next);
      lines_[count_++] = size_of(slot.dtype);
    }
  }
  FASTCL_HD void group(int64_t e) const {
    for (int k = 0; k < count_; ++k)
      for (int64_t line = 0; line < lines_[k]; ++line) __builtin_prefetch(data_[k] + e * lines_[k] + 64 * line, 0, 2);
  }

 private:
  int count_ = 0;
  const char* data_[kMost];
  int64_t lines_[kMost];  // of a group
};

// Widens n elements.
template <class C>
void widen_block(const char* data, DType dtype, int64_t stride, int64_t n, C* out);

// Transforms blocks of gradients, one thread's.
template <class C>
class GradientBlock {
 public:
  // The gradient of elements [done, done + n) of a run after all transforms: in a buffer, or where the gradient itself lies.
  const C* transformed(const GradientSweep& sweep, const GradientSweep::Run& run, int64_t done, int64_t n);

 private:
  static constexpr int64_t kBlock = GradientSweep::kBlock;
  alignas(64) C x_[kBlock];
  alignas(64) C operand_[3][kBlock];
  alignas(64) double reference_[kBlock];

  const C* widened(const GradientSweep::Run& run, int slot, int64_t done, int64_t n, C* buffer);
};

}  // namespace fastcl::cpu
