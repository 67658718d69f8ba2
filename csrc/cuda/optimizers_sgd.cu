// SGD, and the dot product of what the transforms make of the gradients.
#include "cuda/block.cuh"
#include "cuda/optimizers.cuh"

namespace fastcl::cuda {
namespace {

constexpr char kSgd[] = "sgd_", kDot[] = "transformed_dot";

template <class C, bool with_momentum, class P>
__global__ void __launch_bounds__(kThreads, 3)
    sgd_kernel(const __grid_constant__ P packet, const __grid_constant__ Sweep sweep, const SGDRule rule, const DeviceNumber lr) {
  if (sweep.skipped()) return;
  SGDRule own = rule;
  if (lr.data != nullptr) own.lr = lr.read();
  sgd_thread<C, with_momentum>(packet, Chunk::find(packet, blockIdx.x, kRunChunk), int(threadIdx.x), sweep, own);
}

template <class C, bool with_momentum>
constexpr KernelOf<SmallSweep, LargeSweep, Sweep, SGDRule, DeviceNumber> kSgdKernel{sgd_kernel<C, with_momentum, SmallSweep>,
                                                                                    sgd_kernel<C, with_momentum, LargeSweep>};

template <class C, class P>
__global__ void __launch_bounds__(kThreads, 3)
    dot_kernel(const __grid_constant__ P packet, const __grid_constant__ Sweep sweep, Products* parts) {
  const Chunk c = Chunk::find(packet, blockIdx.x, kRunChunk);
  const Products sum = combine_block<kThreads>(transformed_dot_thread<C>(packet, c, int(threadIdx.x), sweep));
  if (threadIdx.x == 0) parts[packet.base + blockIdx.x] = sum;
}

template <class C>
constexpr KernelOf<SmallSweep, LargeSweep, Sweep, Products*> kDotKernel{dot_kernel<C, SmallSweep>, dot_kernel<C, LargeSweep>};

constexpr int kFinishThreads = 1024;

__global__ void __launch_bounds__(kFinishThreads) dot_finish_kernel(const Products* parts, int64_t count, double* out) {
  Products sum{0, 0};
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) sum = combine(sum, parts[i]);
  sum = combine_block<kFinishThreads>(sum);
  if (threadIdx.x != 0) return;
  out[0] = sum.dot;
  out[1] = sum.square;
}

}  // namespace

void sgd_(const OptimizerInputs& inputs, const SGDRule& rule, const Workspace& workspace, const Stream& stream) {
  SweepPlan plan(inputs, nullptr, false);
  const List steps = steps_list(inputs.steps);
  if (inputs.params.empty()) return;
  auto* rows = reinterpret_cast<StepRow*>(workspace(row_doubles(steps)));
  const DeviceGuard guard(stream, kSgd);
  plan.sweep.rows = prepare(kSgd, steps, {{}, {}, flag(inputs.found_inf), true, false}, rows, stream);
  const DeviceNumber lr = device_number(inputs.lr);
  const bool with_momentum = !inputs.first.empty();
  (with_momentum ? kSgdKernel<float, true> : kSgdKernel<float, false>).run(kSgd, stream, plan.lists.single, plan.sweep, rule, lr);
  (with_momentum ? kSgdKernel<double, true> : kSgdKernel<double, false>).run(kSgd, stream, plan.lists.twice, plan.sweep, rule, lr);
}

void transformed_dot(const OptimizerInputs& inputs, const Views& reference, double* out, const Workspace& workspace, const Stream& stream) {
  static_assert(sizeof(Products) == 2 * sizeof(double), "the workspace counts in doubles");
  SweepPlan plan(inputs, &reference, false);
  const List steps = steps_list(inputs.steps);
  const int64_t single = chunks_of(plan.lists.single), all = single + chunks_of(plan.lists.twice);
  auto* rows = reinterpret_cast<StepRow*>(workspace(row_doubles(steps)));
  auto* parts = reinterpret_cast<Products*>(workspace(2 * all));
  const DeviceGuard guard(stream, kDot);
  plan.sweep.rows = prepare(kDot, steps, {{}, {}, nullptr, false, false}, rows, stream);
  kDotKernel<float>.run(kDot, stream, plan.lists.single, plan.sweep, parts);
  kDotKernel<double>.run(kDot, stream, plan.lists.twice, plan.sweep, parts + single);
  launch(kDot, stream, 1, kFinishThreads, dot_finish_kernel, parts, all, out);
}

}  // namespace fastcl::cuda
