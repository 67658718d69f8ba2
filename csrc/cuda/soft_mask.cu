#include "core/soft_mask.h"

#include "cuda/ops.h"
#include "cuda/pairs.cuh"

namespace fastcl::cuda {
namespace {

template <class G, class I>
struct Op : SoftMask<G, I> {
  static Op make(double strength) { return {{typename SoftMask<G, I>::compute(strength)}}; }
};

PairType table(DType grad, DType importance) {
  return with_floating(grad, [&](auto g) {
    return with_stored(importance, [&](auto i) {
      using G = typename decltype(g)::type;
      using I = typename decltype(i)::type;
      return pair_type<G, I, Op<G, I>>();
    });
  });
}

}  // namespace

void soft_mask_(const Views& grads, const Views& importance, double strength, const Stream& stream) {
  run_pairs("soft_mask_", "grads", grads, importance, table, strength, stream);
}

}  // namespace fastcl::cuda
