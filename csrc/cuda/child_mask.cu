#include "core/child_mask.h"

#include "cuda/lists.h"
#include "cuda/multi_tensor.cuh"
#include "cuda/ops.h"

namespace fastcl::cuda {
namespace {

template <class C, class P>
__global__ void __launch_bounds__(kThreads) child_mask_kernel(const __grid_constant__ P packet, const ChildDraw draw, uint32_t step) {
  child_mask_thread<C>(packet, Chunk::find(packet, blockIdx.x, kRunChunk), int(threadIdx.x), draw, step);
}

template <class C>
constexpr PacketKernel<ChildDraw, uint32_t> kChildMask{child_mask_kernel<C, SmallPacket>, child_mask_kernel<C, LargePacket>};

}  // namespace

void child_mask_at_(const Views& grads, double keep, uint64_t seed, uint32_t step, const std::vector<Place>& places, const Stream& stream) {
  constexpr char name[] = "child_mask_";
  const ByCompute lists = child_mask_lists(grads, places);
  if (lists.empty()) return;
  const DeviceGuard guard(stream, name);
  const auto draw = ChildDraw::make(keep, seed);
  kChildMask<float>.run(name, stream, lists.single, draw, step);
  kChildMask<double>.run(name, stream, lists.twice, draw, step);
}

}  // namespace fastcl::cuda
