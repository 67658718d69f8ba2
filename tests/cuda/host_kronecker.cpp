// The layers of Kronecker-factored precisions: a block's phases, its threads forwards and backwards, against the definition in extended
// precision.
#include <deque>
#include <functional>

#include "cuda/kronecker_plan.h"
#include "host.h"

using namespace host;

namespace {

template <class C, int kRows, int kColumns, class P, class Layers>
void run_tile(const Layers& layers, const LayerTask& task, double* out, bool backwards) {
  using Tile = LayerTile<C, kRows, kColumns>;
  static_assert(std::is_same_v<Tile, typename Layers::Tile>, "the plan's tile");
  blocks<P>(layers.list, [&](const P& packet, uint32_t block) {
    constexpr size_t kBehind = 64;
    const auto elements = size_t(layers.buffer + layers.stage);
    std::vector<Four> memory((elements * sizeof(C) + sizeof(Four) - 1) / sizeof(Four) + kBehind);
    std::memset(static_cast<void*>(memory.data()), 0xff, memory.size() * sizeof(Four));
    C* buffer = reinterpret_cast<C*>(memory.data());
    Team<typename Tile::Own, kLayerThreads> team(backwards);
    small_layer<C, kRows, kColumns>(packet, block, task, buffer, buffer + layers.buffer, out, team);
    for (size_t e = elements; e < elements + kBehind; ++e) CHECK(buffer[e] != buffer[e], "a write behind the shared memory");
  });
}

template <class P>
void run(const SmallLayers& layers, const LayerTask& task, double* out, bool backwards) {
  run_tile<float, 2, 5, P>(layers.narrow, task, out, backwards);
  run_tile<float, 4, 9, P>(layers.wide, task, out, backwards);
  run_tile<double, 4, 9, P>(layers.twice, task, out, backwards);
}

// ---- lists of layers

struct LayerList {
  std::deque<Tensor> tensors;
  std::vector<std::vector<uint64_t>> before;
  Views views;
  void add(Tensor t) {
    tensors.push_back(std::move(t));
    before.push_back(tensors.back().memory);
    views.push_back(tensors.back().view(tensors.back().memory));
  }
  void restore() {
    for (size_t i = 0; i < tensors.size(); ++i) std::copy(before[i].begin(), before[i].end(), tensors[i].memory.begin());
  }
  std::vector<std::vector<uint64_t>> bits() const {
    std::vector<std::vector<uint64_t>> out;
    for (const Tensor& t : tensors) out.push_back(t.memory);
    return out;
  }
};

double value(const View& v, const std::vector<uint64_t>& memory, const Tensor& t, int64_t at) {
  (void)v;
  return with_floating(t.dtype, [&](auto type) {
    return load<double>(reinterpret_cast<const typename decltype(type)::type*>(memory.data())[t.offset + at]);
  });
}

// A matrix of the values before or after a call: element (i, j) of weight and bias, or of a padded matrix.
using Matrix = std::function<double(int64_t, int64_t)>;

Matrix tensors_of(const LayerList& weights, const LayerList& biases, size_t i, bool after) {
  return [&weights, &biases, i, after](int64_t row, int64_t column) {
    const View& w = weights.views[i];
    const auto& list = column == inputs_of(w) ? biases : weights;
    const Tensor& t = list.tensors[i];
    int64_t at = row * t.strides[0];
    for (int d = w.ndim - 1; d > 0 && &list == &weights; --d) {
      at += column % w.shape[d] * w.strides[d];
      column /= w.shape[d];
    }
    return value(w, after ? t.memory : list.before[i], t, at);
  };
}
Matrix matrix_of(const LayerList& list, size_t i, bool after) {
  return [&list, i, after](int64_t row, int64_t column) {
    const Tensor& t = list.tensors[i];
    return value(list.views[i], after ? t.memory : list.before[i], t, row * t.strides[0] + column);
  };
}

double unit_of(DType t) { return t == DType::f64 ? 0x1p-53 : t == DType::f32 ? 0x1p-24 : t == DType::f16 ? 0x1p-11 : 0x1p-8; }

struct Size {
  int64_t m, inputs;
  bool biased;
};
// The large ones come last.
constexpr Size kSizes[] = {{1, 1, false},   {1, 1, true},    {3, 5, true},   {17, 16, true},  {10, 64, true},   {32, 32, true},
                           {64, 64, true},  {65, 30, false}, {33, 9, true},  {0, 5, true},    {64, 79, true},   {64, 80, true},
                           {64, 80, false}, {127, 7, true},  {2, 128, true}, {128, 1, false}, {128, 128, true}, {128, 129, false}};
constexpr size_t kSmallest = 10;

struct Layers {
  LayerList weights, biases, weight_grads, bias_grads, m, h, v, a, g;
  std::vector<Size> sizes;

