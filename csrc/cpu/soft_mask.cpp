#include "core/soft_mask.h"
#include "cpu/dtypes.h"
#include "cpu/ops.h"
#include "cpu/sweep.h"

namespace fastcl::cpu {
namespace {

template <class G, class I>
FASTCL_CLONES void run(char* grad, const char* importance, int64_t n, int64_t grad_stride, int64_t importance_stride, double strength) {
  using Op = SoftMask<G, I>;
  run_elements<G, I>(grad, importance, n, grad_stride, importance_stride, Op{typename Op::compute(strength)});
}

Run table(DType grad, DType importance) {
  return with_floating(grad, [&](auto g) {
    return with_stored(importance, [&](auto i) -> Run { return run<typename decltype(g)::type, typename decltype(i)::type>; });
  });
}

}  // namespace

void soft_mask_(const Views& grads, const Views& importance, double strength, const Pool& pool) {
  PairSweep(grads, importance, table).run(strength, pool);
}

}  // namespace fastcl::cpu
