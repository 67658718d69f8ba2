// SPG's importance. Compiled with contraction into fused multiply-adds: its results are held to a tolerance, not to bits.

#include "core/importance.h"

#include <type_traits>

#include "core/dtypes.h"
#include "cpu/lanes.h"
#include "cpu/ops.h"
#include "cpu/sweep.h"

namespace fastcl::cpu {
namespace {

// The unit of the reductions. Its boundaries depend on the tensor alone, never on the threads: that fixes the order of summation.
constexpr int64_t kChunk = 16384;
// What is worked on at once: it stays in the first-level cache through the passes over it.
constexpr int64_t kBlock = 512;

// The moments of one run of a gradient, which is copied to the stack first where it is strided.
//
// Narrow types take one pass, sums of d = x - shift and of d^2 in double. What cancels in m2 is bounded: the shift is an element of the
// tensor, so (mean - shift)^2 <= n * variance, and m2 loses at most a factor n of double's precision, less than a float's rounding up to
// 2^29 elements however the tensor is made. Doubles have no such reserve: they take a second pass around the mean.
template <class G>
FASTCL_CLONES Moments run_moments(const char* data, int64_t stride, int64_t n, double shift) {
  const G* g = reinterpret_cast<const G*>(data);
  G packed[kBlock];
  if (stride != 1) {
    for (int64_t e = 0; e < n; ++e) packed[e] = g[e * stride];
    g = packed;
  }
  const double count = double(n);
  if constexpr (std::is_same_v<G, double>) {
    const double mean = lane_sum(g, n, [shift](double x) { return x - shift; }) / count;
    const double m2 = lane_sum(g, n, [shift, mean](double x) {
      const double d = (x - shift) - mean;
      return d * d;
    });
    return {count, mean, m2};
  } else {
    // Two sums over a block in the first-level cache: compilers vectorise each, and neither vectorises both in one loop.
    const double sum = lane_sum(g, n, [shift](G x) { return load<double>(x) - shift; });
    const double squares = lane_sum(g, n, [shift](G x) {
      const double d = load<double>(x) - shift;
      return d * d;
    });
    const double m2 = squares - sum * (sum / count);
    return {count, sum / count, m2 < 0 ? 0 : m2};
  }
}

template <class S, class C>
FASTCL_CLONES void decode(const char* stored, int64_t stride, int64_t n, C* value) {
  const S* s = reinterpret_cast<const S*>(stored);
  if (stride == 1)
    for (int64_t e = 0; e < n; ++e) value[e] = load<C>(s[e]);
  else
    for (int64_t e = 0; e < n; ++e) value[e] = load<C>(s[e * stride]);
}

template <class G, class C>
FASTCL_CLONES void raise_to(const char* grad, int64_t stride, int64_t n, const Normaliser<C>& normalise, C* value) {
  const G* g = reinterpret_cast<const G*>(grad);
  if (stride == 1)
    for (int64_t e = 0; e < n; ++e) value[e] = nan_max(value[e], normalise(load<C>(g[e])));
  else
    for (int64_t e = 0; e < n; ++e) value[e] = nan_max(value[e], normalise(load<C>(g[e * stride])));
}

// Writes the values and returns the sum of what now is stored.
template <class S, class C>
FASTCL_CLONES double encode(char* stored, int64_t stride, int64_t n, const C* value) {
  S* s = reinterpret_cast<S*>(stored);
  S packed[kBlock];
  S* to = stride == 1 ? s : packed;
  for (int64_t e = 0; e < n; ++e) to[e] = store<S>(value[e]);
  if (stride != 1)
    for (int64_t e = 0; e < n; ++e) s[e * stride] = packed[e];
  if constexpr (std::is_same_v<S, uint8_t>)
    return lane_sum(to, n, [](S x) { return double(x); }) / 255;  // one division, not one for each element
  else
    return lane_sum(to, n, [](S x) { return load<double>(x); });
}

template <class C>
struct Kernels {
  void (*decode)(const char*, int64_t, int64_t, C*);
  double (*encode)(char*, int64_t, int64_t, const C*);
  explicit Kernels(DType stored) {
    with_stored(stored, [this](auto s) {
      using S = typename decltype(s)::type;
      this->decode = cpu::decode<S, C>;
      this->encode = cpu::encode<S, C>;
    });
  }
};

// One tensor with its heads' gradients: which chunks are its own, and how its elements are walked.
struct Item {
  const View* accumulated;
  std::vector<const View*> grads;
  int64_t numel, chunks, first_chunk;
  bool in_double;
  Layout layout;                 // of accumulated and all gradients together
  std::vector<double> shifts;    // per head
  std::vector<Moments> moments;  // per head, of the whole tensor
};

double first_element(const View& v) {
  return with_floating(v.dtype, [&](auto g) { return load<double>(*reinterpret_cast<const typename decltype(g)::type*>(v.data)); });
}

// Calls visit(offsets, n) for runs of at most kBlock elements of one chunk.
template <class Visit>
void walk_chunk(const Item& item, int64_t chunk, Visit&& visit) {
  const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, item.numel);
  for (int64_t at = begin; at < end; at += kBlock) walk(item.layout, at, std::min(at + kBlock, end), visit);
}

// The hardware's own prefetch stops where a block ends and its results are worked on; this keeps memory busy meanwhile. Addresses past
// the end are harmless.
void prefetch_next(const char* data, int64_t stride, int64_t n, int64_t size) {
  if (stride == 1)
    for (int64_t at = n * size; at < 2 * n * size; at += 64) __builtin_prefetch(data + at);
}

Moments chunk_moments(const Item& item, int head, int64_t chunk) {
  const View& g = *item.grads[head];
  const auto run = with_floating(g.dtype, [](auto t) { return &run_moments<typename decltype(t)::type>; });
  Moments sum{0, 0, 0};
  walk_chunk(item, chunk, [&](const int64_t* at, int64_t n) {
    const char* data = g.data + at[head + 1] * size_of(g.dtype);
    const int64_t stride = item.layout.stride(0)[head + 1];
    prefetch_next(data, stride, n, size_of(g.dtype));
    sum = combine(sum, run(data, stride, n, item.shifts[head]));
  });
  return sum;
}

template <class C>
double chunk_update(const Item& item, int64_t chunk) {
  const Kernels<C> kernels(item.accumulated->dtype);
  const int64_t* strides = item.layout.stride(0);
  std::vector<Normaliser<C>> normalise;
  for (size_t h = 0; h < item.grads.size(); ++h) normalise.push_back(Normaliser<C>::make(item.shifts[h], item.moments[h]));
  double sum = 0;
  walk_chunk(item, chunk, [&](const int64_t* at, int64_t n) {
    C value[kBlock];
    char* stored = item.accumulated->data + at[0] * size_of(item.accumulated->dtype);
    prefetch_next(stored, strides[0], n, size_of(item.accumulated->dtype));
    kernels.decode(stored, strides[0], n, value);
    for (size_t h = 0; h < item.grads.size(); ++h) {
      const View& g = *item.grads[h];
      with_floating(g.dtype, [&](auto t) {
        using G = typename decltype(t)::type;
        const char* grad = g.data + at[h + 1] * size_of(g.dtype);
        prefetch_next(grad, strides[h + 1], n, size_of(g.dtype));
        raise_to<G, C>(grad, strides[h + 1], n, normalise[h], value);
      });
    }
    sum += kernels.encode(stored, strides[0], n, value);
  });
  return sum;
}

// All tensors that have elements, and the chunks of all of them as one range.
struct Plan {
  std::vector<Item> items;
  std::vector<size_t> places;  // of the items in the lists
  int64_t chunks = 0, numel = 0;
  int heads;

