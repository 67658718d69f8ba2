// What one thread does in an optimizer's sweep: the gradient through the transforms in registers, then the step. Which transforms there are
// tells a program at run time, whose branches all threads take together, so that any list of them costs no kernel of its own.
#pragma once

#include "core/optimizers.h"
#include "core/transforms.h"
#include "cuda/operands.h"
#include "cuda/projection.h"

namespace fastcl::cuda {

constexpr int kMostTransforms = 8;
enum { kParam, kGrad, kFirst, kSecond };  // operands; those of transforms follow, and what is dotted with is last
// Compact state lies in an order of its own: its addresses alone are operands, and behind them are those of the bits, whose note is the
// state's length, and of the ranks.
enum { kBits = 4, kRanks };
constexpr int64_t kAbsent = -1;  // the note of an operand that leaves its tensor out

struct Program {
  struct Step {
    TransformKind kind;
    int operand;
    double number;
    ChildDraw draw;
    const double* coefficient;
  };
  int count;
  bool pulls;
  Step steps[kMostTransforms];
};

// What is known of a tensor's step when the sweep starts.
struct StepRow {
  AdamWScalars scalars;
  double draw;  // its number for draws
};
static_assert(sizeof(StepRow) % sizeof(double) == 0, "the workspace counts in doubles");

// A number in device memory; null: there is none.
struct DeviceNumber {
  const void* data;
  bool twice;
  FASTCL_HD double read() const { return twice ? *static_cast<const double*>(data) : double(*static_cast<const float*>(data)); }
};

struct Sweep {
  Program program;
  DeviceNumber scale;
  const float* found_inf;
  const StepRow* rows;  // null: nothing draws, and the scalars are the same in every step
  FASTCL_HD bool skipped() const { return found_inf != nullptr && *found_inf != 0; }
};

// The packets of these sweeps leave room for the program.
using SmallSweep = Packet<40, 400>;
using LargeSweep = Packet<400, 3392>;
constexpr int kMostOperands = kRanks + 1 + 2 * kMostTransforms + 1;
static_assert(SmallSweep::max_words >= kAddress + 2 * kMostOperands + kMaxDims * (1 + kMostOperands), "any one entry fits");
static_assert(sizeof(SmallSweep) + sizeof(Sweep) + sizeof(SGDRule) + sizeof(DeviceNumber) <= 4064 &&
                  sizeof(LargeSweep) + sizeof(Sweep) + sizeof(SGDRule) + sizeof(DeviceNumber) <= 32700,
              "kernel parameters have 4096 or 32764 bytes");

// ---- before the sweep: each tensor's step is counted, and what it multiplies by is worked out

struct Preparation {
  AdamWRule rule;
  DeviceNumber lr;
  const float* found_inf;
  bool advance, adamw;
};

template <class P>
FASTCL_HD void prepare_thread(const P& p, int tensor, const Preparation& how, StepRow* rows) {
  if (tensor >= p.tensors || (how.found_inf != nullptr && *how.found_inf != 0)) return;
  auto* step = p.template address<float>(p.at[tensor], 0);
  const float before = *step, next = before + 1;
  StepRow& row = rows[p.base + tensor];
  row.draw = draw_step(before);
  if (how.adamw) {
    AdamWRule rule = how.rule;
    if (how.lr.data != nullptr) rule.lr = how.lr.read();
    row.scalars = AdamWScalars::make(rule, double(next));
  }
  if (how.advance) *step = next;
}

// ---- the transforms

template <class C>
struct Transforms {
  const Sweep& sweep;
  C scale;
  uint32_t step;

  static FASTCL_HD Transforms make(const Sweep& sweep, int64_t item) {
    return {sweep, sweep.scale.data != nullptr ? C(sweep.scale.read()) : C(1), sweep.rows != nullptr ? uint32_t(sweep.rows[item].draw) : 0};
  }

  // The gradient of a site after all transforms; theta: the parameter before this step.
  template <class Site, int V>
  FASTCL_HD void read(const Site& site, const C (&theta)[V], C (&x)[V]) const {
    site.read(kGrad, x);
    if (sweep.scale.data != nullptr) {
      FASTCL_UNROLL
      for (int k = 0; k < V; ++k) x[k] = x[k] * scale;
    }
    FASTCL_ROLLED
    for (int s = 0; s < sweep.program.count; ++s) apply(site, sweep.program.steps[s], theta, x);
  }

