#include "core/importance.h"

#include "cuda/ops.h"
#include "cuda/pairs.cuh"

namespace fastcl::cuda {
namespace {

template <class S, class N>
struct Op : EMax<S, N> {
  static Op make(double) { return {}; }
};

PairType table(DType importance, DType fresh) {
  return with_stored(importance, [&](auto s) {
    return with_stored(fresh, [&](auto n) {
      using S = typename decltype(s)::type;
      using N = typename decltype(n)::type;
      return pair_type<S, N, Op<S, N>>();
    });
  });
}

}  // namespace

void emax_(const Views& importance, const Views& fresh, const Stream& stream) {
  run_pairs("emax_", "importance", importance, fresh, table, 0, stream);
}

}  // namespace fastcl::cuda
