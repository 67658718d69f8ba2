// Dot products and projections. Compiled with contraction into fused multiply-adds: products of float, bfloat16 and half are exact in
// double, so the sums keep their bits, and doubles are held to a tolerance.

#include "core/projection.h"

#include <type_traits>

#include "core/dtypes.h"
#include "cpu/gram.h"
#include "cpu/joint.h"
#include "cpu/ops.h"

namespace fastcl::cpu {
namespace {

constexpr int64_t kPart = 16384;
// What is worked on at once; it stays in the first-level cache.
constexpr int64_t kBlock = 1024;
constexpr int kLanes = 32;

template <class T>
FASTCL_HD void widen_eight(const T* x, Wide& out) {
  if constexpr (std::is_same_v<T, float>) {
    typedef float Narrow __attribute__((vector_size(32)));
    Narrow narrow;
    memcpy(&narrow, x, sizeof(narrow));
    out = __builtin_convertvector(narrow, Wide);
  } else {
    double wide[kWide];
    for (int l = 0; l < kWide; ++l) wide[l] = load<double>(x[l]);
    memcpy(&out, wide, sizeof(out));
  }
}

// Neighbours are far apart in the order of summation: 32 sums side by side, folded in halves.
struct Lanes {
  static constexpr int kCount = kLanes / kWide;
  Wide lane[kCount] = {};
  FASTCL_HD double fold() const { return fold_wide((lane[0] + lane[2]) + (lane[1] + lane[3])); }
};
static_assert(Lanes::kCount == 4, "fold() adds four");

struct Products {
  double dot, square;
};

// a . b, and with_square b . b from the same loads.
template <class A, class B, bool with_square>
FASTCL_CLONES Products dot_block(const char* a_data, const char* b_data, int64_t n) {
  const A* a = reinterpret_cast<const A*>(a_data);
  const B* b = reinterpret_cast<const B*>(b_data);
  Lanes dot, square;
  int64_t e = 0;
  for (; e + kLanes <= n; e += kLanes)
    for (int l = 0; l < Lanes::kCount; ++l) {
      Wide x, y;
      widen_eight(a + e + l * kWide, x);
      widen_eight(b + e + l * kWide, y);
      dot.lane[l] += x * y;
      if constexpr (with_square) square.lane[l] += y * y;
    }
  for (int l = 0; e < n; ++e, ++l) {
    const double x = load<double>(a[e]), y = load<double>(b[e]);
    dot.lane[l / kWide][l % kWide] += x * y;
    if constexpr (with_square) square.lane[l / kWide][l % kWide] += y * y;
  }
  return {dot.fold(), square.fold()};
}

using Dot = Products (*)(const char*, const char*, int64_t);
Dot dot_of(DType a, DType b, bool with_square) {
  return with_floating(a, [&](auto x) {
    return with_floating(b, [&](auto y) -> Dot {
      using A = typename decltype(x)::type;
      using B = typename decltype(y)::type;
      return with_square ? dot_block<A, B, true> : dot_block<A, B, false>;
    });
  });
}

template <class T>
FASTCL_CLONES void widen_run(const char* data, int64_t stride, int64_t n, double* out) {
  const T* x = reinterpret_cast<const T*>(data);
  if (stride == 1)
    for (int64_t e = 0; e < n; ++e) out[e] = load<double>(x[e]);
  else
    for (int64_t e = 0; e < n; ++e) out[e] = load<double>(x[e * stride]);
}

void widen(const Operand& from, int64_t stride, int64_t skip, int64_t n, double* out) {
  with_floating(from.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    widen_run<T>(from.data + skip * stride * int64_t(sizeof(T)), stride, n, out);
  });
}

// Many streams that take turns are more than the hardware follows: the next block of one is asked for while this one is worked on.
void prefetch_block(const Operand& from, int64_t begin, int64_t end) {
  const int64_t size = size_of(from.dtype);
  for (int64_t at = begin * size; at < end * size; at += 64) __builtin_prefetch(from.data + at);
}

// A sum that keeps what each addition rounds away (Neumaier, 1974): many small tensors are many additions, one after the other.
struct Sum {
  double value = 0, rest = 0;
  void add(double x) {
    const double next = value + x;
    rest += std::fabs(value) >= std::fabs(x) ? (value - next) + x : (x - next) + value;
    value = next;
  }
  // A rest that is not a number would hide an infinite sum.
  double total() const { return std::isfinite(value) ? value + rest : value; }
};

// a . b, and with_square b . b as well, in one sweep.
Products dot_sweep(const Views& a, const Views& b, bool with_square, const Pool& pool) {
  const JointSweep sweep({&a, &b}, kPart);
  std::vector<double> parts(size_t(sweep.parts()) * 2);
  pool.each(sweep.parts(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      Sum dot, square;
      sweep.part(p, [&](const Operand* at, const int64_t* strides, int64_t n) {
        double packed[2][kBlock];
        const bool packs = strides != nullptr;
        const Dot products = dot_of(packs ? DType::f64 : at[0].dtype, packs ? DType::f64 : at[1].dtype, with_square);
        for (int64_t done = 0; done < n; done += kBlock) {
          const int64_t m = std::min(kBlock, n - done);
          const char *x = at[0].data + done * size_of(at[0].dtype), *y = at[1].data + done * size_of(at[1].dtype);
          if (strides != nullptr) {
            for (int o = 0; o < 2; ++o) widen(at[o], strides[o], done, m, packed[o]);
            x = reinterpret_cast<const char*>(packed[0]);
            y = reinterpret_cast<const char*>(packed[1]);
          }
          const Products own = products(x, y, m);
          dot.add(own.dot);
          square.add(own.square);
        }
      });
      parts[2 * p] = dot.total();
      parts[2 * p + 1] = square.total();
    }
  });
  if (parts.empty()) return {0, 0};
  add_pairwise(parts.data(), sweep.parts(), 2);
  return {parts[0], parts[1]};
}

