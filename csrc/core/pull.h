// EWC's pull towards an anchor (Kirkpatrick et al., PNAS 2017, eq. 3): the gradient of strength * sum A (theta - c)^2.
#pragma once

#include "core/scalar.h"

namespace fastcl {

// g + 2 strength A (theta - c) on values in the compute type, each operation rounded, none contracted.
template <class C>
struct Pull {
  C twice;  // 2 strength, which torch multiplies by as a number of the compute type
  static FASTCL_HD Pull make(double strength) { return {C(2 * strength)}; }
  FASTCL_HD C operator()(C g, C theta, C precision, C anchor) const { return g + twice * (precision * (theta - anchor)); }
};

}  // namespace fastcl
