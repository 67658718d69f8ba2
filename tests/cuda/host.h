// What the programs of tests/cuda share: tensors of every layout, and the blocks of a list's launches one after the other.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/dtypes.h"
#include "core/parallel.h"
#include "cuda/sweep.h"

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      std::exit(1);                                               \
    }                                                             \
  } while (0)

namespace host {

using namespace fastcl;
using namespace fastcl::cuda;

inline const Pool kSerial{[](int64_t count, int64_t, Pool::Body body, void* context) {
  if (count > 0) body(0, count, context);
}};

struct Tensor {
  std::vector<int64_t> shape, strides;
  DType dtype;
  int64_t offset;                // of the first element, in elements
  std::vector<uint64_t> memory;  // aligned to 16 bytes by malloc
  View view(std::vector<uint64_t>& buffer) const {
    return {reinterpret_cast<char*>(buffer.data()) + offset * size_of(dtype),
            shape.data(),
            strides.data(),
            int32_t(shape.size()),
            dtype,
            Device::cuda,
            0};
  }
};

inline std::mt19937_64 random_bits(7);

// Random importance-like or gradient-like values in the memory's every element, with NaN, infinities, zeros and ones among them; NaN behind
// the end.
inline Tensor make(DType dtype, std::vector<int64_t> shape, std::vector<int64_t> strides, int64_t offset, bool special) {
  int64_t last = offset;
  for (size_t d = 0; d < shape.size(); ++d) last += (std::max<int64_t>(shape[d], 1) - 1) * strides[d];
  Tensor t{std::move(shape), std::move(strides), dtype, offset,
           std::vector<uint64_t>(size_t((last + 1) * size_of(dtype) + 7) / 8 + 4, ~uint64_t(0))};
  std::normal_distribution<double> normal;
  const double specials[] = {NAN, INFINITY, -INFINITY, 0, -0.0, 1, 1e-40, 65504};
  with_stored(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* x = reinterpret_cast<T*>(t.memory.data());
    for (int64_t e = 0; e <= last; ++e) {
      const double value = special && random_bits() % 50 == 0 ? specials[random_bits() % 8] : normal(random_bits);
      if constexpr (std::is_same_v<T, uint8_t>)
        x[e] = uint8_t(random_bits());
      else
        x[e] = store<T>(value);
    }
  });
  return t;
}

inline std::vector<int64_t> default_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t next = 1;
  for (int d = int(shape.size()) - 1; d >= 0; --d) {
    strides[size_t(d)] = next;
    next *= shape[size_t(d)];
  }
  return strides;
}

struct LayoutCase {
  const char* name;
  std::vector<int64_t> shape, strides, read_shape, read_strides;
  int64_t offset, read_offset;
};

inline std::vector<LayoutCase> layouts(bool broadcasting) {
  std::vector<LayoutCase> out;
  const auto plain = [&](const char* name, std::vector<int64_t> shape, int64_t offset, int64_t read_offset) {
    out.push_back({name, shape, default_strides(shape), shape, default_strides(shape), offset, read_offset});
  };
  plain("0-d", {}, 0, 0);
  for (int64_t n : {1, 63, 65, 8191, 8192, 8193, 40001}) plain("contiguous", {n}, 0, 0);
  plain("empty", {0, 3}, 0, 0);
  plain("misaligned written", {9001}, 1, 0);
  plain("misaligned read", {9001}, 0, 3);
  plain("misaligned both", {9001}, 1, 1);
  plain("4-d", {5, 3, 32, 33}, 0, 0);
  out.push_back({"both transposed", {70, 130}, {1, 70}, {70, 130}, {1, 70}, 0, 0});
  out.push_back({"read transposed", {70, 130}, {130, 1}, {70, 130}, {1, 70}, 0, 0});
  out.push_back({"written transposed", {96, 160}, {1, 96}, {96, 160}, {160, 1}, 0, 0});
  out.push_back({"channels last", {2, 16, 9, 20}, {2880, 1, 320, 16}, {2, 16, 9, 20}, {2880, 180, 20, 1}, 0, 0});
  out.push_back({"rows of a wider matrix", {120, 64}, {96, 1}, {120, 64}, {64, 1}, 0, 0});
  out.push_back({"odd rows of a wider matrix", {120, 65}, {97, 1}, {120, 65}, {65, 1}, 1, 0});
  out.push_back({"rows at odd distances", {120, 64}, {97, 1}, {120, 64}, {64, 1}, 0, 0});
  out.push_back({"every third", {5000}, {3}, {5000}, {1}, 0, 0});
  if (!broadcasting) return out;
  out.push_back({"one value", {9000}, {1}, {}, {}, 0, 0});
  out.push_back({"one value, misaligned", {9000}, {1}, {1}, {1}, 1, 1});
  out.push_back({"per row", {150, 128}, {128, 1}, {150, 1}, {1, 1}, 0, 1});
  out.push_back({"per odd row", {150, 129}, {129, 1}, {150, 1}, {1, 1}, 0, 0});
  out.push_back({"per column", {150, 128}, {128, 1}, {1, 128}, {128, 1}, 0, 0});
  out.push_back({"per column, fewer dimensions", {150, 128}, {128, 1}, {128}, {1}, 0, 0});
  out.push_back({"per column, misaligned", {150, 128}, {128, 1}, {128}, {1}, 0, 1});
  out.push_back({"expanded", {40, 30, 20}, {600, 20, 1}, {40, 30, 20}, {20, 0, 1}, 0, 0});
  out.push_back({"per middle", {40, 30, 20}, {600, 20, 1}, {30, 1}, {1, 1}, 0, 0});
  return out;
}

