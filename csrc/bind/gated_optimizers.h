// The optimizers behind the gate. Functions return None (transformed_dot: a float64 tensor), or a string that says why the call was refused
// and that nothing was written.
#pragma once

#include <limits>

#include "bind/gated.h"
#include "bind/gated_child_mask.h"
#include "core/optimizers.h"
#include "core/transforms.h"

namespace fastcl::bind {

// The arguments that the optimizers have in common, taken one by one; each function returns whether all is well so far.
class OptimizerArguments {
 public:
  using Object = pybind11::object;
  static constexpr double kAny = std::numeric_limits<double>::max();

  OptimizerInputs inputs;
  Gate gate;

  OptimizerArguments(Device device, bool grad_mode) : gate(device, grad_mode) {}

  bool take_gradients(const Object& params, Access access, const Object& grads);
  // Moments or momentum buffers: with the parameters' layouts, in the type that these compute in; but compact where there are bits.
  bool take_state(const char* name, const Object& list, Views& out);
  bool take_steps(const Object& steps, Access access, bool optional);
  bool take_transforms(const Object& transforms);
  bool take_places(const Object& places);
  bool take_compact(const Object& compact);
  bool take_scalars(const Object& scale, const Object& found_inf);
  bool take_lr(const Object& lr, double& number);
  bool apart();

 private:
  Places places_;  // owns the strides

  bool take_transform(pybind11::handle transform, Transform& out);
  bool take_bits(const char* name, pybind11::handle list, Views& out);
  bool scalar(const char* name, const Views& list, bool accepts_f64, bool accepts_f32, bool any_shape);
};

template <class Backend>
struct GatedOptimizers {
  using Object = pybind11::object;

  static Object adamw_(const Object& params, const Object& grads, const Object& exp_avgs, const Object& exp_avg_sqs, const Object& steps,
                       const Object& transforms, const Object& places, const Object& compact, const Object& scale, const Object& found_inf,
                       const Object& lr, const Object& beta1, const Object& beta2, const Object& eps, const Object& weight_decay, bool hf,
                       bool maximize, bool grad_mode) {
    OptimizerArguments a(Backend::kind, grad_mode);
    AdamWRule rule{0, 0, 0, 0, 0, hf, maximize};
    if (!(a.take_gradients(params, Access::writes, grads) && a.take_compact(compact) &&
          a.take_state("exp_avgs", exp_avgs, a.inputs.first) && a.take_state("exp_avg_sqs", exp_avg_sqs, a.inputs.second) &&
          a.take_steps(steps, Access::writes, false) && a.take_transforms(transforms) && a.take_places(places) &&
          a.take_scalars(scale, found_inf) && a.take_lr(lr, rule.lr) && a.gate.take_number("beta1", beta1, 1, rule.beta1) &&
          a.gate.require(rule.beta1 < 1, "beta1", std::nullopt, "is not below 1") && a.gate.take_number("beta2", beta2, 1, rule.beta2) &&
          a.gate.require(rule.beta2 < 1, "beta2", std::nullopt, "is not below 1") &&
          a.gate.take_number("eps", eps, OptimizerArguments::kAny, rule.eps) &&
          a.gate.take_number("weight_decay", weight_decay, OptimizerArguments::kAny, rule.weight_decay) && a.apart()))
      return a.gate.verdict();
    return Gated<Backend>::run(a.gate, [&](Backend& backend) { backend.adamw_(a.inputs, rule); });
  }

  static Object sgd_(const Object& params, const Object& grads, const Object& momentum_buffers, const Object& steps,
                     const Object& transforms, const Object& places, const Object& scale, const Object& found_inf, const Object& lr,
                     const Object& momentum, const Object& dampening, const Object& weight_decay, bool nesterov, bool maximize, bool first,
                     bool grad_mode) {
    OptimizerArguments a(Backend::kind, grad_mode);
    SGDRule rule{0, 0, 0, 0, nesterov, maximize, first};
    if (!(a.take_gradients(params, Access::writes, grads) &&
          a.gate.take_number("momentum", momentum, OptimizerArguments::kAny, rule.momentum)))
      return a.gate.verdict();
    const bool passed = rule.momentum != 0 ? a.take_state("momentum_buffers", momentum_buffers, a.inputs.first)
                                           : a.gate.take("momentum_buffers", momentum_buffers, Access::writes, false, a.inputs.first) &&
                                                 a.gate.same_length("momentum_buffers", a.inputs.first.size(), 0);
    if (!(passed && a.take_steps(steps, Access::writes, true) && a.take_transforms(transforms) && a.take_places(places) &&
          a.take_scalars(scale, found_inf) && a.take_lr(lr, rule.lr) &&
          a.gate.take_number("dampening", dampening, OptimizerArguments::kAny, rule.dampening) &&
          a.gate.take_number("weight_decay", weight_decay, OptimizerArguments::kAny, rule.weight_decay) && a.apart()))
      return a.gate.verdict();
    return Gated<Backend>::run(a.gate, [&](Backend& backend) { backend.sgd_(a.inputs, rule); });
  }

  static Object transformed_dot(const Object& params, const Object& grads, const Object& steps, const Object& transforms,
                                const Object& places, const Object& scale, const Object& reference, bool grad_mode) {
    OptimizerArguments a(Backend::kind, grad_mode);
    Views r;
    if (!(a.take_gradients(params, Access::reads, grads) && a.take_steps(steps, Access::reads, true) && a.take_transforms(transforms) &&
          a.take_places(places) && a.take_scalars(scale, pybind11::none()) &&
          a.gate.take("reference", reference, Access::reads, false, r) && a.gate.same_shapes("reference", r, a.inputs.params)))
      return a.gate.verdict();
    NewTensor out(Backend::device_type, std::max(a.gate.device_index(), 0), {dlpack::kFloat, 64, 1}, {2});
    const Object refused =
        Gated<Backend>::run(a.gate, [&](Backend& backend) { backend.transformed_dot(a.inputs, r, out.template data<double>()); });
    return refused.is_none() ? out.to_python() : refused;
  }
};

template <class Backend>
void define_optimizers(pybind11::module_& m) {
  using pybind11::arg;
  using Family = GatedOptimizers<Backend>;
  m.def("adamw_", &Family::adamw_, arg("params"), arg("grads"), arg("exp_avgs"), arg("exp_avg_sqs"), arg("steps"), arg("transforms"),
        arg("places"), arg("compact"), arg("scale"), arg("found_inf"), arg("lr"), arg("beta1"), arg("beta2"), arg("eps"),
        arg("weight_decay"), arg("hf"), arg("maximize"), arg("grad_mode"));
  m.def("sgd_", &Family::sgd_, arg("params"), arg("grads"), arg("momentum_buffers"), arg("steps"), arg("transforms"), arg("places"),
        arg("scale"), arg("found_inf"), arg("lr"), arg("momentum"), arg("dampening"), arg("weight_decay"), arg("nesterov"), arg("maximize"),
        arg("first"), arg("grad_mode"));
  m.def("transformed_dot", &Family::transformed_dot, arg("params"), arg("grads"), arg("steps"), arg("transforms"), arg("places"),
        arg("scale"), arg("reference"), arg("grad_mode"));
}

}  // namespace fastcl::bind
