#include "core/bit_mask.h"

#include "core/dtypes.h"
#include "cpu/bits.h"
#include "cpu/ops.h"

namespace fastcl::cpu {
namespace {

// Elements whose bits are looked at as one vector.
constexpr int kLanes = 16;

// Sixteen elements of any type of a size, as words that are kept or cleared.
template <class Word>
using Lanes __attribute__((vector_size(kLanes * sizeof(Word)))) = Word;

template <class Word>
FASTCL_HD void select_lanes(Word* w, uint16_t bits) {
  constexpr Lanes<Word> place = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  Lanes<Word> value;
  memcpy(&value, w, sizeof(value));
  value &= reinterpret_cast<Lanes<Word>>((place & Word(bits)) != 0);
  memcpy(w, &value, sizeof(value));
}

template <class Word>
FASTCL_CLONES void select_run(char* data, int64_t stride, const uint8_t* bits, int64_t e, int64_t n) {
  Word* w = reinterpret_cast<Word*>(data);
  int64_t done = 0;
  if (stride == 1) {
    for (; done < n && ((e + done) & 7) != 0; ++done) w[done] = selected(w[done], bit_of(bits, e + done));
    for (; done + kLanes <= n; done += kLanes) {
      uint16_t own;
      memcpy(&own, bits + ((e + done) >> 3), sizeof(own));
      select_lanes(w + done, own);
    }
  }
  for (; done < n; ++done) w[done * stride] = selected(w[done * stride], bit_of(bits, e + done));
}

// One bit for each of n elements, the first of which has the lowest bit of the first byte; whole bytes are written.
template <class T>
FASTCL_CLONES void threshold_block(const T* x, uint8_t* bits, int64_t n, double threshold) {
  uint8_t flags[64];
  for (int64_t done = 0; done < n; done += 64) {
    const int64_t m = n - done < 64 ? n - done : 64;
    if (m == 64) {
      for (int l = 0; l < 64; ++l) flags[l] = reaches(x[done + l], threshold);
    } else {
      memset(flags, 0, sizeof(flags));
      for (int64_t l = 0; l < m; ++l) flags[l] = reaches(x[done + l], threshold);
    }
    for (int64_t byte = 0; byte < (m + 7) / 8; ++byte) {
      uint64_t eight;
      memcpy(&eight, flags + 8 * byte, 8);
      bits[done / 8 + byte] = uint8_t((eight * 0x0102040810204080ull) >> 56);
    }
  }
}

template <class T>
void threshold_run(const char* data, int64_t stride, uint8_t* bits, int64_t e, int64_t n, double threshold) {
  const T* x = reinterpret_cast<const T*>(data);
  int64_t done = 0;
  if (stride == 1 && (e & 7) == 0) {
    threshold_block(x, bits + (e >> 3), n, threshold);
    return;
  }
  for (; done < n; ++done) {
    const int64_t at = e + done;
    const uint8_t bit = uint8_t(reaches(x[done * stride], threshold) << (at & 7));
    // A byte's first element makes the byte, so that its spare bits are zero. Runs come in order.
    bits[at >> 3] = (at & 7) == 0 ? bit : uint8_t(bits[at >> 3] | bit);
  }
}

}  // namespace

void bit_mask_(const Views& grads, const Views& bits, const Pool& pool) {
  BitSweep(grads, bits).run(pool, [](DType dtype, char* data, int64_t stride, const uint8_t* own, int64_t e, int64_t n) {
    switch (size_of(dtype)) {
      case 8: return select_run<uint64_t>(data, stride, own, e, n);
      case 4: return select_run<uint32_t>(data, stride, own, e, n);
      default: return select_run<uint16_t>(data, stride, own, e, n);
    }
  });
}

void threshold_bits_(const Views& bits, const Views& tensors, double threshold, const Pool& pool) {
  BitSweep(tensors, bits).run(pool, [&](DType dtype, const char* data, int64_t stride, uint8_t* own, int64_t e, int64_t n) {
    with_stored(dtype, [&](auto t) { threshold_run<typename decltype(t)::type>(data, stride, own, e, n, threshold); });
  });
}

}  // namespace fastcl::cpu
