// Blocks of a run in the type that computes: where they lie if they are dense and of that type, else copied.
#pragma once

#include "core/dtypes.h"
#include "cpu/joint.h"

namespace fastcl::cpu {

template <class C>
constexpr DType dtype_of = sizeof(C) == 8 ? DType::f64 : DType::f32;

template <class T, class C>
FASTCL_CLONES void widen_strided(const char* data, int64_t stride, int64_t n, C* out) {
  const T* x = reinterpret_cast<const T*>(data);
  if (stride == 1)
    for (int64_t e = 0; e < n; ++e) out[e] = load<C>(x[e]);
  else
    for (int64_t e = 0; e < n; ++e) out[e] = load<C>(x[e * stride]);
}

template <class T, class C>
FASTCL_CLONES void narrow_strided(const C* x, char* data, int64_t stride, int64_t n) {
  T* out = reinterpret_cast<T*>(data);
  if (stride == 1)
    for (int64_t e = 0; e < n; ++e) out[e] = store<T>(x[e]);
  else
    for (int64_t e = 0; e < n; ++e) out[e * stride] = store<T>(x[e]);
}

inline char* block_of(const Operand& from, int64_t stride, int64_t done) { return from.data + done * stride * size_of(from.dtype); }

// Elements [done, done + n) of a run.
template <class C>
const C* read_block(const Operand& from, int64_t stride, int64_t done, int64_t n, C* buffer) {
  const char* data = block_of(from, stride, done);
  if (from.dtype == dtype_of<C> && stride == 1) return reinterpret_cast<const C*>(data);
  with_floating(from.dtype, [&](auto t) { widen_strided<typename decltype(t)::type, C>(data, stride, n, buffer); });
  return buffer;
}

template <class C>
void write_block(const C* x, const Operand& to, int64_t stride, int64_t done, int64_t n) {
  char* data = block_of(to, stride, done);
  with_floating(to.dtype, [&](auto t) { narrow_strided<typename decltype(t)::type, C>(x, data, stride, n); });
}

}  // namespace fastcl::cpu
