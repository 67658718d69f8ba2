// A list of tensors as the native code sees it, and how its elements are laid out for a sweep. Host code without Python or torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/scalar.h"

namespace fastcl {

enum class Device : uint8_t { cpu, cuda, other };

// Borrowed memory: the caller keeps the tensors alive for the length of the call. What every step of a call asks for is worked out once,
// while the shape is in the cache: with thousands of tensors each look at it again is a miss.
struct View {
  char* data = nullptr;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;  // in elements
  int32_t ndim = 0;
  DType dtype = DType::other;
  Device device = Device::other;
  bool contiguous = true;  // with any stride where a size is 1
  int32_t device_index = 0;
  int64_t elements = 0;

  View() = default;
  View(char* data, const int64_t* shape, const int64_t* strides, int32_t ndim, DType dtype, Device device, int32_t device_index)
      : data(data), shape(shape), strides(strides), ndim(ndim), dtype(dtype), device(device), device_index(device_index), elements(1) {
    for (int d = ndim - 1; d >= 0; --d) {
      contiguous = contiguous && (shape[d] == 1 || strides[d] == elements);
      elements *= shape[d];
    }
    contiguous = contiguous || elements == 0;  // torch gives an empty tensor strides as if its sizes were at least 1
  }

  int64_t numel() const { return elements; }
  // One past the last byte that the view reaches.
  const char* end() const {
    if (contiguous) return data + elements * size_of(dtype);
    int64_t last = 0;
    for (int d = 0; d < ndim; ++d) last += (shape[d] - 1) * strides[d];
    return data + (last + 1) * size_of(dtype);
  }
};
using Views = std::vector<View>;

// A call that cannot be served; thrown before anything is written.
struct Refusal : std::runtime_error {
  Refusal(const char* argument, size_t index, const char* reason)
      : std::runtime_error(std::string(argument) + "[" + std::to_string(index) + "] " + reason) {}
};

inline bool is_contiguous(const View& v) { return v.contiguous; }

// The common iteration order of a tensor and of others that broadcast to it, in as few dimensions as their strides allow, innermost
// first. Contiguous tensors, and any with equal dense strides, become one dimension.
struct Layout {
  int operands;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;  // [dimension][operand], 0 where an operand broadcasts

  int ndim() const { return int(sizes.size()); }
  const int64_t* stride(int d) const { return strides.data() + size_t(d) * operands; }
};

inline Layout coalesce(const View* const* views, int operands) {
  const View& first = *views[0];
  const auto stride_of = [&](int operand, int d) -> int64_t {
    const View& v = *views[operand];
    const int own = d - (first.ndim - v.ndim);
    return own < 0 || (v.shape[own] == 1 && first.shape[d] != 1) ? 0 : v.strides[own];
  };
  std::vector<int> order;
  for (int d = first.ndim - 1; d >= 0; --d)
    if (first.shape[d] != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return first.strides[a] < first.strides[b]; });
  Layout out{operands, {}, {}};
  for (int d : order) {
    bool merges = !out.sizes.empty();
    for (int o = 0; o < operands && merges; ++o)
      merges = stride_of(o, d) == out.sizes.back() * out.strides[out.strides.size() - operands + o];
    if (merges) {
      out.sizes.back() *= first.shape[d];
    } else {
      out.sizes.push_back(first.shape[d]);
      for (int o = 0; o < operands; ++o) out.strides.push_back(stride_of(o, d));
    }
  }
  if (out.sizes.empty()) {
    out.sizes.push_back(1);
    out.strides.assign(operands, 1);
  }
  return out;
}

// Walks the elements [begin, end) of a layout, in its order, as runs of constant strides: visit(offsets[operand], n), offsets in elements.
template <class Visit>
void walk(const Layout& layout, int64_t begin, int64_t end, Visit&& visit) {
  std::vector<int64_t> at(layout.operands);
  while (begin < end) {
    const int64_t inner = begin % layout.sizes[0];
    for (int o = 0; o < layout.operands; ++o) at[o] = inner * layout.stride(0)[o];
    int64_t rest = begin / layout.sizes[0];
    for (int d = 1; d < layout.ndim(); ++d) {
      const int64_t index = rest % layout.sizes[d];
      rest /= layout.sizes[d];
      for (int o = 0; o < layout.operands; ++o) at[o] += index * layout.stride(d)[o];
    }
    const int64_t n = std::min(end - begin, layout.sizes[0] - inner);
    visit(at.data(), n);
    begin += n;
  }
}

