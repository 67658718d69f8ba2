// Layers of Kronecker-factored precisions: one block per small layer, and sweeps over the elements of layers of any size. Every sum has a
// fixed order, which depends on the list alone.
#include "cuda/block.cuh"
#include "cuda/kronecker_plan.h"
#include "cuda/multi_tensor.cuh"
#include "cuda/ops.h"

namespace fastcl::cuda {
namespace {

template <class Own>
struct LayerTeam {
  Own own;

  template <class Phase>
  __device__ void each(const Phase& phase) {
    phase(int(threadIdx.x), own);
    __syncthreads();
  }
  __device__ void leave(double* out) {
    const double sum = combine_block<kLayerThreads>(own.total);
    if (threadIdx.x == 0) *out = sum;
  }
};

// A block with wide layers in double keeps a matrix in the workspace, [blocks, stride], since not every GPU has as much shared memory.
template <class C, int kRows, int kColumns, class P>
__global__ void __launch_bounds__(kLayerThreads, sizeof(C) == 4 && kRows == 2 ? 2 : 1)
    layer_kernel(const __grid_constant__ P packet, const LayerTask task, C* workspace, int64_t stride, double* out) {
  using Tile = LayerTile<C, kRows, kColumns>;
  extern __shared__ double memory[];
  C *shared = reinterpret_cast<C*>(memory), *buffer = shared, *stage = shared + stride;
  if constexpr (sizeof(C) == sizeof(double)) {
    if (workspace != nullptr) {
      buffer = workspace + (packet.base + blockIdx.x) * stride;
      stage = shared;
    }
  }
  LayerTeam<typename Tile::Own> team;
  small_layer<C, kRows, kColumns>(packet, blockIdx.x, task, buffer, stage, out, team);
}

template <class C, int kRows, int kColumns>
constexpr PacketKernel<LayerTask, C*, int64_t, double*> kLayers{layer_kernel<C, kRows, kColumns, SmallPacket>,
                                                                layer_kernel<C, kRows, kColumns, LargePacket>, kLayerThreads};
// The checking type is not worth the second instance.
template <int kRows, int kColumns>
constexpr KernelOf<SmallPacket, SmallPacket, LayerTask, double*, int64_t, double*> kLayers<double, kRows, kColumns>{
    layer_kernel<double, kRows, kColumns, SmallPacket>, layer_kernel<double, kRows, kColumns, SmallPacket>, kLayerThreads};

__global__ void __launch_bounds__(kThreads) total_kernel(const double* parts, int64_t count, double* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += parts[i];
  sum = combine_block<kThreads>(sum);
  if (threadIdx.x == 0) *out = sum;
}

template <class C, int kRows, int kColumns, class Layers>
void run_tile(const char* name, const Layers& layers, const LayerTask& task, C* spilled, double* out, const Stream& stream) {
  static_assert(std::is_same_v<typename Layers::Tile, LayerTile<C, kRows, kColumns>>, "the kernel's tile is the plan's");
  const int64_t shared = (layers.stage + (spilled != nullptr ? 0 : layers.buffer)) * int64_t(sizeof(C));
  kLayers<C, kRows, kColumns>.run_blocks(
      name, stream, layers.list, shared, [](const List::Launch& part) { return part.chunks; }, task, spilled, layers.buffer, out);
}

void run_small(const char* name, const SmallLayers& layers, const LayerTask& task, double* out, const Workspace& workspace,
               const Stream& stream) {
  double* spilled = nullptr;
  if ((layers.twice.buffer + layers.twice.stage) * int64_t(sizeof(double)) > kMostShared)
    spilled = workspace(layers.twice.buffer * layers.twice.layers());
  const DeviceGuard guard(stream, name);
  run_tile<float, 2, 5>(name, layers.narrow, task, nullptr, out, stream);
  run_tile<float, 4, 9>(name, layers.wide, task, nullptr, out, stream);
  run_tile<double, 4, 9>(name, layers.twice, task, spilled, out, stream);
}

// A result of <X, V> for every layer, those without elements too.
void clear_unless_all(const char* name, double* results, size_t count, const SmallLayers& layers, const Stream& stream) {
  if (int64_t(count) == layers.layers()) return;
  const DeviceGuard guard(stream, name);
  check(cudaMemsetAsync(results, 0, count * sizeof(double), cudaStream_t(stream.handle)), name);
}

template <class C, class P>
__global__ void __launch_bounds__(kThreads) ncl_momentum_kernel(const __grid_constant__ P packet, const MomentumRule rule) {
  ncl_momentum_thread<C>(packet, Chunk::find(packet, blockIdx.x, kRunChunk), int(threadIdx.x), rule);
}
template <class C>
constexpr PacketKernel<MomentumRule> kMomentum{ncl_momentum_kernel<C, SmallPacket>, ncl_momentum_kernel<C, LargePacket>};

template <class C, class P>
__global__ void __launch_bounds__(kThreads) ncl_apply_kernel(const __grid_constant__ P packet, const double* step) {
  ncl_apply_thread<C>(packet, Chunk::find(packet, blockIdx.x, kRunChunk), int(threadIdx.x), *step);
}
template <class C>
constexpr PacketKernel<const double*> kApply{ncl_apply_kernel<C, SmallPacket>, ncl_apply_kernel<C, LargePacket>};

template <class Kernel, class... Parameters>
void sweep(const char* name, const Kernel& single, const Kernel& twice, const ByCompute& lists, const Stream& stream,
           const Parameters&... parameters) {
  if (lists.empty()) return;
  const DeviceGuard guard(stream, name);
  single.run(name, stream, lists.single, parameters...);
  twice.run(name, stream, lists.twice, parameters...);
}

}  // namespace

void kron_small_(const Views& weights, const Views& biases, const Views& a, const Views& g, const Workspace& workspace,
                 const Stream& stream) {
  const SmallLayers layers({&weights, &biases, nullptr, nullptr, nullptr, nullptr, nullptr, &a, &g});
  run_small("kron_small_", layers, {LayerKind::solve, 0, 0, 0}, nullptr, workspace, stream);
}

void kron_small_quadratic(const Views& weights, const Views& biases, const Views& a, const Views& g, double* out,
                          const Workspace& workspace, const Stream& stream) {
  constexpr char name[] = "kron_small_quadratic";
  const SmallLayers layers({&weights, &biases, nullptr, nullptr, nullptr, nullptr, nullptr, &a, &g});
  double* parts = workspace(int64_t(weights.size()));
  clear_unless_all(name, parts, weights.size(), layers, stream);
  run_small(name, layers, {LayerKind::quadratic, 0, 0, 0}, parts, workspace, stream);
  const DeviceGuard guard(stream, name);
  launch(name, stream, 1, kThreads, total_kernel, parts, int64_t(weights.size()), out);
}

void ncl_small_step_(const Views& weights, const Views& biases, const Views& weight_grads, const Views& bias_grads, const Views& m,
                     const Views& h, const Views& a, const Views& g, double lr, double momentum, double strength,
                     const Workspace& workspace, const Stream& stream) {
  const SmallLayers layers({&weights, &biases, &weight_grads, &bias_grads, &m, &h, nullptr, &a, &g});
  run_small("ncl_small_step_", layers, {LayerKind::step, momentum, strength, lr}, nullptr, workspace, stream);
}

void ncl_small_direction_(const Views& m, const Views& v, const Views& weight_grads, const Views& bias_grads, const Views& h,
                          const Views& a, const Views& g, double momentum, double strength, double* products, const Workspace& workspace,
                          const Stream& stream) {
  constexpr char name[] = "ncl_small_direction_";
  const SmallLayers layers({nullptr, nullptr, &weight_grads, &bias_grads, &m, &h, &v, &a, &g});
  clear_unless_all(name, products, weight_grads.size(), layers, stream);
  run_small(name, layers, {LayerKind::direction, momentum, strength, 0}, products, workspace, stream);
}

void ncl_momentum_(const Views& m, const Views& h, const Views& weight_grads, const Views& bias_grads, double momentum, double strength,
                   const double* lr, const Stream& stream) {
  sweep("ncl_momentum_", kMomentum<float>, kMomentum<double>, momentum_lists(m, h, weight_grads, bias_grads), stream,
        MomentumRule{momentum, strength, lr != nullptr ? *lr : 0, lr != nullptr});
}

void ncl_apply_(const Views& weights, const Views& biases, const Views& h, const Views& v, const Views& m, const double* step,
                const Stream& stream) {
  sweep("ncl_apply_", kApply<float>, kApply<double>, apply_lists(weights, biases, h, v, m), stream, step);
}

}  // namespace fastcl::cuda
