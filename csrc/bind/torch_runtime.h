// What the native code gets from the torch that is loaded: two types, DLPack's exchange functions and the thread pool. Nothing of torch is
// included or linked; connect() receives it all from Python.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "bind/dlpack_abi.h"
#include "core/parallel.h"

namespace fastcl::bind {

struct TorchRuntime {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  // Tensor.requires_grad without the attribute look-up, which would cost as much as the rest of the gate.
  PyGetSetDef* requires_grad = nullptr;
  const dlpack::ExchangeAPI* api = nullptr;
  int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, Pool::Body body, void* context) = nullptr;
  int32_t (*num_threads)(uint32_t* out) = nullptr;
};

// Throws std::runtime_error before connect().
const TorchRuntime& torch_runtime();

// Adds connect(Tensor, Parameter, exchange_api_capsule, parallel_for_address, num_threads_address) to a module.
using Connect = void(const pybind11::type& tensor, const pybind11::type& parameter, const pybind11::capsule& api, uintptr_t parallel_for,
                     uintptr_t num_threads);
Connect connect;
void define_connect(pybind11::module_& m, Connect* function = &connect);

// torch's own threads.
Pool torch_pool();
int torch_threads();

// An uninitialised tensor from torch's allocator (on CUDA the caching one), as memory to write and as an object to hand to Python.
class NewTensor {
 public:
  NewTensor(int32_t device_type, int32_t device_index, dlpack::DataType dtype, std::vector<int64_t> shape);
  ~NewTensor();
  NewTensor(const NewTensor&) = delete;
  NewTensor& operator=(const NewTensor&) = delete;

  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(managed_->tensor.data) + managed_->tensor.byte_offset);
  }
  pybind11::object to_python();

 private:
  dlpack::ManagedTensor* managed_ = nullptr;
};

}  // namespace fastcl::bind