inline bool broadcasts(const View& read, const View& written) {
  if (read.ndim > written.ndim) return false;
  if (written.ndim == 1) return read.elements == written.elements || read.elements == 1;
  for (int r = 0; r < read.ndim; ++r) {
    const int64_t size = read.shape[r];
    if (size != 1 && size != written.shape[r + written.ndim - read.ndim]) return false;
  }
  return true;
}

inline bool same_shape(const View& a, const View& b) {
  return a.ndim == b.ndim && a.elements == b.elements && (a.ndim == 1 || std::equal(a.shape, a.shape + a.ndim, b.shape));
}

inline bool same_layout(const View& a, const View& b) {
  return a.data == b.data && a.dtype == b.dtype && same_shape(a, b) && std::equal(a.strides, a.strides + a.ndim, b.strides);
}

// Whether two indices of a view may share an element; exact for every view that slicing, transposing and expanding can make.
inline bool overlaps_itself(const View& v) {
  if (is_contiguous(v)) return false;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int d = 0; d < v.ndim; ++d)
    if (v.shape[d] > 1) dims.emplace_back(v.strides[d], v.shape[d]);
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return true;
    reach += (size - 1) * stride;
  }
  return false;
}

struct Span {
  const char* begin;
  const char* end;
};

// The ranges of memory of many views in ascending order. Allocators hand out memory in order, so most lists need no sort.
inline void sort_spans(std::vector<Span>& spans) {
  const auto before = [](const Span& a, const Span& b) { return a.begin < b.begin; };
  if (std::is_sorted(spans.begin(), spans.end(), before)) return;
  if (std::is_sorted(spans.rbegin(), spans.rend(), before)) {
    std::reverse(spans.begin(), spans.end());
    return;
  }
  std::sort(spans.begin(), spans.end(), before);
}

// Whether the order of writes could show: two written views share memory, or a written one shares memory with a read one that is not (or
// may not be) its own partner, element for element. Interleaved views of one buffer count as sharing.
inline bool writes_overlap(const Views& written, const std::vector<const Views*>& reads, bool partners_may_be_equal = true) {
  std::vector<Span> writes, others;
  writes.reserve(written.size());
  for (const View& w : written) {
    if (w.numel() == 0) continue;
    if (overlaps_itself(w)) return true;
    writes.push_back({w.data, w.end()});
  }
  sort_spans(writes);
  for (size_t i = 1; i < writes.size(); ++i)
    if (writes[i].begin < writes[i - 1].end) return true;
  for (const Views* list : reads) {
    others.clear();
    others.reserve(list->size());
    for (size_t i = 0; i < list->size(); ++i) {
      const View& r = (*list)[i];
      if (r.numel() == 0 || (partners_may_be_equal && i < written.size() && same_layout(written[i], r))) continue;
      others.push_back({r.data, r.end()});
    }
    sort_spans(others);
    size_t w = 0;
    for (const Span& r : others) {
      while (w < writes.size() && writes[w].end <= r.begin) ++w;
      if (w < writes.size() && writes[w].begin < r.end) return true;
    }
  }
  return false;
}

// Whether two views of any written lists share memory, or a written view and a read one.
inline bool lists_overlap(const std::vector<const Views*>& written, const std::vector<const Views*>& reads) {
  std::vector<Span> writes, others, merged;
  const auto collect = [&](const Views& list) {
    others.clear();
    others.reserve(list.size());
    for (const View& v : list)
      if (v.numel() > 0) others.push_back({v.data, v.end()});
    sort_spans(others);
  };
  for (const Views* list : written) {
    for (const View& v : *list)
      if (v.numel() > 0 && overlaps_itself(v)) return true;
    collect(*list);
    merged.resize(writes.size() + others.size());
    std::merge(writes.begin(), writes.end(), others.begin(), others.end(), merged.begin(),
               [](const Span& a, const Span& b) { return a.begin < b.begin; });
    writes.swap(merged);
  }
  for (size_t i = 1; i < writes.size(); ++i)
    if (writes[i].begin < writes[i - 1].end) return true;
  for (const Views* list : reads) {
    collect(*list);
    size_t w = 0;
    for (const Span& r : others) {
      while (w < writes.size() && writes[w].end <= r.begin) ++w;
      if (w < writes.size() && writes[w].begin < r.end) return true;
    }
  }
  return false;
}

}  // namespace fastcl
