// Lists of tensors as kernels see them: a packet of plain words that travels by value in the kernel's parameters, so that a launch can be
// captured in a CUDA graph and needs no upload. Planning is host code and the packet's readers compile everywhere: tests run all of it
// without a GPU and with sizes that no GPU holds.
#pragma once

#include <cstdint>
#include <vector>

#include "core/view.h"

namespace fastcl::cuda {

constexpr int kMaxDims = 12;                // of a walked tensor after coalescing
constexpr int kMaxHeads = 8;                // gradients that one SPG kernel walks along with their accumulator
constexpr int64_t kMaxBlocks = 0x7fffffff;  // of one launch

// An entry is: numel, form, one address per operand, in some lists one note per operand, and for a walked entry per dimension, innermost
// first, its size and the stride of every operand. Forms:
//   dense   all operands contiguous (or of one dense layout), aligned for vectors; kOne: the second operand is a single value (no notes)
//   walked  everything else; kVectors: runs of V elements are contiguous and aligned in every operand that moves along them
// An operand of dtype `other` has no elements of its own: its strides tell an index that goes along, its address where that one counts
// from.
constexpr int64_t kDimsMask = 0xff, kVectors = 0x100, kOne = 0x200;
constexpr int kNumel = 0, kForm = 1, kAddress = 2;

template <int kTensors, int kWords>
struct Packet {
  static constexpr int max_tensors = kTensors, max_words = kWords;
  int64_t base;  // of the launch's chunks in the numbering of all chunks
  int32_t tensors, operands, notes;
  uint32_t first_chunk[kTensors + 1];
  uint16_t at[kTensors];  // where a tensor's entry starts
  int64_t words[kWords];

  FASTCL_HD int64_t note(int entry, int operand) const { return words[entry + kAddress + operands + operand]; }
  template <class T>
  FASTCL_HD T* address(int entry, int operand) const {
    return reinterpret_cast<T*>(words[entry + kAddress + operand]);
  }
  FASTCL_HD int dims(int entry) const { return entry + kAddress + operands + notes; }

  // The tensor that a chunk belongs to. Empty tensors are not listed, so the prefix sums ascend strictly.
  FASTCL_HD int find(uint32_t chunk) const {
    int low = 0, high = tensors;
    FASTCL_ROLLED
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_chunk[middle] <= chunk) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Where element e of a walked entry lies in N operands from the given one on, in elements.
  template <int N>
  FASTCL_HD void offsets(int entry, int64_t e, int operand, int64_t (&out)[N]) const {
    for (int o = 0; o < N; ++o) out[o] = 0;
    const int ndim = int(words[entry + kForm] & kDimsMask);
    int d = dims(entry);
    uint64_t rest = uint64_t(e);
    FASTCL_ROLLED
    for (int left = ndim; left > 0; --left, d += 1 + operands) {
      const uint64_t size = uint64_t(words[d]);
      const uint64_t next = left > 1 ? rest / size : 0;
      const int64_t index = int64_t(rest - next * size);
      for (int o = 0; o < N; ++o) out[o] += index * words[d + 1 + operand + o];
      rest = next;
    }
  }
};

// Parameters of 4 KB work with every driver and cost the least per launch: they serve lists of up to a hundred tensors. With 32 KB (CUDA
// 12.1, sm_70) ten thousand tensors take twelve launches instead of ninety-seven, which is what decides there.
using SmallPacket = Packet<104, 416>;
using LargePacket = Packet<848, 3392>;
static_assert(SmallPacket::max_words >= kAddress + 2 * (1 + kMaxHeads) + kMaxDims * (2 + kMaxHeads), "any one entry fits");
static_assert(sizeof(SmallPacket) <= 4064 && sizeof(LargePacket) <= 32700, "kernel parameters have 4096 or 32764 bytes");

// The entries of a list, in order, before they are split into launches.
class List {
 public:
  struct Entry {
    int64_t numel;
    size_t at, words;  // in the pool
  };
  struct Launch {
    size_t first, last;  // entries
    int64_t base, chunks;
    size_t words;
  };

  // vectors: whether the kernel has a vector path for walked entries; notes: whether entries carry notes.
  List(int operands, int64_t chunk, bool vectors, bool notes)
      : operands_(operands), notes_(notes ? operands : 0), chunk_(chunk), vectors_(vectors) {}

  int operands() const { return operands_; }
  const std::vector<Entry>& entries() const { return entries_; }
  const int64_t* words(const Entry& e) const { return pool_.data() + e.at; }
  int64_t chunks_of(const Entry& e) const { return (e.numel + chunk_ - 1) / chunk_; }

