// Runs the CUDA code's host part and, thread by thread, what its kernels do to elements, on the CPU: the planner with sizes that no GPU
// holds, and every dtype and layout against the CPU ops. Usage: host <case>; exits with 1 and a line about the first difference.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>

#include "core/dtypes.h"
#include "core/soft_mask.h"
#include "cpu/ops.h"
#include "cuda/sweep.h"

using namespace fastcl;
using namespace fastcl::cuda;

namespace {

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      std::exit(1);                                               \
    }                                                             \
  } while (0)

const Pool kSerial{[](int64_t count, int64_t, Pool::Body body, void* context) {
  if (count > 0) body(0, count, context);
}};

struct Tensor {
  std::vector<int64_t> shape, strides;
  DType dtype;
  int64_t offset;                // of the first element, in elements
  std::vector<uint64_t> memory;  // aligned to 16 bytes by malloc
  View view(std::vector<uint64_t>& buffer) const {
    return {reinterpret_cast<char*>(buffer.data()) + offset * size_of(dtype),
            shape.data(),
            strides.data(),
            int32_t(shape.size()),
            dtype,
            Device::cuda,
            0};
  }
};

std::mt19937_64 random_bits(7);

// Random importance-like or gradient-like values in the memory's every element, with NaN, infinities, zeros and ones among them.
Tensor make(DType dtype, std::vector<int64_t> shape, std::vector<int64_t> strides, int64_t offset, bool special) {
  int64_t last = offset;
  for (size_t d = 0; d < shape.size(); ++d) last += (std::max<int64_t>(shape[d], 1) - 1) * strides[d];
  Tensor t{std::move(shape), std::move(strides), dtype, offset, std::vector<uint64_t>(size_t((last + 1) * size_of(dtype) + 7) / 8 + 1)};
  std::normal_distribution<double> normal;
  const double specials[] = {NAN, INFINITY, -INFINITY, 0, -0.0, 1, 1e-40, 65504};
  with_stored(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* x = reinterpret_cast<T*>(t.memory.data());
    for (int64_t e = 0; e <= last; ++e) {
      const double value = special && random_bits() % 50 == 0 ? specials[random_bits() % 8] : normal(random_bits);
      if constexpr (std::is_same_v<T, uint8_t>)
        x[e] = uint8_t(random_bits());
      else
        x[e] = store<T>(value);
    }
  });
  return t;
}

std::vector<int64_t> default_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t next = 1;
  for (int d = int(shape.size()) - 1; d >= 0; --d) {
    strides[size_t(d)] = next;
    next *= shape[size_t(d)];
  }
  return strides;
}

struct LayoutCase {
  const char* name;
  std::vector<int64_t> shape, strides, read_shape, read_strides;
  int64_t offset, read_offset;
};