  static void tensors(const Size& s, DType dtype, int layout, LayerList& weights, LayerList& biases) {
    const int64_t rows = s.m, n = s.inputs, offset = layout % 3;
    std::vector<int64_t> shape{rows, n}, strides{n, 1};
    if (layout % 5 == 1) strides = {1, std::max<int64_t>(rows, 1)};
    if (layout % 5 == 2) strides = {n + 3, 1};
    if (layout % 5 == 3 && n % 4 == 0) shape = {rows, n / 4, 2, 2}, strides = {n, 1, n / 2, n / 4};  // channels last
    if (layout % 5 == 4 && n % 2 == 0) shape = {rows, 2, n / 2}, strides = {n, 1, 2};
    weights.add(make(dtype, shape, strides, offset, false));
    const int64_t elements = s.biased ? rows : 0;
    biases.add(make(layout % 4 == 0 ? DType::f32 : dtype, {elements}, {1 + layout % 2}, offset, false));
  }

  Layers(DType params, DType grads, DType own, int layout, bool all = true) {
    for (const Size& s : kSizes) {
      if (!all && sizes.size() == kSmallest) break;
      sizes.push_back(s);
      const int64_t n = s.inputs + s.biased, ld = (n + 15) / 16 * 16;
      tensors(s, params, layout, weights, biases);
      tensors(s, grads, layout + 1, weight_grads, bias_grads);
      for (LayerList* list : {&m, &h, &v}) list->add(make(own, {s.m, n}, {ld + (layout % 2), 1}, layout % 2, false));
      a.add(make(own, {n, n}, {n + layout % 3, 1}, layout % 2, false));
      g.add(make(own, {s.m, s.m}, {s.m + layout % 2, 1}, 0, false));
      ++layout;
    }
  }

