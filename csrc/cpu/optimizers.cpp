#include "cpu/optimizers.h"

#include <atomic>
#include <type_traits>

#include "core/dtypes.h"
#include "cpu/child_bits.h"
#include "cpu/ops.h"

namespace fastcl::cpu {
namespace {

using Run = GradientSweep::Run;

// Where the loop finds its gradients. The last transform can be done on the way: then all that is read comes in one stream, and not the
// gradients first and the parameters after them.
template <class C>
struct Given {
  const C* x;
  FASTCL_HD C operator[](int64_t e) const { return x[e]; }
};
template <class I>
struct SoftenedOnTheWay {
  const float* x;
  const I* importance;
  float strength;
  FASTCL_HD float operator[](int64_t e) const { return Softened<float>{strength}(x[e], importance[e]); }
};
struct DrawnOnTheWay {
  const float* x;
  const uint16_t* drawn;
  uint32_t bound;
  float scale;
  FASTCL_HD float operator[](int64_t e) const { return Drawn<float>{scale}(x[e], drawn[e] < bound); }
};

template <class P, class C, bool hf, class X>
FASTCL_CLONES void adamw_loop(P* __restrict p, C* __restrict m, C* __restrict v, X x, int64_t stride, int64_t n, const AdamW<C>& rule) {
  const AdamW<C> r = rule;  // so that no store can reach it
  if (stride == 1)
#pragma GCC ivdep
    for (int64_t e = 0; e < n; ++e) p[e] = store<P>(r.template updated<hf>(load<C>(p[e]), x[e], m[e], v[e]));
  else
    for (int64_t e = 0; e < n; ++e)
      p[e * stride] = store<P>(r.template updated<hf>(load<C>(p[e * stride]), x[e], m[e * stride], v[e * stride]));
}

template <class C, bool hf>
FASTCL_CLONES void change_loop(C* __restrict change, C* __restrict m, C* __restrict v, const C* __restrict x, int64_t n,
                               const AdamW<C>& rule) {
  const AdamW<C> r = rule;
  for (int64_t e = 0; e < n; ++e) change[e] = r.template change<hf>(x[e], m[e], v[e]);
}

template <class X>
void adamw_on_the_way(const Run& run, int64_t done, int64_t n, const AdamW<float>& rule, bool hf, X x) {
  auto* p = reinterpret_cast<float*>(run.at(GradientSweep::kParam, done));
  auto* m = reinterpret_cast<float*>(run.at(GradientSweep::kFirst, done));
  auto* v = reinterpret_cast<float*>(run.at(GradientSweep::kSecond, done));
  (hf ? adamw_loop<float, float, true, X> : adamw_loop<float, float, false, X>)(p, m, v, x, 1, n, rule);
}

// Whether it was done so: with float32 and stride 1, for the masks that come alone most often.
bool fuses(const GradientSweep& sweep, GradientBlock<float>& block, const Run& run, int64_t done, int64_t n, const AdamW<float>& rule,
           bool hf) {
  const auto& transforms = sweep.inputs().transforms;
  if (transforms.empty() || run.strides != nullptr || run.item.compact || run.slots[GradientSweep::kParam].dtype != DType::f32)
    return false;
  const Transform& last = transforms.back();
  const int slot = sweep.slots() - 1;
  const GradientSweep::Slot& operand = run.slots[slot];
  const auto before = [&] { return block.transformed(sweep, run, done, n, transforms.size() - 1); };
  if (last.kind == TransformKind::child_mask) {
    const ChildDraw draw = ChildDraw::make(last.number, last.seed);
    ChildBits bits(draw);
    const uint16_t* drawn = bits.draw(run.item.offset + run.index(slot, done), 1, n, run.item.place, run.item.step);
    adamw_on_the_way(run, done, n, rule, hf, DrawnOnTheWay{before(), drawn, bits.bound(), float(draw.scale)});
    return true;
  }
  if (last.kind != TransformKind::soft_mask || operand.data == nullptr) return false;
  const char* importance = run.at(slot, done);
  if (operand.dtype == DType::f32)
    adamw_on_the_way(run, done, n, rule, hf,
                     SoftenedOnTheWay<float>{before(), reinterpret_cast<const float*>(importance), float(last.number)});
  else if (operand.dtype == DType::u8)
    adamw_on_the_way(run, done, n, rule, hf,
                     SoftenedOnTheWay<uint8_t>{before(), reinterpret_cast<const uint8_t*>(importance), float(last.number)});
  else
    return false;
  return true;
}

template <class P, class C, bool with_momentum>
FASTCL_CLONES void sgd_loop(P* __restrict p, C* __restrict buffer, const C* __restrict x, int64_t stride, int64_t n, const SGD<C>& rule) {
  const SGD<C> r = rule;
  C none = 0;
  if (stride == 1)
    for (int64_t e = 0; e < n; ++e)
      p[e] = store<P>(r.template updated<with_momentum>(load<C>(p[e]), x[e], with_momentum ? buffer[e] : none));
  else
    for (int64_t e = 0; e < n; ++e)
      p[e * stride] = store<P>(r.template updated<with_momentum>(load<C>(p[e * stride]), x[e], with_momentum ? buffer[e * stride] : none));
}

bool skipped(const OptimizerInputs& inputs) {
  return !inputs.found_inf.empty() && *reinterpret_cast<const float*>(inputs.found_inf[0].data) != 0;
}

float& counter(const View& step) { return *reinterpret_cast<float*>(step.data); }

void advance(const OptimizerInputs& inputs) {
  for (const View& step : inputs.steps) counter(step) += 1;
}

double learning_rate(const OptimizerInputs& inputs, double lr) {
  if (inputs.lr.empty()) return lr;
  const View& v = inputs.lr[0];
  return v.dtype == DType::f64 ? *reinterpret_cast<const double*>(v.data) : double(*reinterpret_cast<const float*>(v.data));
}

// Calls visit(block of C, run, done, n) for the blocks of a run, C being what its parameter computes in.
template <class Visit>
void each_block(const GradientSweep& sweep, int64_t begin, int64_t end, Visit&& visit) {
  GradientBlock<float> single;
  GradientBlock<double> twice;
  for (int64_t p = begin; p < end; ++p)
    sweep.part(p, [&](const Run& run) {
      for (int64_t done = 0; done < run.n;) {
        const int64_t n = run.block(done);
        if (run.slots[GradientSweep::kParam].dtype == DType::f64)
          visit(twice, run, done, n);
        else
          visit(single, run, done, n);
        done += n;
      }
    });
}

// f(Type<P>) for the parameters that compute in C.
template <class C, class F>
void with_param(DType dtype, F&& f) {
  if constexpr (std::is_same_v<C, double>)
    f(Type<double>{});
  else if (dtype == DType::f32)
    f(Type<float>{});
  else if (dtype == DType::bf16)
    f(Type<BFloat16>{});
  else
    f(Type<Float16>{});
}

// The same scalars for all tensors that have made as many steps.
class Scalars {
 public:
  Scalars(const OptimizerInputs& inputs, AdamWRule rule) {
    rule.lr = learning_rate(inputs, rule.lr);
    which_.reserve(inputs.steps.size());
    float last = -1;
    for (const View& step : inputs.steps) {
      const float next = counter(step) + 1;
      if (made_.empty() || next != last) made_.push_back(AdamWScalars::make(rule, double(last = next)));
      which_.push_back(made_.size() - 1);
    }
  }
  const AdamWScalars& of(size_t tensor) const { return made_[which_[tensor]]; }