  Plan(const Views& accumulated, const std::vector<Views>& grads_by_head) : heads(int(grads_by_head.size())) {
    for (size_t i = 0; i < accumulated.size(); ++i) {
      const View& a = accumulated[i];
      const int64_t n = a.numel();
      if (n == 0) continue;
      Item item{&a, {}, n, (n + kChunk - 1) / kChunk, chunks, a.dtype == DType::f64, {}, {}, {}};
      std::vector<const View*> views{&a};
      for (const Views& head : grads_by_head) {
        item.grads.push_back(&head[i]);
        item.in_double |= head[i].dtype == DType::f64;
        item.shifts.push_back(first_element(head[i]));
        views.push_back(&head[i]);
      }
      item.layout = coalesce(views.data(), heads + 1);
      chunks += item.chunks;
      numel += n;
      items.push_back(std::move(item));
      places.push_back(i);
    }
  }

  const Item& item_of(int64_t chunk) const {
    return *(std::upper_bound(items.begin(), items.end(), chunk, [](int64_t at, const Item& i) { return at < i.first_chunk; }) - 1);
  }
};

// First sweep: every item's moments.
void measure(Plan& plan, const Pool& pool) {
  const int heads = plan.heads;
  std::vector<Moments> parts(size_t(plan.chunks) * heads);
  pool.each(plan.chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Item& item = plan.item_of(c);
      for (int h = 0; h < heads; ++h) parts[c * heads + h] = chunk_moments(item, h, c - item.first_chunk);
    }
  });
  for (Item& item : plan.items) {
    item.moments.assign(heads, {0, 0, 0});
    for (int64_t c = item.first_chunk; c < item.first_chunk + item.chunks; ++c)
      for (int h = 0; h < heads; ++h) item.moments[h] = combine(item.moments[h], parts[c * heads + h]);
  }
}

// Second sweep: from every item's moments the importance. Returns the mean of what then is stored.
double update(const Plan& plan, const Pool& pool) {
  std::vector<double> sums(plan.chunks);
  pool.each(plan.chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Item& item = plan.item_of(c);
      const int64_t own = c - item.first_chunk;
      sums[c] = item.in_double ? chunk_update<double>(item, own) : chunk_update<float>(item, own);
    }
  });
  double total = 0;
  for (double s : sums) total += s;
  return plan.numel > 0 ? total / double(plan.numel) : 0;
}

}  // namespace

double spg_importance_(const Views& accumulated, const std::vector<Views>& grads_by_head, const Pool& pool) {
  Plan plan(accumulated, grads_by_head);
  measure(plan, pool);
  return update(plan, pool);
}

void spg_moments(const Views& accumulated, const std::vector<Views>& grads_by_head, Statistics* rows, const Pool& pool) {
  Plan plan(accumulated, grads_by_head);
  measure(plan, pool);
  std::fill_n(rows, accumulated.size() * grads_by_head.size(), Statistics{0, {0, 0, 0}});
  for (size_t i = 0; i < plan.items.size(); ++i)
    for (int h = 0; h < plan.heads; ++h)
      rows[h * accumulated.size() + plan.places[i]] = {plan.items[i].shifts[h], plan.items[i].moments[h]};
}

double spg_update_(const Views& accumulated, const std::vector<Views>& grads_by_head, const Statistics* rows, const Pool& pool) {
  Plan plan(accumulated, grads_by_head);
  for (size_t i = 0; i < plan.items.size(); ++i) {
    Item& item = plan.items[i];
    for (int h = 0; h < plan.heads; ++h) {
      const Statistics& row = rows[h * accumulated.size() + plan.places[i]];
      item.shifts[h] = row.shift;
      item.moments.push_back(row.moments);
    }
  }
  return update(plan, pool);
}

}  // namespace fastcl::cpu
