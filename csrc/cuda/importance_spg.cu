// SPG's importance: two sweeps and two small kernels that combine what the blocks left in the workspace. Every sum has a fixed order, which
// depends on the list alone: no atomics, the same bits in every run.
#include <algorithm>
#include <map>

#include "core/dtypes.h"
#include "cuda/block.cuh"
#include "cuda/multi_tensor.cuh"
#include "cuda/ops.h"

namespace fastcl::cuda {
namespace {

constexpr char kName[] = "spg_importance_";
constexpr int kCombineThreads = 128;

struct Range {
  int64_t first, count;
};
static_assert(sizeof(Range) == 2 * sizeof(double), "the workspace counts in doubles");

// An item is one head's gradient of one tensor. Its chunks are counted, like the items, over the launches of all dtypes.
template <class G, class P>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(const __grid_constant__ P packet, Statistics* parts, int64_t first_part, Range* ranges) {
  const Chunk c = Chunk::find(packet, blockIdx.x, kSpgChunk);
  const double shift = load<double>(*packet.template address<const G>(c.entry, 0));
  const Moments m = combine_block<kThreads>(moments_thread<G>(packet, c, int(threadIdx.x), shift));
  if (threadIdx.x != 0) return;
  const int64_t part = first_part + packet.base + blockIdx.x;
  parts[part] = {shift, m};
  if (c.begin == 0) ranges[packet.note(c.entry, 0)] = {part, int64_t(packet.first_chunk[c.tensor + 1] - packet.first_chunk[c.tensor])};
}

__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const Statistics* parts, const Range* ranges, Statistics* items) {
  const Range range = ranges[blockIdx.x];
  Moments m{0, 0, 0};
  for (int64_t i = threadIdx.x; i < range.count; i += kCombineThreads) m = combine(m, parts[range.first + i].moments);
  m = combine_block<kCombineThreads>(m);
  if (threadIdx.x == 0) items[blockIdx.x] = {parts[range.first].shift, m};
}

template <class S, class C, class P>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const __grid_constant__ P packet, const Statistics* items, double* sums, int64_t first_sum) {
  __shared__ Normaliser<C> normalisers[kMaxHeads];
  const Chunk c = Chunk::find(packet, blockIdx.x, kSpgChunk);
  const int head = int(threadIdx.x);
  if (head < packet.operands - 1) {
    const Statistics s = items[note_item(packet.note(c.entry, head + 1))];
    normalisers[head] = Normaliser<C>::make(s.shift, s.moments);
  }
  __syncthreads();
  const double sum = combine_block<kThreads>(update_thread<S, C>(packet, c, int(threadIdx.x), normalisers));
  if (threadIdx.x == 0) sums[first_sum + packet.base + blockIdx.x] = sum / sum_unit<S>;
}

__global__ void __launch_bounds__(kThreads) mean_kernel(const double* sums, int64_t n, double numel, double* mean) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += sums[i];
  sum = combine_block<kThreads>(sum);
  if (threadIdx.x == 0) *mean = sum / numel;
}

// A list with the place of its chunks among those of all lists of a sweep.
struct Part {
  List list;
  int64_t first_chunk = 0, chunks = 0;
};

template <class Key>
int64_t count_chunks(std::map<Key, Part>& parts) {
  int64_t chunks = 0;
  for (auto& [key, part] : parts) {
    part.first_chunk = chunks;
    for (const List::Entry& e : part.list.entries()) part.chunks += part.list.chunks_of(e);
    chunks += part.chunks;
  }
  return chunks;
}

template <class Key>
List& list_of(std::map<Key, Part>& parts, const Key& key, int operands) {
  return parts.try_emplace(key, Part{List(operands, kSpgChunk, false, true)}).first->second.list;
}

// Which tensors a launch of the second sweep can hold together.
struct UpdateKey {
  size_t first_head;  // outermost: a tensor's groups of heads follow each other
  DType stored;
  bool in_double;
  bool operator<(const UpdateKey& o) const {
    return std::tie(first_head, stored, in_double) < std::tie(o.first_head, o.stored, o.in_double);
  }
};

