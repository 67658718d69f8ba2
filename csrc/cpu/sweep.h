// One sweep over a list of pairs (written, read): the elements of all tensors are one range, split evenly over the threads, so that ten
// thousand tiny tensors and one huge one are the same work.
#pragma once

#include <algorithm>
#include <deque>
#include <vector>

#include "core/parallel.h"
#include "core/view.h"

namespace fastcl::cpu {

// Small enough to balance, large enough that a thread's start costs nothing against it.
constexpr int64_t kGrain = 32768;

// One run of n elements at constant strides. An op is a table of these, one per pair of dtypes.
template <class Parameter>
using RunWith = void (*)(char* written, const char* read, int64_t n, int64_t written_stride, int64_t read_stride, Parameter parameter);
template <class Parameter>
using TableWith = RunWith<Parameter> (*)(DType written, DType read);
using Run = RunWith<double>;

template <class Parameter>
class PairSweepWith {
 public:
  using Run = RunWith<Parameter>;

  PairSweepWith(const Views& written, const Views& read, TableWith<Parameter> table)
      : PairSweepWith(written, read, 0, written.size(), table) {}
  // The pairs [first, last) of the lists.
  PairSweepWith(const Views& written, const Views& read, size_t first, size_t last, TableWith<Parameter> table) {
    items_.reserve(last - first);
    for (size_t i = first; i < last; ++i) {
      const View &w = written[i], &r = read[i];
      const int64_t n = w.numel();
      if (n == 0) continue;
      const Layout* layout = nullptr;  // both contiguous
      if (!(is_contiguous(w) && is_contiguous(r) && r.numel() == n)) {
        const View* both[] = {&w, &r};
        layout = &layouts_.emplace_back(coalesce(both, 2));
      }
      items_.push_back({total_, w.data, r.data, table(w.dtype, r.dtype), size_of(w.dtype), size_of(r.dtype), layout, i});
      total_ += n;
    }
  }

  void run(Parameter parameter, const Pool& pool) const {
    run_each([&](size_t) { return parameter; }, pool);
  }
  // With parameter_of(place in the lists).
  template <class ParameterOf>
  void run_each(ParameterOf&& parameter_of, const Pool& pool) const {
    pool.each(total_, kGrain, [&](int64_t begin, int64_t end) { part(begin, end, parameter_of); });
  }

 private:
  struct Item {
    int64_t start;  // of the tensor's first element in the range of all elements
    char* written;
    const char* read;
    Run run;
    int64_t written_size, read_size;
    const Layout* layout;
    size_t place;
  };
  std::vector<Item> items_;
  std::deque<Layout> layouts_;  // a deque: the items point into it
  int64_t total_ = 0;

  // Between small tensors the hardware sees no pattern; the first lines of one that comes soon are asked for by hand.
  void prefetch(typename std::vector<Item>::const_iterator item) const {
    constexpr int ahead = 6;
    if (items_.end() - item <= ahead) return;
    for (int64_t line = 0; line < 4; ++line) {
      __builtin_prefetch(item[ahead].written + 64 * line, 1);
      __builtin_prefetch(item[ahead].read + 64 * line);
    }
  }

  template <class ParameterOf>
  void part(int64_t begin, int64_t end, ParameterOf&& parameter_of) const {
    auto item = std::upper_bound(items_.begin(), items_.end(), begin, [](int64_t at, const Item& i) { return at < i.start; }) - 1;
    for (; begin < end; ++item) {
      prefetch(item);
      const Parameter parameter = parameter_of(item->place);
      const int64_t stop = std::min(end, item + 1 == items_.end() ? total_ : (item + 1)->start);
      const int64_t from = begin - item->start, to = stop - item->start;
      if (item->layout == nullptr) {
        item->run(item->written + from * item->written_size, item->read + from * item->read_size, to - from, 1, 1, parameter);
      } else {
        const int64_t* strides = item->layout->stride(0);
        walk(*item->layout, from, to, [&](const int64_t* at, int64_t n) {
          item->run(item->written + at[0] * item->written_size, item->read + at[1] * item->read_size, n, strides[0], strides[1], parameter);
        });
      }
      begin = stop;
    }
  }
};

using PairSweep = PairSweepWith<double>;

// The inner loop of an element-wise op, for the strides that occur: contiguous, one value for the whole run, anything.
template <class W, class R, class Op>
FASTCL_HD void run_elements(char* written, const char* read, int64_t n, int64_t written_stride, int64_t read_stride, const Op& op) {
  W* w = reinterpret_cast<W*>(written);
  const R* r = reinterpret_cast<const R*>(read);
  if (written_stride == 1 && read_stride == 1) {
    // ivdep, not restrict: a gradient may be its own importance, element for element; no other overlap gets here.
#pragma GCC ivdep
    for (int64_t e = 0; e < n; ++e) w[e] = op(w[e], r[e]);
  } else if (written_stride == 1 && read_stride == 0) {
    const R value = *r;
    for (int64_t e = 0; e < n; ++e) w[e] = op(w[e], value);
  } else {
    for (int64_t e = 0; e < n; ++e) w[e * written_stride] = op(w[e * written_stride], r[e * read_stride]);
  }
}

}  // namespace fastcl::cpu
