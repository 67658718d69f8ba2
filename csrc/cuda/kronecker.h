// Layers of Kronecker-factored precisions. A small layer is one block's: both products, the norm and the momentum. Its threads wait for
// each other between phases; inside one they share nothing, so that the host can run a phase for all threads in turn.
#pragma once

#include "core/kronecker.h"
#include "cuda/operands.h"

#ifdef __CUDA_ARCH__
#define FASTCL_UNROLL_SOME _Pragma("unroll kUnrolled")
#else
#define FASTCL_UNROLL_SOME
#endif

namespace fastcl::cuda {

// The build forbids contraction, which products want: they are held to tolerances.
FASTCL_HD float fused(float a, float b, float c) { return fmaf(a, b, c); }
FASTCL_HD double fused(double a, double b, double c) { return fma(a, b, c); }

// ---- small layers: what a list's entry says about one
//
// Behind the form: the layer's number, its sizes, the address and the row stride of each matrix, and where the tensors that hold weight and
// bias are described. Element (i, j) of a weight is that of W.flatten(1); column n_in is the bias.

constexpr int kLayerItem = 2, kLayerSizes = 3, kLayerMatrices = 4;
enum LayerMatrix : int { kInputFactor, kOutputFactor, kDualMomentum, kLayerPull, kLayerDirection, kLayerMatrixCount };
constexpr int kLayerParams = kLayerMatrices + 2 * kLayerMatrixCount, kLayerGrads = kLayerParams + 1, kLayerWords = kLayerGrads + 1;
// A description: these words, and per inner dimension, innermost first, its size and stride.
constexpr int kWeightAddress = 0, kWeightType = 1, kWeightRow = 2, kWeightDims = 3, kBiasAddress = 4, kBiasType = 5, kBiasStride = 6;
constexpr int kTensorWords = 7;

template <class C>
FASTCL_HD C read_element(const int64_t address, DType t, int64_t at) {
  if (t == DType::f32) return load<C>(reinterpret_cast<const float*>(address)[at]);
  if (t == DType::bf16) return load<C>(reinterpret_cast<const BFloat16*>(address)[at]);
  if (t == DType::f16) return load<C>(reinterpret_cast<const Float16*>(address)[at]);
  return load<C>(reinterpret_cast<const double*>(address)[at]);
}
template <class C>
FASTCL_HD void write_element(const int64_t address, DType t, int64_t at, C x) {
  if (t == DType::f32) {
    reinterpret_cast<float*>(address)[at] = store<float>(x);
  } else if (t == DType::bf16) {
    reinterpret_cast<BFloat16*>(address)[at] = store<BFloat16>(x);
  } else if (t == DType::f16) {
    reinterpret_cast<Float16*>(address)[at] = store<Float16>(x);
  } else {
    reinterpret_cast<double*>(address)[at] = store<double>(x);
  }
}

// Weight and bias of a layer as one matrix.
template <class C, class P>
struct LayerTensors {
  const P& p;
  int at, inputs;  // inputs: without the bias

  FASTCL_HD int64_t offset(int i, int j) const {
    int64_t out = i * p.words[at + kWeightRow];
    int d = at + kTensorWords;
    FASTCL_ROLLED
    for (int left = int(p.words[at + kWeightDims]); left > 1; --left, d += 2) {
      const int size = int(p.words[d]);
      out += j % size * p.words[d + 1];
      j /= size;
    }
    return out + j * p.words[d + 1];
  }
  FASTCL_HD C read(int i, int j) const {
    if (j == inputs) return read_element<C>(p.words[at + kBiasAddress], DType(p.words[at + kBiasType]), i * p.words[at + kBiasStride]);
    return read_element<C>(p.words[at + kWeightAddress], DType(p.words[at + kWeightType]), offset(i, j));
  }
  FASTCL_HD void write(int i, int j, C x) const {
    if (j == inputs) {
      write_element(p.words[at + kBiasAddress], DType(p.words[at + kBiasType]), i * p.words[at + kBiasStride], x);
    } else {
      write_element(p.words[at + kWeightAddress], DType(p.words[at + kWeightType]), offset(i, j), x);
    }
  }
};

template <class C, class P>
struct Layer {
  const P& p;
  int entry, m, n, inputs;