 private:
  std::vector<AdamWScalars> made_;
  std::vector<size_t> which_;
};

// How much of a tensor's compact state lies before an element.
int64_t state_before(const OptimizerInputs& inputs, size_t tensor, int64_t element) {
  const int64_t block = element / kRankBlock;
  const auto* ranks = reinterpret_cast<const int64_t*>(inputs.ranks[tensor].data);
  return ranks[block] + count_bits(reinterpret_cast<const uint8_t*>(inputs.bits[tensor].data), block * kRankBlock, element);
}

// Ranks and the sizes of the state decide where is written: they have to be those of the bits.
void check_ranks(const OptimizerInputs& inputs, const Pool& pool) {
  for (size_t i = 0; i < inputs.bits.size(); ++i) {
    const int64_t n = inputs.params[i].elements, blocks = inputs.ranks[i].elements;
    if (inputs.bits[i].elements == 0) continue;
    const auto* bits = reinterpret_cast<const uint8_t*>(inputs.bits[i].data);
    const auto* ranks = reinterpret_cast<const int64_t*>(inputs.ranks[i].data);
    std::atomic<bool> right{ranks[0] == 0};
    pool.each(blocks, 1024, [&](int64_t begin, int64_t end) {
      bool fits = true;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t next = ranks[b] + count_bits(bits, b * kRankBlock, std::min(n, (b + 1) * kRankBlock));
        fits = fits && next == (b + 1 < blocks ? ranks[b + 1] : inputs.first[i].elements);
      }
      if (!fits) right = false;
    });
    if (!right) throw Refusal("ranks", i, "are not those of the bits");
    if (inputs.first[i].elements != inputs.second[i].elements) throw Refusal("exp_avg_sqs", i, "has another length than exp_avgs");
  }
}

template <class C>
C* state(const Views& list, size_t tensor) {
  return reinterpret_cast<C*>(list[tensor].data);
}

}  // namespace

