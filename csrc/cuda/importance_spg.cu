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

// The launches of both sweeps. An item is a head's gradient of a tensor with elements; items are counted tensor by tensor within a head.
struct Plan {
  std::map<DType, Part> moments;
  std::map<UpdateKey, Part> updates;
  size_t heads;
  int64_t items = 0, parts = 0, sums = 0;
  double numel = 0;

  Plan(const Views& accumulated, const std::vector<Views>& grads_by_head) : heads(grads_by_head.size()) {
    int64_t tensors = 0;
    for (const View& a : accumulated) tensors += a.numel() > 0;
    items = tensors * int64_t(heads);
    int64_t tensor = 0;
    for (size_t i = 0; i < accumulated.size(); ++i)
      if (accumulated[i].numel() > 0) add(accumulated, grads_by_head, i, tensor++, tensors);
    parts = count_chunks(moments);
    sums = count_chunks(updates);
  }

  void measure(Statistics* part_statistics, Range* ranges, Statistics* item_statistics, const Stream& stream) const {
    for (const auto& [dtype, part] : moments)
      with_floating(dtype, [&, &part = part](auto g) {
        using G = typename decltype(g)::type;
        PacketKernel<Statistics*, int64_t, Range*>{moments_kernel<G, SmallPacket>, moments_kernel<G, LargePacket>}.run(
            kName, stream, part.list, part_statistics, part.first_chunk, ranges);
      });
    if (items > 0) launch(kName, stream, items, kCombineThreads, combine_kernel, part_statistics, ranges, item_statistics);
  }

  void update(const Statistics* item_statistics, double* block_sums, double* mean, const Stream& stream) const {
    // The sums of the last group of heads count: it sees what the others have stored.
    int64_t first_sum = 0;
    for (const auto& [key, part] : updates) {
      if (key.first_head + kMaxHeads < heads) first_sum = part.first_chunk + part.chunks;
      with_stored(key.stored, [&, &part = part, &key = key](auto s) {
        using S = typename decltype(s)::type;
        if constexpr (std::is_same_v<S, double>) {
          launch_update<S, double>(part, item_statistics, block_sums, stream);
        } else if (key.in_double) {
          launch_update<S, double>(part, item_statistics, block_sums, stream);
        } else {
          launch_update<S, float>(part, item_statistics, block_sums, stream);
        }
      });
    }
    launch(kName, stream, 1, kThreads, mean_kernel, block_sums + first_sum, sums - first_sum, std::max(numel, 1.0), mean);
  }

 private:
  std::vector<int64_t> notes_;
  std::vector<const View*> views_;

  void add(const Views& accumulated, const std::vector<Views>& grads_by_head, size_t i, int64_t tensor, int64_t tensors) {
    const View& a = accumulated[i];
    numel += double(a.numel());
    bool in_double = a.dtype == DType::f64;
    for (const Views& head : grads_by_head) in_double |= head[i].dtype == DType::f64;
    // Groups of heads; with none, one group that only sums. Storing in between loses nothing: rounding is monotone, so the maximum of
    // rounded values is the rounded maximum.
    for (size_t first = 0; first < std::max<size_t>(heads, 1); first += kMaxHeads) {
      const size_t last = std::min(heads, first + kMaxHeads);
      views_.assign(1, &a);
      notes_.assign(1, 0);
      for (size_t h = first; h < last; ++h) {
        const View& g = grads_by_head[h][i];
        const View* alone[] = {&g};
        const int64_t item = int64_t(h) * tensors + tensor;
        if (const char* reason = list_of(moments, g.dtype, 1).add(alone, 16 / int(size_of(g.dtype)), &item))
          throw Refusal(("grads_by_head[" + std::to_string(h) + "]").c_str(), i, reason);
        views_.push_back(&g);
        notes_.push_back(update_note(item, g.dtype));
      }
      List& list = list_of(updates, UpdateKey{first, a.dtype, in_double}, int(1 + last - first));
      if (const char* reason = list.add(views_.data(), kUpdateRun, notes_.data())) throw Refusal("accumulated", i, reason);
    }
  }
};

}  // namespace

void spg_importance_(const Views& accumulated, const std::vector<Views>& grads_by_head, double* mean, const Workspace& workspace,
                     const Stream& stream) {
  const Plan plan(accumulated, grads_by_head);
  double* memory = workspace(4 * plan.parts + 4 * plan.items + 2 * plan.items + plan.sums);
  auto* part_statistics = reinterpret_cast<Statistics*>(memory);
  auto* item_statistics = part_statistics + plan.parts;
  auto* ranges = reinterpret_cast<Range*>(item_statistics + plan.items);
  const DeviceGuard guard(stream, kName);
  plan.measure(part_statistics, ranges, item_statistics, stream);
  plan.update(item_statistics, reinterpret_cast<double*>(ranges + plan.items), mean, stream);
}

void spg_moments(const Views& accumulated, const std::vector<Views>& grads_by_head, Statistics* rows, const Workspace& workspace,
                 const Stream& stream) {
  const Plan plan(accumulated, grads_by_head);
  auto* part_statistics = reinterpret_cast<Statistics*>(workspace(4 * plan.parts + 2 * plan.items));
  const DeviceGuard guard(stream, kName);
  plan.measure(part_statistics, reinterpret_cast<Range*>(part_statistics + plan.parts), rows, stream);
}

void spg_update_(const Views& accumulated, const std::vector<Views>& grads_by_head, const Statistics* rows, double* mean,
                 const Workspace& workspace, const Stream& stream) {
  const Plan plan(accumulated, grads_by_head);
  double* sums = workspace(plan.sums);
  const DeviceGuard guard(stream, kName);
  plan.update(rows, sums, mean, stream);
}

}  // namespace fastcl::cuda