  static FASTCL_HD Layer of(const P& p, uint32_t block) {
    const int entry = p.at[p.find(block)];
    const int64_t sizes = p.words[entry + kLayerSizes];
    return {p, entry, int(sizes & 0xffff), int(sizes >> 16 & 0xffff), int(sizes >> 32)};
  }
  FASTCL_HD int64_t item() const { return p.words[entry + kLayerItem]; }
  FASTCL_HD C* at(LayerMatrix which, int i, int j) const {
    const int word = entry + kLayerMatrices + 2 * int(which);
    return reinterpret_cast<C*>(p.words[word]) + (i * p.words[word + 1] + j);
  }
  FASTCL_HD LayerTensors<C, P> params() const { return {p, entry + int(p.words[entry + kLayerParams]), inputs}; }
  FASTCL_HD LayerTensors<C, P> grads() const { return {p, entry + int(p.words[entry + kLayerGrads]), inputs}; }
};

// ---- small layers: the products
//
// kDown x kAcross threads hold the whole result, kRows x kColumns elements each. X [m, n] lies in one buffer, which T^T = (G X)^T takes
// over when all have read it; G and A come by kDepth of their columns or rows. In a step of the inner loop a thread reads its kRows of the
// left operand in one or two words, which half a warp shares, and kColumns of the right one, where a warp's lie side by side: the stride of
// one thread's columns is kAcross. Wide layers: 13 words for 36 multiply-adds.

constexpr int kLayerThreads = 512, kAcross = 16, kDown = kLayerThreads / kAcross, kDepth = 16;
constexpr int kLayerWarps = kLayerThreads / 32;
static_assert(kLayerWarps == kDepth, "a warp fetches a row of A");

enum class LayerKind : int32_t { solve, quadratic, step, direction };

struct LayerTask {
  LayerKind kind;
  double momentum, strength, lr;
};

template <class C, int kRows, int kColumns>
struct LayerTile {
  static constexpr int most_m = kRows * kDown, ldn = kColumns * kAcross;
  static constexpr int fetches = (ldn + 31) / 32 > most_m / kDown ? (ldn + 31) / 32 : most_m / kDown;

  // In elements: of the buffer, and of a part of a factor behind it.
  static constexpr FASTCL_HD int ldm(int m) { return (m + 3) / 4 * 4 + 4; }
  static constexpr FASTCL_HD int buffer(int m, int n) { return m * ldn > n * ldm(m) ? m * ldn : n * ldm(m); }
  static constexpr FASTCL_HD int stage(int m) { return kDepth * (ldn > ldm(m) ? ldn : ldm(m)); }

  // What a thread keeps.
  struct Own {
    C sum[kRows][kColumns], fetched[fetches];
    double total;
  };

  template <class P>
  static FASTCL_HD void fetch_output_factor(const Layer<C, P>& layer, int begin, int thread, Own& own) {
    const int k = begin + thread % kDepth;
    FASTCL_UNROLL
    for (int f = 0; f < fetches; ++f) {
      const int i = thread / kDepth + f * kDown;
      own.fetched[f] = i < layer.m && k < layer.m ? *layer.at(kOutputFactor, i, k) : C(0);
    }
  }
  static FASTCL_HD void put_output_factor(int ldm, int thread, const Own& own, C* stage) {
    FASTCL_UNROLL
    for (int f = 0; f < fetches; ++f) {
      const int i = thread / kDepth + f * kDown;
      if (i < ldm) stage[thread % kDepth * ldm + i] = own.fetched[f];
    }
  }
  template <class P>
  static FASTCL_HD void fetch_input_factor(const Layer<C, P>& layer, int begin, int thread, Own& own) {
    const int k = begin + thread / 32;
    FASTCL_UNROLL
    for (int f = 0; f < fetches; ++f) {
      const int j = thread % 32 + f * 32;
      own.fetched[f] = j < layer.n && k < layer.n ? *layer.at(kInputFactor, k, j) : C(0);
    }
  }
  static FASTCL_HD void put_input_factor(int thread, const Own& own, C* stage) {
    FASTCL_UNROLL
    for (int f = 0; f < fetches; ++f) {
      const int j = thread % 32 + f * 32;
      if (j < ldn) stage[thread / 32 * ldn + j] = own.fetched[f];
    }
  }

