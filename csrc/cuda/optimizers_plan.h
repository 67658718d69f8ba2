// The lists of an optimizer's sweep and their program. Host code.
#pragma once

#include "cuda/lists.h"
#include "cuda/optimizers.h"

namespace fastcl::cuda {

inline DeviceNumber device_number(const Views& list) {
  return list.empty() ? DeviceNumber{nullptr, false} : DeviceNumber{list[0].data, list[0].dtype == DType::f64};
}
inline const float* flag(const Views& list) { return list.empty() ? nullptr : reinterpret_cast<const float*>(list[0].data); }

// Operands of one tensor's entry, those of the transforms behind what the optimizer itself has.
class EntryOperands {
 public:
  std::vector<const View*> views;
  std::vector<int64_t> notes;

  explicit EntryOperands(const View& param) : param_(param) {}
  void add(const View& view, int64_t item = 0) {
    const bool present = view.numel() > 0;
    views.push_back(present ? &view : &param_);
    notes.push_back(present ? operand_note(view.dtype, item) : kAbsent);
  }
  // What lies in another order, of which an address is all that is known.
  void add_address(const void* data, int64_t note = 0) {
    addresses_.emplace_back(static_cast<char*>(const_cast<void*>(data)), param_.shape, param_.strides, param_.ndim, DType::other,
                            param_.device, param_.device_index);
    views.push_back(&addresses_.back());
    notes.push_back(note);
  }
  void add_index(const void* origin, const int64_t* strides, int64_t note) {
    indices_.emplace_back(param_, origin, strides);
    views.push_back(&indices_.back().view());
    notes.push_back(note);
  }
  void add_transforms(const OptimizerInputs& inputs, size_t i) {
    for (const Transform& t : inputs.transforms) {
      if (t.kind == TransformKind::child_mask) {
        const Place place = inputs.places.empty() ? Place{int64_t(i), 0, nullptr} : inputs.places[i];
        add_index(counted_from(place.offset), place.strides, place.tensor);
      } else if (t.kind == TransformKind::fixed_mask) {
        add_index(t.operand[i].data, nullptr, t.operand[i].numel() > 0 ? 0 : kAbsent);
      } else {
        add(t.operand[i]);
      }
      if (t.kind == TransformKind::pull) add(t.anchor[i]);
    }
  }

 private:
  const View& param_;
  std::deque<View> addresses_;
  std::deque<Index> indices_;
};

inline int operands_of(const OptimizerInputs& inputs) {
  int operands = 0;
  for (const Transform& t : inputs.transforms) operands += t.kind == TransformKind::pull ? 2 : 1;
  return operands;
}

// The transforms' operands start behind the first ones.
inline Program program_of(const OptimizerInputs& inputs, int first) {
  if (inputs.transforms.size() > size_t(kMostTransforms))
    throw Refusal("transforms", size_t(kMostTransforms), "is more than the CUDA kernels take");
  Program out{};
  for (const Transform& t : inputs.transforms) {
    const bool draws = t.kind == TransformKind::child_mask, projects = t.kind == TransformKind::project;
    out.steps[out.count++] = {t.kind, first, t.number, draws ? ChildDraw::make(t.number, t.seed) : ChildDraw{},
                              projects ? reinterpret_cast<const double*>(t.coefficient[0].data) : nullptr};
    out.pulls = out.pulls || t.kind == TransformKind::pull;
    first += t.kind == TransformKind::pull ? 2 : 1;
  }
  return out;
}

// The sweep over all tensors, or over those with compact state alone.
struct SweepPlan {
  ByCompute lists;
  Sweep sweep;

  SweepPlan(const OptimizerInputs& inputs, const Views* dotted, bool compact)
      : lists(first_operand(inputs, compact) + operands_of(inputs) + (dotted != nullptr)),
        sweep{program_of(inputs, first_operand(inputs, compact)), device_number(inputs.scale), flag(inputs.found_inf), nullptr} {
    for (size_t i = 0; i < inputs.params.size(); ++i) {
      const View& param = inputs.params[i];
      if (param.numel() == 0 || compact != (!inputs.bits.empty() && inputs.bits[i].numel() > 0)) continue;
      EntryOperands operands(param);
      operands.add(param, int64_t(i));
      operands.add(inputs.grads[i]);
      if (compact) {
        operands.add_address(inputs.first[i].data);
        operands.add_address(inputs.second[i].data);
        operands.add_address(inputs.bits[i].data, std::min(inputs.first[i].numel(), inputs.second[i].numel()));
        operands.add_address(inputs.ranks[i].data);
      } else {
        if (!inputs.first.empty()) operands.add(inputs.first[i]);
        if (!inputs.second.empty()) operands.add(inputs.second[i]);
      }
      operands.add_transforms(inputs, i);
      if (dotted != nullptr) operands.add((*dotted)[i]);
      lists.add("params", i, param.dtype == DType::f64, operands.views, operands.notes);
    }
  }

 private:
  static int first_operand(const OptimizerInputs& inputs, bool compact) {
    return compact ? kRanks + 1 : kGrad + 1 + !inputs.first.empty() + !inputs.second.empty();
  }
};

// A row of the table of steps for each tensor, elements or not.
inline List steps_list(const Views& steps) {
  List list(1, 1, false, false);
  for (size_t i = 0; i < steps.size(); ++i) {
    const View* view = &steps[i];
    if (const char* reason = list.add(&view, 1)) throw Refusal("steps", i, reason);
  }
  return list;
}
inline int64_t row_doubles(const List& steps) { return int64_t(steps.entries().size() * sizeof(StepRow) / sizeof(double)); }

}  // namespace fastcl::cuda