template <class P, class C>
void adamw_dense(P* param, C* m, C* v, const C* x, int64_t stride, int64_t n, const AdamW<C>& rule, bool hf) {
  (hf ? adamw_loop<P, C, true, Given<C>> : adamw_loop<P, C, false, Given<C>>)(param, m, v, {x}, stride, n, rule);
}
template void adamw_dense(double*, double*, double*, const double*, int64_t, int64_t, const AdamW<double>&, bool);
template void adamw_dense(float*, float*, float*, const float*, int64_t, int64_t, const AdamW<float>&, bool);
template void adamw_dense(BFloat16*, float*, float*, const float*, int64_t, int64_t, const AdamW<float>&, bool);
template void adamw_dense(Float16*, float*, float*, const float*, int64_t, int64_t, const AdamW<float>&, bool);

template <class C>
void adamw_changes(C* change, C* m, C* v, const C* x, int64_t n, const AdamW<C>& rule, bool hf) {
  (hf ? change_loop<C, true> : change_loop<C, false>)(change, m, v, x, n, rule);
}
template void adamw_changes(double*, double*, double*, const double*, int64_t, const AdamW<double>&, bool);
template void adamw_changes(float*, float*, float*, const float*, int64_t, const AdamW<float>&, bool);

void adamw_(const OptimizerInputs& inputs, const AdamWRule& rule, const Pool& pool) {
  check_ranks(inputs, pool);
  if (skipped(inputs)) return;
  const GradientSweep sweep(inputs, nullptr);
  const Scalars scalars(inputs, rule);
  pool.each(sweep.parts(), 1, [&](int64_t begin, int64_t end) {
    const GradientSweep::Item* current = nullptr;  // the compact tensor that is worked on, and where in its state
    int64_t at = 0;
    each_block(sweep, begin, end, [&](auto& block, const Run& run, int64_t done, int64_t n) {
      using C = typename std::remove_reference_t<decltype(block)>::compute;
      const size_t tensor = run.item.tensor;
      const auto own = AdamW<C>::make(scalars.of(tensor));
      if constexpr (std::is_same_v<C, float>)
        if (fuses(sweep, block, run, done, n, own, rule.hf)) return;
      // Packing selects by itself.
      const auto& transforms = inputs.transforms;
      const bool selects = run.item.compact && !transforms.empty() && transforms.back().kind == TransformKind::fixed_mask &&
                           transforms.back().operand[tensor].data == inputs.bits[tensor].data;
      const C* x = block.transformed(sweep, run, done, n, transforms.size() - size_t(selects));
      char* param = run.at(GradientSweep::kParam, done);
      with_param<C>(run.slots[GradientSweep::kParam].dtype, [&](auto t) {
        auto* p = reinterpret_cast<typename decltype(t)::type*>(param);
        if (run.item.compact) {
          const int64_t index = run.index(GradientSweep::kParam, done);
          if (current != &run.item) at = state_before(inputs, tensor, index);
          current = &run.item;
          const CompactBlock child{reinterpret_cast<const uint8_t*>(inputs.bits[tensor].data), index, n};
          at += adamw_compact(p, state<C>(inputs.first, tensor) + at, state<C>(inputs.second, tensor) + at, x, child, own, rule.hf);
        } else {
          adamw_dense(p, reinterpret_cast<C*>(run.at(GradientSweep::kFirst, done)),
                      reinterpret_cast<C*>(run.at(GradientSweep::kSecond, done)), x, run.stride(GradientSweep::kParam), n, own, rule.hf);
        }
      });
    });
  });
  advance(inputs);
}

