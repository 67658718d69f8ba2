#include "core/pull.h"

#include "cuda/lists.h"
#include "cuda/multi_tensor.cuh"
#include "cuda/ops.h"

namespace fastcl::cuda {
namespace {

template <class C, class P>
__global__ void __launch_bounds__(kThreads) pull_kernel(const __grid_constant__ P packet, const Pull<C> op) {
  pull_thread<C>(packet, Chunk::find(packet, blockIdx.x, kRunChunk), int(threadIdx.x), op);
}

template <class C>
constexpr PacketKernel<Pull<C>> kPull{pull_kernel<C, SmallPacket>, pull_kernel<C, LargePacket>};

}  // namespace

void ewc_pull_(const Views& grads, const Views& params, const Views& precision, const Views& anchor, double strength,
               const Stream& stream) {
  constexpr char name[] = "ewc_pull_";
  const ByCompute lists = joint_lists("grads", {&grads, &params, &precision, &anchor});
  if (lists.empty()) return;
  const DeviceGuard guard(stream, name);
  kPull<float>.run(name, stream, lists.single, Pull<float>::make(strength));
  kPull<double>.run(name, stream, lists.twice, Pull<double>::make(strength));
}

}  // namespace fastcl::cuda