template <class S, class C>
void launch_update(const Part& part, const Statistics* items, double* sums, const Stream& stream) {
  PacketKernel<const Statistics*, double*, int64_t>{update_kernel<S, C, SmallPacket>, update_kernel<S, C, LargePacket>}.run(
      kName, stream, part.list, items, sums, part.first_chunk);
}

}  // namespace

void spg_importance_(const Views& accumulated, const std::vector<Views>& grads_by_head, double* mean, const Workspace& workspace,
                     const Stream& stream) {
  const size_t heads = grads_by_head.size();
  std::map<DType, Part> moments;
  std::map<UpdateKey, Part> updates;
  int64_t items = 0;
  double numel = 0;
  std::vector<int64_t> notes;
  std::vector<const View*> views;
  for (size_t i = 0; i < accumulated.size(); ++i) {
    const View& a = accumulated[i];
    if (a.numel() == 0) continue;
    numel += double(a.numel());
    bool in_double = a.dtype == DType::f64;
    for (const Views& head : grads_by_head) in_double |= head[i].dtype == DType::f64;
    // Groups of heads; with none, one group that only sums. Storing in between loses nothing: rounding is monotone, so the maximum of
    // rounded values is the rounded maximum.
    for (size_t first = 0; first < std::max<size_t>(heads, 1); first += kMaxHeads) {
      const size_t last = std::min(heads, first + kMaxHeads);
      views.assign(1, &a);
      notes.assign(1, 0);
      for (size_t h = first; h < last; ++h) {
        const View& g = grads_by_head[h][i];
        const View* alone[] = {&g};
        if (const char* reason = list_of(moments, g.dtype, 1).add(alone, 16 / int(size_of(g.dtype)), &items))
          throw Refusal(("grads_by_head[" + std::to_string(h) + "]").c_str(), i, reason);
        views.push_back(&g);
        notes.push_back(update_note(items++, g.dtype));
      }
      List& list = list_of(updates, UpdateKey{first, a.dtype, in_double}, int(1 + last - first));
      if (const char* reason = list.add(views.data(), kUpdateRun, notes.data())) throw Refusal("accumulated", i, reason);
    }
  }

  const int64_t parts = count_chunks(moments), sums_count = count_chunks(updates);
  double* memory = workspace(4 * parts + 4 * items + 2 * items + sums_count);
  auto* part_statistics = reinterpret_cast<Statistics*>(memory);
  auto* item_statistics = part_statistics + parts;
  auto* ranges = reinterpret_cast<Range*>(item_statistics + items);
  double* sums = reinterpret_cast<double*>(ranges + items);

  const DeviceGuard guard(stream, kName);
  for (const auto& [dtype, part] : moments)
    with_floating(dtype, [&, &part = part](auto g) {
      using G = typename decltype(g)::type;
      PacketKernel<Statistics*, int64_t, Range*>{moments_kernel<G, SmallPacket>, moments_kernel<G, LargePacket>}.run(
          kName, stream, part.list, part_statistics, part.first_chunk, ranges);
    });
  if (items > 0) launch(kName, stream, items, kCombineThreads, combine_kernel, part_statistics, ranges, item_statistics);
  // The sums of the last group of heads count: it sees what the others have stored.
  int64_t first_sum = 0;
  for (const auto& [key, part] : updates) {
    if (key.first_head + kMaxHeads < heads) first_sum = part.first_chunk + part.chunks;
    with_stored(key.stored, [&, &part = part, &key = key](auto s) {
      using S = typename decltype(s)::type;
      if constexpr (std::is_same_v<S, double>) {
        launch_update<S, double>(part, item_statistics, sums, stream);
      } else if (key.in_double) {
        launch_update<S, double>(part, item_statistics, sums, stream);
      } else {
        launch_update<S, float>(part, item_statistics, sums, stream);
      }
    });
  }
  launch(kName, stream, 1, kThreads, mean_kernel, sums + first_sum, sums_count - first_sum, std::max(numel, 1.0), mean);
}

}  // namespace fastcl::cuda
