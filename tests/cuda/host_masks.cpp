// The masks, the pull, Fisher and the radix counts: what their kernels do to elements, against the CPU ops.
#include <deque>

#include "core/quantile.h"
#include "cpu/ops.h"
#include "cuda/lists.h"
#include "cuda/quantile.h"
#include "host.h"

using namespace host;

namespace {

// Tensors of one dtype in every layout, twice: for the kernel's threads and for the CPU.
struct Written {
  std::deque<Tensor> tensors;
  std::deque<std::vector<uint64_t>> copies;
  Views ours, theirs;

  void add(Tensor tensor) {
    tensors.push_back(std::move(tensor));
    copies.push_back(tensors.back().memory);
    ours.push_back(tensors.back().view(tensors.back().memory));
    theirs.push_back(tensors.back().view(copies.back()));
  }
  void compare(const std::vector<LayoutCase>& cases) {
    for (size_t i = 0; i < tensors.size(); ++i)
      CHECK(same_values(tensors[i].memory, copies[i], tensors[i].dtype), "dtype %d, layout %s", int(tensors[i].dtype),
            cases[i % cases.size()].name);
  }
};

struct Read {
  std::deque<Tensor> tensors;
  Views views;
  void add(Tensor tensor) {
    tensors.push_back(std::move(tensor));
    views.push_back(tensors.back().view(tensors.back().memory));
  }
};

// Where the tensors lie in larger ones, rows and all.
std::vector<Place> places_of(const Views& views, bool whole, std::deque<std::vector<int64_t>>& strides) {
  std::vector<Place> out;
  for (size_t i = 0; i < views.size(); ++i) {
    const int64_t tensor = int64_t(random_bits() >> 32);
    if (whole || i % 3 == 0) {
      out.push_back({tensor, whole ? 0 : int64_t(i) * 1001, nullptr});
      continue;
    }
    strides.push_back(contiguous_strides(views[i]));
    for (size_t d = 0; d + 1 < strides.back().size(); ++d) strides.back()[d] = strides.back()[d] * 3 + int64_t(i % 2);
    if (i % 5 == 4)
      for (int64_t& stride : strides.back()) stride *= 2;
    out.push_back({tensor, (int64_t(1) << 33) + int64_t(i) * 7, strides.back().data()});
  }
  return out;
}

template <class P>
void compare_child_mask(DType dtype, double keep, bool whole) {
  const std::vector<LayoutCase> cases = layouts(false);
  Written grads;
  for (const LayoutCase& c : cases) grads.add(make(dtype, c.shape, c.strides, c.offset, true));
  std::deque<std::vector<int64_t>> strides;
  const std::vector<Place> places = places_of(grads.ours, whole, strides);
  const uint64_t seed = random_bits();
  const auto step = uint32_t(random_bits());
  cpu::child_mask_at_(grads.theirs, keep, seed, step, places, kSerial);
  const ByCompute lists = child_mask_lists(grads.ours, places);
  const auto draw = ChildDraw::make(keep, seed);
  run_threads<P>(lists.single, kRunChunk, [&](const P& p, const Chunk& c, int t) { child_mask_thread<float>(p, c, t, draw, step); });
  run_threads<P>(lists.twice, kRunChunk, [&](const P& p, const Chunk& c, int t) { child_mask_thread<double>(p, c, t, draw, step); });
  grads.compare(cases);
}

template <int V>
void compare_draws() {
  for (int n = 0; n < 2000; ++n) {
    const uint64_t element = n < 1000 ? uint64_t(n) : random_bits() >> 1;
    const auto tensor = uint32_t(random_bits()), step = uint32_t(random_bits());
    auto draw = ChildDraw::make(0.37, random_bits());
    // The limit of one of the elements, so that its second draw decides.
    const uint64_t chosen = element + random_bits() % V;
    if (n % 2 == 0) draw.limit = ChildDraw::bits(draw.draw8(chosen >> 3, tensor, step), int(chosen & 7));
    const uint32_t kept = kept_bits<V>(draw, element, tensor, step);
    for (int k = 0; k < V; ++k)
      CHECK((kept >> k & 1) == uint32_t(draw.kept(element + uint64_t(k), tensor, step)), "element %llu + %d", (unsigned long long)element,
            k);
    CHECK(kept >> V == 0, "more bits than elements");
  }
}

template <class W, class P>
void run_bit_mask(const List& list) {
  run_threads<P>(list, kRunChunk, [](const P& p, const Chunk& c, int t) { bit_mask_thread<W>(p, c, t); });
}

template <class P>
void compare_bit_mask(DType dtype) {
  const std::vector<LayoutCase> cases = layouts(false);
  Written grads;
  std::deque<std::vector<uint64_t>> masks;
  Views bits;
  std::deque<int64_t> sizes;
  const int64_t one = 1;
  for (size_t i = 0; i < cases.size(); ++i) {
    const LayoutCase& c = cases[i];
    grads.add(make(dtype, c.shape, c.strides, c.offset, true));
    const int64_t n = grads.ours.back().numel();
    masks.push_back(random_mask(n));
    if (i % 4 == 3) std::fill_n(reinterpret_cast<uint8_t*>(masks.back().data()), n / 8, uint8_t(255));
    sizes.push_back(bit_bytes(n));
    bits.push_back({reinterpret_cast<char*>(masks.back().data()), &sizes.back(), &one, 1, DType::u8, Device::cuda, 0});
  }
  cpu::bit_mask_(grads.theirs, bits, kSerial);
  for (const auto& [size, list] : bit_mask_lists(grads.ours, bits))
    (size == 8 ? run_bit_mask<uint64_t, P> : size == 4 ? run_bit_mask<uint32_t, P> : run_bit_mask<uint16_t, P>)(list);
  grads.compare(cases);
}

template <class P>
void compare_thresholds(DType dtype, double threshold) {
  const std::vector<LayoutCase> cases = equal_shapes();
  Read tensors;
  std::deque<std::vector<uint8_t>> ours, theirs;
  std::deque<int64_t> sizes;
  const int64_t one = 1;
  Views our_bits, their_bits;
  for (const LayoutCase& c : cases) {
    tensors.add(make(dtype, c.read_shape, c.read_strides, c.read_offset, true));
    sizes.push_back(bit_bytes(tensors.views.back().numel()));
    for (auto* all : {&ours, &theirs}) {
      all->emplace_back(size_t(sizes.back()) + 2, uint8_t(0xa5));
      (all == &ours ? our_bits : their_bits)
          .push_back({reinterpret_cast<char*>(all->back().data()) + 1, &sizes.back(), &one, 1, DType::u8, Device::cuda, 0});
    }
  }
  cpu::threshold_bits_(their_bits, tensors.views, threshold, kSerial);
  run_threads<P>(threshold_list(our_bits, tensors.views), kRunChunk,
                 [&](const P& p, const Chunk& c, int t) { threshold_thread(p, c, t, threshold); });
  for (size_t i = 0; i < cases.size(); ++i) CHECK(ours[i] == theirs[i], "dtype %d, layout %s", int(dtype), cases[i].name);
}

}  // namespace

