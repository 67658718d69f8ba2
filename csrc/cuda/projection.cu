// Dot products and projections. Every sum has a fixed order, which depends on the lists alone: what a block sums up goes into the
// workspace, and one block adds that up. What the data decides is decided on the device: the second sweep's blocks end at once if nothing
// is violated.
#include "cuda/projection.h"

#include <map>

#include "core/dtypes.h"
#include "cuda/block.cuh"
#include "cuda/multi_tensor.cuh"
#include "cuda/ops.h"

namespace fastcl::cuda {
namespace {

// ---- one reference

template <class A, class B, class P>
__global__ void __launch_bounds__(kThreads) dot_kernel(const __grid_constant__ P packet, Products* parts, bool squares) {
  const Products sum = combine_block<kThreads>(dot_thread<A, B>(packet, blockIdx.x, int(threadIdx.x), squares));
  if (threadIdx.x == 0) parts[packet.base + blockIdx.x] = sum;
}

constexpr int kFinishThreads = 1024;

__global__ void __launch_bounds__(kFinishThreads) dot_finish_kernel(const Products* parts, int64_t count, bool project, double* out) {
  Products sum{0, 0};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) sum = combine(sum, parts[i]);
  sum = combine_block<kFinishThreads>(sum);
  if (threadIdx.x != 0) return;
  out[0] = sum.dot;
  if (!project) return;
  out[1] = sum.square;
  out[2] = agem_coefficient(sum.dot, sum.square);
}

template <class G, class R, class P>
__global__ void __launch_bounds__(kThreads) add_kernel(const __grid_constant__ P packet, const double* coefficient) {
  const AddScaled<G, R> op{*coefficient};
  if (op.coefficient == 0) return;
  pair_thread<G, R>(packet, blockIdx.x, int(threadIdx.x), op);
}

// What a pair of dtypes needs.
struct Pair {
  int run;
  int64_t chunk;
  void (*dot)(const char* name, const Stream& stream, const List& list, Products* parts, bool squares);
  void (*add)(const char* name, const Stream& stream, const List& list, const double* coefficient);

  static Pair of(DType a, DType b) {
    return with_floating(a, [&](auto x) {
      return with_floating(b, [](auto y) -> Pair {
        using A = typename decltype(x)::type;
        using B = typename decltype(y)::type;
        return {pair_run<A, B>, pair_chunk<A, B>,
                [](const char* name, const Stream& stream, const List& list, Products* parts, bool squares) {
                  PacketKernel<Products*, bool>{dot_kernel<A, B, SmallPacket>, dot_kernel<A, B, LargePacket>}.run(name, stream, list, parts,
                                                                                                                  squares);
                },
                [](const char* name, const Stream& stream, const List& list, const double* coefficient) {
                  PacketKernel<const double*>{add_kernel<A, B, SmallPacket>, add_kernel<A, B, LargePacket>}.run(name, stream, list,
                                                                                                                coefficient);
                }};
      });
    });
  }
};

struct Group {
  Pair pair;
  List list;
  int64_t first_part = 0;
};

// Two lists, grouped by their dtypes.
struct Pairs {
  std::map<std::pair<DType, DType>, Group> groups;
  int64_t parts = 0;

  void add(const char* argument, size_t index, const View& a, const View& b) {
    if (a.numel() == 0) return;
    const std::pair<DType, DType> key{a.dtype, b.dtype};
    auto group = groups.find(key);
    if (group == groups.end()) {
      const Pair pair = Pair::of(a.dtype, b.dtype);
      group = groups.emplace(key, Group{pair, List(2, pair.chunk, true, false)}).first;
    }
    const View* both[] = {&a, &b};
    if (const char* reason = group->second.list.add(both, group->second.pair.run)) throw Refusal(argument, index, reason);
  }

  void count() {
    for (auto& [key, group] : groups) {
      group.first_part = parts;
      for (const List::Entry& e : group.list.entries()) parts += group.list.chunks_of(e);
    }
  }

  void dot(const char* name, bool project, double* out, const Workspace& workspace, const Stream& stream) const {
    static_assert(sizeof(Products) == 2 * sizeof(double), "the workspace counts in doubles");
    auto* memory = reinterpret_cast<Products*>(workspace(2 * parts));
    for (const auto& [key, group] : groups) group.pair.dot(name, stream, group.list, memory + group.first_part, project);
    launch(name, stream, 1, kFinishThreads, dot_finish_kernel, memory, parts, project, out);
  }
};

// ---- many memories

template <class P>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ P packet, const double* coefficients) {
  __shared__ double own[kMostMemories];
  const int k = int(threadIdx.x);
  bool used = false;
  if (k < packet.operands - 1) {
    own[k] = coefficients[k];
    used = own[k] != 0;
  }
  if (!__syncthreads_or(used)) return;
  combine_thread(packet, Chunk::find(packet, blockIdx.x, kJointChunk), k, own);
}