 private:
  template <class Site, int V>
  FASTCL_HD void apply(const Site& site, const Program::Step& own, const C (&theta)[V], C (&x)[V]) const {
    const int64_t note = site.p.note(site.entry, own.operand);
    if (note == kAbsent) return;
    if (own.kind == TransformKind::soft_mask) {
      const Softened<C> op{C(own.number)};
      C importance[V];
      site.template read<true>(own.operand, importance);
      FASTCL_UNROLL
      for (int k = 0; k < V; ++k) x[k] = op(x[k], importance[k]);
    } else if (own.kind == TransformKind::child_mask) {
      const Drawn<C> op{C(own.draw.scale)};
      const uint32_t kept = kept_bits<V>(own.draw, uint64_t(site.origin(own.operand) + site.at(own.operand)), uint32_t(note), step);
      FASTCL_UNROLL
      for (int k = 0; k < V; ++k) x[k] = op(x[k], (kept >> k & 1) != 0);
    } else if (own.kind == TransformKind::fixed_mask) {
      const Selected<C> op;
      const uint32_t bits = mask_bits<V>(site.template address<const uint8_t>(own.operand, 0), site.at(own.operand));
      FASTCL_UNROLL
      for (int k = 0; k < V; ++k) x[k] = op(x[k], (bits >> k & 1) != 0);
    } else if (own.kind == TransformKind::project) {
      const Projected<C> op{*own.coefficient};
      if (op.coefficient == 0) return;
      double reference[V];
      site.read(own.operand, reference);
      FASTCL_UNROLL
      for (int k = 0; k < V; ++k) x[k] = op(x[k], reference[k]);
    } else {
      const auto op = Pull<C>::make(own.number);
      C precision[V], anchor[V];
      site.read(own.operand, precision);
      site.read(own.operand + 1, anchor);
      FASTCL_UNROLL
      for (int k = 0; k < V; ++k) x[k] = op(x[k], theta[k], precision[k], anchor[k]);
    }
  }
};

// ---- AdamW

template <class C>
FASTCL_HD C adamw_element(const AdamW<C>& rule, bool hf, C p, C x, C& m, C& v) {
  return hf ? rule.template updated<true>(p, x, m, v) : rule.template updated<false>(p, x, m, v);
}

template <class C, class P>
FASTCL_HD void adamw_thread(const P& p, const Chunk& c, int thread, const Sweep& sweep) {
  const int64_t item = operand_item(p.note(c.entry, kParam));
  const AdamWScalars& scalars = sweep.rows[item].scalars;
  const auto rule = AdamW<C>::make(scalars);
  const bool hf = scalars.hf;
  const auto transforms = Transforms<C>::make(sweep, item);
  each_run<kRun<C>>(p, c, thread, [&](const auto& site) {
    constexpr int V = std::decay_t<decltype(site)>::width;
    const int64_t own = site.at(kParam);  // the moments are laid out like the parameter
    C* first = site.template address<C>(kFirst, own);
    C* second = site.template address<C>(kSecond, own);
    Elements<C, V> m = Vector<C, V>::load(first).elements(), v = Vector<C, V>::load(second).elements();
    C theta[V], x[V];
    site.read(kParam, own, theta);
    transforms.read(site, theta, x);
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) theta[k] = adamw_element(rule, hf, theta[k], x[k], m.x[k], v.x[k]);
    Vector<C, V>::of(m).store(first);
    Vector<C, V>::of(v).store(second);
    site.write(kParam, own, theta);
  });
}

// ---- AdamW with compact state: a chunk's bits and their ranks are worked out first, in memory that a block shares

struct ChildStage {
  uint32_t words[kThreads];   // 32 elements each
  uint32_t before[kThreads];  // set bits since the last entry of the ranks
};
static_assert(kRunChunk == 32 * kThreads && kRunChunk % kRankBlock == 0, "a thread has a word, and a chunk begins with a rank");

template <class P>
FASTCL_HD void fetch_child(const P& p, const Chunk& c, int thread, ChildStage& stage) {
  const int64_t bytes = (p.words[c.entry + kNumel] + 7) / 8, first = c.begin / 8 + 4 * thread;
  const auto* bits = p.template address<const uint8_t>(c.entry, kBits);
  uint32_t word = 0;
  FASTCL_UNROLL
  for (int b = 0; b < 4; ++b)
    if (first + b < bytes) word |= uint32_t(bits[first + b]) << (8 * b);
  stage.words[thread] = word;
}

