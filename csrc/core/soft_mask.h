// Soft masking of one gradient element: SPG eq. 4, DAS eq. 7.
#pragma once

#include "core/scalar.h"

namespace fastcl {

// g * (1 - strength * I), each operation rounded, none contracted: the same bits on every processor.
template <class G, class I>
struct SoftMask {
  using compute = compute_t<G, I>;
  compute strength;
  FASTCL_HD G operator()(G g, I importance) const {
    return store<G>(load<compute>(g) * (compute(1) - strength * load<compute>(importance)));
  }
};

}  // namespace fastcl