constexpr int64_t kGramShared = (kStageDoubles + kKeptDoubles) * int64_t(sizeof(double));

// Block b leaves its partial matrix at parts[b]; launches after the first add to what is there.
template <class P>
__global__ void __launch_bounds__(kThreads, 2) gram_kernel(const __grid_constant__ P packet, double* parts) {
  extern __shared__ double memory[];
  double *rows = memory, *kept = memory + kStageDoubles;
  const GramShape g = GramShape::of(packet.operands);
  const int thread = int(threadIdx.x);
  for (int e = thread; e < kKeptDoubles; e += kThreads) kept[e] = 0;
  __syncthreads();  // a block without a chunk comes to the end at once
  GramTile sum{};
  GramFetch fetched;
  int chain = 0;
  auto stage = GramStage<P>::first(packet, blockIdx.x);
  if (stage.left()) gram_fetch(packet, g, stage, thread, fetched);
  while (stage.left()) {
    gram_put(packet, g, stage, thread, fetched, rows);
    const int columns = stage.slots(g) * kJointRun;
    __syncthreads();
    stage.advance(packet, g, gridDim.x);
    if (stage.left()) gram_fetch(packet, g, stage, thread, fetched);  // on its way during the multiplications
    gram_multiply(g, columns, thread, rows, sum);
    chain += columns / g.groups + 1;
    if (chain >= kGramChain || !stage.left()) {
      gram_keep(thread, sum, kept);
      chain = 0;
    }
    __syncthreads();
  }
  for (int groups = g.groups; groups > 1; groups = (groups + 1) / 2) {
    gram_fold(g, groups, (groups + 1) / 2, thread, kept);
    __syncthreads();
  }
  gram_leave(g, thread, kept, packet.base > 0, parts + int64_t(blockIdx.x) * gram_entries(g.lists));
}

constexpr int kFinishEntries = 32, kWarps = kThreads / 32;

// 32 products of the lower triangle: each of eight warps adds up every eighth block's.
__global__ void __launch_bounds__(kThreads)
    gram_finish_kernel(const double* parts, int64_t blocks, int lists, bool last, double* products) {
  __shared__ double sums[kWarps][kFinishEntries];
  const int64_t entries = gram_entries(lists);
  const int lane = int(threadIdx.x) % kFinishEntries, warp = int(threadIdx.x) / kFinishEntries;
  const int entry = int(blockIdx.x) * kFinishEntries + lane;
  double chains[4] = {};
  for (int64_t first = warp; first < blocks && entry < entries; first += 4 * kWarps) {
    FASTCL_UNROLL
    for (int c = 0; c < 4; ++c)
      if (first + c * kWarps < blocks) chains[c] += parts[(first + c * kWarps) * entries + entry];
  }
  double sum = (chains[0] + chains[1]) + (chains[2] + chains[3]);
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || entry >= entries) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  const TilePlace place = TilePlace::of(entry);
  const int i = gram_place(place.row, lists, last), j = gram_place(place.column, lists, last);
  products[i * lists + j] = sum;
  products[j * lists + i] = sum;
}

constexpr int kSolverThreads = 64;

struct Block {
  int rank;
  static constexpr int size = kSolverThreads;
  FASTCL_HD void sync() const {
#ifdef __CUDA_ARCH__
    __syncthreads();
#endif
  }
};

__global__ void __launch_bounds__(kSolverThreads) solve_kernel(const double* products, int k, double margin, double ridge, double* out) {
  extern __shared__ double memory[];
  int* flags = reinterpret_cast<int*>(memory + gem_workspace_doubles(k));
  fastcl::gem_coefficients(products, k, margin, ridge, out, memory, flags, Block{int(threadIdx.x)});
}

void launch_solver(const char* name, const Stream& stream, const double* products, int k, double margin, double ridge, double* out) {
  // Up to 70 KB, which every GPU has that this is built for.
  const int64_t bytes = gem_workspace_doubles(k) * int64_t(sizeof(double)) + gem_workspace_ints(k) * int64_t(sizeof(int));
  launch_shared(name, stream, 1, kSolverThreads, bytes, solve_kernel, products, k, margin, ridge, out);
}

