// The optimizers' sweeps with every kind of transform, against the CPU ops.
#include <deque>

#include "cpu/ops.h"
#include "cuda/optimizers_plan.h"
#include "host.h"

using namespace host;

namespace {

using TinySweep = Packet<2, 400>;

// What an optimizer is called with, twice: for the kernels' threads and for the CPU.
struct World {
  std::deque<Tensor> tensors;
  std::deque<std::vector<uint64_t>> copies;
  std::deque<std::vector<int64_t>> strides;  // of places
  std::vector<std::string> names;
  std::vector<size_t> written;  // numbers of tensors
  OptimizerInputs ours, theirs;

  View read(Tensor tensor) {
    tensors.push_back(std::move(tensor));
    return tensors.back().view(tensors.back().memory);
  }
  void write(Tensor tensor, Views OptimizerInputs::* list, const char* name) {
    (ours.*list).push_back(read(std::move(tensor)));
    written.push_back(tensors.size() - 1);
    copies.push_back(tensors.back().memory);
    names.emplace_back(name);
    (theirs.*list).push_back(tensors.back().view(copies.back()));
  }
  void both(Views OptimizerInputs::* list, const View& view) {
    (ours.*list).push_back(view);
    (theirs.*list).push_back(view);
  }
  View number(DType dtype, double value) {
    Tensor t = make(dtype, {}, {}, 0, false);
    if (dtype == DType::f64)
      *reinterpret_cast<double*>(t.memory.data()) = value;
    else
      *reinterpret_cast<float*>(t.memory.data()) = float(value);
    return read(std::move(t));
  }
  View mask(int64_t elements) { return read({{bit_bytes(elements)}, {1}, DType::u8, 0, random_mask(elements)}); }
  View none(DType dtype) { return read(make(dtype, {0}, {1}, 0, false)); }
  void compare() const {
    for (size_t w = 0; w < written.size(); ++w)
      CHECK(same_values(tensors[written[w]].memory, copies[w], tensors[written[w]].dtype), "%s", names[w].c_str());
  }
};

Tensor positive(Tensor t) {
  with_floating(t.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* x = reinterpret_cast<T*>(t.memory.data());
    for (size_t e = 0; e < t.memory.size() * 8 / sizeof(T); ++e) x[e] = store<T>(std::fabs(load<double>(x[e])));
  });
  return t;
}

struct Config {
  std::vector<TransformKind> transforms;
  int states;  // moments of each parameter
  bool compact, special, whole;
  DType only;  // of the parameters; other: all of them
  bool counts = true;
};

DType any_floating() { return kFloating[random_bits() % 4]; }

// Importance in all the shapes that broadcast, or left out.
View importance_of(World& world, const LayoutCase& c, bool special) {
  const DType dtype = kStored[random_bits() % 5];
  switch (random_bits() % 5) {
    case 0: return world.none(dtype);
    case 1: return world.read(make(dtype, {}, {}, 0, special));
    case 2:
      if (c.shape.size() == 2) return world.read(make(dtype, {c.shape[0], 1}, {1, 1}, 1, special));
      [[fallthrough]];
    case 3: return world.read(make(dtype, c.read_shape, c.read_strides, c.read_offset, special));
    default: return world.read(make(dtype, c.shape, c.strides, c.offset, special));
  }
}

void add_transform(World& world, TransformKind kind, const std::vector<LayoutCase>& cases, bool special) {
  Transform t{kind, 0.3, random_bits(), {}, {}, {}};
  if (kind == TransformKind::project) t.coefficient.push_back(world.number(DType::f64, random_bits() % 4 == 0 ? 0 : 0.37));
  for (size_t i = 0; i < cases.size(); ++i) {
    const LayoutCase& c = cases[i];
    const bool absent = random_bits() % 5 == 0;
    const auto operand = [&] { return world.read(make(any_floating(), c.shape, c.read_strides, c.read_offset, special)); };
    if (kind == TransformKind::soft_mask)
      t.operand.push_back(importance_of(world, c, special));
    else if (kind == TransformKind::fixed_mask)
      t.operand.push_back(absent ? world.none(DType::u8) : world.mask(world.ours.params[i].numel()));
    else if (kind != TransformKind::child_mask)
      t.operand.push_back(absent ? world.none(DType::f32) : operand());
    if (kind == TransformKind::pull) t.anchor.push_back(operand());
  }
  world.ours.transforms.push_back(t);
  world.theirs.transforms.push_back(t);
}