void child_mask() {
  compare_draws<1>();
  compare_draws<2>();
  compare_draws<4>();
  compare_draws<8>();
  for (DType dtype : kFloating)
    for (const double keep : {0.3, 1.0, 0.7 + 1e-12, 0x1p-40}) {
      compare_child_mask<LargePacket>(dtype, keep, true);
      compare_child_mask<TinyPacket>(dtype, keep, false);
    }
}

void bit_mask() {
  for (DType dtype : kFloating) {
    compare_bit_mask<LargePacket>(dtype);
    compare_bit_mask<TinyPacket>(dtype);
  }
  for (DType dtype : kFloating)
    for (const double threshold : {0.0, 0.5, 0.1, double(NAN), -double(INFINITY)}) {
      compare_thresholds<LargePacket>(dtype, threshold);
      compare_thresholds<TinyPacket>(dtype, threshold);
    }
}

void pull() {
  const std::vector<LayoutCase> cases = equal_shapes();
  for (const bool mixed : {false, true})
    for (DType dtype : kFloating) {
      Written grads;
      Read operands[3];
      for (size_t i = 0; i < cases.size(); ++i) {
        const LayoutCase& c = cases[i];
        grads.add(make(dtype, c.shape, c.strides, c.offset, true));
        for (size_t o = 0; o < 3; ++o) {
          const DType own = mixed ? kFloating[random_bits() % 4] : dtype;
          const bool first = (i + o) % 3 == 0;
          operands[o].add(make(own, c.shape, first ? c.strides : c.read_strides, first ? c.offset : c.read_offset, true));
        }
      }
      cpu::ewc_pull_(grads.theirs, operands[0].views, operands[1].views, operands[2].views, 0.15, kSerial);
      const ByCompute lists = joint_lists("grads", {&grads.ours, &operands[0].views, &operands[1].views, &operands[2].views});
      const auto run = [&](auto packet) {
        using P = decltype(packet);
        run_threads<P>(lists.single, kRunChunk, [&](const P& p, const Chunk& c, int t) { pull_thread(p, c, t, Pull<float>::make(0.15)); });
        run_threads<P>(lists.twice, kRunChunk, [&](const P& p, const Chunk& c, int t) { pull_thread(p, c, t, Pull<double>::make(0.15)); });
      };
      if (mixed)
        run(TinyPacket{});
      else
        run(SmallPacket{});
      grads.compare(cases);
    }
}

