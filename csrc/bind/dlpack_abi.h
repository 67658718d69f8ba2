// The part of DLPack's C ABI (version 1, https://dmlc.github.io/dlpack/latest/) that fastcl uses, declared from its specification.
#pragma once

#include <cstdint>

namespace fastcl::dlpack {

struct Version {
  uint32_t major, minor;
};

constexpr int32_t kCPU = 1;
constexpr int32_t kCUDA = 2;
struct Device {
  int32_t type;
  int32_t index;
};

constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4;
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;  // the table of an older major version
};

struct ExchangeAPI {
  ExchangeHeader header;
  int (*allocate)(Tensor* prototype, ManagedTensor** out, void* error_context,
                  void (*set_error)(void* error_context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, ManagedTensor** out);
  int (*managed_to_object)(ManagedTensor* tensor, void** out_object);
  int (*tensor_from_object)(void* object, Tensor* out);  // may be null
  int (*current_stream)(int32_t device_type, int32_t device_index, void** out_stream);
};

constexpr uint32_t kMajor = 1;

}  // namespace fastcl::dlpack