std::vector<LayoutCase> layouts(bool broadcasting) {
  std::vector<LayoutCase> out;
  const auto plain = [&](const char* name, std::vector<int64_t> shape, int64_t offset, int64_t read_offset) {
    out.push_back({name, shape, default_strides(shape), shape, default_strides(shape), offset, read_offset});
  };
  plain("0-d", {}, 0, 0);
  for (int64_t n : {1, 63, 65, 8191, 8192, 8193, 40001}) plain("contiguous", {n}, 0, 0);
  plain("empty", {0, 3}, 0, 0);
  plain("misaligned written", {9001}, 1, 0);
  plain("misaligned read", {9001}, 0, 3);
  plain("misaligned both", {9001}, 1, 1);
  plain("4-d", {5, 3, 32, 33}, 0, 0);
  out.push_back({"both transposed", {70, 130}, {1, 70}, {70, 130}, {1, 70}, 0, 0});
  out.push_back({"read transposed", {70, 130}, {130, 1}, {70, 130}, {1, 70}, 0, 0});
  out.push_back({"written transposed", {96, 160}, {1, 96}, {96, 160}, {160, 1}, 0, 0});
  out.push_back({"channels last", {2, 16, 9, 20}, {2880, 1, 320, 16}, {2, 16, 9, 20}, {2880, 180, 20, 1}, 0, 0});
  out.push_back({"rows of a wider matrix", {120, 64}, {96, 1}, {120, 64}, {64, 1}, 0, 0});
  out.push_back({"odd rows of a wider matrix", {120, 65}, {97, 1}, {120, 65}, {65, 1}, 1, 0});
  out.push_back({"rows at odd distances", {120, 64}, {97, 1}, {120, 64}, {64, 1}, 0, 0});
  out.push_back({"every third", {5000}, {3}, {5000}, {1}, 0, 0});
  if (!broadcasting) return out;
  out.push_back({"one value", {9000}, {1}, {}, {}, 0, 0});
  out.push_back({"one value, misaligned", {9000}, {1}, {1}, {1}, 1, 1});
  out.push_back({"per row", {150, 128}, {128, 1}, {150, 1}, {1, 1}, 0, 1});
  out.push_back({"per odd row", {150, 129}, {129, 1}, {150, 1}, {1, 1}, 0, 0});
  out.push_back({"per column", {150, 128}, {128, 1}, {1, 128}, {128, 1}, 0, 0});
  out.push_back({"per column, fewer dimensions", {150, 128}, {128, 1}, {128}, {1}, 0, 0});
  out.push_back({"per column, misaligned", {150, 128}, {128, 1}, {128}, {1}, 0, 1});
  out.push_back({"expanded", {40, 30, 20}, {600, 20, 1}, {40, 30, 20}, {20, 0, 1}, 0, 0});
  out.push_back({"per middle", {40, 30, 20}, {600, 20, 1}, {30, 1}, {1, 1}, 0, 0});
  return out;
}

template <class P, class Visit>
void blocks(const List& list, Visit&& visit) {
  auto packet = std::make_unique<P>();
  for (const List::Launch& part : list.launches(P::max_tensors, P::max_words)) {
    std::memset(static_cast<void*>(packet.get()), 0xa5, sizeof(P));
    list.fill(part, *packet);
    for (int64_t b = 0; b < part.chunks; ++b) visit(*packet, uint32_t(b));
  }
}

bool same_values(const std::vector<uint64_t>& a, const std::vector<uint64_t>& b, DType dtype) {
  return with_stored(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T *x = reinterpret_cast<const T*>(a.data()), *y = reinterpret_cast<const T*>(b.data());
    for (size_t e = 0; e < a.size() * 8 / sizeof(T); ++e)
      if (std::memcmp(x + e, y + e, sizeof(T)) != 0 &&
          (load<double>(x[e]) == load<double>(x[e]) || load<double>(y[e]) == load<double>(y[e])))
        return false;
    return true;
  });
}

template <class P, class W, class R, class Op, class OnCpu>
void compare_pairs(DType written, DType read, const Op& op, const OnCpu& on_cpu) {
  std::deque<Tensor> ws, rs;
  Views on_gpu, expected, reads;
  std::deque<std::vector<uint64_t>> copies;
  List list(2, pair_chunk<W, R>, true, false);
  for (const LayoutCase& c : layouts(true)) {
    ws.push_back(make(written, c.shape, c.strides, c.offset, true));
    rs.push_back(make(read, c.read_shape, c.read_strides, c.read_offset, true));
    copies.push_back(ws.back().memory);
    on_gpu.push_back(ws.back().view(ws.back().memory));
    expected.push_back(ws.back().view(copies.back()));
    reads.push_back(rs.back().view(rs.back().memory));
    const View* both[] = {&on_gpu.back(), &reads.back()};
    if (on_gpu.back().numel() > 0) CHECK(list.add(both, pair_run<W, R>) == nullptr, "%s", c.name);
  }
  on_cpu(expected, reads);
  blocks<P>(list, [&](const P& packet, uint32_t block) {
    for (int thread = 0; thread < kThreads; ++thread) pair_thread<W, R>(packet, block, thread, op);
  });
  for (size_t i = 0; i < ws.size(); ++i)
    CHECK(same_values(ws[i].memory, copies[i], written), "dtypes %d %d, layout %s", int(written), int(read), layouts(true)[i].name);
}

