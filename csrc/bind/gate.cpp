#include "bind/gate.h"

#include <cmath>

#include "bind/torch_runtime.h"
#include "core/bit_mask.h"

namespace py = pybind11;

namespace fastcl::bind {
namespace {

DType dtype_of(dlpack::DataType t) {
  if (t.lanes != 1) return DType::other;
  if (t.code == dlpack::kFloat) return t.bits == 64 ? DType::f64 : t.bits == 32 ? DType::f32 : t.bits == 16 ? DType::f16 : DType::other;
  if (t.code == dlpack::kBFloat && t.bits == 16) return DType::bf16;
  if (t.code == dlpack::kInt && t.bits == 64) return DType::i64;
  return t.code == dlpack::kUInt && t.bits == 8 ? DType::u8 : DType::other;
}

Device device_of(dlpack::Device d) { return d.type == dlpack::kCPU ? Device::cpu : d.type == dlpack::kCUDA ? Device::cuda : Device::other; }

// The strides of a freshly made tensor of more than one element, also where a size is 1, or rows without gaps between their elements. Views
// of complex memory, the only ones that can be lazily negated, never have them (all their strides are even) unless as_strided is told to
// make them up.
bool has_real_strides(const View& v) {
  if (v.ndim == 2 && v.shape[1] > 1 && v.strides[1] == 1) return true;
  int64_t expected = 1, elements = 1;
  for (int d = v.ndim - 1; d >= 0; --d) {
    if (v.strides[d] != expected) return false;
    expected *= v.shape[d] > 0 ? v.shape[d] : 1;
    elements *= v.shape[d];
  }
  return elements != 1;
}

// 1, 0, or -1 if the question itself failed.
int truth(PyObject* value) {
  if (value == nullptr) {
    PyErr_Clear();
    return -1;
  }
  const int result = value == Py_True ? 1 : value == Py_False ? 0 : -1;
  Py_DECREF(value);
  return result;
}

// A view into a storage without memory (resized to nothing, as sharded training does) reports its offset as its address. Real memory
// this low is rare, so that asking the storage costs nothing.
bool has_no_memory(PyObject* object, const void* data) {
  if (reinterpret_cast<uintptr_t>(data) >> 38 != 0) return false;
  try {
    return data == nullptr || py::handle(object).attr("untyped_storage")().attr("data_ptr")().cast<uintptr_t>() == 0;
  } catch (const py::error_already_set&) {
    return true;
  }
}

}  // namespace

bool Gate::refuse(const char* name, std::optional<size_t> index, const char* reason) {
  refusal_ = std::string(name) + (index ? "[" + std::to_string(*index) + "] " : " ") + reason;
  return false;
}

const char* Gate::view_of(PyObject* object, Access access, Dtypes dtypes, View& out) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  const TorchRuntime& torch = torch_runtime();
  if (Py_TYPE(object) != torch.tensor && Py_TYPE(object) != torch.parameter) return "is not an exact torch.Tensor or Parameter";
  dlpack::Tensor t;
  if (torch.api->tensor_from_object(object, &t) != 0) {
    PyErr_Clear();
    return "has no plain memory";
  }
  out =
      View{static_cast<char*>(t.data) + t.byte_offset, t.shape, t.strides, t.ndim, dtype_of(t.dtype), device_of(t.device), t.device.index};
  if (out.device != device_) return "is on another kind of device";
  if (device_index_ >= 0 && out.device_index != device_index_) return "is on another device";
  device_index_ = out.device_index;
  if (out.dtype == DType::other || (out.dtype == DType::i64) != (dtypes == Dtypes::int64) ||
      (out.dtype == DType::u8 && dtypes != Dtypes::stored))
    return "has a dtype that is not accepted";
  if (out.numel() > 0 && has_no_memory(object, out.data)) return "has no memory behind it";
  if ((reinterpret_cast<uintptr_t>(out.data) & uintptr_t(size_of(out.dtype) - 1)) != 0) return "is not aligned to its elements";
  if (grad_mode_ && access == Access::writes && truth(torch.requires_grad->get(object, torch.requires_grad->closure)) != 0)
    return "requires grad";
  if (!has_real_strides(out) && truth(PyObject_CallMethodNoArgs(object, is_neg)) != 0) return "is lazily negated";
  return nullptr;
}