  // sum(i, j) += sum_k left[k, i] right[k, j]
  static FASTCL_HD void multiply(int m, int depth, const C* left, const C* right, int thread, Own& own) {
    const int row = thread / kAcross * kRows, column = thread % kAcross, rows = ldm(m);
    [[maybe_unused]] constexpr int kUnrolled = sizeof(C) == sizeof(float) ? 4 : 1;  // doubles fill the registers
    if (row >= m) return;
    FASTCL_UNROLL_SOME
    for (int k = 0; k < depth; ++k) {
      const Elements<C, kRows> a = Vector<C, kRows>::load(left + k * rows + row).elements();
      FASTCL_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const C b = right[k * ldn + column + c * kAcross];
        FASTCL_UNROLL
        for (int r = 0; r < kRows; ++r) own.sum[r][c] = fused(a.x[r], b, own.sum[r][c]);
      }
    }
  }
  static FASTCL_HD void clear(Own& own) {
    FASTCL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FASTCL_UNROLL
      for (int c = 0; c < kColumns; ++c) own.sum[r][c] = 0;
    }
  }
  // The result, and its transpose, into the buffer.
  static FASTCL_HD void put(int m, int thread, const Own& own, C* buffer) {
    const int row = thread / kAcross * kRows, column = thread % kAcross;
    FASTCL_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= m) continue;
      FASTCL_UNROLL
      for (int c = 0; c < kColumns; ++c) buffer[(row + r) * ldn + column + c * kAcross] = own.sum[r][c];
    }
  }
  static FASTCL_HD void turn(int m, int n, int thread, const Own& own, C* buffer) {
    const int row = thread / kAcross * kRows, column = thread % kAcross;
    if (row >= m) return;
    FASTCL_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      if (column + c * kAcross >= n) continue;
      Elements<C, kRows> e;
      FASTCL_UNROLL
      for (int r = 0; r < kRows; ++r) e.x[r] = own.sum[r][c];
      Vector<C, kRows>::of(e).store(buffer + (column + c * kAcross) * ldm(m) + row);
    }
  }
};

// X into the buffer, with zeros where the threads' columns go on: the tensors' own elements, or the momentum after its update.
template <class Tile, class C, class P>
FASTCL_HD void layer_fill(const Layer<C, P>& layer, const LayerTask& task, int thread, C* buffer) {
  const bool updates = task.kind == LayerKind::step || task.kind == LayerKind::direction;
  const auto tensors = updates ? layer.grads() : layer.params();
  const auto update = DualMomentum<C>::make(task.momentum, task.strength);
  const auto descend = Descent<C>::make(task.lr);
  for (int i = thread / 32; i < layer.m; i += kLayerWarps) {
    FASTCL_ROLLED
    for (int j = thread % 32; j < Tile::ldn; j += 32) {
      C x = 0;
      if (j < layer.n) {
        x = tensors.read(i, j);
        if (updates) {
          C *own = layer.at(kDualMomentum, i, j), *pull = layer.at(kLayerPull, i, j);
          const C h = *pull;
          x = update(*own, x, h);
          *own = x;
          if (task.kind == LayerKind::step) *pull = descend(h, x);
        }
      }
      buffer[i * Tile::ldn + j] = x;
    }
  }
}

// What becomes of V = G X A, which lies in the buffer, and the thread's part of <X, V>. X is read anew: it is still in the cache.
template <class Tile, class C, class P>
FASTCL_HD double layer_leave(const Layer<C, P>& layer, const LayerTask& task, int thread, const C* buffer) {
  const auto params = layer.params();
  const auto descend = Descent<C>::make(task.lr);
  double total = 0;
  for (int i = thread / 32; i < layer.m; i += kLayerWarps) {
    FASTCL_ROLLED
    for (int j = thread % 32; j < layer.n; j += 32) {
      const C v = buffer[i * Tile::ldn + j];
      if (task.kind == LayerKind::solve) {
        params.write(i, j, v);
        continue;
      }
      const C x = task.kind == LayerKind::direction ? *layer.at(kDualMomentum, i, j) : params.read(i, j);
      if (task.kind == LayerKind::step) {
        params.write(i, j, descend(x, v));
        continue;
      }
      if (task.kind == LayerKind::direction) *layer.at(kLayerDirection, i, j) = v;
      total = fma(double(x), double(v), total);
    }
  }
  return total;
}