FASTCL_HD void rank_child(int thread, ChildStage& stage) {
  constexpr int kWords = int(kRankBlock / 32);
  uint32_t before = 0;
  FASTCL_ROLLED
  for (int w = thread / kWords * kWords; w < thread; ++w) before += uint32_t(set_bits(stage.words[w]));
  stage.before[thread] = before;
}

template <class C, class P>
FASTCL_HD void adamw_compact_thread(const P& p, const Chunk& c, int thread, const ChildStage& stage, const Sweep& sweep) {
  const int64_t item = operand_item(p.note(c.entry, kParam));
  const AdamWScalars& scalars = sweep.rows[item].scalars;
  const auto rule = AdamW<C>::make(scalars);
  const bool hf = scalars.hf;
  const auto transforms = Transforms<C>::make(sweep, item);
  const auto* ranks = p.template address<const int64_t>(c.entry, kRanks);
  const int64_t length = p.note(c.entry, kBits);  // ranks of another mask must not lead out of the state
  each_run<kRun<C>>(p, c, thread, [&](const auto& site) {
    constexpr int V = std::decay_t<decltype(site)>::width;
    const int local = int(site.first - c.begin), shift = local % 32;
    const uint32_t word = stage.words[local / 32], child = word >> shift & ((1u << V) - 1);
    const int64_t own = site.at(kParam);
    C theta[V], x[V] = {};
    site.read(kParam, own, theta);
    int64_t at = 0;
    if (child != 0) {
      transforms.read(site, theta, x);
      at = ranks[site.first / kRankBlock] + stage.before[local / 32] + set_bits(word & ((1u << shift) - 1));
    }
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) {
      if ((child >> k & 1) == 0 || at < 0 || at >= length) {
        theta[k] = hf ? rule.template decayed<true>(theta[k]) : rule.template decayed<false>(theta[k]);
        continue;
      }
      C* first = site.template address<C>(kFirst, at);
      C* second = site.template address<C>(kSecond, at);
      theta[k] = adamw_element(rule, hf, theta[k], x[k], *first, *second);
      ++at;
    }
    site.write(kParam, own, theta);
  });
}

// ---- SGD

template <class C, bool with_momentum, class P>
FASTCL_HD void sgd_thread(const P& p, const Chunk& c, int thread, const Sweep& sweep, const SGDRule& rule) {
  const auto step = SGD<C>::make(rule);
  const auto transforms = Transforms<C>::make(sweep, operand_item(p.note(c.entry, kParam)));
  each_run<kRun<C>>(p, c, thread, [&](const auto& site) {
    constexpr int V = std::decay_t<decltype(site)>::width;
    const int64_t own = site.at(kParam);
    C* buffers = site.template address<C>(with_momentum ? kFirst : kParam, own);
    Elements<C, V> buffer{};
    if (with_momentum && !step.first) buffer = Vector<C, V>::load(buffers).elements();
    C theta[V], x[V];
    site.read(kParam, own, theta);
    transforms.read(site, theta, x);
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) theta[k] = step.template updated<with_momentum>(theta[k], x[k], buffer.x[k]);
    if (with_momentum) Vector<C, V>::of(buffer).store(buffers);
    site.write(kParam, own, theta);
  });
}

// ---- T(g) . r and r . r

template <class C, class P>
FASTCL_HD Products transformed_dot_thread(const P& p, const Chunk& c, int thread, const Sweep& sweep) {
  const auto transforms = Transforms<C>::make(sweep, operand_item(p.note(c.entry, kParam)));
  Products sum[kRun<C>] = {};
  each_run<kRun<C>>(p, c, thread, [&](const auto& site) {
    constexpr int V = std::decay_t<decltype(site)>::width;
    C theta[V] = {}, x[V];
    double reference[V];
    if (sweep.program.pulls) site.read(kParam, theta);
    transforms.read(site, theta, x);
    site.read(p.operands - 1, reference);
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) sum[k] = combine(sum[k], {double(x[k]) * reference[k], reference[k] * reference[k]});
  });
  FASTCL_UNROLL
  for (int k = 1; k < kRun<C>; ++k) sum[0] = combine(sum[0], sum[k]);
  return sum[0];
}

}  // namespace fastcl::cuda
