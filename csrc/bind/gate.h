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
  // The same for tensors of int64.
  bool take_int64(const char* name, pybind11::handle list, Views& out);
  // A list of no tensor for None, else of the one.
  bool take_optional(const char* name, pybind11::handle tensor, Views& out);
  // A number in [0, most], finite.
  bool take_number(const char* name, pybind11::handle value, double most, double& out);
  // A number in (0, most], finite.
  bool take_positive(const char* name, pybind11::handle value, double most, double& out);
  // An integer in [0, most].
  bool take_unsigned(const char* name, pybind11::handle value, uint64_t most, uint64_t& out);
  // A list of at most most lists, each as take() accepts it.
  bool take_lists(const char* name, pybind11::handle lists, size_t most, std::vector<Views>& out);
  // One contiguous tensor of int64 with this many elements; out points to its memory.
  bool take_int64(const char* name, pybind11::handle tensor, int64_t elements, const int64_t*& out);
  // One tensor of bits per view: uint8, contiguous, [ceil(n / 8)].
  bool bits_of(const char* name, const Views& bits, const Views& tensors);
  bool same_length(const char* name, size_t length, size_t expected);
  bool broadcast(const char* name, const Views& read, const Views& written);
  bool same_shapes(const char* name, const Views& views, const Views& others);
  bool contiguous(const char* name, const Views& views);
  // No written tensor shares memory; if partners_may_be_equal, it may be the read one of its own place, element for element.
  bool apart(const Views& written, const std::vector<const Views*>& reads, bool partners_may_be_equal = true);

  // The same for several written lists, and no read tensor may be a written one.
  bool apart(const std::vector<const Views*>& written, const std::vector<const Views*>& reads);
  // Refuses unless the condition holds.
  bool require(bool condition, const char* name, std::optional<size_t> index, const char* reason);

  // The index of the tensors' device; -1 before the first tensor.
  int32_t device_index() const { return device_index_; }

  // Refuses for a reason that the caller found; returns false.
  bool refuse(const char* name, std::optional<size_t> index, const char* reason);

  // None if nothing was refused, else the reason.
  pybind11::object verdict() const;

 private:
  Device device_;
  bool grad_mode_;
  int32_t device_index_ = -1;
  std::optional<std::string> refusal_;
  std::vector<pybind11::object> alive_;

  enum class Dtypes : uint8_t { floating, stored, int64 };

  bool take_list(const char* name, pybind11::handle list, Access access, Dtypes dtypes, Views& out);
  const char* view_of(PyObject* object, Access access, Dtypes dtypes, View& out);
};

}  // namespace fastcl::bind
