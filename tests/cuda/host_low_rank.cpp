// Precisions of low rank plus a diagonal, thread by thread and phase by phase, against the definition in extended precision.
#include <deque>

#include "cuda/low_rank_plan.h"
#include "host.h"

using namespace host;

namespace {

struct Lists {
  std::deque<Tensor> tensors;
  std::deque<std::vector<uint64_t>> before;
  Views views;
  void add(Tensor t) {
    tensors.push_back(std::move(t));
    before.push_back(tensors.back().memory);
    views.push_back(tensors.back().view(tensors.back().memory));
  }
  View old(size_t i) { return tensors[i].view(before[i]); }
};

template <class C>
struct Problem {
  static constexpr DType own = sizeof(C) == 8 ? DType::f64 : DType::f32;
  static constexpr double u = sizeof(C) == 8 ? 0x1p-53 : 0x1p-24;
  int rank;
  std::vector<LayoutCase> cases;
  Lists diagonal, basis, momenta, anchors, params, grads;
  std::vector<Lists> vectors;

  Problem(int rank, int count, std::vector<LayoutCase> all, int seed) : rank(rank), cases(std::move(all)), vectors(size_t(count)) {
    for (size_t i = 0; i < cases.size(); ++i) {
      const LayoutCase& c = cases[i];
      // Every fourth basis is not aligned for vectors.
      const int64_t offset = (i + size_t(seed)) % 4 == 3;
      std::vector<int64_t> rows = c.shape;
      rows.insert(rows.begin(), rank);
      for (Lists* list : {&diagonal, &momenta, &anchors}) list->add(make(own, c.shape, default_strides(c.shape), 0, false));
      C* d = reinterpret_cast<C*>(diagonal.views[i].data);
      for (int64_t e = 0; e < diagonal.views[i].numel(); ++e) d[e] = std::fabs(d[e]) + C(0.1);
      diagonal.before[i] = diagonal.tensors[i].memory;
      basis.add(make(own, rows, default_strides(rows), offset, false));
      const auto dtype = [&](size_t o) { return kFloating[(i / 2 + o + size_t(seed)) % 4]; };
      params.add(make(dtype(0), c.shape, c.strides, c.offset, false));
      grads.add(make(dtype(1), c.read_shape, c.read_strides, c.read_offset, false));
      for (size_t k = 0; k < vectors.size(); ++k) {
        const bool written = (i + k) % 2 == 0;
        vectors[k].add(make(dtype(k), written ? c.shape : c.read_shape, written ? c.strides : c.read_strides,
                            written ? c.offset : c.read_offset, false));
      }
    }
  }
  std::vector<Views> vector_views() const {
    std::vector<Views> out;
    for (const Lists& v : vectors) out.push_back(v.views);
    return out;
  }
  C row(size_t i, int j, int64_t element, bool after = false) const {
    const auto& memory = after ? basis.tensors[i].memory : basis.before[i];
    return reinterpret_cast<const C*>(memory.data())[basis.tensors[i].offset + j * diagonal.views[i].numel() + element];
  }
};

// A thread's sums.
struct HostSums {
  std::vector<double>& own;
  int slots;
  template <int R>
  void add(int slot, const double (&part)[R], int count) {
    CHECK(count <= R && slot + count <= slots, "a sum without a place");
    for (int r = 0; r < count; ++r) own[size_t(slot + r)] += part[r];
  }
};

template <class C, bool kStep, class P>
std::vector<double> sums_of(const List& list, int rank, const LowRankRule& rule) {
  const auto slots = size_t(kStep ? 2 * rank + 3 : rank + 1);
  std::vector<std::vector<double>> parts(slots, std::vector<double>(1));
  run_threads<P>(list, kRunChunk, [&](const P& p, const Chunk& c, int t) {
    std::vector<double> own(slots);
    HostSums sums{own, int(slots)};
    low_rank_sums_thread<C, kStep>(p, c, t, rank, rule, sums);
    for (size_t slot = 0; slot < slots; ++slot) parts[slot].push_back(own[slot]);
  });
  std::vector<double> out;
  for (std::vector<double>& part : parts) out.push_back(add_as_tree(part));
  return out;
}

void near(const char* what, double found, long double exact, long double bound) {
  CHECK(std::fabs((long double)(found)-exact) <= bound, "%s: %.17g, %.17Lg expected within %Lg", what, found, exact, bound);
}

template <class C>
void compare_solve(int rank, bool inverse, int seed) {
  Problem<C> p(rank, 0, equal_shapes(), seed);
  std::vector<Exact> exact(size_t(rank) + 1);
  for (size_t i = 0; i < p.cases.size(); ++i) {
    int64_t e = 0;
    elements({&p.diagonal.views[i], &p.params.views[i]}, [&](const std::vector<double>& v) {
      const long double z = inverse ? C(v[1]) / std::sqrt((long double)(v[0])) : C(v[1]) * std::sqrt((long double)(v[0]));
      for (int j = 0; j <= rank; ++j) {
        const long double product = j < rank ? z * p.row(i, j, e) : z * z;
        exact[size_t(j)].sum += product;
        exact[size_t(j)].magnitude += std::fabs(product);
      }
      ++e;
    });
  }
  const auto list = precision_list("vectors", p.diagonal.views, p.basis.views, {&p.params.views}, kRunChunk, run_of(p.basis.views));
  const LowRankRule rule{0, 0, 0, 0, inverse};
  const auto found = sums_of<C, false, SmallPacket>(list, rank, rule);
  for (size_t j = 0; j < exact.size(); ++j) near("a product", found[j], exact[j].sum, 6 * p.u * exact[j].magnitude);

  std::vector<C> coefficients;
  for (int j = 0; j < rank; ++j) coefficients.push_back(C(0.3 + 0.1 * j));
  run_threads<TinyPacket>(list, kRunChunk, [&](const TinyPacket& packet, const Chunk& c, int t) {
    low_rank_update_thread<C, false>(packet, c, t, rank, rule, coefficients.data(), C(0));
  });
  for (size_t i = 0; i < p.cases.size(); ++i) {
    const View old = p.params.old(i);
    const DType stored = old.dtype;
    int64_t e = 0;
    elements({&p.diagonal.views[i], &old, &p.params.views[i]}, [&](const std::vector<double>& v) {
      const long double root = std::sqrt((long double)(v[0]));
      long double x = C(v[1]) / root, magnitude = std::fabs(x);
      for (int j = 0; j < rank; ++j) {
        x -= (long double)(coefficients[size_t(j)]) * p.row(i, j, e);
        magnitude += std::fabs((long double)(coefficients[size_t(j)]) * p.row(i, j, e));
      }
      const double rounding = stored == DType::bf16 ? 0x1p-8 : stored == DType::f16 ? 0x1p-11 : stored == DType::f32 ? 0x1p-24 : 0;
      near(p.cases[i].name, v[2], x / root,
           8 * p.u * magnitude / root + 1.01 * rounding * std::fabs(x / root) + (stored == DType::f16) * 1e-7);
      ++e;
    });
  }
}

template <class C>
void compare_step(int rank, double momentum, double strength, int seed) {
  Problem<C> p(rank, 0, equal_shapes(), seed);
  const Views none;
  const LowRankStep step{p.params.views,
                         p.grads.views,
                         momentum != 0 ? p.momenta.views : none,
                         strength != 0 ? p.anchors.views : none,
                         p.diagonal.views,
                         p.basis.views,
                         momentum,
                         strength};
  const LowRankStepPlan plan(step);
  std::vector<Exact> exact(size_t(2 * rank) + 3);
  const double size = 0.02;
  std::vector<C> coefficients;
  for (int j = 0; j < rank; ++j) coefficients.push_back(C(0.3 - 0.1 * j));
  const auto found = sums_of<C, true, TinyPacket>(plan.list, rank, plan.rule);
  run_threads<SmallPacket>(plan.list, kRunChunk, [&](const SmallPacket& packet, const Chunk& c, int t) {
    low_rank_update_thread<C, true>(packet, c, t, rank, plan.rule, coefficients.data(), C(size));
  });
  for (size_t i = 0; i < p.cases.size(); ++i) {
    const View param = p.params.old(i), velocity = p.momenta.old(i);
    const DType stored = param.dtype;
    int64_t e = 0;
    elements({&p.diagonal.views[i], &param, &p.grads.views[i], &velocity, &p.anchors.views[i], &p.params.views[i], &p.momenta.views[i]},
             [&](const std::vector<double>& v) {
               const long double root = std::sqrt((long double)(v[0])), w = C(v[1]);
               const long double kept = momentum * (long double)(v[3]), pulled = strength * (w - v[4]), y = (kept + pulled) * root;
               const long double spread = std::fabs(kept) + std::fabs(strength) * (std::fabs(w) + std::fabs((long double)(v[4])));
               long double x = C(v[2]) / root, magnitude = std::fabs(x);
               const long double z = x;
               const auto add = [&](size_t slot, long double product, long double bound) {
                 exact[slot].sum += product;
                 exact[slot].magnitude += bound;
               };
               for (int j = 0; j < rank; ++j) {
                 const long double q = p.row(i, j, e);
                 add(size_t(j), z * q, std::fabs(z * q));
                 add(size_t(rank + j), y * q, spread * root * std::fabs(q));
                 x -= coefficients[size_t(j)] * q;
                 magnitude += std::fabs(coefficients[size_t(j)] * q);
               }
               add(size_t(2 * rank), z * z, z * z);
               add(size_t(2 * rank) + 1, z * y, std::fabs(z) * spread * root);
               add(size_t(2 * rank) + 2, y * y, spread * root * spread * root);
               const long double direction = kept + pulled + x / root, bound = 8 * p.u * (magnitude / root + spread);
               if (momentum != 0)
                 near("V", v[6], direction, bound);
               else
                 CHECK(v[6] == v[3], "V was written without a momentum");
               const double rounding = stored == DType::bf16 ? 0x1p-8 : stored == DType::f16 ? 0x1p-11 : stored == DType::f32 ? 0x1p-24 : 0;
               const long double stepped = v[1] - size * direction;
               near(p.cases[i].name, v[5], stepped,
                    size * bound + 2 * p.u * std::fabs(size * direction) + 1.01 * rounding * std::fabs(stepped) +
                        4 * (stored == DType::f64 ? 0x1p-53 : p.u) * (std::fabs((long double)(v[1])) + std::fabs(stepped)) +
                        (stored == DType::f16) * 1e-7);
               ++e;
             });
  }
  for (size_t j = 0; j < exact.size(); ++j) near("a product of the step", found[j], exact[j].sum, 8 * p.u * exact[j].magnitude);
}

// ---- appending

constexpr size_t kSharedDoubles = size_t(kStageDoubles + kKeptDoubles);

template <class C, class P>
std::vector<double> products_of(const Problem<C>& p, const Views& diagonal, const std::vector<Views>& vectors, const double* sigma,
                                bool backwards) {
  const int rows = p.rank + int(vectors.size());
  std::vector<double> out(size_t(rows) * size_t(rows), NAN);
  for (const RowPanels& panels : row_panels(p.rank, rows)) {
    const List list = products_list(diagonal, p.basis.views, vectors, panels);
    const auto entries = size_t(gram_entries(panels.lists));
    const uint32_t most = 7;  // blocks; the first launch writes all
    std::vector<double> parts(most * entries, NAN);
    auto packet = std::make_unique<P>();
    for (const List::Launch& part : list.launches(P::max_tensors, P::max_words)) {
      list.fill(part, *packet);
      for (uint32_t b = 0; b < most; ++b) {
        std::vector<double> memory(kSharedDoubles, NAN);
        Team<GramTile, kThreads> team(backwards);
        products_block<C>(*packet, b, most, panels, memory.data(), parts.data() + b * entries, team);
      }
    }
    for (size_t e = 0; e < entries; ++e) {
      double sum = 0;
      for (uint32_t b = 0; b < most; ++b) sum += parts[b * entries + e];
      const TilePlace place = TilePlace::of(int(e));
      const int i = panels.row(place.row), j = panels.row(place.column);
      if (sigma != nullptr && i < p.rank) sum *= sigma[i];
      if (sigma != nullptr && j < p.rank) sum *= sigma[j];
      out[size_t(i * rows + j)] = out[size_t(j * rows + i)] = sum;
    }
  }
  return out;
}

template <class C, class Packet>
void compare_append(int rank, int count, bool widens, bool backwards, std::vector<LayoutCase> cases) {
  Problem<C> p(rank, count, std::move(cases), rank + count);
  const int rows = rank + count;
  std::vector<double> sigma, mix;
  for (int j = 0; j < rank; ++j) sigma.push_back(2.0 / (1 + j));
  for (int i = 0; i < rows * rows; ++i) mix.push_back(std::normal_distribution<double>()(random_bits) / std::sqrt(rows));
  const std::vector<Views> vectors = p.vector_views();
  Views first;
  for (const View& b : p.basis.views) first.push_back(row_of(b));
  const Views& along = widens ? p.diagonal.views : first;
  const double* scales = widens ? sigma.data() : nullptr;
  const auto found = products_of<C, Packet>(p, along, vectors, scales, backwards);
  std::vector<Exact> exact(found.size());
  std::vector<std::vector<std::vector<long double>>> all;  // tensor, element, row
  for (size_t i = 0; i < p.cases.size(); ++i) {
    all.emplace_back();
    std::vector<const View*> views{&p.diagonal.views[i]};
    for (const Views& v : vectors) views.push_back(&v[i]);
    elements(views, [&](const std::vector<double>& v) {
      std::vector<long double> y;
      for (int j = 0; j < rank; ++j) y.push_back((widens ? sigma[size_t(j)] : 1.0L) * p.row(i, j, int64_t(all.back().size())));
      for (size_t k = 1; k < v.size(); ++k) y.push_back(v[k] / std::sqrt((long double)(v[0])));
      for (size_t a = 0; a < y.size(); ++a)
        for (size_t b = 0; b < y.size(); ++b) {
          exact[a * y.size() + b].sum += y[a] * y[b];
          exact[a * y.size() + b].magnitude += std::fabs(y[a] * y[b]);
        }
      all.back().push_back(std::move(y));
    });
  }
  for (size_t e = 0; e < found.size(); ++e) near("a product of rows", found[e], exact[e].sum, 16 * kRound * exact[e].magnitude);

  std::vector<const Views*> others;
  for (const Views& v : vectors) others.push_back(&v);
  const List list = precision_list("diagonal", along, p.basis.views, others, kMixChunk, 1);
  const RowMix rule{rank, rows, scales, mix.data(), widens};
  blocks<Packet>(list, [&](const Packet& packet, uint32_t block) {
    std::vector<double> memory(size_t(mix_doubles(rows)) + 1, NAN);
    Team<NothingKept, kThreads> team(backwards);
    mix_block<C>(packet, block, rule, memory.data(), team);
    CHECK(std::isnan(memory.back()), "a write behind the shared memory");
  });
  for (size_t i = 0; i < p.cases.size(); ++i)
    for (size_t e = 0; e < all[i].size(); ++e) {
      const C before = reinterpret_cast<const C*>(p.diagonal.before[i].data())[e];
      const C after = reinterpret_cast<const C*>(p.diagonal.tensors[i].memory.data())[e];
      std::vector<long double> mixed(size_t(rows), 0), magnitude(size_t(rows), 0);
      long double factor = 1, spread = 0;
      for (int j = 0; j < rows; ++j) {
        for (int k = 0; k < rows; ++k) {
          const long double term = mix[size_t(k * rows + j)] * all[i][e][size_t(k)];
          mixed[size_t(j)] += term;
          magnitude[size_t(j)] += std::fabs(term);
        }
        if (j >= rank && widens) {
          factor += mixed[size_t(j)] * mixed[size_t(j)];
          spread += magnitude[size_t(j)] * magnitude[size_t(j)];
        }
      }
      near("D", double(after), before * factor, 1.01 * p.u * before * factor + 64 * kRound * before * (1 + spread));
      for (int j = 0; j < rank; ++j) {
        const long double row = mixed[size_t(j)] / std::sqrt(factor);
        near("a new row", double(p.row(i, j, int64_t(e), true)), row,
             1.01 * p.u * std::fabs(row) + 64 * kRound * (magnitude[size_t(j)] + spread * std::fabs(row)));
      }
    }
}

}  // namespace