constexpr DType kStored[] = {DType::f64, DType::f32, DType::bf16, DType::f16, DType::u8};
// So small that every list needs several launches.
using TinyPacket = Packet<2, 416>;

void pairs() {
  for (DType w : kStored)
    for (DType r : kStored)
      with_stored(w, [&](auto wt) {
        with_stored(r, [&](auto rt) {
          using W = typename decltype(wt)::type;
          using R = typename decltype(rt)::type;
          compare_pairs<LargePacket, W, R>(w, r, EMax<W, R>{}, [](const Views& a, const Views& b) { cpu::emax_(a, b, kSerial); });
          if constexpr (!std::is_same_v<W, uint8_t>)
            compare_pairs<TinyPacket, W, R>(w, r, SoftMask<W, R>{0.75},
                                            [](const Views& a, const Views& b) { cpu::soft_mask_(a, b, 0.75, kSerial); });
        });
      });
}

// The first sweep's moments of every layout, and the second sweep with the statistics that the first would have left.
void spg() {
  for (DType stored : kStored)
    for (DType grad : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
      const bool in_double = stored == DType::f64 || grad == DType::f64;
      for (const LayoutCase& c : layouts(false)) {
        constexpr int heads = 3;
        Tensor a = make(stored, c.shape, c.strides, c.offset, false);
        std::vector<uint64_t> copy = a.memory;
        const View written = a.view(a.memory);
        if (written.numel() == 0) continue;
        std::vector<Tensor> grads;
        for (int h = 0; h < heads; ++h) grads.push_back(make(grad, c.read_shape, c.read_strides, c.read_offset, false));
        std::vector<Views> by_head;
        std::vector<const View*> views{&written};
        std::vector<int64_t> notes{0};
        std::vector<Statistics> statistics;
        for (Tensor& g : grads) by_head.push_back({g.view(g.memory)});
        for (int h = 0; h < heads; ++h) {
          List list(1, kSpgChunk, false, true);
          const View* alone[] = {&by_head[h][0]};
          const int64_t item = h;
          CHECK(list.add(alone, 16 / int(size_of(grad)), &item) == nullptr, "%s", c.name);
          Statistics s{0, {0, 0, 0}};
          with_floating(grad, [&](auto gt) {
            using G = typename decltype(gt)::type;
            blocks<SmallPacket>(list, [&](const SmallPacket& p, uint32_t block) {
              const Chunk chunk = Chunk::find(p, block, kSpgChunk);
              CHECK(p.note(chunk.entry, 0) == item, "note");
              s.shift = load<double>(*p.address<const G>(chunk.entry, 0));
              for (int t = 0; t < kThreads; ++t) s.moments = combine(s.moments, moments_thread<G>(p, chunk, t, s.shift));
            });
          });
          CHECK(s.moments.count == double(written.numel()), "%s: %g", c.name, s.moments.count);
          statistics.push_back(s);
          views.push_back(&by_head[h][0]);
          notes.push_back(update_note(item, grad));
        }
        const double mean = cpu::spg_importance_({a.view(copy)}, by_head, kSerial) * double(written.numel());
        List list(1 + heads, kSpgChunk, false, true);
        CHECK(list.add(views.data(), kUpdateRun, notes.data()) == nullptr, "%s", c.name);
        double sum = 0;
        with_stored(stored, [&](auto st) {
          using S = typename decltype(st)::type;
          const auto update = [&](auto compute) {
            using C = decltype(compute);
            std::vector<Normaliser<C>> normalisers;
            for (const Statistics& s : statistics) normalisers.push_back(Normaliser<C>::make(s.shift, s.moments));
            blocks<SmallPacket>(list, [&](const SmallPacket& p, uint32_t block) {
              const Chunk chunk = Chunk::find(p, block, kSpgChunk);
              for (int t = 0; t < kThreads; ++t) sum += update_thread<S, C>(p, chunk, t, normalisers.data()) / sum_unit<S>;
            });
          };
          if (std::is_same_v<S, double> || in_double)
            update(double{});
          else if constexpr (!std::is_same_v<S, double>)
            update(float{});
          // Not bitwise: the moments are combined in another order.
          const S *x = reinterpret_cast<const S*>(a.memory.data()), *y = reinterpret_cast<const S*>(copy.data());
          const double unit = in_double && stored == DType::f64 ? 1e-14
                              : stored == DType::u8             ? 1.01 / 255
                              : stored == DType::bf16           ? 1e-2
                              : stored == DType::f16            ? 1e-3
                                                                : 1e-6;
          for (size_t e = 0; e < copy.size() * 8 / sizeof(S); ++e) {
            const double u = load<double>(x[e]), v = load<double>(y[e]);
            CHECK(std::memcmp(x + e, y + e, sizeof(S)) == 0 || std::fabs(u - v) <= unit * std::max(1.0, std::fabs(v)),
                  "%d %d %s at %zu: %.17g %.17g", int(stored), int(grad), c.name, e, u, v);
          }
          CHECK(std::fabs(sum - mean) <= unit * double(written.numel()) + 1e-9, "%s: sums %.17g %.17g", c.name, sum, mean);
        });
      }
    }
}

