// Precisions of low rank plus a diagonal. Every sum has a fixed order, which depends on the lists alone: a warp adds up its threads' parts
// as a tree, a block its warps', and one block per sum the blocks'.
#include "cuda/block.cuh"
#include "cuda/low_rank_plan.h"
#include "cuda/multi_tensor.cuh"
#include "cuda/ops.h"

namespace fastcl::cuda {
namespace {

constexpr int kWarps = kThreads / 32;
// On a multiprocessor: with more the compiler would save registers, and hold back loads.
constexpr int kBlocks = 3;

// A warp's sums, in shared memory.
struct WarpSums {
  double* own;

  template <int R>
  __device__ void add(int slot, const double (&part)[R], int count) {
    double sum[R];
    FASTCL_UNROLL
    for (int r = 0; r < R; ++r) sum[r] = part[r];
    FASTCL_UNROLL
    for (int step = 16; step > 0; step /= 2) {
      FASTCL_UNROLL
      for (int r = 0; r < R; ++r) sum[r] += __shfl_down_sync(0xffffffffu, sum[r], step);
    }
    if (threadIdx.x % 32 != 0) return;
    FASTCL_UNROLL
    for (int r = 0; r < R; ++r)
      if (r < count) own[slot + r] += sum[r];
  }
};

// parts[sum][chunk of all launches]
template <class C, bool kStep, class P>
__global__ void __launch_bounds__(kThreads, kBlocks)
    low_rank_sums_kernel(const __grid_constant__ P packet, int rank, const LowRankRule rule, double* parts, int64_t chunks) {
  extern __shared__ double memory[];
  const int slots = kStep ? 2 * rank + 3 : rank + 1, thread = int(threadIdx.x);
  for (int e = thread; e < kWarps * slots; e += kThreads) memory[e] = 0;
  __syncthreads();
  WarpSums sums{memory + thread / 32 * slots};
  low_rank_sums_thread<C, kStep>(packet, Chunk::find(packet, blockIdx.x, kRunChunk), thread, rank, rule, sums);
  __syncthreads();
  for (int slot = thread; slot < slots; slot += kThreads) {
    double sum = memory[slot];
    for (int w = 1; w < kWarps; ++w) sum += memory[w * slots + slot];
    parts[slot * chunks + packet.base + blockIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(kThreads) low_rank_finish_kernel(const double* parts, int64_t chunks, double* out) {
  const double* own = parts + blockIdx.x * chunks;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += own[i];
  sum = combine_block<kThreads>(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

template <class C, bool kStep, class P>
__global__ void __launch_bounds__(kThreads, kBlocks)
    low_rank_update_kernel(const __grid_constant__ P packet, int rank, const LowRankRule rule, const double* coefficients,
                           const double* step) {
  __shared__ C own[kMostRows];
  const int thread = int(threadIdx.x);
  for (int r = thread; r < rank; r += kThreads) own[r] = C(coefficients[r]);
  __syncthreads();
  low_rank_update_thread<C, kStep>(packet, Chunk::find(packet, blockIdx.x, kRunChunk), thread, rank, rule, own, kStep ? C(*step) : C(0));
}

template <class C, bool kStep>
constexpr PacketKernel<int, LowRankRule, double*, int64_t> kSums{low_rank_sums_kernel<C, kStep, SmallPacket>,
                                                                 low_rank_sums_kernel<C, kStep, LargePacket>};
// Lists in double are not worth a second instance.
template <bool kStep>
constexpr KernelOf<SmallPacket, SmallPacket, int, LowRankRule, double*, int64_t> kSums<double, kStep>{
    low_rank_sums_kernel<double, kStep, SmallPacket>, low_rank_sums_kernel<double, kStep, SmallPacket>};
template <class C, bool kStep>
constexpr PacketKernel<int, LowRankRule, const double*, const double*> kUpdate{low_rank_update_kernel<C, kStep, SmallPacket>,
                                                                               low_rank_update_kernel<C, kStep, LargePacket>};
template <bool kStep>
constexpr KernelOf<SmallPacket, SmallPacket, int, LowRankRule, const double*, const double*> kUpdate<double, kStep>{
    low_rank_update_kernel<double, kStep, SmallPacket>, low_rank_update_kernel<double, kStep, SmallPacket>};

template <bool kStep>
void run_sums(const char* name, const List& list, const Views& basis, const LowRankRule& rule, double* out, const Workspace& workspace,
              const Stream& stream) {
  const int rank = rank_of(basis), slots = kStep ? 2 * rank + 3 : rank + 1;
  const int64_t chunks = chunks_of(list), shared = int64_t(sizeof(double)) * kWarps * slots;
  double* parts = workspace(slots * chunks);
  const DeviceGuard guard(stream, name);
  const auto blocks = [](const List::Launch& part) { return part.chunks; };
  if (computes_in_double(basis)) {
    kSums<double, kStep>.run_blocks(name, stream, list, shared, blocks, rank, rule, parts, chunks);
  } else {
    kSums<float, kStep>.run_blocks(name, stream, list, shared, blocks, rank, rule, parts, chunks);
  }
  launch(name, stream, slots, kThreads, low_rank_finish_kernel, parts, chunks, out);
}

template <bool kStep>
void run_update(const char* name, const List& list, const Views& basis, const LowRankRule& rule, const double* coefficients,
                const double* step, const Stream& stream) {
  if (list.entries().empty()) return;
  const DeviceGuard guard(stream, name);
  if (computes_in_double(basis)) {
    kUpdate<double, kStep>.run(name, stream, list, rank_of(basis), rule, coefficients, step);
  } else {
    kUpdate<float, kStep>.run(name, stream, list, rank_of(basis), rule, coefficients, step);
  }
}

// ---- appending

template <class Own>
struct BlockTeam {
  Own own;
  template <class Phase>
  __device__ void each(const Phase& phase) {
    phase(int(threadIdx.x), own);
    __syncthreads();
  }
};

constexpr int64_t kProductsShared = (kStageDoubles + kKeptDoubles) * int64_t(sizeof(double));

// Block b leaves its partial matrix at parts[b]; launches after the first add to what is there.
template <class C, class P>
__global__ void __launch_bounds__(kThreads, 2)
    low_rank_products_kernel(const __grid_constant__ P packet, const RowPanels panels, double* parts) {
  extern __shared__ double memory[];
  BlockTeam<GramTile> team;
  products_block<C>(packet, blockIdx.x, gridDim.x, panels, memory, parts + blockIdx.x * gram_entries(panels.lists), team);
}
// Once per task: one instance, which takes many vectors.
template <class C>
constexpr KernelOf<LargePacket, LargePacket, RowPanels, double*> kProducts{low_rank_products_kernel<C, LargePacket>,
                                                                           low_rank_products_kernel<C, LargePacket>};

// A warp for each product of the lower triangle; every warp's lanes add up every 32nd block's.
__global__ void __launch_bounds__(kThreads) low_rank_products_finish_kernel(const double* parts, int64_t blocks, const RowPanels panels,
                                                                            const double* sigma, int rows, double* products) {
  const int64_t entries = gram_entries(panels.lists);
  const int lane = int(threadIdx.x) % 32, entry = int(blockIdx.x) * kWarps + int(threadIdx.x) / 32;
  if (entry >= entries) return;
  double sum = 0;
  for (int64_t b = lane; b < blocks; b += 32) sum += parts[b * entries + entry];
  FASTCL_UNROLL
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (lane != 0) return;
  const TilePlace place = TilePlace::of(entry);
  const int i = panels.row(place.row), j = panels.row(place.column);
  if (sigma != nullptr && i < panels.rank) sum *= sigma[i];
  if (sigma != nullptr && j < panels.rank) sum *= sigma[j];
  products[i * rows + j] = sum;
  products[j * rows + i] = sum;
}

void run_products(const char* name, const Views& diagonal, const Views& basis, const double* sigma, const std::vector<Views>& vectors,
                  double* products, const Workspace& workspace, const Stream& stream) {
  const int rank = rank_of(basis), rows = rank + int(vectors.size());
  if (rows == 0) return;
  for (const RowPanels& panels : row_panels(rank, rows)) {
    const List list = products_list(diagonal, basis, vectors, panels);
    const int64_t blocks = products_blocks(list), entries = gram_entries(panels.lists);
    double* parts = workspace(blocks * entries);
    const DeviceGuard guard(stream, name);
    // All blocks of the first launch write, those without a chunk zeros.
    const auto blocks_of = [&](const List::Launch& part) { return part.base == 0 ? blocks : std::min(blocks, part.chunks); };
    if (computes_in_double(basis)) {
      kProducts<double>.run_blocks(name, stream, list, kProductsShared, blocks_of, panels, parts);
    } else {
      kProducts<float>.run_blocks(name, stream, list, kProductsShared, blocks_of, panels, parts);
    }
    launch(name, stream, (entries + kWarps - 1) / kWarps, kThreads, low_rank_products_finish_kernel, parts, blocks, panels, sigma, rows,
           products);
  }
}

template <class C, class P>
__global__ void __launch_bounds__(kThreads, kBlocks) low_rank_mix_kernel(const __grid_constant__ P packet, const RowMix mix) {
  extern __shared__ double memory[];
  BlockTeam<NothingKept> team;
  mix_block<C>(packet, blockIdx.x, mix, memory, team);
}
template <class C>
constexpr KernelOf<LargePacket, LargePacket, RowMix> kMix{low_rank_mix_kernel<C, LargePacket>, low_rank_mix_kernel<C, LargePacket>};

void run_mix(const char* name, const List& list, const Views& basis, const RowMix& mix, const Stream& stream) {
  const DeviceGuard guard(stream, name);
  const int64_t shared = mix_doubles(mix.rows) * int64_t(sizeof(double));
  const auto blocks = [](const List::Launch& part) { return part.chunks; };
  if (computes_in_double(basis)) {
    kMix<double>.run_blocks(name, stream, list, shared, blocks, mix);
  } else {
    kMix<float>.run_blocks(name, stream, list, shared, blocks, mix);
  }
}

}  // namespace

void low_rank_products(const Views& vectors, const Views& diagonal, const Views& basis, bool inverse, double* out,
                       const Workspace& workspace, const Stream& stream) {
  const List list = precision_list("vectors", diagonal, basis, {&vectors}, kRunChunk, run_of(basis));
  run_sums<false>("low_rank_products", list, basis, {0, 0, 0, 0, inverse}, out, workspace, stream);
}

void low_rank_update_(const Views& grads, const Views& diagonal, const Views& basis, const double* coefficients, const Stream& stream) {
  const List list = precision_list("grads", diagonal, basis, {&grads}, kRunChunk, run_of(basis));
  run_update<false>("low_rank_update_", list, basis, {0, 0, 0, 0, true}, coefficients, nullptr, stream);
}

void low_rank_step_products(const LowRankStep& step, double* out, const Workspace& workspace, const Stream& stream) {
  const LowRankStepPlan plan(step);
  run_sums<true>("low_rank_step_products", plan.list, step.basis, plan.rule, out, workspace, stream);
}

void low_rank_step_update_(const LowRankStep& step, const double* coefficients, const double* size, const Stream& stream) {
  const LowRankStepPlan plan(step);
  run_update<true>("low_rank_step_update_", plan.list, step.basis, plan.rule, coefficients, size, stream);
}

void low_rank_gram(const Views& diagonal, const Views& basis, const double* sigma, const std::vector<Views>& vectors, double* products,
                   const Workspace& workspace, const Stream& stream) {
  run_products("low_rank_gram", diagonal, basis, sigma, vectors, products, workspace, stream);
}

void low_rank_compress_(const Views& diagonal, const Views& basis, const double* sigma, const std::vector<Views>& vectors,
                        const double* mix, double* products, const Workspace& workspace, const Stream& stream) {
  constexpr char name[] = "low_rank_compress_";
  const int rank = rank_of(basis), rows = rank + int(vectors.size());
  std::vector<const Views*> others;
  for (const Views& v : vectors) others.push_back(&v);
  run_mix(name, precision_list("diagonal", diagonal, basis, others, kMixChunk, 1), basis, {rank, rows, sigma, mix, true}, stream);
  run_products(name, diagonal, basis, nullptr, {}, products, workspace, stream);
}

void low_rank_rotate_(const Views& basis, const double* mix, double* products, const Workspace& workspace, const Stream& stream) {
  constexpr char name[] = "low_rank_rotate_";
  const int rank = rank_of(basis);
  if (rank == 0) return;
  Views first;  // gives shapes here
  for (const View& b : basis) first.push_back(row_of(b));
  run_mix(name, precision_list("basis", first, basis, {}, kMixChunk, 1), basis, {rank, rank, nullptr, mix, false}, stream);
  run_products(name, first, basis, nullptr, {}, products, workspace, stream);
}

}  // namespace fastcl::cuda
