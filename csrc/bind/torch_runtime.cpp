#include "bind/torch_runtime.h"

#include <pthread.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace fastcl::bind {
namespace {

TorchRuntime runtime;

// OpenMP's threads do not survive a fork, and its pool waits for them for ever in the child: a child of a process that has used the pool
// works alone.
std::atomic<bool> pool_was_used{false};
std::atomic<bool> pool_is_lost{false};

const dlpack::ExchangeAPI* exchange_api(const py::capsule& capsule) {
  auto* header = static_cast<const dlpack::ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (header == nullptr) throw py::error_already_set();
  const uint32_t newest = header->version.major;
  while (header != nullptr && header->version.major > dlpack::kMajor) header = header->previous;
  if (header == nullptr || header->version.major != dlpack::kMajor)
    throw std::runtime_error("its DLPack exchange API has version " + std::to_string(newest) + ", this fastcl knows version 1");
  auto* api = reinterpret_cast<const dlpack::ExchangeAPI*>(header);
  if (api->tensor_from_object == nullptr) throw std::runtime_error("its DLPack exchange API cannot lend tensors");
  return api;
}

void run_on_torch(int64_t count, int64_t grain, Pool::Body body, void* context) {
  if (count <= 0) return;
  if (pool_is_lost) return body(0, count, context);
  pool_was_used = true;
  if (runtime.parallel_for(0, count, grain, body, context) != 0) throw std::runtime_error("torch's thread pool reported a failure");
}

void throw_allocation_error(void*, const char* kind, const char* message) {
  py::gil_scoped_acquire gil;
  PyErr_SetString(PyExc_RuntimeError, (std::string("torch could not allocate: ") + kind + ": " + message).c_str());
}

}  // namespace

const TorchRuntime& torch_runtime() {
  if (runtime.api == nullptr) throw std::runtime_error("the compiled module is not connected to torch; import fastcl, not its modules");
  return runtime;
}

void connect(const py::type& tensor, const py::type& parameter, const py::capsule& api, uintptr_t parallel_for, uintptr_t num_threads) {
  TorchRuntime next;
  next.api = exchange_api(api);
  if (parallel_for == 0 || num_threads == 0) throw std::runtime_error("it does not export its thread pool");
  const py::object attribute = tensor.attr("requires_grad");
  if (!PyObject_TypeCheck(attribute.ptr(), &PyGetSetDescr_Type)) throw std::runtime_error("its Tensor.requires_grad is no getter");
  next.requires_grad = reinterpret_cast<PyGetSetDescrObject*>(attribute.ptr())->d_getset;
  // Kept for ever: the types outlive every call.
  next.tensor = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  next.parameter = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  next.parallel_for = reinterpret_cast<decltype(next.parallel_for)>(parallel_for);
  next.num_threads = reinterpret_cast<decltype(next.num_threads)>(num_threads);
  if (runtime.api == nullptr) pthread_atfork(nullptr, nullptr, [] { pool_is_lost = pool_was_used.load(); });
  runtime = next;
}

void define_connect(py::module_& m, Connect* function) {
  m.def("connect", function, py::arg("tensor"), py::arg("parameter"), py::arg("exchange_api"), py::arg("parallel_for"),
        py::arg("num_threads"));
}

Pool torch_pool() {
  torch_runtime();
  return Pool{run_on_torch};
}

int torch_threads() {
  uint32_t threads = 1;
  torch_runtime().num_threads(&threads);
  return int(threads);
}

NewTensor::NewTensor(int32_t device_type, int32_t device_index, dlpack::DataType dtype, std::vector<int64_t> shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t elements = 1;
  for (size_t d = shape.size(); d-- > 0; elements *= shape[d]) strides[d] = elements;
  dlpack::Tensor prototype{nullptr, {device_type, device_index}, int32_t(shape.size()), dtype, shape.data(), strides.data(), 0};
  if (torch_runtime().api->allocate(&prototype, &managed_, nullptr, throw_allocation_error) != 0 || managed_ == nullptr) {
    if (PyErr_Occurred()) throw py::error_already_set();
    throw std::runtime_error("torch could not allocate");
  }
  // Under a FakeTensorMode torch hands out tensors without memory.
  if (managed_->tensor.data == nullptr && elements > 0) {
    managed_->deleter(managed_);
    throw std::runtime_error("torch allocated a tensor without memory");
  }
}

NewTensor::~NewTensor() {
  if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
}

py::object NewTensor::to_python() {
  void* object = nullptr;
  if (torch_runtime().api->managed_to_object(managed_, &object) != 0) throw py::error_already_set();
  managed_ = nullptr;  // the object owns it now
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

}  // namespace fastcl::bind
