// Fisher information. What a block sums up goes into the workspace, and one block per tensor adds that up in a fixed order; the sweep that
// adds to F finds the coefficients in device memory.
#include "core/importance.h"
#include "cuda/block.cuh"
#include "cuda/lists.h"
#include "cuda/multi_tensor.cuh"
#include "cuda/ops.h"

namespace fastcl::cuda {
namespace {

constexpr char kName[] = "fisher_add_";

template <class P>
__global__ void __launch_bounds__(kThreads) squares_kernel(const __grid_constant__ P packet, double* parts) {
  const double sum = combine_block<kThreads>(squares_thread(packet, Chunk::find(packet, blockIdx.x, kRunChunk), int(threadIdx.x)));
  if (threadIdx.x == 0) parts[packet.base + blockIdx.x] = sum;
}

// One block per tensor.
template <class P>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ P packet, const double* parts, double* squares) {
  const int tensor = int(blockIdx.x);
  double sum = 0;
  for (uint32_t i = packet.first_chunk[tensor] + threadIdx.x; i < packet.first_chunk[tensor + 1]; i += kThreads)
    sum += parts[packet.base + i];
  sum = combine_block<kThreads>(sum);
  if (threadIdx.x == 0) squares[operand_item(packet.note(packet.at[tensor], 0))] = sum;
}

// Where a tensor's coefficient comes from.
struct Clip {
  const double* numbers;  // null: none, the coefficient is 1
  bool are_squares;       // or coefficients
  double weight, max_norm;
};

template <class C, class P>
__global__ void __launch_bounds__(kThreads) fisher_kernel(const __grid_constant__ P packet, const Clip clip) {
  const Chunk c = Chunk::find(packet, blockIdx.x, kRunChunk);
  double coefficient = 1;
  if (clip.numbers != nullptr) {
    coefficient = clip.numbers[operand_item(packet.note(c.entry, 0))];
    if (clip.are_squares) coefficient = clip_coefficient(coefficient, clip.max_norm);
  }
  fisher_thread<C>(packet, c, int(threadIdx.x), clip.weight, coefficient);
}

template <class C>
constexpr PacketKernel<Clip> kFisher{fisher_kernel<C, SmallPacket>, fisher_kernel<C, LargePacket>};

List measured(const Views& grads) { return single_list("grads", grads, kRunChunk, kRun<float>); }

void measure(const List& list, size_t tensors, double* squares, double* parts, const Stream& stream) {
  if (list.entries().size() < tensors) check(cudaMemsetAsync(squares, 0, tensors * sizeof(double), cudaStream_t(stream.handle)), kName);
  PacketKernel<double*>{squares_kernel<SmallPacket>, squares_kernel<LargePacket>}.run(kName, stream, list, parts);
  PacketKernel<const double*, double*>{sum_kernel<SmallPacket>, sum_kernel<LargePacket>}.run_blocks(
      kName, stream, list, 0, [](const List::Launch& part) { return int64_t(part.last - part.first); }, parts, squares);
}

ByCompute updated(const Views& fisher, const Views& grads) { return joint_lists("fisher", {&fisher, &grads}); }

void update(const ByCompute& lists, const Clip& clip, const Stream& stream) {
  kFisher<float>.run(kName, stream, lists.single, clip);
  kFisher<double>.run(kName, stream, lists.twice, clip);
}

}  // namespace

void fisher_squares(const Views& grads, double* squares, const Workspace& workspace, const Stream& stream) {
  const List list = measured(grads);
  if (grads.empty()) return;
  double* parts = workspace(chunks_of(list));
  const DeviceGuard guard(stream, kName);
  measure(list, grads.size(), squares, parts, stream);
}

void fisher_update_(const Views& fisher, const Views& grads, double weight, const double* coefficients, const Stream& stream) {
  const ByCompute lists = updated(fisher, grads);
  if (lists.empty()) return;
  const DeviceGuard guard(stream, kName);
  update(lists, {coefficients, false, weight, 0}, stream);
}

void fisher_add_(const Views& fisher, const Views& grads, double weight, const double* max_norm, const Workspace& workspace,
                 const Stream& stream) {
  const ByCompute lists = updated(fisher, grads);
  if (lists.empty()) return;
  if (max_norm == nullptr) {
    const DeviceGuard guard(stream, kName);
    update(lists, {nullptr, false, weight, 0}, stream);
    return;
  }
  const List list = measured(grads);
  double *squares = workspace(int64_t(grads.size())), *parts = workspace(chunks_of(list));
  const DeviceGuard guard(stream, kName);
  measure(list, grads.size(), squares, parts, stream);
  update(lists, {squares, true, weight, *max_norm}, stream);
}

}  // namespace fastcl::cuda
