#include "cuda/ops.h"
#include "cuda/pairs.cuh"

namespace fastcl::cuda {
namespace {

template <class T>
struct ExclusiveOr {
  static ExclusiveOr make(double) { return {}; }
  FASTCL_HD T operator()(T a, T b) const { return a ^ b; }
};

PairType table(DType t, DType) {
  return t == DType::f64 ? pair_type<uint64_t, uint64_t, ExclusiveOr<uint64_t>>() : pair_type<uint8_t, uint8_t, ExclusiveOr<uint8_t>>();
}

constexpr int64_t kReadChunk = 1 << 16;  // bytes
constexpr int kReadRun = 16;

// The 64-bit words of a chunk folded together, and what is left byte by byte.
FASTCL_HD uint64_t fold_dense(const uint8_t* bytes, int n, int thread) {
  constexpr int U = 4;
  uint64_t folded = 0;
  const int vectors = n / kReadRun;
  for (int first = thread; first < vectors; first += U * kThreads) {
    Vector<uint64_t, 2> x[U];
    FASTCL_UNROLL
    for (int u = 0; u < U; ++u) {
      x[u] = {};
      if (first + u * kThreads < vectors)
        x[u] = Vector<uint64_t, 2>::load(reinterpret_cast<const uint64_t*>(bytes + int64_t(first + u * kThreads) * kReadRun));
    }
    FASTCL_UNROLL
    for (int u = 0; u < U; ++u) folded ^= x[u].elements().x[0] ^ x[u].elements().x[1];
  }
  for (int e = vectors * kReadRun + thread; e < n; e += kThreads) {
    const bool whole = e / 8 < n / 8;
    folded ^= uint64_t(bytes[e]) << (whole ? 8 * (e % 8) : 0);
  }
  return folded;
}

__device__ uint64_t fold_block(uint64_t folded) {
  __shared__ uint64_t parts[kThreads / 32];
  for (int step = 16; step > 0; step /= 2) folded ^= __shfl_down_sync(0xffffffffu, folded, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = folded;
  __syncthreads();
  folded = 0;
  for (uint64_t part : parts) folded ^= part;
  return folded;
}

template <class P>
__global__ void __launch_bounds__(kThreads) read_kernel(const __grid_constant__ P packet, uint64_t* parts) {
  const Chunk c = Chunk::find(packet, blockIdx.x, kReadChunk);
  const uint64_t folded = fold_block(fold_dense(packet.template address<const uint8_t>(c.entry, 0) + c.begin, c.n, int(threadIdx.x)));
  if (threadIdx.x == 0) parts[packet.base + blockIdx.x] = folded;
}

__global__ void __launch_bounds__(kThreads) fold_kernel(const uint64_t* parts, int64_t n, uint64_t* out) {
  uint64_t folded = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) folded ^= parts[i];
  folded = fold_block(folded);
  if (threadIdx.x == 0) *out = folded;
}

}  // namespace

void yardstick_(const Views& written, const Views& read, const Stream& stream) {
  // Contiguous bytes as words where they fill them: bytes in registers would make this more than a yardstick.
  std::vector<int64_t> sizes(written.size());
  const int64_t stride = 1;
  Views w = written, r = read;
  for (size_t i = 0; i < w.size(); ++i) {
    const auto words = [](const View& v) { return is_contiguous(v) && v.numel() % 8 == 0 && reinterpret_cast<uintptr_t>(v.data) % 8 == 0; };
    if (!words(w[i]) || !words(r[i])) continue;
    sizes[i] = w[i].numel() / 8;
    for (View* v : {&w[i], &r[i]}) *v = {v->data, &sizes[i], &stride, 1, DType::f64, v->device, v->device_index};
  }
  run_pairs("yardstick_", "written", w, r, table, 0, stream);
}

void yardstick_read(const Views& read, uint64_t* folded, const Workspace& workspace, const Stream& stream) {
  List list(1, kReadChunk, false, false);
  int64_t chunks = 0;
  for (size_t i = 0; i < read.size(); ++i) {
    if (read[i].numel() == 0) continue;
    const int64_t bytes = read[i].numel() * size_of(read[i].dtype), stride = 1;
    const View v{read[i].data, &bytes, &stride, 1, DType::u8, read[i].device, read[i].device_index};
    const View* views[] = {&v};
    const char* reason = !is_contiguous(read[i])                               ? "is not contiguous"
                         : reinterpret_cast<uintptr_t>(v.data) % kReadRun != 0 ? "is not aligned to 16 bytes"
                                                                               : list.add(views, kReadRun);
    if (reason != nullptr) throw Refusal("read", i, reason);
    chunks += list.chunks_of(list.entries().back());
  }
  auto* parts = reinterpret_cast<uint64_t*>(workspace(chunks));
  const DeviceGuard guard(stream, "yardstick_read");
  PacketKernel<uint64_t*>{read_kernel<SmallPacket>, read_kernel<LargePacket>}.run("yardstick_read", stream, list, parts);
  launch("yardstick_read", stream, 1, kThreads, fold_kernel, parts, chunks, folded);
}

}  // namespace fastcl::cuda
