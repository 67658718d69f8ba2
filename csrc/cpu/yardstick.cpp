#include "cpu/ops.h"
#include "cpu/sweep.h"

namespace fastcl::cpu {
namespace {

FASTCL_CLONES void exclusive_or(char* written, const char* read, int64_t n, int64_t, int64_t, double) {
  uint8_t* __restrict w = reinterpret_cast<uint8_t*>(written);
  const uint8_t* __restrict r = reinterpret_cast<const uint8_t*>(read);
  for (int64_t e = 0; e < n; ++e) w[e] ^= r[e];
}

FASTCL_CLONES uint64_t fold(const char* data, int64_t n) {
  uint64_t lane[16] = {};
  int64_t e = 0;
  for (; e + 128 <= n; e += 128) {
    uint64_t words[16];
    memcpy(words, data + e, sizeof(words));
    for (int l = 0; l < 16; ++l) lane[l] ^= words[l];
  }
  uint64_t folded = 0;
  for (uint64_t l : lane) folded ^= l;
  for (; e < n; ++e) folded ^= uint64_t(uint8_t(data[e]));
  return folded;
}

}  // namespace

void yardstick_(const Views& written, const Views& read, const Pool& pool) {
  PairSweep(written, read, [](DType, DType) -> Run { return exclusive_or; }).run(0, pool);
}

uint64_t yardstick_read(const Views& read, const Pool& pool) {
  uint64_t folded = 0;
  for (const View& v : read) {
    const int64_t bytes = v.numel() * size_of(v.dtype);
    std::vector<uint64_t> parts(size_t(bytes / kGrain + 1));
    pool.each(int64_t(parts.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) parts[p] = fold(v.data + p * kGrain, std::min(kGrain, bytes - p * kGrain));
    });
    for (uint64_t p : parts) folded ^= p;
  }
  return folded;
}

}  // namespace fastcl::cpu
