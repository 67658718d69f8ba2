#include "core/child_mask.h"

#include <deque>

#include "core/dtypes.h"
#include "cpu/child_bits.h"
#include "cpu/ops.h"
#include "cpu/sweep.h"

namespace fastcl::cpu {
namespace {

// n elements from an index of their whole parameter on.
using MaskRun = void (*)(char* grad, int64_t stride, int64_t element, int64_t element_stride, int64_t n, uint32_t tensor, uint32_t step,
                         const ChildDraw& draw);

template <class G>
FASTCL_CLONES void run(char* grad, int64_t stride, int64_t element, int64_t element_stride, int64_t n, uint32_t tensor, uint32_t step,
                       const ChildDraw& draw) {
  using Op = ChildMask<G>;
  const Op op{typename Op::compute(draw.scale)};
  ChildBits drawn(draw);
  const uint32_t bound = drawn.bound();
  for (int64_t done = 0; done < n; done += kMostChildBits) {
    const int64_t m = std::min(kMostChildBits, n - done);
    G* g = reinterpret_cast<G*>(grad) + done * stride;
    if (stride == 1)  // the generator gives memory time: what it will be applied to can come meanwhile
      for (int64_t at = 0; at < m * int64_t(sizeof(G)); at += 64) __builtin_prefetch(reinterpret_cast<const char*>(g) + at, 1);
    const uint16_t* bits = drawn.draw(element + done * element_stride, element_stride, m, tensor, step);
    if (stride == 1)
      for (int64_t e = 0; e < m; ++e) g[e] = op(g[e], bits[e] < bound);
    else
      for (int64_t e = 0; e < m; ++e) g[e * stride] = op(g[e * stride], bits[e] < bound);
  }
}

MaskRun run_of(DType grad) {
  return with_floating(grad, [](auto g) -> MaskRun { return run<typename decltype(g)::type>; });
}

// The elements of all tensors as one range, each with its index in its whole parameter.
class ChildSweep {
 public:
  ChildSweep(const Views& grads, const std::vector<Place>& places) {
    for (size_t i = 0; i < grads.size(); ++i) {
      const View& g = grads[i];
      if (g.numel() == 0) continue;
      const Place& place = places[i];
      items_.push_back({total_, &g, run_of(g.dtype), place.offset, uint32_t(place.tensor), layout_of(g, place.strides)});
      total_ += g.numel();
    }
  }

  void run(const ChildDraw& draw, uint32_t step, const Pool& pool) const {
    pool.each(total_, kGrain, [&](int64_t begin, int64_t end) { part(begin, end, draw, step); });
  }

 private:
  struct Item {
    int64_t start;  // of the tensor's first element in the range of all elements
    const View* grad;
    MaskRun run;
    int64_t offset;  // of the first element's index
    uint32_t tensor;
    const Layout* layout;  // null: memory and indices both ascend by one
  };
  std::vector<Item> items_;
  std::deque<Layout> layouts_;  // a deque: the items point into it
  int64_t total_ = 0;

  const Layout* layout_of(const View& g, const int64_t* strides) {
    std::vector<int64_t> own;
    if (strides == nullptr) {
      if (is_contiguous(g)) return nullptr;
      own.resize(size_t(g.ndim));
      int64_t stride = 1;
      for (int d = g.ndim - 1; d >= 0; --d) {
        own[size_t(d)] = stride;
        stride *= g.shape[d];
      }
      strides = own.data();
    }
    const View index(nullptr, g.shape, strides, g.ndim, DType::other, g.device, 0);
    if (is_contiguous(g) && is_contiguous(index)) return nullptr;
    const View* both[] = {&g, &index};
    return &layouts_.emplace_back(coalesce(both, 2));
  }

  void part(int64_t begin, int64_t end, const ChildDraw& draw, uint32_t step) const {
    auto item = std::upper_bound(items_.begin(), items_.end(), begin, [](int64_t at, const Item& i) { return at < i.start; }) - 1;
    for (; begin < end; ++item) {
      const int64_t stop = std::min(end, item + 1 == items_.end() ? total_ : (item + 1)->start);
      const int64_t from = begin - item->start, to = stop - item->start;
      const View& g = *item->grad;
      if (item->layout == nullptr) {
        item->run(g.data + from * size_of(g.dtype), 1, item->offset + from, 1, to - from, item->tensor, step, draw);
      } else {
        const int64_t* strides = item->layout->stride(0);
        walk(*item->layout, from, to, [&](const int64_t* at, int64_t n) {
          item->run(g.data + at[0] * size_of(g.dtype), strides[0], item->offset + at[1], strides[1], n, item->tensor, step, draw);
        });
      }
      begin = stop;
    }
  }
};

}  // namespace

void child_mask_at_(const Views& grads, double keep, uint64_t seed, uint32_t step, const std::vector<Place>& places, const Pool& pool) {
  ChildSweep(grads, places).run(ChildDraw::make(keep, seed), step, pool);
}

}  // namespace fastcl::cpu