// A view without memory behind it.
struct Fake {
  std::vector<int64_t> shape, strides;
  View view(DType t = DType::f32) const {
    return {reinterpret_cast<char*>(uintptr_t(4096)), shape.data(), strides.data(), int32_t(shape.size()), t, Device::cuda, 0};
  }
};

template <class P>
void check_plan(const List& list, int64_t chunk, int64_t max_chunks = kMaxBlocks) {
  auto packet = std::make_unique<P>();
  size_t next = 0;
  int64_t base = 0;
  for (const List::Launch& part : list.launches(P::max_tensors, P::max_words, max_chunks)) {
    CHECK(part.first == next && part.last > part.first && part.last - part.first <= size_t(P::max_tensors), "launch at %zu", part.first);
    CHECK(part.base == base && part.words <= size_t(P::max_words) && part.chunks <= max_chunks, "launch at %zu", part.first);
    list.fill(part, *packet);
    CHECK(packet->base == base && packet->tensors == int(part.last - part.first), "packet");
    int64_t chunks = 0;
    for (size_t i = part.first; i < part.last; ++i) {
      const int64_t numel = list.entries()[i].numel, own = (numel + chunk - 1) / chunk;
      for (int64_t c : {int64_t(0), own / 2, own - 1}) {
        const Chunk found = Chunk::find(*packet, uint32_t(chunks + c), chunk);
        CHECK(found.tensor == int(i - part.first) && found.begin == c * chunk, "tensor %zu chunk %lld", i, (long long)c);
        CHECK(found.n == std::min(chunk, numel - c * chunk), "tensor %zu chunk %lld has %d", i, (long long)c, found.n);
      }
      chunks += own;
    }
    CHECK(chunks == part.chunks && packet->first_chunk[packet->tensors] == uint32_t(chunks), "chunks %lld", (long long)chunks);
    base += chunks;
    next = part.last;
  }
  CHECK(next == list.entries().size(), "%zu entries are in no launch", list.entries().size() - next);
}

List planned(const std::vector<int64_t>& sizes, int64_t chunk) {
  List list(2, chunk, true, false);
  for (int64_t n : sizes) {
    const Fake fake{{n}, {1}};
    const View v = fake.view();
    const View* both[] = {&v, &v};
    CHECK(list.add(both, 4) == nullptr, "%lld elements", (long long)n);
  }
  return list;
}