List joint_list(const char* argument, const std::vector<const Views*>& lists) {
  List joint(int(lists.size()), kJointChunk, false, true);
  std::vector<const View*> views(lists.size());
  std::vector<int64_t> dtypes(lists.size());
  for (size_t i = 0; i < lists[0]->size(); ++i) {
    if ((*lists[0])[i].numel() == 0) continue;
    for (size_t l = 0; l < lists.size(); ++l) {
      views[l] = &(*lists[l])[i];
      dtypes[l] = int64_t(views[l]->dtype);
    }
    if (const char* reason = joint.add(views.data(), kJointRun, dtypes.data())) throw Refusal(argument, i, reason);
  }
  return joint;
}

std::vector<const Views*> joined(const Views& grads, const std::vector<Views>& memories) {
  std::vector<const Views*> lists{&grads};
  for (const Views& m : memories) lists.push_back(&m);
  return lists;
}

// The most chunks that one launch has, as far as that many blocks are wanted.
int64_t gram_blocks(const List& list) {
  int64_t most = 0;
  for (const List::Launch& part : list.launches(LargePacket::max_tensors, LargePacket::max_words)) most = std::max(most, part.chunks);
  return std::min(most, kGramBlocks);
}

void launch_gram(const char* name, const List& list, bool last, double* parts, int64_t blocks, double* products, const Stream& stream) {
  // All blocks of the first launch write, those without a chunk zeros.
  PacketKernel<double*>{gram_kernel<SmallPacket>, gram_kernel<LargePacket>}.run_blocks(
      name, stream, list, kGramShared, [&](const List::Launch& part) { return part.base == 0 ? blocks : std::min(blocks, part.chunks); },
      parts);
  const int64_t entries = gram_entries(list.operands());
  launch(name, stream, (entries + kFinishEntries - 1) / kFinishEntries, kThreads, gram_finish_kernel, parts, blocks, list.operands(), last,
         products);
}

void launch_combine(const char* name, const List& list, const double* coefficients, const Stream& stream) {
  PacketKernel<const double*>{combine_kernel<SmallPacket>, combine_kernel<LargePacket>}.run(name, stream, list, coefficients);
}

}  // namespace

void grad_dot(const Views& a, const Views& b, double* out, const Workspace& workspace, const Stream& stream) {
  Pairs pairs;
  // The walk follows the first of a pair: an expanded tensor, which stands for a missing gradient, had better not be it.
  for (size_t i = 0; i < a.size(); ++i) {
    if (is_contiguous(a[i])) {
      pairs.add("a", i, a[i], b[i]);
    } else {
      pairs.add("a", i, b[i], a[i]);
    }
  }
  pairs.count();
  const DeviceGuard guard(stream, "grad_dot");
  pairs.dot("grad_dot", false, out, workspace, stream);
}

void project_(const Views& grads, const Views& reference, double* out, const Workspace& workspace, const Stream& stream) {
  Pairs pairs;
  for (size_t i = 0; i < grads.size(); ++i) pairs.add("grads", i, grads[i], reference[i]);
  pairs.count();
  const DeviceGuard guard(stream, "project_");
  pairs.dot("project_", true, out, workspace, stream);
  for (const auto& [key, group] : pairs.groups) group.pair.add("project_", stream, group.list, out + 2);
}

void gram(const std::vector<Views>& vectors, double* products, const Workspace& workspace, const Stream& stream) {
  std::vector<const Views*> lists;
  for (const Views& v : vectors) lists.push_back(&v);
  const List list = joint_list("vectors[0]", lists);
  const int64_t blocks = gram_blocks(list);
  double* parts = workspace(blocks * gram_entries(list.operands()));
  const DeviceGuard guard(stream, "gram");
  launch_gram("gram", list, false, parts, blocks, products, stream);
}

void gem_coefficients(const double* products, int k, double margin, double ridge, double* out, const Stream& stream) {
  const DeviceGuard guard(stream, "gem_coefficients");
  launch_solver("gem_coefficients", stream, products, k, margin, ridge, out);
}

void gem_project_(const Views& grads, const std::vector<Views>& memories, double margin, double ridge, double* out,
                  const Workspace& workspace, const Stream& stream) {
  constexpr char name[] = "gem_project_";
  const List list = joint_list("grads", joined(grads, memories));
  const int64_t blocks = gram_blocks(list), square = int64_t(list.operands()) * list.operands();
  double* products = workspace(square + blocks * gram_entries(list.operands()));
  const DeviceGuard guard(stream, name);
  launch_gram(name, list, true, products + square, blocks, products, stream);
  launch_solver(name, stream, products, int(memories.size()), margin, ridge, out);
  launch_combine(name, list, out + 1, stream);
}

void combine_(const Views& grads, const std::vector<Views>& memories, const double* coefficients, const Stream& stream) {
  const List list = joint_list("grads", joined(grads, memories));
  const DeviceGuard guard(stream, "combine_");
  launch_combine("combine_", list, coefficients, stream);
}

}  // namespace fastcl::cuda
