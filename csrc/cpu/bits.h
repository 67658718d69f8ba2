// A sweep over pairs of a tensor and its bits. A part is a range of whole bytes of the bits, so that two threads never share one.
#pragma once

#include <algorithm>
#include <deque>
#include <vector>

#include "core/bit_mask.h"
#include "core/parallel.h"

namespace fastcl::cpu {

class BitSweep {
 public:
  BitSweep(const Views& tensors, const Views& bits) {
    items_.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const View& t = tensors[i];
      if (t.numel() == 0) continue;
      const Layout* layout = t.contiguous ? nullptr : &layouts_.emplace_back(row_major(t));
      items_.push_back({bytes_, t.numel(), t.data, reinterpret_cast<uint8_t*>(bits[i].data), t.dtype, layout});
      bytes_ += bit_bytes(t.numel());
    }
  }

  // Calls visit(dtype, data, stride, bits, e, n) for runs of n elements whose first one has the bit e & 7 of bits[e >> 3].
  template <class Visit>
  void run(const Pool& pool, Visit&& visit) const {
    pool.each(bytes_, kGrainBytes, [&](int64_t begin, int64_t end) {
      auto item = std::upper_bound(items_.begin(), items_.end(), begin, [](int64_t at, const Item& i) { return at < i.start; }) - 1;
      for (; begin < end; ++item) {
        prefetch(item);
        const int64_t stop = std::min(end, item->start + bit_bytes(item->elements));
        const int64_t first = 8 * (begin - item->start), last = std::min(8 * (stop - item->start), item->elements);
        const int64_t size = size_of(item->dtype);
        if (item->layout == nullptr) {
          visit(item->dtype, item->data + first * size, int64_t(1), item->bits, first, last - first);
        } else {
          int64_t e = first;
          walk(*item->layout, first, last, [&](const int64_t* at, int64_t n) {
            visit(item->dtype, item->data + at[0] * size, item->layout->stride(0)[0], item->bits, e, n);
            e += n;
          });
        }
        begin = stop;
      }
    });
  }

 private:
  static constexpr int64_t kGrainBytes = 4096;
  struct Item {
    int64_t start;  // of the tensor's first byte in the range of all bytes of bits
    int64_t elements;
    char* data;
    uint8_t* bits;
    DType dtype;
    const Layout* layout;  // null: contiguous
  };
  std::vector<Item> items_;
  std::deque<Layout> layouts_;  // a deque: the items point into it
  int64_t bytes_ = 0;

  // Between small tensors the hardware sees no pattern.
  void prefetch(std::vector<Item>::const_iterator item) const {
    constexpr int ahead = 6;
    if (items_.end() - item <= ahead) return;
    __builtin_prefetch(item[ahead].bits, 1);
    for (int64_t line = 0; line < 4; ++line) __builtin_prefetch(item[ahead].data + 64 * line, 1);
  }
};

}  // namespace fastcl::cpu