void fisher() {
  const std::vector<LayoutCase> cases = equal_shapes();
  for (DType f : kFloating)
    for (DType g : kFloating) {
      Written fishers;
      Read grads;
      std::vector<double> coefficients;
      for (const LayoutCase& c : cases) {
        fishers.add(make(f, c.shape, c.strides, c.offset, true));
        grads.add(make(g, c.read_shape, c.read_strides, c.read_offset, true));
        coefficients.push_back(1.0 / double(1 + random_bits() % 7));
      }
      cpu::fisher_update_(fishers.theirs, grads.views, 0.3, coefficients.data(), kSerial);
      const ByCompute lists = joint_lists("fisher", {&fishers.ours, &grads.views});
      const auto run = [&](const List& list, auto compute) {
        run_threads<SmallPacket>(list, kRunChunk, [&](const SmallPacket& p, const Chunk& c, int t) {
          fisher_thread<decltype(compute)>(p, c, t, 0.3, coefficients[size_t(operand_item(p.note(c.entry, 0)))]);
        });
      };
      run(lists.single, float{});
      run(lists.twice, double{});
      fishers.compare(cases);
    }
  for (DType g : kFloating)
    for (const LayoutCase& c : cases) {
      Read grads;
      grads.add(make(g, c.read_shape, c.read_strides, c.read_offset, false));
      if (grads.views[0].numel() == 0) continue;
      long double exact = 0;
      elements({&grads.views[0]}, [&](const std::vector<double>& e) { exact += (long double)(e[0]) * e[0]; });
      std::vector<double> parts;
      run_threads<SmallPacket>(single_list("grads", grads.views, kRunChunk, kRun<float>), kRunChunk,
                               [&](const SmallPacket& p, const Chunk& chunk, int t) { parts.push_back(squares_thread(p, chunk, t)); });
      const double sum = add_as_tree(parts);
      CHECK(std::fabs(sum - exact) <= 8 * kRound * exact, "dtype %d, layout %s: %.17g %.17Lg", int(g), c.name, sum, exact);
    }
}

namespace {

template <class Key, class P>
void compare_counts(const Views& tensors, const int64_t* prefixes, int level) {
  constexpr bool wide = sizeof(Key) == 8;
  std::vector<int64_t> expected(2 * kRadixColumns, -1), counts(2 * kRadixColumns, 0);
  cpu::radix_counts(tensors, prefixes, level, wide, expected.data(), kSerial);
  const auto query = RadixQuery::make(prefixes, level);
  run_threads<P>(single_list("tensors", tensors, kRadixChunk, kRun<key_float_t<Key>>), kRadixChunk,
                 [&](const P& p, const Chunk& c, int t) { radix_thread<Key>(p, c, t, query, [&](int slot) { ++counts[size_t(slot)]; }); });
  if (query.one) std::copy_n(counts.begin(), kRadixColumns, counts.begin() + kRadixColumns);
  CHECK(counts == expected, "level %d of keys of %zu bytes", level, sizeof(Key));
}

template <class Key, class P>
void compare_levels(const std::vector<DType>& dtypes) {
  Read tensors;
  size_t i = 0;
  for (const LayoutCase& c : equal_shapes())
    tensors.add(make(dtypes[i++ % dtypes.size()], c.read_shape, c.read_strides, c.read_offset, true));
  const std::vector<double> targets{0.0, 0.25, -1.5, 0.4375, INFINITY};
  for (size_t a = 0; a < targets.size(); ++a)
    for (size_t b : {a, (a + 1) % targets.size()})
      for (int level = 0; level < Radix<Key>::kLevels; ++level) {
        int64_t prefixes[2] = {-1, -7};
        if (level > 0)
          for (int k = 0; k < 2; ++k)
            prefixes[k] = int64_t(Radix<Key>::prefix(radix_key<Key>(key_float_t<Key>(targets[k == 0 ? a : b])), level));
        compare_counts<Key, P>(tensors.views, prefixes, level);
      }
}

}  // namespace

void radix() {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) compare_levels<uint32_t, SmallPacket>({dtype});
  compare_levels<uint32_t, TinyPacket>({DType::f32, DType::bf16, DType::f16});
  compare_levels<uint64_t, SmallPacket>({DType::f64});
  compare_levels<uint64_t, TinyPacket>({DType::f64, DType::f32, DType::bf16, DType::f16});
}
