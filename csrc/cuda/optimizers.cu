// AdamW: a small kernel that counts the steps and works out what they multiply by, and one sweep for each type that computes.
#include "cuda/optimizers.cuh"

namespace fastcl::cuda {
namespace {

constexpr char kName[] = "adamw_";
// Blocks per multiprocessor at least: what the registers allow, for more bytes in flight.
template <class C>
constexpr int kBlocks = sizeof(C) == 4 ? 3 : 2;

template <class P>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ P packet, const Preparation how, StepRow* rows) {
  prepare_thread(packet, int(blockIdx.x * kThreads + threadIdx.x), how, rows);
}

template <class C, class P>
__global__ void __launch_bounds__(kThreads, kBlocks<C>)
    adamw_kernel(const __grid_constant__ P packet, const __grid_constant__ Sweep sweep) {
  if (sweep.skipped()) return;
  adamw_thread<C>(packet, Chunk::find(packet, blockIdx.x, kRunChunk), int(threadIdx.x), sweep);
}

template <class C, class P>
__global__ void __launch_bounds__(kThreads, kBlocks<C>)
    adamw_compact_kernel(const __grid_constant__ P packet, const __grid_constant__ Sweep sweep) {
  __shared__ ChildStage stage;
  if (sweep.skipped()) return;
  const Chunk c = Chunk::find(packet, blockIdx.x, kRunChunk);
  fetch_child(packet, c, int(threadIdx.x), stage);
  __syncthreads();
  rank_child(int(threadIdx.x), stage);
  __syncthreads();
  adamw_compact_thread<C>(packet, c, int(threadIdx.x), stage, sweep);
}

using SweepKernel = KernelOf<SmallSweep, LargeSweep, Sweep>;
template <class C>
constexpr SweepKernel kAdamW{adamw_kernel<C, SmallSweep>, adamw_kernel<C, LargeSweep>};
template <class C>
constexpr SweepKernel kCompact{adamw_compact_kernel<C, SmallSweep>, adamw_compact_kernel<C, LargeSweep>};

}  // namespace

const StepRow* prepare(const char* name, const List& steps, const Preparation& how, StepRow* rows, const Stream& stream) {
  if (steps.entries().empty()) return nullptr;
  PacketKernel<Preparation, StepRow*>{prepare_kernel<SmallPacket>, prepare_kernel<LargePacket>}.run_blocks(
      name, stream, steps, 0, [](const List::Launch& part) { return (int64_t(part.last - part.first) + kThreads - 1) / kThreads; }, how,
      rows);
  return rows;
}

void adamw_(const OptimizerInputs& inputs, const AdamWRule& rule, const Workspace& workspace, const Stream& stream) {
  SweepPlan dense(inputs, nullptr, false), compact(inputs, nullptr, true);
  const List steps = steps_list(inputs.steps);
  if (inputs.params.empty()) return;
  auto* rows = reinterpret_cast<StepRow*>(workspace(row_doubles(steps)));
  const DeviceGuard guard(stream, kName);
  const Preparation how{rule, device_number(inputs.lr), flag(inputs.found_inf), true, true};
  dense.sweep.rows = compact.sweep.rows = prepare(kName, steps, how, rows, stream);
  kAdamW<float>.run(kName, stream, dense.lists.single, dense.sweep);
  kAdamW<double>.run(kName, stream, dense.lists.twice, dense.sweep);
  kCompact<float>.run(kName, stream, compact.lists.single, compact.sweep);
  kCompact<double>.run(kName, stream, compact.lists.twice, compact.sweep);
}

}  // namespace fastcl::cuda
