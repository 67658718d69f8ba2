// From a DType at run time to a C++ type.
#pragma once

#include "core/scalar.h"

namespace fastcl::cpu {

template <class T>
struct Type {
  using type = T;
};

template <class F>
auto with_floating(DType t, F&& f) {
  switch (t) {
    case DType::f64: return f(Type<double>{});
    case DType::f32: return f(Type<float>{});
    case DType::bf16: return f(Type<BFloat16>{});
    default: return f(Type<Float16>{});
  }
}

template <class F>
auto with_stored(DType t, F&& f) {
  return t == DType::u8 ? f(Type<uint8_t>{}) : with_floating(t, f);
}

}  // namespace fastcl::cpu
