// The gate between Python and raw memory, the only place where a mistake could kill the process. It lets through what it fully understands
// and refuses everything else with a reason; fastcl.ops then finds out in Python what to tell the user. Nothing is written before every
// tensor of a call has passed.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "core/view.h"

namespace fastcl::bind {

enum class Access { reads, writes };

class Gate {
 public:
  // grad_mode: whether autograd records, in which case a written tensor that requires grad is refused. Read ones are constants.
  Gate(Device device, bool grad_mode) : device_(device), grad_mode_(grad_mode) {}

  // Reads a list or tuple of exact torch.Tensor or Parameter. False: refused. The gate keeps the tensors alive, since the list may change
  // in another thread while the lock is released.
  bool take(const char* name, pybind11::handle list, Access access, bool accepts_uint8, Views& out);
  bool take_number(const char* name, pybind11::handle value, double& out);
  bool same_length(const char* name, size_t length, size_t expected);
  bool broadcast(const char* name, const Views& read, const Views& written);
  bool same_shapes(const char* name, const Views& views, const Views& others);
  bool apart(const Views& written, const std::vector<const Views*>& reads);

  // None if nothing was refused, else the reason.
  pybind11::object verdict() const;

 private:
  Device device_;
  bool grad_mode_;
  int32_t device_index_ = -1;
  std::optional<std::string> refusal_;
  std::vector<pybind11::object> alive_;

  bool refuse(const char* name, std::optional<size_t> index, const char* reason);
  const char* view_of(PyObject* object, Access access, bool accepts_uint8, View& out);
};

}  // namespace fastcl::bind
