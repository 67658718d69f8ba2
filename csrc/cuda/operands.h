// Operands whose dtypes are known at run time only. One kernel serves all dtypes that compute in one type: a launch may mix them, and the
// library stays small. A thread works on runs of elements that lie next to each other, as wide as a vector of the computing type.
#pragma once

#include <type_traits>

#include "core/bit_mask.h"
#include "core/child_mask.h"
#include "core/dtypes.h"
#include "cuda/sweep.h"

namespace fastcl::cuda {

// The note of an operand: its dtype, and in the first operand's also the number of the item.
constexpr int64_t operand_note(DType t, int64_t item = 0) { return item * 8 + int64_t(t); }
FASTCL_HD int64_t operand_item(int64_t note) { return note / 8; }
FASTCL_HD DType operand_dtype(int64_t note) { return DType(note % 8); }

template <class C>
constexpr int kRun = 16 / int(sizeof(C));
constexpr int64_t kRunChunk = 8192;

// V elements from one address on, or V times the one there if the operand stands still.
template <class T, class D, int V>
FASTCL_HD void read_as(const T* x, bool still, D (&out)[V]) {
  if (V > 1 && still) {
    const D value = load<D>(*x);
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) out[k] = value;
  } else {
    const Elements<T, V> e = Vector<T, V>::load(x).elements();
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) out[k] = load<D>(e.x[k]);
  }
}

template <class T, class D, int V>
FASTCL_HD void write_as(T* out, const D (&x)[V]) {
  Elements<T, V> e;
  FASTCL_UNROLL
  for (int k = 0; k < V; ++k) e.x[k] = store<T>(x[k]);
  Vector<T, V>::of(e).store(out);
}

// Where a thread's V elements lie in each operand.
template <int V, class P>
struct Site {
  static constexpr int width = V;
  const P& p;
  int entry;
  int64_t form, first;  // the first element, in the order of the list

  FASTCL_HD int64_t at(int operand) const {
    int64_t out[1] = {first};
    if ((form & kDimsMask) != 0) p.offsets(entry, first, operand, out);
    return out[0];
  }
  FASTCL_HD bool still(int operand) const { return (form & kDimsMask) != 0 && p.words[p.dims(entry) + 1 + operand] == 0; }
  FASTCL_HD DType dtype(int operand) const { return operand_dtype(p.note(entry, operand)); }

  template <class T>
  FASTCL_HD T* address(int operand, int64_t offset) const {
    return p.template address<T>(entry, operand) + offset;
  }
  // In the index of an operand without elements: where it counts from, and how far.
  FASTCL_HD int64_t origin(int operand) const { return p.words[entry + kAddress + operand]; }

  // Floating elements, or with stored also importance in uint8.
  template <bool stored = false, class D>
  FASTCL_HD void read(int operand, int64_t offset, D (&out)[V]) const {
    const DType t = dtype(operand);
    const bool stands = still(operand);
    if (t == DType::f32) {
      read_as(address<const float>(operand, offset), stands, out);
    } else if (t == DType::bf16) {
      read_as(address<const BFloat16>(operand, offset), stands, out);
    } else if (t == DType::f16) {
      read_as(address<const Float16>(operand, offset), stands, out);
    } else if (stored && t == DType::u8) {
      read_as(address<const uint8_t>(operand, offset), stands, out);
    } else {
      read_as(address<const double>(operand, offset), stands, out);
    }
  }
  template <bool stored = false, class D>
  FASTCL_HD void read(int operand, D (&out)[V]) const {
    read<stored>(operand, at(operand), out);
  }

  template <class D>
  FASTCL_HD void write(int operand, int64_t offset, const D (&x)[V]) const {
    const DType t = dtype(operand);
    if (t == DType::f32) {
      write_as(address<float>(operand, offset), x);
    } else if (t == DType::bf16) {
      write_as(address<BFloat16>(operand, offset), x);
    } else if (t == DType::f16) {
      write_as(address<Float16>(operand, offset), x);
    } else {
      write_as(address<double>(operand, offset), x);
    }
  }
};

// body(site) for the thread's runs of V elements and, where they do not lie in runs, for single ones.
template <int V, class P, class Body>
FASTCL_HD void each_run(const P& p, const Chunk& c, int thread, const Body& body) {
  const bool runs = (c.form & kDimsMask) == 0 || (c.form & kVectors) != 0;
  const int vectors = runs ? c.n / V : 0;
  FASTCL_ROLLED
  for (int i = thread; i < vectors; i += kThreads) body(Site<V, P>{p, c.entry, c.form, c.begin + int64_t(i) * V});
  FASTCL_ROLLED
  for (int e = vectors * V + thread; e < c.n; e += kThreads) body(Site<1, P>{p, c.entry, c.form, c.begin + e});
}

// ---- many elements' draws and bits, as the bits of a word: bit k is that of the k-th of V neighbours

FASTCL_HD int lowest_bit(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __ffs(int(word)) - 1;
#else
  return __builtin_ctz(word);
#endif
}
FASTCL_HD int set_bits(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// Which of the elements from an index of the whole parameter on are kept.
template <int V>
FASTCL_HD uint32_t kept_bits(const ChildDraw& draw, uint64_t element, uint32_t tensor, uint32_t step) {
  static_assert(V <= 8, "they lie in at most two blocks");
  const int lane = int(element & 7);
  const Philox low = draw.draw8(element >> 3, tensor, step);
  uint32_t word[8] = {low.word[0], low.word[1], low.word[2], low.word[3], 0, 0, 0, 0};
  if (lane + V > 8) {
    const Philox high = draw.draw8((element >> 3) + 1, tensor, step);
    FASTCL_UNROLL
    for (int w = 0; w < 4; ++w) word[4 + w] = high.word[w];
  }
  if (lane & 4) {
    FASTCL_UNROLL
    for (int w = 0; w < 6; ++w) word[w] = word[w + 2];
  }
  if (lane & 2) {
    FASTCL_UNROLL
    for (int w = 0; w < 5; ++w) word[w] = word[w + 1];
  }
  if (lane & 1) {
    FASTCL_UNROLL
    for (int w = 0; w < 4; ++w) word[w] = word[w] >> 16 | word[w + 1] << 16;
  }
  uint32_t kept = 0, undecided = 0;
  FASTCL_UNROLL
  for (int k = 0; k < V; ++k) {
    const uint32_t u = k & 1 ? word[k >> 1] >> 16 : word[k >> 1] & 0xffffu;
    kept |= uint32_t(u < draw.limit) << k;
    undecided |= uint32_t(u == draw.limit) << k;
  }
  FASTCL_ROLLED
  for (; undecided != 0; undecided &= undecided - 1) {
    const int k = lowest_bit(undecided);
    kept |= uint32_t(draw.kept_at_limit(element + uint64_t(k), tensor, step)) << k;
  }
  return kept;
}

// The bits of a mask from an element on. Rows of runs are whole runs long, so that a run's elements lie in one byte.
template <int V>
FASTCL_HD uint32_t mask_bits(const uint8_t* bits, int64_t element) {
  static_assert(8 % V == 0, "runs fill bytes");
  return uint32_t(bits[element >> 3]) >> (element & 7) & ((1u << V) - 1);
}

}  // namespace fastcl::cuda