// ---- Gram matrix

void gram_sweep(const std::vector<const Views*>& lists, double* products, const Pool& pool) {
  const int k = int(lists.size());
  const int64_t entries = triangle(k, 0);
  int64_t total = 0;
  for (const View& v : *lists[0]) total += v.numel();
  const JointSweep sweep(lists, gram_part(total, kPart));
  std::vector<double> parts(size_t(std::max<int64_t>(sweep.parts(), 1) * entries));
  pool.each(sweep.parts(), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> rows(size_t(k) * kGramBlock);
    for (int64_t p = begin; p < end; ++p) {
      int64_t filled = 0;  // runs of small tensors are packed together
      const auto flush = [&] {
        for (int row = 0; row < k; ++row) std::fill(rows.begin() + row * kGramBlock + filled, rows.begin() + (row + 1) * kGramBlock, 0.0);
        gram_block(rows.data(), k, kGramBlock, parts.data() + p * entries);
        filled = 0;
      };
      sweep.part(p, [&](const Operand* at, const int64_t* strides, int64_t n) {
        for (int64_t done = 0; done < n;) {
          const int64_t m = std::min(kGramBlock - filled, n - done);
          for (int row = 0; row < k; ++row) {
            widen(at[row], strides != nullptr ? strides[row] : 1, done, m, rows.data() + row * kGramBlock + filled);
            if (strides == nullptr) prefetch_block(at[row], done + m, std::min(done + m + kGramBlock, n));
          }
          filled += m;
          done += m;
          if (filled == kGramBlock) flush();
        }
      });
      if (filled > 0) flush();
    }
  });
  unfold_gram(parts, sweep.parts(), k, products);
}

std::vector<const Views*> pointers(const std::vector<Views>& lists) {
  std::vector<const Views*> out;
  for (const Views& list : lists) out.push_back(&list);
  return out;
}

// ---- g + sum_k v_k m_k

template <class G, class M>
FASTCL_CLONES void add_run(char* grad, const char* memory, int64_t n, double coefficient) {
  G* __restrict g = reinterpret_cast<G*>(grad);
  const M* __restrict m = reinterpret_cast<const M*>(memory);
  for (int64_t e = 0; e < n; ++e) g[e] = store<G>(add_scaled(load<double>(g[e]), coefficient, m[e]));
}

template <class M>
FASTCL_CLONES void add_to(double* __restrict sum, const char* memory, int64_t n, double coefficient) {
  const M* __restrict m = reinterpret_cast<const M*>(memory);
  for (int64_t e = 0; e < n; ++e) sum[e] = add_scaled(sum[e], coefficient, m[e]);
}