void low_rank_sweeps() {
  int seed = 0;
  for (const int rank : {0, 1, 3, 4, 5, 17})
    for (const bool inverse : {false, true}) {
      compare_solve<float>(rank, inverse, seed++);
      compare_solve<double>(rank, inverse, seed++);
    }
  for (const int rank : {0, 1, 4, 9})
    for (const double momentum : {0.0, 0.9})
      for (const double strength : {0.0, 0.5}) {
        compare_step<float>(rank, momentum, strength, seed++);
        compare_step<double>(rank, momentum, strength, seed++);
      }
}

void low_rank_append() {
  const std::vector<LayoutCase> cases = equal_shapes();
  std::vector<LayoutCase> few;
  for (const LayoutCase& c : cases) {
    int64_t elements = 1;
    for (int64_t s : c.shape) elements *= s;
    if (elements <= 5000) few.push_back(c);
  }
  compare_append<float, LargePacket>(0, 1, true, false, cases);
  compare_append<float, LargePacket>(4, 0, false, false, cases);
  compare_append<float, LargePacket>(3, 2, true, true, cases);
  compare_append<double, LargePacket>(5, 4, true, false, cases);
  compare_append<double, TinyPacket>(1, 1, true, true, few);
  compare_append<float, LargePacket>(16, 48, true, false, few);
  // More rows than one panel has: the basis ends in the first, in the second, in the last.
  compare_append<float, LargePacket>(20, 45, true, true, few);
  compare_append<float, LargePacket>(40, 57, true, false, few);
  compare_append<double, LargePacket>(70, 3, true, false, few);
  compare_append<float, LargePacket>(67, 0, false, false, few);
}
