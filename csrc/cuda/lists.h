// Lists whose operands' dtypes are known at run time only, grouped by the type that computes. Host code.
#pragma once

#include <deque>
#include <map>

#include "cuda/masks.h"
#include "cuda/operands.h"

namespace fastcl::cuda {

// The strides of a contiguous tensor of a view's shape.
inline std::vector<int64_t> contiguous_strides(const View& v) {
  std::vector<int64_t> strides(size_t(v.ndim), 1);
  for (int d = v.ndim - 1; d > 0; --d) strides[size_t(d - 1)] = strides[size_t(d)] * v.shape[d];
  return strides;
}

// An index that goes along with a tensor: in the order of its rows, or as strides tell. Keeps what it points to.
class Index {
 public:
  Index(const View& along, const void* origin, const int64_t* strides = nullptr)
      : strides_(strides != nullptr ? std::vector<int64_t>(strides, strides + along.ndim) : contiguous_strides(along)),
        view_(static_cast<char*>(const_cast<void*>(origin)), along.shape, strides_.data(), along.ndim, DType::other, along.device,
              along.device_index) {}
  Index(const Index&) = delete;
  Index& operator=(const Index&) = delete;
  const View& view() const { return view_; }

 private:
  std::vector<int64_t> strides_;
  View view_;
};

// A count as the address of an index.
inline const void* counted_from(int64_t first) { return reinterpret_cast<const void*>(intptr_t(first)); }

inline void add_or_refuse(List& list, const char* argument, size_t index, const std::vector<const View*>& views, int run,
                          const std::vector<int64_t>& notes) {
  if (const char* reason = list.add(views.data(), run, notes.data())) throw Refusal(argument, index, reason);
}

inline int64_t chunks_of(const List& list) {
  int64_t chunks = 0;
  for (const List::Entry& e : list.entries()) chunks += list.chunks_of(e);
  return chunks;
}

// The lists of tensors that compute in float and in double.
struct ByCompute {
  List single, twice;
  explicit ByCompute(int operands) : single(operands, kRunChunk, true, true), twice(operands, kRunChunk, true, true) {}
  bool empty() const { return single.entries().empty() && twice.entries().empty(); }
  // Runs are so many vectors of the computing type long.
  void add(const char* argument, size_t index, bool in_double, const std::vector<const View*>& views, const std::vector<int64_t>& notes,
           int vectors = 1) {
    add_or_refuse(in_double ? twice : single, argument, index, views, vectors * (in_double ? kRun<double> : kRun<float>), notes);
  }
};

inline ByCompute child_mask_lists(const Views& grads, const std::vector<Place>& places) {
  ByCompute lists(2);
  for (size_t i = 0; i < grads.size(); ++i) {
    const View& g = grads[i];
    if (g.numel() == 0) continue;
    const Index index(g, counted_from(places[i].offset), places[i].strides);
    lists.add("grads", i, g.dtype == DType::f64, {&g, &index.view()}, {operand_note(g.dtype), places[i].tensor}, kChildVectors);
  }
  return lists;
}

// By the size of a gradient's element.
inline std::map<int64_t, List> bit_mask_lists(const Views& grads, const Views& bits) {
  std::map<int64_t, List> lists;
  for (size_t i = 0; i < grads.size(); ++i) {
    const View& g = grads[i];
    if (g.numel() == 0) continue;
    List& list = lists.try_emplace(size_of(g.dtype), 2, kRunChunk, true, true).first->second;
    const Index index(g, bits[i].data);
    add_or_refuse(list, "grads", i, {&g, &index.view()}, int(16 / size_of(g.dtype)), {operand_note(g.dtype), 0});
  }
  return lists;
}

inline List threshold_list(const Views& bits, const Views& tensors) {
  List list(2, kRunChunk, true, true);
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].numel() == 0) continue;
    const Index index(tensors[i], bits[i].data);
    add_or_refuse(list, "tensors", i, {&index.view(), &tensors[i]}, kByteRun, {0, operand_note(tensors[i].dtype)});
  }
  return list;
}

// Lists of one shape; the first operand's note has the tensor's number.
inline ByCompute joint_lists(const char* argument, const std::vector<const Views*>& operands) {
  ByCompute lists(int(operands.size()));
  std::vector<const View*> views(operands.size());
  std::vector<int64_t> notes(operands.size());
  for (size_t i = 0; i < operands[0]->size(); ++i) {
    if ((*operands[0])[i].numel() == 0) continue;
    bool in_double = false;
    for (size_t o = 0; o < operands.size(); ++o) {
      views[o] = &(*operands[o])[i];
      notes[o] = operand_note(views[o]->dtype, o == 0 ? int64_t(i) : 0);
      in_double = in_double || views[o]->dtype == DType::f64;
    }
    lists.add(argument, i, in_double, views, notes);
  }
  return lists;
}

// Tensors that are read alone.
inline List single_list(const char* argument, const Views& tensors, int64_t chunk, int run) {
  List list(1, chunk, true, true);
  for (size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].numel() > 0) add_or_refuse(list, argument, i, {&tensors[i]}, run, {operand_note(tensors[i].dtype, int64_t(i))});
  return list;
}

}  // namespace fastcl::cuda