  // Adds a tensor that has elements, with the others that are walked along with it; run: elements of a vector. Returns why it
  // cannot be, or null.
  const char* add(const View* const* views, int run, const int64_t* notes = nullptr) {
    const View& first = *views[0];
    const int64_t numel = first.numel();
    if ((numel - 1) / chunk_ >= kMaxBlocks) return "has too many elements for one launch";
    bool plain = true, aligned = true;
    for (int o = 0; o < operands_; ++o) {
      plain = plain && views[o]->numel() == numel && is_contiguous(*views[o]);
      aligned = aligned && is_aligned(*views[o], run);
    }
    if (plain && aligned) {
      push(views, numel, 0, notes, nullptr);
      return nullptr;
    }
    const Layout layout = coalesce(views, operands_);
    if (layout.ndim() > kMaxDims) return "has more than 12 dimensions that cannot be walked as one";

    push(views, numel, form(views, layout, run), notes, &layout);
    return nullptr;
  }

  // Adds an entry that no view describes, in a list with a block per entry: these words stand behind the form.
  void add_words(const std::vector<int64_t>& own) {
    const size_t at = pool_.size();
    pool_.insert(pool_.end(), {1, 0});
    pool_.insert(pool_.end(), own.begin(), own.end());
    entries_.push_back({1, at, pool_.size() - at});
  }

  // Splits the list so that each launch fits into a packet of the given capacity.
  std::vector<Launch> launches(size_t max_tensors, size_t max_words, int64_t max_chunks = kMaxBlocks) const {
    std::vector<Launch> out;
    int64_t base = 0;
    for (size_t i = 0; i < entries_.size(); ++i) {
      const Entry& e = entries_[i];
      const int64_t chunks = chunks_of(e);
      if (out.empty() || i - out.back().first == max_tensors || out.back().words + e.words > max_words ||
          out.back().chunks > max_chunks - chunks)
        out.push_back({i, i, base, 0, 0});
      out.back().last = i + 1;
      out.back().chunks += chunks;
      out.back().words += e.words;
      base += chunks;
    }
    return out;
  }

  template <class P>
  void fill(const Launch& launch, P& packet) const {
    packet.base = launch.base;
    packet.tensors = int32_t(launch.last - launch.first);
    packet.operands = operands_;
    packet.notes = notes_;
    uint32_t chunk = 0;
    size_t at = 0;
    for (size_t i = launch.first; i < launch.last; ++i) {
      const Entry& e = entries_[i];
      packet.first_chunk[i - launch.first] = chunk;
      packet.at[i - launch.first] = uint16_t(at);
      std::copy_n(words(e), e.words, packet.words + at);
      chunk += uint32_t(chunks_of(e));
      at += e.words;
    }
    packet.first_chunk[launch.last - launch.first] = chunk;
  }

 private:
  int operands_, notes_;
  int64_t chunk_;
  bool vectors_;
  std::vector<Entry> entries_;
  std::vector<int64_t> pool_;

  static bool is_aligned(const View& v, int run) {
    return v.dtype == DType::other || reinterpret_cast<uintptr_t>(v.data) % uintptr_t(std::min<int64_t>(16, run * size_of(v.dtype))) == 0;
  }

  int64_t form(const View* const* views, const Layout& layout, int run) const {
    const bool one = operands_ == 2 && notes_ == 0 && layout.stride(0)[1] == 0;  // kernels with notes have no dense path for it
    bool along = layout.stride(0)[0] == 1 && is_aligned(*views[0], run), stands = false;
    for (int o = 1; o < operands_; ++o) {
      const int64_t stride = layout.stride(0)[o];
      stands = stands || stride == 0;
      const bool may_stand = one || (notes_ > 0 && vectors_ && views[o]->dtype != DType::other);
      along = along && (stride == 0 ? may_stand : stride == 1 && is_aligned(*views[o], run));
    }
    if (along && layout.ndim() == 1 && (one || !stands)) return one ? kOne : 0;
    bool runs = along && vectors_ && layout.sizes[0] % run == 0;
    for (int d = 1; d < layout.ndim(); ++d)
      for (int o = 0; o < operands_; ++o)
        runs = runs && (layout.stride(d)[o] % run == 0 || layout.stride(0)[o] == 0 || views[o]->dtype == DType::other);
    return layout.ndim() | (runs ? kVectors : 0);
  }

  void push(const View* const* views, int64_t numel, int64_t form, const int64_t* notes, const Layout* layout) {
    const size_t at = pool_.size();
    pool_.push_back(numel);
    pool_.push_back(form);
    for (int o = 0; o < operands_; ++o) pool_.push_back(int64_t(reinterpret_cast<intptr_t>(views[o]->data)));
    pool_.insert(pool_.end(), notes, notes + notes_);
    for (int d = 0; d < int(form & kDimsMask); ++d) {
      pool_.push_back(layout->sizes[d]);
      pool_.insert(pool_.end(), layout->stride(d), layout->stride(d) + operands_);
    }
    entries_.push_back({numel, at, pool_.size() - at});
  }
};

}  // namespace fastcl::cuda