void sgd_(const OptimizerInputs& inputs, const SGDRule& rule, const Pool& pool) {
  if (skipped(inputs)) return;
  const GradientSweep sweep(inputs, nullptr);
  SGDRule with_lr = rule;
  with_lr.lr = learning_rate(inputs, rule.lr);
  pool.each(sweep.parts(), 1, [&](int64_t begin, int64_t end) {
    each_block(sweep, begin, end, [&](auto& block, const Run& run, int64_t done, int64_t n) {
      const auto* x = block.transformed(sweep, run, done, n);
      using C = std::remove_cv_t<std::remove_pointer_t<decltype(x)>>;
      const auto own = SGD<C>::make(with_lr);
      with_param<C>(run.slots[GradientSweep::kParam].dtype, [&](auto t) {
        using P = typename decltype(t)::type;
        auto* p = reinterpret_cast<P*>(run.at(GradientSweep::kParam, done));
        const int64_t stride = run.stride(GradientSweep::kParam);
        if (inputs.first.empty())
          sgd_loop<P, C, false>(p, nullptr, x, stride, n, own);
        else
          sgd_loop<P, C, true>(p, reinterpret_cast<C*>(run.at(GradientSweep::kFirst, done)), x, stride, n, own);
      });
    });
  });
  advance(inputs);
}

namespace {

// Neighbours are far apart in the order of summation, and added in halves in the end.
template <class C, class R>
FASTCL_CLONES void dot_block(const C* x, const char* reference, int64_t n, double* out) {
  constexpr int kLanes = 32;
  const R* r = reinterpret_cast<const R*>(reference);
  double dot[kLanes] = {}, square[kLanes] = {};
  int64_t e = 0;
  for (; e + kLanes <= n; e += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const double y = load<double>(r[e + l]);
      dot[l] += double(x[e + l]) * y;
      square[l] += y * y;
    }
  for (int l = 0; e < n; ++e, ++l) {
    const double y = load<double>(r[e]);
    dot[l] += double(x[e]) * y;
    square[l] += y * y;
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) {
      dot[l] += dot[l + half];
      square[l] += square[l + half];
    }
  out[0] += dot[0];
  out[1] += square[0];
}

}  // namespace

void transformed_dot(const OptimizerInputs& inputs, const Views& reference, double* out, const Pool& pool) {
  const GradientSweep sweep(inputs, &reference);
  const int last = sweep.slots() - 1;
  std::vector<double> parts(size_t(2 * std::max<int64_t>(sweep.parts(), 1)));
  pool.each(sweep.parts(), 1, [&](int64_t begin, int64_t end) {
    alignas(64) double widened[GradientSweep::kBlock];
    for (int64_t part = begin; part < end; ++part)
      each_block(sweep, part, part + 1, [&](auto& block, const Run& run, int64_t done, int64_t n) {
        const auto* x = block.transformed(sweep, run, done, n);
        using C = std::remove_cv_t<std::remove_pointer_t<decltype(x)>>;
        double* sums = parts.data() + 2 * part;
        const DType dtype = run.slots[last].dtype;
        if (run.stride(last) == 1) {
          with_floating(dtype, [&](auto t) { dot_block<C, typename decltype(t)::type>(x, run.at(last, done), n, sums); });
        } else {
          widen_block<double>(run.at(last, done), dtype, run.stride(last), n, widened);
          dot_block<C, double>(x, reinterpret_cast<const char*>(widened), n, sums);
        }
      });
  });
  for (int64_t width = 1; width < sweep.parts(); width *= 2)
    for (int64_t p = 0; p + width < sweep.parts(); p += 2 * width)
      for (int s = 0; s < 2; ++s) parts[size_t(2 * p + s)] += parts[size_t(2 * (p + width) + s)];
  out[0] = parts[0];
  out[1] = parts[1];
}

}  // namespace fastcl::cpu
