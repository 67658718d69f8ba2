// The child mask behind the gate. Returns None, or a string that says why the call was refused and that nothing was written.
#pragma once

#include <deque>

#include "bind/gated.h"
#include "core/child_mask.h"

namespace fastcl::bind {

// Where tensors lie in their whole parameters, from Python: None, or a list or tuple with a tuple (tensor index, offset, strides) for each.
class Places {
 public:
  // False: refused by the gate.
  bool take(Gate& gate, const char* name, pybind11::handle places, const Views& tensors) {
    if (places.is_none()) {
      for (size_t i = 0; i < tensors.size(); ++i) all.push_back({int64_t(i), 0, nullptr});
      return true;
    }
    if (!is_sequence(places)) return gate.refuse(name, std::nullopt, "is not a list or tuple");
    if (!gate.same_length(name, size_of(places), tensors.size())) return false;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const pybind11::handle row = at(places, i);
      Place place{};
      if (!PyTuple_CheckExact(row.ptr()) || size_of(row) != 3 || !is_sequence(at(row, 2)) || size_of(at(row, 2)) != size_t(tensors[i].ndim))
        return gate.refuse(name, i, "is not a tuple (tensor index, offset, a stride for each dimension)");
      bool fits = integer(at(row, 0), place.tensor) && place.tensor <= 0xffffffffll && integer(at(row, 1), place.offset);
      std::vector<int64_t>& strides = strides_.emplace_back(size_t(tensors[i].ndim));
      int64_t last = place.offset;
      for (size_t d = 0; fits && d < strides.size(); ++d) {
        const int64_t steps = tensors[i].shape[d] - 1;
        fits = integer(at(at(row, 2), d), strides[d]) && (steps <= 0 || strides[d] <= (kMost - last) / steps);
        if (fits && steps > 0) last += steps * strides[d];
      }
      if (!fits) return gate.refuse(name, i, "has a number that is no index");
      place.strides = strides.data();
      all.push_back(place);
    }
    return true;
  }

  std::vector<Place> all;

 private:
  static constexpr int64_t kMost = int64_t(1) << 62;
  std::deque<std::vector<int64_t>> strides_;  // a deque: the places point into it

  static bool is_sequence(pybind11::handle h) { return PyTuple_CheckExact(h.ptr()) || PyList_CheckExact(h.ptr()); }
  static size_t size_of(pybind11::handle h) { return size_t(PySequence_Fast_GET_SIZE(h.ptr())); }
  static pybind11::handle at(pybind11::handle h, size_t i) { return PySequence_Fast_GET_ITEM(h.ptr(), Py_ssize_t(i)); }
  static bool integer(pybind11::handle h, int64_t& out) {
    if (!PyLong_CheckExact(h.ptr())) return false;
    int overflow = 0;
    out = PyLong_AsLongLongAndOverflow(h.ptr(), &overflow);
    return overflow == 0 && out >= 0 && out <= kMost;
  }
};

template <class Backend>
struct GatedChildMask {
  using Object = pybind11::object;

  static Object at_(const Object& grads, const Object& keep, const Object& seed, const Object& step, const Object& places, bool grad_mode) {
    Gate gate(Backend::kind, grad_mode);
    Views g;
    double k = 0;
    uint64_t key = 0, s = 0;
    Places where;
    if (!(gate.take("grads", grads, Access::writes, false, g) && gate.take_positive("keep", keep, 1, k) &&
          gate.take_unsigned("seed", seed, ~uint64_t(0), key) && gate.take_unsigned("step", step, 0xffffffffu, s) &&
          where.take(gate, "places", places, g) && gate.apart(g, {})))
      return gate.verdict();
    return Gated<Backend>::run(gate, [&](Backend& backend) { backend.child_mask_at_(g, k, key, uint32_t(s), where.all); });
  }

  static Object whole_(const Object& grads, const Object& keep, const Object& seed, const Object& step, bool grad_mode) {
    return at_(grads, keep, seed, step, pybind11::none(), grad_mode);
  }
};

template <class Backend>
void define_child_mask(pybind11::module_& m) {
  using pybind11::arg;
  m.def("child_mask_", &GatedChildMask<Backend>::whole_, arg("grads"), arg("keep"), arg("seed"), arg("step"), arg("grad_mode"));
  m.def("child_mask_at_", &GatedChildMask<Backend>::at_, arg("grads"), arg("keep"), arg("seed"), arg("step"), arg("places"),
        arg("grad_mode"));
}

}  // namespace fastcl::bind