// A layer from beginning to end. team.each(phase) runs phase(thread, own) for every thread and waits for all. out, if any, has a place for
// each layer's <X, V>.
template <class C, int kRows, int kColumns, class P, class Team>
FASTCL_HD void small_layer(const P& p, uint32_t block, const LayerTask& task, C* buffer, C* stage, double* out, Team& team) {
  using Tile = LayerTile<C, kRows, kColumns>;
  using Own = typename Tile::Own;
  const auto layer = Layer<C, P>::of(p, block);
  const int m = layer.m, n = layer.n, ldm = Tile::ldm(m);
  constexpr bool kAhead = sizeof(C) == sizeof(float);  // doubles leave no registers for it
  team.each([&](int thread, Own& own) {
    if (kAhead) Tile::fetch_output_factor(layer, 0, thread, own);
    layer_fill<Tile>(layer, task, thread, buffer);
    Tile::clear(own);
  });
  for (int k = 0; k < m; k += kDepth) {
    team.each([&](int thread, Own& own) {
      if (!kAhead) Tile::fetch_output_factor(layer, k, thread, own);
      Tile::put_output_factor(ldm, thread, own, stage);
    });
    team.each([&](int thread, Own& own) {
      if (kAhead && k + kDepth < m) Tile::fetch_output_factor(layer, k + kDepth, thread, own);  // on its way during the multiplications
      Tile::multiply(m, m - k < kDepth ? m - k : kDepth, stage, buffer + k * Tile::ldn, thread, own);
    });
  }
  team.each([&](int thread, Own& own) {
    if (kAhead) Tile::fetch_input_factor(layer, 0, thread, own);
    Tile::turn(m, n, thread, own, buffer);
    Tile::clear(own);
  });
  for (int k = 0; k < n; k += kDepth) {
    team.each([&](int thread, Own& own) {
      if (!kAhead) Tile::fetch_input_factor(layer, k, thread, own);
      Tile::put_input_factor(thread, own, stage);
    });
    team.each([&](int thread, Own& own) {
      if (kAhead && k + kDepth < n) Tile::fetch_input_factor(layer, k + kDepth, thread, own);
      Tile::multiply(m, n - k < kDepth ? n - k : kDepth, buffer + k * ldm, stage, thread, own);
    });
  }
  team.each([&](int thread, Own& own) { Tile::put(m, thread, own, buffer); });
  team.each([&](int thread, Own& own) { own.total = layer_leave<Tile>(layer, task, thread, buffer); });
  if (out != nullptr) team.leave(out + layer.item());
}

// ---- layers of any size, element by element

// Where a run lies in the first N operands, with one division per dimension for all of them.
template <int N, class S>
FASTCL_HD void places(const S& site, int64_t (&at)[N]) {
  FASTCL_UNROLL
  for (int o = 0; o < N; ++o) at[o] = site.first;
  if ((site.form & kDimsMask) != 0) site.p.offsets(site.entry, site.first, 0, at);
}

struct MomentumRule {
  double momentum, strength, lr;
  bool moves;  // the pull, by lr
};

// M <- rho M + g + lambda H, and where it moves H <- H - lr M: momentum, pull, gradient.
template <class C, class P>
FASTCL_HD void ncl_momentum_thread(const P& p, const Chunk& c, int thread, const MomentumRule& rule) {
  const auto update = DualMomentum<C>::make(rule.momentum, rule.strength);
  const auto descend = Descent<C>::make(rule.lr);
  each_run<kRun<C>>(p, c, thread, [&](const auto& site) {
    constexpr int V = std::decay_t<decltype(site)>::width;
    int64_t at[3];
    places(site, at);
    C m[V], h[V], g[V];
    site.read(0, at[0], m);
    site.read(1, at[1], h);
    site.read(2, at[2], g);
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) {
      m[k] = update(m[k], g[k], h[k]);
      h[k] = descend(h[k], m[k]);
    }
    site.write(0, at[0], m);
    if (rule.moves) site.write(1, at[1], h);
  });
}

// W <- W - s V, H <- H - s M: pull, parameter, direction, momentum. The rows of a pull lie in order, those of a parameter may not.
template <class C, class P>
FASTCL_HD void ncl_apply_thread(const P& p, const Chunk& c, int thread, double step) {
  const auto descend = Descent<C>::make(step);
  each_run<kRun<C>>(p, c, thread, [&](const auto& site) {
    constexpr int V = std::decay_t<decltype(site)>::width;
    int64_t at[4];
    places(site, at);
    C h[V], w[V], v[V], m[V];
    site.read(0, at[0], h);
    site.read(1, at[1], w);
    site.read(2, at[2], v);
    site.read(3, at[3], m);
    FASTCL_UNROLL
    for (int k = 0; k < V; ++k) {
      w[k] = descend(w[k], v[k]);
      h[k] = descend(h[k], m[k]);
    }
    site.write(1, at[1], w);
    site.write(0, at[0], h);
  });
}

}  // namespace fastcl::cuda