  LayerViews views(LayerKind kind) const {
    const bool params = kind != LayerKind::direction, updates = kind == LayerKind::step || kind == LayerKind::direction;
    return {params ? &weights.views : nullptr,
            params ? &biases.views : nullptr,
            updates ? &weight_grads.views : nullptr,
            updates ? &bias_grads.views : nullptr,
            updates ? &m.views : nullptr,
            updates ? &h.views : nullptr,
            kind == LayerKind::direction ? &v.views : nullptr,
            &a.views,
            &g.views};
  }
  void restore() {
    for (LayerList* list : {&weights, &biases, &m, &h, &v}) list->restore();
  }
  std::vector<std::vector<std::vector<uint64_t>>> bits() const { return {weights.bits(), biases.bits(), m.bits(), h.bits(), v.bits()}; }
};

void compare(const Layers& l, const LayerTask& task, DType own, const std::vector<double>& products, double total) {
  const double u = unit_of(own);
  long double all = 0, all_magnitude = 0;
  for (size_t i = 0; i < l.sizes.size(); ++i) {
    const int64_t rows = l.sizes[i].m, n = l.sizes[i].inputs + l.sizes[i].biased;
    if (rows == 0) continue;
    const bool updates = task.kind == LayerKind::step || task.kind == LayerKind::direction;
    const Matrix w = tensors_of(l.weights, l.biases, i, false), w_after = tensors_of(l.weights, l.biases, i, true);
    const Matrix grad = tensors_of(l.weight_grads, l.bias_grads, i, false), m = matrix_of(l.m, i, false), h = matrix_of(l.h, i, false);
    const Matrix m_after = matrix_of(l.m, i, true), h_after = matrix_of(l.h, i, true), v_after = matrix_of(l.v, i, true);
    const Matrix a = matrix_of(l.a, i, false), g = matrix_of(l.g, i, false);
    const auto at = [n](int64_t r, int64_t c) { return size_t(r * n + c); };
    std::vector<long double> x(size_t(rows * n)), t(x.size()), tm(x.size());
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < n; ++c) {
        const long double exact =
            updates ? task.momentum * (long double)(m(r, c)) + grad(r, c) + task.strength * (long double)(h(r, c)) : (long double)(w(r, c));
        x[at(r, c)] = updates ? m_after(r, c) : w(r, c);
        const double scale = std::fabs(task.momentum * m(r, c)) + std::fabs(grad(r, c)) + std::fabs(task.strength * h(r, c));
        CHECK(std::fabs(double(x[at(r, c)] - exact)) <= 4 * u * scale, "layer %zu: M is %.9Lg, %.9Lg expected", i, x[at(r, c)], exact);
        if (updates) {
          const double pulled = task.kind == LayerKind::step ? h(r, c) - task.lr * m_after(r, c) : h(r, c);
          CHECK(std::fabs(h_after(r, c) - pulled) <= 4 * u * (std::fabs(h(r, c)) + std::fabs(task.lr * m_after(r, c))), "layer %zu: H", i);
        }
      }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < rows; ++k)
        for (int64_t c = 0; c < n; ++c) {
          t[at(r, c)] += (long double)(g(r, k)) * x[at(k, c)];
          tm[at(r, c)] += std::fabs((long double)(g(r, k)) * x[at(k, c)]);
        }
    long double product = 0, product_magnitude = 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < n; ++c) {
        long double v = 0, magnitude = 0;
        for (int64_t k = 0; k < n; ++k) {
          v += t[at(r, k)] * a(k, c);
          magnitude += tm[at(r, k)] * std::fabs((long double)(a(k, c)));
        }
        product += x[at(r, c)] * v;
        product_magnitude += std::fabs(x[at(r, c)]) * magnitude;
        const double bound = double(8 * u * magnitude);
        const DType stored = c == l.sizes[i].inputs ? l.biases.tensors[i].dtype : l.weights.tensors[i].dtype;
        const auto near = [&](double found, long double expected, double allowed, DType dtype) {
          const double spread = allowed + 1.01 * unit_of(dtype) * std::fabs(double(expected)) + (dtype == DType::f16 ? 1e-7 : 0);
          CHECK(std::fabs(double(found - expected)) <= spread || (dtype == DType::f16 && std::fabs(double(expected)) > 65000),
                "kind %d, layer %zu (%lld, %lld): %.9g, %.9Lg expected", int(task.kind), i, (long long)r, (long long)c, found, expected);
        };
        if (task.kind == LayerKind::solve) near(w_after(r, c), v, bound, stored);
        if (task.kind == LayerKind::direction) near(v_after(r, c), v, bound, own);
        if (task.kind == LayerKind::step)
          near(w_after(r, c), w(r, c) - task.lr * v, task.lr * bound + 4 * u * (std::fabs(w(r, c)) + std::fabs(task.lr * double(v))),
               stored);
        if (task.kind == LayerKind::quadratic || task.kind == LayerKind::direction)
          CHECK(w_after(r, c) == w(r, c), "layer %zu: a parameter was written", i);
      }
    all += product;
    all_magnitude += product_magnitude;
    if (task.kind == LayerKind::direction)
      CHECK(std::fabs(double(products[i] - product)) <= double(8 * u * product_magnitude), "layer %zu: %.17g, %.17Lg expected", i,
            products[i], product);
  }
  if (task.kind == LayerKind::quadratic)
    CHECK(std::fabs(double(total - all)) <= double(8 * u * all_magnitude), "%.17g, %.17Lg expected", total, all);
}

}  // namespace