template <class G>
FASTCL_CLONES void narrow_run(const double* sum, char* data, int64_t stride, int64_t n) {
  G* g = reinterpret_cast<G*>(data);
  if (stride == 1)
    for (int64_t e = 0; e < n; ++e) g[e] = store<G>(sum[e]);
  else
    for (int64_t e = 0; e < n; ++e) g[e * stride] = store<G>(sum[e]);
}

void add_block(const Operand* at, const int64_t* strides, int64_t done, int64_t n, const std::vector<double>& coefficients) {
  double sum[kBlock], memory[kBlock];
  const int64_t m = std::min(kBlock, n - done), next = std::min(done + 2 * kBlock, n);
  widen(at[0], strides != nullptr ? strides[0] : 1, done, m, sum);
  if (strides == nullptr) prefetch_block(at[0], done + m, next);
  for (size_t k = 0; k < coefficients.size(); ++k) {
    const Operand& from = at[k + 1];
    if (strides == nullptr) prefetch_block(from, done + m, next);
    if (strides != nullptr) {
      widen(from, strides[k + 1], done, m, memory);
      add_to<double>(sum, reinterpret_cast<const char*>(memory), m, coefficients[k]);
    } else {
      with_floating(from.dtype, [&](auto t) {
        using M = typename decltype(t)::type;
        add_to<M>(sum, from.data + done * int64_t(sizeof(M)), m, coefficients[k]);
      });
    }
  }
  with_floating(at[0].dtype, [&](auto t) {
    using G = typename decltype(t)::type;
    const int64_t stride = strides != nullptr ? strides[0] : 1;
    narrow_run<G>(sum, at[0].data + done * stride * int64_t(sizeof(G)), stride, m);
  });
}

}  // namespace

double grad_dot(const Views& a, const Views& b, const Pool& pool) { return dot_sweep(a, b, false, pool).dot; }

void gram(const std::vector<Views>& vectors, double* products, const Pool& pool) { gram_sweep(pointers(vectors), products, pool); }

void project_(const Views& grads, const Views& reference, double* out, const Pool& pool) {
  const Products products = dot_sweep(grads, reference, true, pool);
  out[0] = products.dot;
  out[1] = products.square;
  out[2] = agem_coefficient(products.dot, products.square);
  combine_(grads, {reference}, out + 2, pool);
}

void gem_coefficients(const double* products, int k, double margin, double ridge, double* out) {
  std::vector<double> doubles(size_t(gem_workspace_doubles(k)));
  std::vector<int> ints(size_t(gem_workspace_ints(k)));
  fastcl::gem_coefficients(products, k, margin, ridge, out, doubles.data(), ints.data(), Alone{});
}

void gem_project_(const Views& grads, const std::vector<Views>& memories, double margin, double ridge, double* out, const Pool& pool) {
  std::vector<const Views*> lists = pointers(memories);
  lists.push_back(&grads);
  std::vector<double> products(lists.size() * lists.size());
  gram_sweep(lists, products.data(), pool);
  gem_coefficients(products.data(), int(memories.size()), margin, ridge, out);
  combine_(grads, memories, out + 1, pool);
}

void combine_(const Views& grads, const std::vector<Views>& memories, const double* coefficients, const Pool& pool) {
  std::vector<const Views*> lists{&grads};
  std::vector<double> used;
  for (size_t k = 0; k < memories.size(); ++k) {
    if (coefficients[k] == 0) continue;
    used.push_back(coefficients[k]);
    lists.push_back(&memories[k]);
  }
  if (used.empty()) return;
  const JointSweep sweep(lists, kPart);
  pool.each(sweep.parts(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      sweep.part(p, [&](const Operand* at, const int64_t* strides, int64_t n) {
        if (strides == nullptr && used.size() == 1) {
          with_floating(at[0].dtype, [&](auto g) {
            with_floating(at[1].dtype, [&](auto m) {
              add_run<typename decltype(g)::type, typename decltype(m)::type>(at[0].data, at[1].data, n, used[0]);
            });
          });
          return;
        }
        for (int64_t done = 0; done < n; done += kBlock) add_block(at, strides, done, n, used);
      });
  });
}

}  // namespace fastcl::cpu
