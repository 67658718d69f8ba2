#include "cpu/transforms.h"

#include "core/dtypes.h"
#include "cpu/child_bits.h"

namespace fastcl::cpu {
namespace {

template <class T, class C>
FASTCL_CLONES void widen_run(const char* data, int64_t stride, int64_t n, C* __restrict out) {
  const T* x = reinterpret_cast<const T*>(data);
  if (stride == 1)
    for (int64_t e = 0; e < n; ++e) out[e] = load<C>(x[e]);
  else
    for (int64_t e = 0; e < n; ++e) out[e] = load<C>(x[e * stride]);
}

template <class C>
FASTCL_CLONES void scale_block(const C* in, C* x, int64_t n, C scale) {
#pragma GCC ivdep
  for (int64_t e = 0; e < n; ++e) x[e] = in[e] * scale;
}

// The loops below may work in place: in is x, or shares nothing with it.
template <class C, class I>
FASTCL_CLONES void soften_block(const C* in, C* x, int64_t n, const char* importance, C strength) {
  const I* i = reinterpret_cast<const I*>(importance);
  const Softened<C> op{strength};
#pragma GCC ivdep
  for (int64_t e = 0; e < n; ++e) x[e] = op(in[e], i[e]);
}

template <class C>
void soften(const C* in, C* x, int64_t n, const char* importance, DType dtype, C strength) {
  with_stored(dtype, [&](auto t) { soften_block<C, typename decltype(t)::type>(in, x, n, importance, strength); });
}

template <class C, class R>
FASTCL_CLONES void project_block(const C* in, C* x, int64_t n, const char* reference, double coefficient) {
  const R* r = reinterpret_cast<const R*>(reference);
  const Projected<C> op{coefficient};
#pragma GCC ivdep
  for (int64_t e = 0; e < n; ++e) x[e] = op(in[e], r[e]);
}

template <class C>
FASTCL_CLONES void pull_block(const C* in, C* x, int64_t n, const C* theta, const C* precision, const C* anchor, double strength) {
  const auto op = Pull<C>::make(strength);
#pragma GCC ivdep
  for (int64_t e = 0; e < n; ++e) x[e] = op(in[e], theta[e], precision[e], anchor[e]);
}

// Bits into lanes: every byte's bits side by side, in as many bytes as a number has.
template <class C>
struct Bitwise;
template <>
struct Bitwise<float> {
  typedef int32_t Lanes __attribute__((vector_size(32)));
};
template <>
struct Bitwise<double> {
  typedef int64_t Lanes __attribute__((vector_size(64)));
};

template <class C>
FASTCL_CLONES void select_block(const C* in, C* x, int64_t n, const uint8_t* bits, int64_t index, int64_t stride) {
  using Lanes = typename Bitwise<C>::Lanes;
  const Selected<C> op;
  int64_t e = 0;
  if (stride == 1) {
    for (; e < n && (index + e) % 8 != 0; ++e) x[e] = op(in[e], bit_at(bits, index + e));
    const Lanes lane = {1, 2, 4, 8, 16, 32, 64, 128};
    for (; e + 8 <= n; e += 8) {
      const Lanes byte = Lanes{} + bits[(index + e) >> 3];
      Lanes g;
      memcpy(&g, in + e, sizeof(g));
      g &= (byte & lane) != 0;
      memcpy(x + e, &g, sizeof(g));
    }
  }
  for (; e < n; ++e) x[e] = op(in[e], bit_at(bits, index + e * stride));
}

template <class C>
FASTCL_CLONES void keep_block(const C* in, C* x, int64_t n, const ChildDraw& draw, int64_t index, int64_t stride, uint32_t place,
                              uint32_t step) {
  static_assert(GradientSweep::kBlock <= kMostChildBits, "a block's bits are drawn at once");
  const Drawn<C> op{C(draw.scale)};
  ChildBits bits(draw);
  const uint16_t* drawn = bits.draw(index, stride, n, place, step);
  const uint32_t bound = bits.bound();
#pragma GCC ivdep
  for (int64_t e = 0; e < n; ++e) x[e] = op(in[e], drawn[e] < bound);
}

}  // namespace

GradientSweep::GradientSweep(const OptimizerInputs& inputs, const Views* dotted) : inputs_(inputs), slots_(kFixed) {
  for (const Transform& t : inputs.transforms) slots_ += t.kind == TransformKind::pull ? 2 : 1;
  slots_ += dotted != nullptr;
  const size_t tensors = inputs.params.size();
  items_.reserve(tensors);
  table_.reserve(tensors * size_t(slots_));
  std::vector<const View*> row(static_cast<size_t>(slots_));
  std::deque<View> indices;  // views without memory: where an element lies in an order of its own
  std::vector<int64_t> dense;
  for (size_t i = 0; i < tensors; ++i) {
    const View& param = inputs.params[i];
    if (param.numel() == 0) continue;
    bool plain = true;
    size_t filled = 0;
    const auto add = [&](const View* view) {
      const bool present = view != nullptr && view->numel() > 0;
      row[filled++] = present ? view : &param;
      table_.push_back({present ? view->data : nullptr, present ? view->dtype : DType::other});
      plain = plain && row[filled - 1]->contiguous && row[filled - 1]->elements == param.elements;
    };
    const auto add_index = [&](const int64_t* strides, char* data) {
      if (strides == nullptr && param.contiguous) {
        row[filled++] = &param;
      } else {
        if (strides == nullptr) {
          dense.assign(size_t(param.ndim), 1);
          for (int d = param.ndim - 1; d > 0; --d) dense[size_t(d - 1)] = dense[size_t(d)] * param.shape[d];
        }
        strides_.emplace_back(strides == nullptr ? dense : std::vector<int64_t>(strides, strides + param.ndim));
        indices.emplace_back(nullptr, param.shape, strides_.back().data(), param.ndim, DType::u8, Device::cpu, 0);
        row[filled++] = &indices.back();
        plain = plain && indices.back().contiguous;
      }
      table_.push_back({data, DType::u8});
    };
    const bool compact = !inputs.bits.empty() && inputs.bits[i].numel() > 0;
    const Place place = inputs.places.empty() ? Place{int64_t(i), 0, nullptr} : inputs.places[i];
    add(&param);
    add(&inputs.grads[i]);
    add(inputs.first.empty() || compact ? nullptr : &inputs.first[i]);
    add(inputs.second.empty() || compact ? nullptr : &inputs.second[i]);
    for (const Transform& t : inputs.transforms) {
      if (t.kind == TransformKind::child_mask)
        add_index(place.strides, nullptr);
      else if (t.kind == TransformKind::fixed_mask)
        add_index(nullptr, t.operand[i].numel() > 0 ? t.operand[i].data : nullptr);
      else
        add(&t.operand[i]);
      if (t.kind == TransformKind::pull) add(t.operand[i].numel() > 0 ? &t.anchor[i] : nullptr);
    }
    if (dotted != nullptr) add(&(*dotted)[i]);
    const Layout* layout = nullptr;
    if (!plain) {
      layout = &layouts_.emplace_back(coalesce(row.data(), slots_));
      if (layout->ndim() == 1 && std::count(layout->strides.begin(), layout->strides.end(), 1) == slots_) layout = nullptr;
    }
    const uint32_t step = inputs.steps.empty() ? 0 : draw_step(*reinterpret_cast<const float*>(inputs.steps[i].data));
    items_.push_back({total_, i, layout, place.offset, uint32_t(place.tensor), step, compact});
    total_ += param.numel();
  }
}

template <class C>
void widen_block(const char* data, DType dtype, int64_t stride, int64_t n, C* out) {
  with_stored(dtype, [&](auto t) { widen_run<typename decltype(t)::type, C>(data, stride, n, out); });
}
template void widen_block<float>(const char*, DType, int64_t, int64_t, float*);
template void widen_block<double>(const char*, DType, int64_t, int64_t, double*);

template <class C>
constexpr DType kComputed = sizeof(C) == 8 ? DType::f64 : DType::f32;

template <class C>
const C* GradientBlock<C>::widened(const GradientSweep::Run& run, int slot, int64_t done, int64_t n, C* buffer) {
  const char* data = run.at(slot, done);
  const DType dtype = run.slots[slot].dtype;
  if (dtype == kComputed<C> && run.stride(slot) == 1) return reinterpret_cast<const C*>(data);
  widen_block<C>(data, dtype, run.stride(slot), n, buffer);
  return buffer;
}

template <class C>
const C* GradientBlock<C>::transformed(const GradientSweep& sweep, const GradientSweep::Run& run, int64_t done, int64_t n) {
  const OptimizerInputs& inputs = sweep.inputs();
  const C* x = widened(run, GradientSweep::kGrad, done, n, x_);
  if (!inputs.scale.empty()) {
    const View& s = inputs.scale[0];
    scale_block(x, x_, n, s.dtype == DType::f64 ? C(*reinterpret_cast<const double*>(s.data)) : C(*reinterpret_cast<const float*>(s.data)));
    x = x_;
  }
  int slot = GradientSweep::kFixed;
  for (const Transform& t : inputs.transforms) {
    const int own = slot;
    slot += t.kind == TransformKind::pull ? 2 : 1;
    const GradientSweep::Slot& operand = run.slots[own];
    if (t.kind == TransformKind::child_mask) {
      keep_block(x, x_, n, ChildDraw::make(t.number, t.seed), run.item.offset + run.index(own, done), run.stride(own), run.item.place,
                 run.item.step);
    } else if (operand.data == nullptr) {
      continue;
    } else if (t.kind == TransformKind::fixed_mask) {
      select_block(x, x_, n, reinterpret_cast<const uint8_t*>(operand.data), run.index(own, done), run.stride(own));
    } else if (t.kind == TransformKind::soft_mask) {
      if (run.stride(own) == 1) {
        soften(x, x_, n, run.at(own, done), operand.dtype, C(t.number));
      } else {
        widen_block<C>(run.at(own, done), operand.dtype, run.stride(own), n, operand_[0]);
        soften(x, x_, n, reinterpret_cast<const char*>(operand_[0]), kComputed<C>, C(t.number));
      }
    } else if (t.kind == TransformKind::project) {
      const double coefficient = *reinterpret_cast<const double*>(t.coefficient[0].data);
      if (coefficient == 0) continue;
      const char* reference = run.at(own, done);
      DType dtype = operand.dtype;
      if (run.stride(own) != 1) {
        widen_block<double>(reference, dtype, run.stride(own), n, reference_);
        reference = reinterpret_cast<const char*>(reference_);
        dtype = DType::f64;
      }
      with_floating(dtype, [&](auto r) { project_block<C, typename decltype(r)::type>(x, x_, n, reference, coefficient); });
    } else {
      const C* theta = widened(run, GradientSweep::kParam, done, n, operand_[0]);
      const C* precision = widened(run, own, done, n, operand_[1]);
      const C* anchor = widened(run, own + 1, done, n, operand_[2]);
      pull_block(x, x_, n, theta, precision, anchor, t.number);
    }
    x = x_;
  }
  return x;
}

template class GradientBlock<float>;
template class GradientBlock<double>;

}  // namespace fastcl::cpu