// Compact state of the first transform's mask.
void add_compact(World& world, size_t i, DType state) {
  const Transform& mask = world.ours.transforms[0];
  const View &bits = mask.operand[i], &param = world.ours.params[i];
  world.both(&OptimizerInputs::bits, bits);
  std::vector<int64_t> ranks{0};
  int64_t count = 0;
  for (int64_t e = 0; e < param.numel() && bits.numel() > 0; ++e) {
    if (e > 0 && e % kRankBlock == 0) ranks.push_back(count);
    count += bit_of(reinterpret_cast<const uint8_t*>(bits.data), e);
  }
  if (bits.numel() == 0 || param.numel() == 0) ranks.clear();
  Tensor table{{int64_t(ranks.size())}, {1}, DType::i64, 0, std::vector<uint64_t>(ranks.begin(), ranks.end())};
  table.memory.resize(table.memory.size() + 1);
  world.both(&OptimizerInputs::ranks, world.read(std::move(table)));
  if (bits.numel() == 0) return;
  world.write(make(state, {count}, {1}, 0, false), &OptimizerInputs::first, "compact first");
  world.write(positive(make(state, {count}, {1}, 0, false)), &OptimizerInputs::second, "compact second");
}

void fill(World& world, const Config& config, const std::vector<LayoutCase>& cases) {
  std::vector<DType> states;
  for (const LayoutCase& c : cases) {
    const DType dtype = config.only == DType::other ? any_floating() : config.only;
    states.push_back(dtype == DType::f64 ? DType::f64 : DType::f32);
    world.write(make(dtype, c.shape, c.strides, c.offset, config.special), &OptimizerInputs::params, c.name);
    world.both(&OptimizerInputs::grads, world.read(make(any_floating(), c.read_shape, c.read_strides, c.read_offset, config.special)));
  }
  for (TransformKind kind : config.transforms) add_transform(world, kind, cases, config.special);
  for (size_t i = 0; i < cases.size(); ++i) {
    const LayoutCase& c = cases[i];
    if (config.compact) add_compact(world, i, states[i]);
    if (!config.compact || world.ours.bits[i].numel() == 0) {
      if (config.states > 0) world.write(make(states[i], c.shape, c.strides, c.offset, config.special), &OptimizerInputs::first, c.name);
      if (config.states > 1) world.write(positive(make(states[i], c.shape, c.strides, c.offset, false)), &OptimizerInputs::second, c.name);
    }
    if (config.counts) {
      Tensor step = make(DType::f32, {}, {}, 0, false);
      *reinterpret_cast<float*>(step.memory.data()) = float(random_bits() % 5);
      world.write(std::move(step), &OptimizerInputs::steps, "step");
    }
    if (config.whole) continue;
    std::vector<int64_t>& strides = world.strides.emplace_back(contiguous_strides(world.ours.params[i]));
    for (int64_t& stride : strides) stride *= i % 3 == 0 ? 3 : 1;
    if (i % 3 == 1 && !strides.empty()) strides[0] += 5;
    for (OptimizerInputs* inputs : {&world.ours, &world.theirs})
      inputs->places.push_back({int64_t(i) * 70001, int64_t(i) * 12345, i % 5 == 0 ? nullptr : strides.data()});
  }
}

std::vector<StepRow> prepared(const OptimizerInputs& inputs, const Preparation& how) {
  std::vector<StepRow> rows(inputs.steps.size());
  auto packet = std::make_unique<TinyPacket>();
  const List list = steps_list(inputs.steps);
  for (const List::Launch& part : list.launches(TinyPacket::max_tensors, TinyPacket::max_words)) {
    list.fill(part, *packet);
    for (int t = 0; t < kThreads; ++t) prepare_thread(*packet, t, how, rows.data());
  }
  return rows;
}