bool Gate::take(const char* name, py::handle list, Access access, bool accepts_uint8, Views& out) {
  return take_list(name, list, access, accepts_uint8 ? Dtypes::stored : Dtypes::floating, out);
}

bool Gate::take_int64(const char* name, py::handle list, Views& out) { return take_list(name, list, Access::reads, Dtypes::int64, out); }

bool Gate::take_optional(const char* name, py::handle tensor, Views& out) {
  if (refusal_) return false;
  out.clear();
  return tensor.is_none() || take(name, py::make_tuple(tensor), Access::reads, false, out);
}

bool Gate::take_list(const char* name, py::handle list, Access access, Dtypes dtypes, Views& out) {
  if (refusal_) return false;
  py::object items;
  if (PyTuple_CheckExact(list.ptr())) {
    items = py::reinterpret_borrow<py::object>(list);
  } else if (PyList_CheckExact(list.ptr())) {
    items = py::reinterpret_steal<py::object>(PyList_AsTuple(list.ptr()));
    if (!items) throw py::error_already_set();
  } else {
    return refuse(name, std::nullopt, "is not a list or tuple");
  }
  const size_t n = size_t(PyTuple_GET_SIZE(items.ptr()));
  out.resize(n);
  for (size_t i = 0; i < n; ++i) {
    // Thousands of tensors are thousands of cache misses, one after the other; fetching ahead overlaps them. The words after an object's
    // head are only guessed to be its address of the C++ tensor: a wrong guess fetches a useless line and harms nothing.
    if (i + 16 < n) __builtin_prefetch(PyTuple_GET_ITEM(items.ptr(), Py_ssize_t(i + 16)));
    PyObject* const soon = i + 8 < n ? PyTuple_GET_ITEM(items.ptr(), Py_ssize_t(i + 8)) : nullptr;
    if (soon != nullptr && Py_TYPE(soon) == torch_runtime().tensor) {  // anything else may be too small to have these words
      const auto* words = reinterpret_cast<void* const*>(soon + 1);
      for (int w = 0; w < 2; ++w)
        for (int line = 0; line < 3; ++line) __builtin_prefetch(static_cast<const char*>(words[w]) + 64 * line);
    }
    if (const char* reason = view_of(PyTuple_GET_ITEM(items.ptr(), Py_ssize_t(i)), access, dtypes, out[i])) return refuse(name, i, reason);
  }
  alive_.push_back(std::move(items));
  return true;
}

bool Gate::take_number(const char* name, py::handle value, double most, double& out) {
  if (refusal_) return false;
  // Nothing here may run Python code (a __float__ of its own), which could change the tensors that have passed.
  if (PyFloat_Check(value.ptr()))
    out = PyFloat_AS_DOUBLE(value.ptr());
  else if (PyLong_CheckExact(value.ptr()) || PyBool_Check(value.ptr()))
    out = PyLong_AsDouble(value.ptr());
  else
    return refuse(name, std::nullopt, "is not a number");
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return refuse(name, std::nullopt, "is too large");
  }
  return out >= 0 && out <= most && std::isfinite(out) ? true : refuse(name, std::nullopt, "is outside its range");
}

bool Gate::take_positive(const char* name, py::handle value, double most, double& out) {
  return take_number(name, value, most, out) && (out > 0 || refuse(name, std::nullopt, "is outside its range"));
}

bool Gate::take_unsigned(const char* name, py::handle value, uint64_t most, uint64_t& out) {
  if (refusal_) return false;
  if (!PyLong_CheckExact(value.ptr())) return refuse(name, std::nullopt, "is not an integer");
  out = PyLong_AsUnsignedLongLong(value.ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return refuse(name, std::nullopt, "is outside its range");
  }
  return out <= most ? true : refuse(name, std::nullopt, "is outside its range");
}

bool Gate::take_lists(const char* name, py::handle lists, size_t most, std::vector<Views>& out) {
  if (refusal_) return false;
  if (!PyTuple_CheckExact(lists.ptr()) && !PyList_CheckExact(lists.ptr())) return refuse(name, std::nullopt, "is not a list or tuple");
  const py::object items = py::reinterpret_steal<py::object>(PySequence_Tuple(lists.ptr()));
  if (!items) throw py::error_already_set();
  const size_t n = size_t(PyTuple_GET_SIZE(items.ptr()));
  if (n == 0 || n > most) return refuse(name, std::nullopt, "has no list or too many");
  out.resize(n);
  for (size_t k = 0; k < n; ++k)
    if (!take(name, PyTuple_GET_ITEM(items.ptr(), Py_ssize_t(k)), Access::reads, false, out[k])) return false;
  return true;
}

