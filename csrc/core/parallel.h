// How the CPU code gets its threads: whoever hosts it (torch, a test) provides the pool.
#pragma once

#include <cstdint>

namespace fastcl {

// Calls body(begin, end) on parts of [0, count), each at least grain long but for the last.
struct Pool {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  void (*run)(int64_t count, int64_t grain, Body body, void* context);

  template <class F>
  void each(int64_t count, int64_t grain, F&& body) const {
    run(
        count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
};

}  // namespace fastcl
