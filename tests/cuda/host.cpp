// Runs the CUDA code's host part and, thread by thread, what its kernels do to elements, on the CPU: the planner with sizes that no GPU
// holds, and every dtype and layout against the CPU ops. Usage: host <case>; exits with 1 and a line about the first difference.
#include "host.h"

#include <deque>
#include <map>

#include "core/soft_mask.h"
#include "cpu/ops.h"
#include "cuda/projection.h"

using namespace host;

namespace {

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
      std::vector<LayoutCase> cases = layouts(false);
      cases.push_back({"expanded gradient", {9000}, {1}, {9000}, {0}, 0, 0});
      for (size_t which = 0; which < 2 * cases.size(); ++which) {
        const LayoutCase& c = cases[which / 2];
        const int heads = which % 2 == 0 ? 1 : 3;
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

// ---- the projection family

bool same_kind(double a, long double b) { return std::isnan(a) == std::isnan(double(b)) && std::isinf(a) == std::isinf(double(b)); }

template <class P, class A, class B>
void compare_dots(DType a, DType b) {
  for (const bool special : {false, true})
    for (const bool squares : {false, true})
      for (const LayoutCase& c : equal_shapes()) {
        if (P::max_tensors < 10 && c.shape.size() != 2) continue;
        const bool odd = special && random_bits() % 2 != 0;  // also sums without a NaN
        Tensor x = make(a, c.shape, c.strides, c.offset, odd), y = make(b, c.read_shape, c.read_strides, c.read_offset, special && !odd);
        const View v = x.view(x.memory), w = y.view(y.memory);
        if (v.numel() == 0) continue;
        Exact dot, square;
        elements({&v, &w}, [&](const std::vector<double>& e) {
          dot.sum += (long double)(e[0]) * e[1];
          dot.magnitude += std::fabs((long double)(e[0]) * e[1]);
          square.sum += (long double)(e[1]) * e[1];
        });
        List list(2, pair_chunk<A, B>, true, false);
        const View* both[] = {&v, &w};
        CHECK(list.add(both, pair_run<A, B>) == nullptr, "%s", c.name);
        std::vector<Products> parts;
        blocks<P>(list, [&](const P& packet, uint32_t block) {
          for (int thread = 0; thread < kThreads; ++thread) parts.push_back(dot_thread<A, B>(packet, block, thread, squares));
        });
        const Products sum = add_as_tree(parts);
        CHECK(squares || sum.square == 0, "%s: an unwanted square", c.name);
        if (special) {
          CHECK(same_kind(sum.dot, dot.sum), "%d %d %s: %g %Lg", int(a), int(b), c.name, sum.dot, dot.sum);
          if (squares) CHECK(same_kind(sum.square, square.sum), "%d %d %s: %g %Lg", int(a), int(b), c.name, sum.square, square.sum);
        } else {
          CHECK(std::fabs(sum.dot - dot.sum) <= 4 * kRound * dot.magnitude, "%d %d %s: %.17g %.17Lg", int(a), int(b), c.name, sum.dot,
                dot.sum);
          if (squares)
            CHECK(std::fabs(sum.square - square.sum) <= 4 * kRound * square.sum, "%d %d %s: %.17g %.17Lg", int(a), int(b), c.name,
                  sum.square, square.sum);
        }
      }
}

void dots() {
  for (DType a : kFloating)
    for (DType b : kFloating)
      with_floating(a, [&](auto at) {
        with_floating(b, [&](auto bt) {
          using A = typename decltype(at)::type;
          using B = typename decltype(bt)::type;
          compare_dots<LargePacket, A, B>(a, b);
          compare_dots<TinyPacket, A, B>(a, b);
        });
      });
}

// Both sides are compiled without fused multiply-adds here, so that the bits can be compared.
void project() {
  const double coefficient = 0.37;
  for (DType g : kFloating)
    for (DType r : kFloating)
      with_floating(g, [&](auto gt) {
        with_floating(r, [&](auto rt) {
          using G = typename decltype(gt)::type;
          using R = typename decltype(rt)::type;
          for (const LayoutCase& c : equal_shapes()) {
            Tensor w = make(g, c.shape, c.strides, c.offset, true), m = make(r, c.read_shape, c.read_strides, c.read_offset, true);
            std::vector<uint64_t> copy = w.memory;
            const View written = w.view(w.memory), memory = m.view(m.memory);
            if (written.numel() == 0) continue;
            cpu::combine_({w.view(copy)}, {{memory}}, &coefficient, kSerial);
            List list(2, pair_chunk<G, R>, true, false);
            const View* both[] = {&written, &memory};
            CHECK(list.add(both, pair_run<G, R>) == nullptr, "%s", c.name);
            blocks<SmallPacket>(list, [&](const SmallPacket& packet, uint32_t block) {
              for (int thread = 0; thread < kThreads; ++thread) pair_thread<G, R>(packet, block, thread, AddScaled<G, R>{coefficient});
            });
            CHECK(same_values(w.memory, copy, g), "dtypes %d %d, layout %s", int(g), int(r), c.name);
          }
        });
      });
}

// Lists of tensors whose dtypes and layouts differ from list to list and from tensor to tensor.
struct JointCase {
  std::deque<Tensor> tensors;
  std::vector<Views> lists;
  std::vector<std::string> names;

  JointCase(int count, const std::vector<LayoutCase>& cases, bool special) : lists(size_t(count)) {
    for (size_t i = 0; i < cases.size(); ++i) {
      const LayoutCase& c = cases[i];
      names.push_back(c.name);
      for (int l = 0; l < count; ++l) {
        const DType dtype = i % 3 == 0 ? DType::f32 : kFloating[(i + size_t(l)) % 4];
        const bool first = l % 2 == 0;
        tensors.push_back(make(dtype, c.shape, first ? c.strides : c.read_strides, first ? c.offset : c.read_offset, special));
        lists[size_t(l)].push_back(tensors.back().view(tensors.back().memory));
      }
    }
  }

  List list() const {
    List joint(int(lists.size()), kJointChunk, false, true);
    for (size_t i = 0; i < names.size(); ++i) {
      if (lists[0][i].numel() == 0) continue;
      std::vector<const View*> views;
      std::vector<int64_t> notes;
      for (const Views& l : lists) {
        views.push_back(&l[i]);
        notes.push_back(int64_t(l[i].dtype));
      }
      CHECK(joint.add(views.data(), kJointRun, notes.data()) == nullptr, "%s", names[i].c_str());
    }
    return joint;
  }
};

void combine_many() {
  for (int k : {1, 2, 7, 64}) {
    std::vector<LayoutCase> cases = equal_shapes();
    if (k == 64) cases.resize(8);
    std::vector<double> coefficients;
    for (int m = 0; m < k; ++m) coefficients.push_back(m % 3 == 1 ? 0 : 0.5 - 0.3 * m);
    for (const bool nothing : {false, true}) {
      if (nothing) coefficients[size_t(k) - 1] = NAN;
      JointCase joint(1 + k, cases, true);
      Views expected;
      std::deque<std::vector<uint64_t>> copies;
      std::vector<Tensor*> written;
      for (size_t i = 0; i < cases.size(); ++i) {
        Tensor& t = joint.tensors[i * size_t(1 + k)];
        written.push_back(&t);
        copies.push_back(t.memory);
        expected.push_back(t.view(copies.back()));
      }
      cpu::combine_(expected, {joint.lists.begin() + 1, joint.lists.end()}, coefficients.data(), kSerial);
      const auto run = [&](const auto& packet, uint32_t block) {
        const Chunk c = Chunk::find(packet, block, kJointChunk);
        for (int thread = 0; thread < kThreads; ++thread) combine_thread(packet, c, thread, coefficients.data());
      };
      if (k == 2)
        blocks<TinyPacket>(joint.list(), run);
      else
        blocks<LargePacket>(joint.list(), run);
      for (size_t i = 0; i < cases.size(); ++i)
        CHECK(same_values(written[i]->memory, copies[i], written[i]->dtype), "%d memories, layout %s", k, cases[i].name);
    }
  }
}

// gram_kernel with its threads in turn. What it may not read is NaN.
template <class P>
void gram_block(const P& packet, uint32_t block, uint32_t count, double* part) {
  const GramShape g = GramShape::of(packet.operands);
  CHECK(g.lists * g.row <= kStageDoubles && g.lists * g.slots <= kStageSlots && g.groups >= 1 && g.slots >= 1, "%d lists", g.lists);
  std::vector<double> rows, kept(kKeptDoubles, 0.0);
  std::vector<GramFetch> fetched(kThreads);
  std::vector<GramTile> sums(kThreads, GramTile{});
  int chain = 0;
  auto stage = GramStage<P>::first(packet, block);
  const auto fetch = [&] {
    std::memset(static_cast<void*>(fetched.data()), 0xff, fetched.size() * sizeof(GramFetch));
    for (int t = 0; t < kThreads && stage.left(); ++t) gram_fetch(packet, g, stage, t, fetched[size_t(t)]);
  };
  fetch();
  while (stage.left()) {
    rows.assign(kStageDoubles, NAN);
    for (int t = 0; t < kThreads; ++t) gram_put(packet, g, stage, t, fetched[size_t(t)], rows.data());
    const int columns = stage.slots(g) * kJointRun;
    stage.advance(packet, g, count);
    fetch();
    chain += columns / g.groups + 1;
    const bool keep = chain >= kGramChain || !stage.left();
    if (keep) chain = 0;
    for (int t = 0; t < kThreads; ++t) {
      gram_multiply(g, columns, t, rows.data(), sums[size_t(t)]);
      if (keep) gram_keep(t, sums[size_t(t)], kept.data());
    }
  }
  for (int groups = g.groups; groups > 1; groups = (groups + 1) / 2)
    for (int t = 0; t < kThreads; ++t) gram_fold(g, groups, (groups + 1) / 2, t, kept.data());
  for (int t = 0; t < kThreads; ++t) gram_leave(g, t, kept.data(), packet.base > 0, part);
}

template <class P>
void compare_gram(int k, const std::vector<LayoutCase>& cases, int64_t most_blocks, bool special, double allowed = 4) {
  JointCase joint(k, cases, special);
  std::vector<Exact> exact(size_t(gram_entries(k)));
  for (size_t i = 0; i < cases.size(); ++i) {
    std::vector<const View*> views;
    for (const Views& l : joint.lists) views.push_back(&l[i]);
    elements(views, [&](const std::vector<double>& e) {
      for (int r = 0; r < k; ++r)
        for (int c = 0; c <= r; ++c) {
          Exact& own = exact[size_t(r * (r + 1) / 2 + c)];
          const long double product = (long double)(e[size_t(r)]) * e[size_t(c)];
          own.sum += product;
          own.magnitude += std::fabs(product);
        }
    });
  }
  const List list = joint.list();
  const int64_t entries = gram_entries(k);
  std::vector<double> parts(size_t(entries * most_blocks), NAN);
  auto packet = std::make_unique<P>();
  for (const List::Launch& part : list.launches(P::max_tensors, P::max_words)) {
    list.fill(part, *packet);
    const int64_t count = part.base == 0 ? most_blocks : std::min(most_blocks, part.chunks);
    for (int64_t b = 0; b < count; ++b) gram_block(*packet, uint32_t(b), uint32_t(count), parts.data() + b * entries);
  }
  for (int64_t e = 0; e < entries; ++e) {
    std::vector<double> column;
    for (int64_t b = 0; b < most_blocks; ++b) column.push_back(parts[size_t(b * entries + e)]);
    const double sum = add_as_tree(column);
    const Exact& own = exact[size_t(e)];
    if (special)
      CHECK(same_kind(sum, own.sum), "%d lists, entry %lld: %g %Lg", k, (long long)e, sum, own.sum);
    else
      CHECK(std::fabs(sum - own.sum) <= allowed * kRound * own.magnitude, "%d lists, entry %lld: %.17g %.17Lg", k, (long long)e, sum,
            own.sum);
  }
}

void gram() {
  std::vector<LayoutCase> cases = equal_shapes(), few(cases.begin(), cases.begin() + 5);
  few.push_back({"read transposed", {70, 130}, {130, 1}, {70, 130}, {1, 70}, 0, 0});
  for (int k : {1, 2, 3, 4, 5, 8, 11, 23}) compare_gram<LargePacket>(k, cases, 64, false);
  compare_gram<LargePacket>(65, few, 12, false);
  // So few that each takes many chunks, in more additions one after the other.
  compare_gram<LargePacket>(65, few, 1, false, 16);
  compare_gram<TinyPacket>(6, cases, 2, false, 16);
  // More blocks than there are chunks: they leave zeros. Where a sum is not a number does not depend on the order.
  compare_gram<LargePacket>(3, {few.begin(), few.begin() + 2}, 20, false);
  for (int k : {2, 11, 65}) compare_gram<LargePacket>(k, {few.begin(), few.begin() + 2}, 2, true);
  for (int k = 1; k <= kMostLists; ++k) {
    const GramShape g = GramShape::of(k);
    int tile = 0;
    for (int i = 0; i < g.tile_rows; ++i)
      for (int j = 0; j <= i; ++j, ++tile) CHECK(TilePlace::of(tile).row == i && TilePlace::of(tile).column == j, "tile %d", tile);
    CHECK(tile == g.tiles && g.tiles * g.groups <= kThreads, "%d lists", k);
    CHECK(gram_place(0, k, true) == k - 1 && gram_place(0, k, false) == 0 && (k == 1 || gram_place(k - 1, k, true) == k - 2), "%d", k);
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
  const std::map<std::string, void (*)()> cases{
      {"plan", plan},
      {"dimensions", dimensions},
      {"quotients", quotients},
      {"pairs", pairs},
      {"spg", spg},
      {"dots", dots},
      {"project", project},
      {"combine", combine_many},
      {"gram", gram},
      {"child_mask", child_mask},
      {"bit_mask", bit_mask},
      {"pull", pull},
      {"fisher", fisher},
      {"radix", radix},
      {"adamw", adamw},
      {"compact", compact},
      {"sgd", sgd},
      {"transformed_dot", transformed_dot},
      {"layers", ::layers},
      {"ncl_sweeps", ncl_sweeps},
      {"low_rank_sweeps", low_rank_sweeps},
      {"low_rank_append", low_rank_append},
  };
  const auto found = cases.find(argc > 1 ? argv[1] : "");
  if (found == cases.end()) {
    std::printf("unknown case\n");
    return 2;
  }
  found->second();
  std::printf("%s: ok\n", argv[1]);
  return 0;
}