bool Gate::take_int64(const char* name, py::handle tensor, int64_t elements, const int64_t*& out) {
  if (refusal_) return false;
  const TorchRuntime& torch = torch_runtime();
  if (Py_TYPE(tensor.ptr()) != torch.tensor) return refuse(name, std::nullopt, "is not an exact torch.Tensor");
  dlpack::Tensor t;
  if (torch.api->tensor_from_object(tensor.ptr(), &t) != 0) {
    PyErr_Clear();
    return refuse(name, std::nullopt, "has no plain memory");
  }
  constexpr uint8_t kInt = 0;
  char* data = static_cast<char*>(t.data) + t.byte_offset;
  // The dtype of the view is of no use here; its shape and strides are.
  const View view{data, t.shape, t.strides, t.ndim, DType::f64, device_of(t.device), t.device.index};
  if (view.device != device_ || (device_index_ >= 0 && view.device_index != device_index_))
    return refuse(name, std::nullopt, "is on another device");
  if (t.dtype.code != kInt || t.dtype.bits != 64 || t.dtype.lanes != 1 || view.numel() != elements || !view.contiguous)
    return refuse(name, std::nullopt, "is not contiguous int64 of the expected length");
  if ((reinterpret_cast<uintptr_t>(data) & 7) != 0) return refuse(name, std::nullopt, "is not aligned to its elements");
  if (elements > 0 && has_no_memory(tensor.ptr(), data)) return refuse(name, std::nullopt, "has no memory behind it");
  out = reinterpret_cast<const int64_t*>(data);
  alive_.push_back(py::reinterpret_borrow<py::object>(tensor));
  return true;
}

bool Gate::bits_of(const char* name, const Views& bits, const Views& tensors) {
  if (refusal_ || !same_length(name, bits.size(), tensors.size())) return false;
  for (size_t i = 0; i < bits.size(); ++i)
    if (bits[i].dtype != DType::u8 || bits[i].ndim != 1 || !bits[i].contiguous || bits[i].numel() != bit_bytes(tensors[i].numel()))
      return refuse(name, i, "is no contiguous uint8 with a bit for each element");
  return true;
}

bool Gate::same_length(const char* name, size_t length, size_t expected) {
  if (refusal_) return false;
  return length == expected ? true : refuse(name, std::nullopt, "has another length");
}

bool Gate::broadcast(const char* name, const Views& read, const Views& written) {
  if (refusal_ || !same_length(name, read.size(), written.size())) return false;
  for (size_t i = 0; i < read.size(); ++i)
    if (!broadcasts(read[i], written[i])) return refuse(name, i, "does not broadcast");
  return true;
}

bool Gate::same_shapes(const char* name, const Views& views, const Views& others) {
  if (refusal_ || !same_length(name, views.size(), others.size())) return false;
  for (size_t i = 0; i < views.size(); ++i)
    if (!same_shape(views[i], others[i])) return refuse(name, i, "has another shape");
  return true;
}

bool Gate::contiguous(const char* name, const Views& views) {
  if (refusal_) return false;
  for (size_t i = 0; i < views.size(); ++i)
    if (!is_contiguous(views[i])) return refuse(name, i, "is not contiguous");
  return true;
}

bool Gate::apart(const Views& written, const std::vector<const Views*>& reads, bool partners_may_be_equal) {
  if (refusal_) return false;
  return writes_overlap(written, reads, partners_may_be_equal) ? refuse("a written tensor", std::nullopt, "shares memory") : true;
}

bool Gate::apart(const std::vector<const Views*>& written, const std::vector<const Views*>& reads) {
  if (refusal_) return false;
  return lists_overlap(written, reads) ? refuse("a written tensor", std::nullopt, "shares memory") : true;
}

bool Gate::require(bool condition, const char* name, std::optional<size_t> index, const char* reason) {
  if (refusal_) return false;
  return condition ? true : refuse(name, index, reason);
}

py::object Gate::verdict() const { return refusal_ ? py::object(py::str(*refusal_)) : py::object(py::none()); }

}  // namespace fastcl::bind