void layers() {
  int layout = 0;
  for (const LayerKind kind : {LayerKind::solve, LayerKind::quadratic, LayerKind::step, LayerKind::direction})
    for (DType own : {DType::f32, DType::f64})
      for (DType params : kFloating) {
        Layers l(params, kFloating[size_t(layout) % 4], own, layout, int(params) == int(kind));
        ++layout;
        const LayerTask task{kind, 0.9, 0.5, 0.01};
        const SmallLayers planned(l.views(kind));
        std::vector<double> products(l.sizes.size(), 0), again = products;
        const bool sums = kind == LayerKind::quadratic || kind == LayerKind::direction;
        run<SmallPacket>(planned, task, sums ? products.data() : nullptr, false);
        double total = 0;
        for (double p : products) total += p;
        compare(l, task, own, products, total);
        const auto bits = l.bits();
        l.restore();
        run<LargePacket>(planned, task, sums ? again.data() : nullptr, true);
        CHECK(bits == l.bits() && products == again, "kind %d: the order of a phase's threads shows", int(kind));
      }
  // A NaN in one gradient is one in the momentum, and in every element of the layer's direction.
  Layers l(DType::f32, DType::f32, DType::f32, 0);
  for (size_t i = 0; i < l.sizes.size(); ++i)
    if (l.sizes[i].m > 0) reinterpret_cast<float*>(l.weight_grads.views[i].data)[0] = NAN;
  run<SmallPacket>(SmallLayers(l.views(LayerKind::step)), {LayerKind::step, 0.9, 0.5, 0.01}, nullptr, false);
  for (size_t i = 0; i < l.sizes.size(); ++i) {
    const int64_t n = l.sizes[i].inputs + l.sizes[i].biased;
    int64_t lost = 0;
    for (int64_t r = 0; r < l.sizes[i].m; ++r)
      for (int64_t c = 0; c < n; ++c) {
        CHECK(std::isnan(tensors_of(l.weights, l.biases, i, true)(r, c)), "layer %zu: a number", i);
        lost += std::isnan(matrix_of(l.m, i, true)(r, c));
      }
    CHECK(lost == std::min<int64_t>(l.sizes[i].m, 1), "layer %zu: %lld elements of M are lost", i, (long long)lost);
  }
}

// Layers of all sizes element by element, to the bit.
void ncl_sweeps() {
  int layout = 0;
  for (DType own : {DType::f32, DType::f64})
    for (DType params : kFloating)
      for (const bool moves : {false, true}) {
        Layers l(params, kFloating[size_t(layout) % 4], own, layout);
        ++layout;
        const MomentumRule rule{0.9, 0.5, 0.01, moves};
        const double step = 0.02;
        const auto on_both = [&](const ByCompute& lists, const auto& thread) {
          const auto one = [&](const List& list, auto compute) {
            run_threads<TinyPacket>(list, kRunChunk, [&](const TinyPacket& p, const Chunk& c, int t) { thread(p, c, t, compute); });
          };
          one(lists.single, float{});
          one(lists.twice, double{});
        };
        const auto check = [&](auto compute, bool applied) {
          using C = decltype(compute);
          for (size_t i = 0; i < l.sizes.size(); ++i)
            for (int64_t r = 0; r < l.sizes[i].m; ++r)
              for (int64_t c = 0; c < l.sizes[i].inputs + l.sizes[i].biased; ++c) {
                const C m = C(matrix_of(l.m, i, false)(r, c)), h = C(matrix_of(l.h, i, false)(r, c));
                const C m_after = C(matrix_of(l.m, i, true)(r, c)), h_after = C(matrix_of(l.h, i, true)(r, c));
                if (applied) {
                  const auto descend = Descent<C>::make(step);
                  const C w = C(tensors_of(l.weights, l.biases, i, false)(r, c)), v = C(matrix_of(l.v, i, false)(r, c));
                  const DType stored = c == l.sizes[i].inputs ? l.biases.tensors[i].dtype : l.weights.tensors[i].dtype;
                  const double expected =
                      with_floating(stored, [&](auto t) { return load<double>(store<typename decltype(t)::type>(descend(w, v))); });
                  CHECK(tensors_of(l.weights, l.biases, i, true)(r, c) == expected, "layer %zu: W", i);
                  CHECK(h_after == descend(h, m), "layer %zu: H", i);
                } else {
                  const C g = C(tensors_of(l.weight_grads, l.bias_grads, i, false)(r, c));
                  const C expected = DualMomentum<C>::make(rule.momentum, rule.strength)(m, g, h);
                  CHECK(m_after == expected, "layer %zu: M", i);
                  CHECK(h_after == (moves ? Descent<C>::make(rule.lr)(h, expected) : h), "layer %zu: H", i);
                }
              }
        };
        const auto by_type = [&](bool applied) {
          if (own == DType::f32)
            check(float{}, applied);
          else
            check(double{}, applied);
        };
        on_both(momentum_lists(l.m.views, l.h.views, l.weight_grads.views, l.bias_grads.views),
                [&](const auto& p, const Chunk& c, int t, auto compute) { ncl_momentum_thread<decltype(compute)>(p, c, t, rule); });
        by_type(false);
        l.restore();
        on_both(apply_lists(l.weights.views, l.biases.views, l.h.views, l.v.views, l.m.views),
                [&](const auto& p, const Chunk& c, int t, auto compute) { ncl_apply_thread<decltype(compute)>(p, c, t, step); });
        by_type(true);
      }
}