template <class P>
void run_adamw(const OptimizerInputs& inputs, const AdamWRule& rule) {
  SweepPlan dense(inputs, nullptr, false), compact(inputs, nullptr, true);
  const std::vector<StepRow> rows = prepared(inputs, {rule, device_number(inputs.lr), flag(inputs.found_inf), true, true});
  dense.sweep.rows = compact.sweep.rows = rows.data();
  if (dense.sweep.skipped()) return;
  run_threads<P>(dense.lists.single, kRunChunk, [&](const P& p, const Chunk& c, int t) { adamw_thread<float>(p, c, t, dense.sweep); });
  run_threads<P>(dense.lists.twice, kRunChunk, [&](const P& p, const Chunk& c, int t) { adamw_thread<double>(p, c, t, dense.sweep); });
  const auto run_compact = [&](const List& list, auto compute) {
    blocks<P>(list, [&](const P& packet, uint32_t block) {
      const Chunk c = Chunk::find(packet, block, kRunChunk);
      ChildStage stage;
      std::memset(&stage, 0xa5, sizeof(stage));
      for (int t = 0; t < kThreads; ++t) fetch_child(packet, c, t, stage);
      for (int t = 0; t < kThreads; ++t) rank_child(t, stage);
      for (int t = 0; t < kThreads; ++t) adamw_compact_thread<decltype(compute)>(packet, c, t, stage, compact.sweep);
    });
  };
  run_compact(compact.lists.single, float{});
  run_compact(compact.lists.twice, double{});
}

template <class P>
void run_sgd(const OptimizerInputs& inputs, SGDRule rule) {
  SweepPlan plan(inputs, nullptr, false);
  const std::vector<StepRow> rows = prepared(inputs, {{}, {}, flag(inputs.found_inf), true, false});
  plan.sweep.rows = rows.empty() ? nullptr : rows.data();
  if (plan.sweep.skipped()) return;
  if (!inputs.lr.empty()) rule.lr = device_number(inputs.lr).read();
  const auto run = [&](const List& list, auto compute) {
    using C = decltype(compute);
    run_threads<P>(list, kRunChunk, [&](const P& p, const Chunk& c, int t) {
      if (inputs.first.empty())
        sgd_thread<C, false>(p, c, t, plan.sweep, rule);
      else
        sgd_thread<C, true>(p, c, t, plan.sweep, rule);
    });
  };
  run(plan.lists.single, float{});
  run(plan.lists.twice, double{});
}

constexpr TransformKind kKinds[] = {TransformKind::soft_mask, TransformKind::child_mask, TransformKind::fixed_mask, TransformKind::project,
                                    TransformKind::pull};

// No transform, each alone, all of them, and as many as there may be.
std::vector<std::vector<TransformKind>> programs() {
  std::vector<std::vector<TransformKind>> out{{}};
  for (TransformKind kind : kKinds) out.push_back({kind});
  out.emplace_back(std::begin(kKinds), std::end(kKinds));
  out.emplace_back(size_t(kMostTransforms), TransformKind::pull);
  out.push_back({TransformKind::pull, TransformKind::child_mask, TransformKind::soft_mask, TransformKind::child_mask});
  return out;
}

void add_scalars(World& world, size_t n) {
  if (n % 2 == 1) world.both(&OptimizerInputs::scale, world.number(n % 4 == 1 ? DType::f64 : DType::f32, 0.123456789));
  if (n % 3 == 1) world.both(&OptimizerInputs::lr, world.number(n % 2 == 0 ? DType::f64 : DType::f32, 0.01));
  if (n % 3 == 2) world.both(&OptimizerInputs::found_inf, world.number(DType::f32, n % 4 == 2 ? 1 : 0));
}

}  // namespace

void adamw() {
  size_t n = 0;
  for (const auto& transforms : programs())
    for (const DType only : {DType::other, DType::f32, DType::f64, DType::bf16}) {
      const Config config{transforms, 2, false, n % 2 == 0, n % 3 == 0, only};
      World world;
      fill(world, config, equal_shapes());
      add_scalars(world, ++n);
      const AdamWRule rule{1e-2, n % 5 == 0 ? 0.3 : 0.9, 0.999, 1e-8, n % 4 == 0 ? 0 : 0.05, n % 2 == 0, n % 7 == 0};
      cpu::adamw_(world.theirs, rule, kSerial);
      if (n % 2 == 0)
        run_adamw<LargeSweep>(world.ours, rule);
      else
        run_adamw<TinySweep>(world.ours, rule);
      world.compare();
    }
  Config many{{}, 2, false, false, true, DType::f32};
  many.transforms.assign(size_t(kMostTransforms) + 1, TransformKind::soft_mask);
  World world;
  fill(world, many, {layouts(false)[0]});
  bool refused = false;
  try {
    SweepPlan(world.ours, nullptr, false);
  } catch (const Refusal&) {
    refused = true;
  }
  CHECK(refused, "a program that does not fit");
}

