// The counts of a radix select. Integers are added in any order with the same result, so that atomics are in place here.
#include "cuda/quantile.h"

#include "cuda/lists.h"
#include "cuda/multi_tensor.cuh"
#include "cuda/ops.h"

namespace fastcl::cuda {
namespace {

constexpr int kSlots = 2 * kRadixColumns;

template <class Key, class P>
__global__ void __launch_bounds__(kThreads)
    radix_kernel(const __grid_constant__ P packet, const int64_t* prefixes, int level, unsigned long long* counts) {
  __shared__ uint32_t own[kSlots];
  for (int s = int(threadIdx.x); s < kSlots; s += kThreads) own[s] = 0;
  const auto query = RadixQuery::make(prefixes, level);
  __syncthreads();
  radix_thread<Key>(packet, Chunk::find(packet, blockIdx.x, kRadixChunk), int(threadIdx.x), query,
                    [&](int slot) { atomicAdd(own + slot, 1u); });
  __syncthreads();
  for (int s = int(threadIdx.x); s < kSlots; s += kThreads) {
    const uint32_t count = own[query.one && s >= kRadixColumns ? s - kRadixColumns : s];
    if (count != 0) atomicAdd(counts + s, static_cast<unsigned long long>(count));
  }
}

template <class Key>
constexpr PacketKernel<const int64_t*, int, unsigned long long*> kRadix{radix_kernel<Key, SmallPacket>, radix_kernel<Key, LargePacket>};

}  // namespace

void radix_counts(const Views& tensors, const int64_t* prefixes, int level, bool wide, int64_t* counts, const Stream& stream) {
  constexpr char name[] = "radix_counts";
  const List list = single_list("tensors", tensors, kRadixChunk, wide ? kRun<double> : kRun<float>);
  const DeviceGuard guard(stream, name);
  check(cudaMemsetAsync(counts, 0, kSlots * sizeof(int64_t), cudaStream_t(stream.handle)), name);
  (wide ? kRadix<uint64_t> : kRadix<uint32_t>).run(name, stream, list, prefixes, level, reinterpret_cast<unsigned long long*>(counts));
}

}  // namespace fastcl::cuda