void plan() {
  constexpr int64_t chunk = pair_chunk<float, float>;
  const int64_t two31 = int64_t(1) << 31, two32 = int64_t(1) << 32;
  check_plan<LargePacket>(planned({1}, chunk), chunk);
  check_plan<SmallPacket>(planned({}, chunk), chunk);
  check_plan<LargePacket>(planned({two31 - 1, two31, two31 + 1, 5, two32 - 1, two32, two32 + 1, 3 * two32 + 17, 1}, chunk), chunk);
  check_plan<LargePacket>(planned(std::vector<int64_t>(10000, 64), chunk), chunk);
  check_plan<SmallPacket>(planned(std::vector<int64_t>(10000, 64), chunk), chunk);
  CHECK(planned(std::vector<int64_t>(10000, 64), chunk).launches(LargePacket::max_tensors, LargePacket::max_words).size() == 12,
        "launches");
  // More chunks than one launch may have: 2^31 - 1 blocks, and a limit so low that it acts.
  check_plan<LargePacket>(planned(std::vector<int64_t>(100, two31 * 1000), chunk), chunk);
  check_plan<LargePacket>(planned(std::vector<int64_t>(50, 10 * chunk), chunk), chunk, 25);
  const Fake huge{{chunk * (kMaxBlocks + 1)}, {1}};
  const View v = huge.view();
  const View* both[] = {&v, &v};
  CHECK(List(2, chunk, true, false).add(both, 4) != nullptr, "a tensor with 2^31 chunks is refused");
  // Offsets beyond 2^32 elements in a walked tensor.
  const Fake wide{{3, two31, 2}, {2 * two31 + 2, 2, 1}}, column{{3, two31, 2}, {0, 1, 0}};
  const View w = wide.view(), r = column.view();
  const View* walked[] = {&w, &r};
  List list(2, chunk, true, false);
  CHECK(list.add(walked, 4) == nullptr, "walked");
  auto packet = std::make_unique<SmallPacket>();
  const auto parts = list.launches(SmallPacket::max_tensors, SmallPacket::max_words);
  list.fill(parts[0], *packet);
  for (int64_t e : {int64_t(0), int64_t(5), 2 * two31 - 1, 2 * two31, 6 * two31 - 1}) {
    int64_t at[2];
    packet->offsets(packet->at[0], e, 0, at);
    const int64_t i = e / (2 * two31), j = e / 2 % two31, k = e % 2;
    CHECK(at[0] == i * (2 * two31 + 2) + j * 2 + k && at[1] == j, "element %lld is at %lld %lld", (long long)e, (long long)at[0],
          (long long)at[1]);
  }
}

void dimensions() {
  for (int n : {kMaxDims, kMaxDims + 1}) {
    Fake fake;  // no two dimensions merge
    for (int d = 0; d < n; ++d) {
      fake.shape.push_back(2);
      fake.strides.push_back(int64_t(1) << (2 * (n - 1 - d)));
    }
    const View v = fake.view();
    const View* both[] = {&v, &v};
    CHECK((List(2, 1024, true, false).add(both, 4) == nullptr) == (n <= kMaxDims), "%d dimensions", n);
  }
}

void quotients() {
  for (int u = 0; u < 256; ++u) {
    CHECK(over_255(float(u)) == float(u) / 255.0f, "float %d", u);
    CHECK(over_255(double(u)) == double(u) / 255.0, "double %d", u);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  if (name == "plan")
    plan();
  else if (name == "dimensions")
    dimensions();
  else if (name == "quotients")
    quotients();
  else if (name == "pairs")
    pairs();
  else if (name == "spg")
    spg();
  else {
    std::printf("unknown case %s\n", name.c_str());
    return 2;
  }
  std::printf("%s: ok\n", name.c_str());
  return 0;
}
