#include "core/bit_mask.h"

#include "cuda/lists.h"
#include "cuda/multi_tensor.cuh"
#include "cuda/ops.h"

namespace fastcl::cuda {
namespace {

// Selection looks at no number: words of the gradient's size.
template <class W, class P>
__global__ void __launch_bounds__(kThreads) bit_mask_kernel(const __grid_constant__ P packet) {
  bit_mask_thread<W>(packet, Chunk::find(packet, blockIdx.x, kRunChunk), int(threadIdx.x));
}

template <class W>
constexpr PacketKernel<> kBitMask{bit_mask_kernel<W, SmallPacket>, bit_mask_kernel<W, LargePacket>};

template <class P>
__global__ void __launch_bounds__(kThreads) threshold_kernel(const __grid_constant__ P packet, const double* threshold) {
  threshold_thread(packet, Chunk::find(packet, blockIdx.x, kRunChunk), int(threadIdx.x), *threshold);
}

}  // namespace

void bit_mask_(const Views& grads, const Views& bits, const Stream& stream) {
  constexpr char name[] = "bit_mask_";
  const std::map<int64_t, List> lists = bit_mask_lists(grads, bits);
  if (lists.empty()) return;
  const DeviceGuard guard(stream, name);
  for (const auto& [size, list] : lists)
    (size == 8 ? kBitMask<uint64_t> : size == 4 ? kBitMask<uint32_t> : kBitMask<uint16_t>).run(name, stream, list);
}

void threshold_bits_(const Views& bits, const Views& tensors, const double* threshold, const Stream& stream) {
  constexpr char name[] = "threshold_bits_";
  const List list = threshold_list(bits, tensors);
  if (list.entries().empty()) return;
  const DeviceGuard guard(stream, name);
  PacketKernel<const double*>{threshold_kernel<SmallPacket>, threshold_kernel<LargePacket>}.run(name, stream, list, threshold);
}

}  // namespace fastcl::cuda