template <class P, class Visit>
void blocks(const List& list, Visit&& visit) {
  auto packet = std::make_unique<P>();
  for (const List::Launch& part : list.launches(P::max_tensors, P::max_words)) {
    std::memset(static_cast<void*>(packet.get()), 0xa5, sizeof(P));
    list.fill(part, *packet);
    for (int64_t b = 0; b < part.chunks; ++b) visit(*packet, uint32_t(b));
  }
}

inline bool same_values(const std::vector<uint64_t>& a, const std::vector<uint64_t>& b, DType dtype) {
  return with_stored(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T *x = reinterpret_cast<const T*>(a.data()), *y = reinterpret_cast<const T*>(b.data());
    for (size_t e = 0; e < a.size() * 8 / sizeof(T); ++e)
      if (std::memcmp(x + e, y + e, sizeof(T)) != 0 &&
          (load<double>(x[e]) == load<double>(x[e]) || load<double>(y[e]) == load<double>(y[e])))
        return false;
    return true;
  });
}

constexpr DType kStored[] = {DType::f64, DType::f32, DType::bf16, DType::f16, DType::u8};
// So small that every list needs several launches.
using TinyPacket = Packet<2, 416>;

constexpr DType kFloating[] = {DType::f64, DType::f32, DType::bf16, DType::f16};
constexpr double kRound = 0x1p-53;

// In extended precision, and the sum of magnitudes.
struct Exact {
  long double sum = 0, magnitude = 0;
};

// Visits corresponding elements of views of one shape, in the order of their indices.
template <class Visit>
void elements(const std::vector<const View*>& views, Visit&& visit) {
  std::vector<int64_t> index(size_t(views[0]->ndim));
  std::vector<double> values(views.size());
  for (int64_t e = 0; e < views[0]->numel(); ++e) {
    int64_t rest = e;
    for (int d = views[0]->ndim - 1; d >= 0; --d) {
      index[size_t(d)] = rest % views[0]->shape[d];
      rest /= views[0]->shape[d];
    }
    for (size_t o = 0; o < views.size(); ++o) {
      int64_t at = 0;
      for (int d = 0; d < views[o]->ndim; ++d) at += index[size_t(d)] * views[o]->strides[d];
      values[o] = with_floating(views[o]->dtype, [&](auto type) {
        return load<double>(reinterpret_cast<const typename decltype(type)::type*>(views[o]->data)[at]);
      });
    }
    visit(values);
  }
}

// Operands of one shape: expanded where the read layout of a broadcasting case has fewer elements.
inline std::vector<LayoutCase> equal_shapes() {
  std::vector<LayoutCase> out = layouts(false);
  out.push_back({"one value", {9000}, {1}, {9000}, {0}, 0, 0});
  out.push_back({"one value, misaligned", {9000}, {1}, {9000}, {0}, 1, 1});
  out.push_back({"per row", {150, 128}, {128, 1}, {150, 128}, {1, 0}, 0, 1});
  out.push_back({"per column", {150, 128}, {128, 1}, {150, 128}, {0, 1}, 0, 0});
  out.push_back({"per odd column", {150, 129}, {129, 1}, {150, 129}, {0, 1}, 0, 0});
  return out;
}

inline double combine(double a, double b) { return a + b; }
// As a block adds.
template <class T>
T add_as_tree(std::vector<T>& parts) {
  for (size_t step = 1; step < parts.size(); step *= 2)
    for (size_t p = 0; p + step < parts.size(); p += 2 * step) parts[p] = combine(parts[p], parts[p + step]);
  return parts[0];
}

// thread(packet, chunk, number) for every thread of every block.
template <class P, class Thread>
void run_threads(const List& list, int64_t chunk, const Thread& thread) {
  blocks<P>(list, [&](const P& packet, uint32_t block) {
    const Chunk c = Chunk::find(packet, block, chunk);
    for (int t = 0; t < kThreads; ++t) thread(packet, c, t);
  });
}

// Bits of which about a third are set, with zeros behind the last.
inline std::vector<uint64_t> random_mask(int64_t elements) {
  std::vector<uint64_t> words(size_t(elements + 63) / 64 + 1);
  auto* bytes = reinterpret_cast<uint8_t*>(words.data());
  for (int64_t e = 0; e < elements; ++e)
    if (random_bits() % 3 == 0) bytes[e >> 3] = uint8_t(bytes[e >> 3] | 1u << (e & 7));
  return words;
}

// Runs a phase for all threads of a block in turn. The order must not matter: in a phase they share nothing. What nobody has written is
// NaN.
template <class Own, int kCount>
struct Team {
  std::vector<Own> own;
  bool backwards;

  explicit Team(bool backwards) : own(kCount), backwards(backwards) {
    std::memset(static_cast<void*>(own.data()), 0xff, own.size() * sizeof(Own));
  }
  template <class Phase>
  void each(const Phase& phase) {
    for (int t = 0; t < kCount; ++t) {
      const int thread = backwards ? kCount - 1 - t : t;
      phase(thread, own[size_t(thread)]);
    }
  }
  void leave(double* out) {
    std::vector<double> totals;
    for (const Own& o : own) totals.push_back(o.total);
    *out = add_as_tree(totals);
  }
};

}  // namespace host

// The cases of the other files.
void child_mask();
void bit_mask();
void pull();
void fisher();
void radix();
void adamw();
void compact();
void sgd();
void transformed_dot();
void layers();
void ncl_sweeps();
void low_rank_sweeps();
void low_rank_append();
