#include "core/importance.h"

#include "core/dtypes.h"
#include "cpu/ops.h"
#include "cpu/sweep.h"

namespace fastcl::cpu {
namespace {

template <class S, class N>
FASTCL_CLONES void emax_run(char* importance, const char* fresh, int64_t n, int64_t importance_stride, int64_t fresh_stride, double) {
  run_elements<S, N>(importance, fresh, n, importance_stride, fresh_stride, EMax<S, N>{});
}

Run emax_table(DType importance, DType fresh) {
  return with_stored(importance, [&](auto s) {
    return with_stored(fresh, [&](auto n) -> Run { return emax_run<typename decltype(s)::type, typename decltype(n)::type>; });
  });
}

}  // namespace

void emax_(const Views& importance, const Views& fresh, const Pool& pool) { PairSweep(importance, fresh, emax_table).run(0, pool); }

}  // namespace fastcl::cpu