void compact() {
  std::vector<LayoutCase> cases;
  for (const LayoutCase& c : equal_shapes())
    if (c.strides == default_strides(c.shape)) cases.push_back(c);
  size_t n = 0;
  using K = TransformKind;
  for (const std::vector<K>& transforms : {std::vector<K>{K::fixed_mask}, {K::fixed_mask, K::soft_mask, K::child_mask}})
    for (const DType only : {DType::other, DType::f32, DType::f64, DType::f16}) {
      World world;
      fill(world, {transforms, 2, true, false, n % 3 == 0, only}, cases);
      add_scalars(world, ++n);
      const AdamWRule rule{1e-2, 0.9, 0.999, 1e-8, n % 4 == 0 ? 0 : 0.05, n % 2 == 0, n % 7 == 0};
      cpu::adamw_(world.theirs, rule, kSerial);
      if (n % 2 == 0)
        run_adamw<LargeSweep>(world.ours, rule);
      else
        run_adamw<TinySweep>(world.ours, rule);
      world.compare();
    }
}

void sgd() {
  size_t n = 0;
  for (const auto& transforms : programs())
    for (const DType only : {DType::other, DType::f32, DType::f64, DType::f16}) {
      const bool draws = std::find(transforms.begin(), transforms.end(), TransformKind::child_mask) != transforms.end();
      Config config{transforms, n % 3 == 0 ? 0 : 1, false, n % 2 == 0, n % 3 == 0, only, draws};
      World world;
      fill(world, config, equal_shapes());
      add_scalars(world, ++n);
      const SGDRule rule{0.1, config.states > 0 ? 0.9 : 0, n % 4 == 0 ? 0.2 : 0, n % 5 == 0 ? 0 : 0.05, n % 2 == 0, n % 7 == 0, n % 5 == 1};
      cpu::sgd_(world.theirs, rule, kSerial);
      if (n % 2 == 0)
        run_sgd<SmallSweep>(world.ours, rule);
      else
        run_sgd<TinySweep>(world.ours, rule);
      world.compare();
    }
}

void transformed_dot() {
  size_t n = 0;
  for (const auto& transforms : programs())
    for (const DType only : {DType::other, DType::f32, DType::f64, DType::bf16}) {
      World world;
      fill(world, {transforms, 0, false, false, n % 3 == 0, only}, equal_shapes());
      if (++n % 2 == 1) world.both(&OptimizerInputs::scale, world.number(DType::f64, 0.123456789));
      Views reference;
      for (const LayoutCase& c : equal_shapes())
        reference.push_back(world.read(make(any_floating(), c.read_shape, c.read_strides, c.read_offset, false)));
      double expected[2];
      cpu::transformed_dot(world.theirs, reference, expected, kSerial);
      SweepPlan plan(world.ours, &reference, false);
      const std::vector<StepRow> rows = prepared(world.ours, {{}, {}, nullptr, false, false});
      plan.sweep.rows = rows.data();
      std::vector<Products> parts;
      const auto run = [&](const List& list, auto compute) {
        run_threads<LargeSweep>(list, kRunChunk, [&](const LargeSweep& p, const Chunk& c, int t) {
          parts.push_back(transformed_dot_thread<decltype(compute)>(p, c, t, plan.sweep));
        });
      };
      run(plan.lists.single, float{});
      run(plan.lists.twice, double{});
      const Products sum = add_as_tree(parts);
      world.compare();  // nothing is written
      const double bound = 1e-12 * std::sqrt(expected[1]) * 1e3;
      CHECK(std::fabs(sum.dot - expected[0]) <= bound, "%zu transforms: %.17g %.17g", transforms.size(), sum.dot, expected[0]);
      CHECK(std::fabs(sum.square - expected[1]) <= 1e-13 * expected[1], "%.17g %.17g", sum.square, expected[1]);
    }
}
