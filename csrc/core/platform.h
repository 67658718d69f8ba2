// What the compilers differ in. Everything under core/ is header-only and compiles as C++17 and as CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTCL_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FASTCL_HD inline __attribute__((always_inline))
#else
#define FASTCL_HD inline
#endif

// One binary for every x86-64: the loader picks the widest version that the processor has. The loops stay plain C++, so the results of
// the versions are bitwise equal (the build forbids contraction into fused multiply-adds).
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(__CUDACC__) && \
    !defined(FASTCL_NO_CLONES)
#define FASTCL_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTCL_CLONES
#endif

namespace fastcl {

template <class To, class From>
FASTCL_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace fastcl
