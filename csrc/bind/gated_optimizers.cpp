#include "bind/gated_optimizers.h"

#include <cmath>

namespace py = pybind11;

namespace fastcl::bind {
namespace {

constexpr std::optional<size_t> kNone = std::nullopt;

bool computes_in_double(const View& param) { return param.dtype == DType::f64; }

bool same_strides(const View& a, const View& b) {
  for (int d = 0; d < a.ndim; ++d)
    if (a.shape[d] > 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}

// The elements of a list or tuple, or nothing.
py::object tuple_of(py::handle value) {
  if (PyTuple_CheckExact(value.ptr())) return py::reinterpret_borrow<py::object>(value);
  if (!PyList_CheckExact(value.ptr())) return {};
  auto out = py::reinterpret_steal<py::object>(PyList_AsTuple(value.ptr()));
  if (!out) throw py::error_already_set();
  return out;
}

bool equals(py::handle text, const char* word) {
  return PyUnicode_CheckExact(text.ptr()) && PyUnicode_CompareWithASCIIString(text.ptr(), word) == 0;
}

}  // namespace

bool OptimizerArguments::take_gradients(const Object& params, Access access, const Object& grads) {
  return gate.take("params", params, access, false, inputs.params) && gate.take("grads", grads, Access::reads, false, inputs.grads) &&
         gate.same_shapes("grads", inputs.grads, inputs.params);
}

bool OptimizerArguments::take_state(const char* name, const Object& list, Views& out) {
  if (!gate.take(name, list, Access::writes, false, out) || !gate.same_length(name, out.size(), inputs.params.size())) return false;
  for (size_t i = 0; i < out.size(); ++i) {
    const View &state = out[i], &param = inputs.params[i];
    if (!gate.require(state.dtype == (computes_in_double(param) ? DType::f64 : DType::f32), name, i,
                      "is not of the dtype that its parameter computes in"))
      return false;
    if (!inputs.bits.empty() && inputs.bits[i].numel() > 0) {
      if (!gate.require(state.ndim == 1 && state.contiguous && state.elements <= param.elements, name, i, "is no compact state"))
        return false;
    } else if (!gate.require(same_shape(state, param), name, i, "has another shape") ||
               !gate.require((state.contiguous && param.contiguous) || same_strides(state, param), name, i, "is non-contiguous state")) {
      return false;
    }
  }
  return true;
}

bool OptimizerArguments::take_steps(const Object& steps, Access access, bool optional) {
  if (!gate.take("steps", steps, access, false, inputs.steps)) return false;
  if (!(optional && inputs.steps.empty()) && !gate.same_length("steps", inputs.steps.size(), inputs.params.size())) return false;
  for (size_t i = 0; i < inputs.steps.size(); ++i)
    if (!gate.require(inputs.steps[i].ndim == 0 && inputs.steps[i].dtype == DType::f32, "steps", i, "is not a float32 number"))
      return false;
  return true;
}

bool OptimizerArguments::take_bits(const char* name, py::handle list, Views& out) {
  if (!gate.take(name, list, Access::reads, true, out) || !gate.same_length(name, out.size(), inputs.params.size())) return false;
  for (size_t i = 0; i < out.size(); ++i) {
    const View& bits = out[i];
    if (!gate.require(bits.dtype == DType::u8 && bits.ndim == 1 && bits.contiguous &&
                          (bits.elements == 0 || bits.elements == (inputs.params[i].elements + 7) / 8),
                      name, i, "is not uint8 with a bit for each element"))
      return false;
  }
  return true;
}

bool OptimizerArguments::take_transform(py::handle transform, Transform& out) {
  constexpr const char* unknown = "is not a tuple of a known kind and its operands";
  if (!gate.require(PyTuple_CheckExact(transform.ptr()), "transforms", kNone, unknown)) return false;
  const py::ssize_t size = PyTuple_GET_SIZE(transform.ptr());
  const auto item = [&](py::ssize_t k) { return py::handle(PyTuple_GET_ITEM(transform.ptr(), k)); };
  const auto is = [&](const char* kind, py::ssize_t operands) { return size == operands + 1 && equals(item(0), kind); };
  const Views& params = inputs.params;
  // An operand without elements leaves its tensor out.
  const auto fits = [&](const char* name, const Views& list, bool broadcasts_too) {
    if (!gate.same_length(name, list.size(), params.size())) return false;
    for (size_t i = 0; i < list.size(); ++i) {
      const bool left_out = list[i].elements == 0 && params[i].elements > 0;
      if (!left_out && !gate.require(broadcasts_too ? broadcasts(list[i], params[i]) : same_shape(list[i], params[i]), name, i,
                                     broadcasts_too ? "does not broadcast" : "has another shape"))
        return false;
    }
    return true;
  };
  if (is("soft_mask", 2)) {
    out.kind = TransformKind::soft_mask;
    return gate.take("importance", item(1), Access::reads, true, out.operand) && fits("importance", out.operand, true) &&
           gate.take_number("strength", item(2), 1, out.number);
  }
  if (is("child_mask", 2)) {
    out.kind = TransformKind::child_mask;
    return gate.take_positive("keep", item(1), 1, out.number) && gate.take_unsigned("seed", item(2), ~uint64_t(0), out.seed) &&
           gate.require(inputs.steps.size() == params.size(), "steps", kNone, "has another length");
  }
  if (is("fixed_mask", 1)) {
    out.kind = TransformKind::fixed_mask;
    return take_bits("masks", item(1), out.operand);
  }
  if (is("project", 2)) {
    out.kind = TransformKind::project;
    return gate.take("reference", item(1), Access::reads, false, out.operand) && fits("reference", out.operand, false) &&
           gate.take("coefficient", py::make_tuple(item(2)), Access::reads, false, out.coefficient) &&
           scalar("coefficient", out.coefficient, true, false, true);
  }
  if (is("pull", 3)) {
    out.kind = TransformKind::pull;
    if (!(gate.take("precision", item(1), Access::reads, false, out.operand) && fits("precision", out.operand, false) &&
          gate.take("anchor", item(2), Access::reads, false, out.anchor) && gate.same_length("anchor", out.anchor.size(), params.size()) &&
          gate.take_number("strength", item(3), kAny, out.number)))
      return false;
    for (size_t i = 0; i < params.size(); ++i)
      if ((out.operand[i].elements > 0 || params[i].elements == 0) &&
          !gate.require(same_shape(out.anchor[i], params[i]), "anchor", i, "has another shape"))
        return false;
    return true;
  }
  return gate.require(false, "transforms", kNone, unknown);
}

bool OptimizerArguments::take_transforms(const Object& transforms) {
  const py::object items = tuple_of(transforms);
  if (!gate.require(bool(items), "transforms", kNone, "is not a list or tuple")) return false;
  inputs.transforms.resize(size_t(PyTuple_GET_SIZE(items.ptr())));
  for (size_t t = 0; t < inputs.transforms.size(); ++t)
    if (!take_transform(PyTuple_GET_ITEM(items.ptr(), py::ssize_t(t)), inputs.transforms[t])) return false;
  return true;
}

bool OptimizerArguments::take_places(const Object& places) {
  if (places.is_none()) return true;
  const bool passed = places_.take(gate, "places", places, inputs.params);
  inputs.places = places_.all;
  return passed;
}

bool OptimizerArguments::take_compact(const Object& compact) {
  if (compact.is_none()) return true;
  const py::object items = tuple_of(compact);
  if (!gate.require(items && PyTuple_GET_SIZE(items.ptr()) == 2, "compact", kNone, "is not a list of bits and one of ranks")) return false;
  if (!(take_bits("bits", PyTuple_GET_ITEM(items.ptr(), 0), inputs.bits) &&
        gate.take_int64("ranks", PyTuple_GET_ITEM(items.ptr(), 1), inputs.ranks) &&
        gate.same_length("ranks", inputs.ranks.size(), inputs.params.size())))
    return false;
  for (size_t i = 0; i < inputs.params.size(); ++i) {
    if (inputs.bits[i].elements == 0) continue;
    const View &param = inputs.params[i], &ranks = inputs.ranks[i];
    if (!gate.require(param.contiguous, "params", i, "is not contiguous, and its state is compact") ||
        !gate.require(ranks.ndim == 1 && ranks.contiguous && ranks.elements == (param.elements + kRankBlock - 1) / kRankBlock, "ranks", i,
                      "does not have a number for each block of 2048 elements"))
      return false;
  }
  return true;
}

bool OptimizerArguments::scalar(const char* name, const Views& list, bool accepts_f64, bool accepts_f32, bool any_shape) {
  for (const View& v : list)
    if (!gate.require(v.elements == 1 && (any_shape || v.ndim == 0) &&
                          ((accepts_f64 && v.dtype == DType::f64) || (accepts_f32 && v.dtype == DType::f32)),
                      name, kNone, "is not one number of a dtype that is accepted"))
      return false;
  return true;
}

bool OptimizerArguments::take_scalars(const Object& scale, const Object& found_inf) {
  return gate.take_optional("scale", scale, inputs.scale) && scalar("scale", inputs.scale, true, true, false) &&
         gate.take_optional("found_inf", found_inf, inputs.found_inf) && scalar("found_inf", inputs.found_inf, false, true, true);
}

bool OptimizerArguments::take_lr(const Object& lr, double& number) {
  if (PyFloat_Check(lr.ptr()) || PyLong_Check(lr.ptr())) return gate.take_number("lr", lr, kAny, number);
  return gate.take("lr", py::make_tuple(lr), Access::reads, false, inputs.lr) && scalar("lr", inputs.lr, true, true, false);
}

bool OptimizerArguments::apart() {
  std::vector<const Views*> reads{&inputs.grads, &inputs.bits, &inputs.ranks, &inputs.scale, &inputs.found_inf, &inputs.lr};
  for (const Transform& t : inputs.transforms) reads.insert(reads.end(), {&t.operand, &t.anchor, &t.coefficient});
  return gate.apart({&inputs.params, &inputs.first, &inputs.second, &inputs.steps}, reads);
}

}  // namespace fastcl::bind
