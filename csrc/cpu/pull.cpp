#include "core/pull.h"

#include "core/dtypes.h"
#include "cpu/blocks.h"
#include "cpu/ops.h"

namespace fastcl::cpu {
namespace {

constexpr int64_t kPart = 16384;
// What is worked on at once; it stays in the first-level cache.
constexpr int64_t kBlock = 512;
constexpr int kOperands = 4;

// A gradient may be the same tensor as an operand, element for element; no other overlap gets here.
template <class C>
FASTCL_CLONES void run(C* g, const C* theta, const C* precision, const C* anchor, int64_t n, double strength) {
  const Pull<C> op = Pull<C>::make(strength);
#pragma GCC ivdep
  for (int64_t e = 0; e < n; ++e) g[e] = op(g[e], theta[e], precision[e], anchor[e]);
}

// Other dtypes and strides, by way of the compute type.
template <class C>
void run_blocks(const Operand* at, const int64_t* strides, int64_t n, double strength) {
  C value[kOperands][kBlock];
  for (int64_t done = 0; done < n; done += kBlock) {
    const int64_t m = std::min(kBlock, n - done);
    const auto stride_of = [&](int o) { return strides != nullptr ? strides[o] : 1; };
    const auto data_of = [&](int o) { return at[o].data + done * stride_of(o) * size_of(at[o].dtype); };
    for (int o = 0; o < kOperands; ++o)
      with_floating(at[o].dtype, [&](auto t) { widen_strided<typename decltype(t)::type, C>(data_of(o), stride_of(o), m, value[o]); });
    run<C>(value[0], value[1], value[2], value[3], m, strength);
    with_floating(at[0].dtype, [&](auto t) { narrow_strided<typename decltype(t)::type, C>(value[0], data_of(0), stride_of(0), m); });
  }
}

template <class C>
bool run_dense(const Operand* at, const int64_t* strides, int64_t n, double strength, DType dtype) {
  if (strides != nullptr || !std::all_of(at, at + kOperands, [&](const Operand& o) { return o.dtype == dtype; })) return false;
  const auto data = [&](int o) { return reinterpret_cast<C*>(at[o].data); };
  run<C>(data(0), data(1), data(2), data(3), n, strength);
  return true;
}

}  // namespace

void ewc_pull_(const Views& grads, const Views& params, const Views& precision, const Views& anchor, double strength, const Pool& pool) {
  const JointSweep sweep({&grads, &params, &precision, &anchor}, kPart);
  pool.each(sweep.parts(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      sweep.part(p, [&](const Operand* at, const int64_t* strides, int64_t n) {
        if (run_dense<float>(at, strides, n, strength, DType::f32) || run_dense<double>(at, strides, n, strength, DType::f64)) return;
        if (std::any_of(at, at + kOperands, [](const Operand& o) { return o.dtype == DType::f64; }))
          run_blocks<double>(at, strides, n, strength);
        else
          run_blocks<float>(at, strides, n, strength);
      });
  });
}

}  // namespace fastcl::cpu
