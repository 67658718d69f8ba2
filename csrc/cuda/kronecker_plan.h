// Lists of layers. Host code.
#pragma once

#include "cuda/kronecker.h"
#include "cuda/lists.h"

namespace fastcl::cuda {

// What the ops have of their layers; a list that an op has not is null. Tensors without elements stand for a missing bias.
struct LayerViews {
  const Views *weights, *biases, *weight_grads, *bias_grads, *momentum, *pull, *direction, *input_factors, *output_factors;
};

inline void describe_tensors(const View& weight, const View& bias, std::vector<int64_t>& words) {
  const Layout row = row_layout(weight);
  const bool biased = bias.numel() > 0;
  words.insert(words.end(),
               {int64_t(reinterpret_cast<intptr_t>(weight.data)), int64_t(weight.dtype), weight.strides[0], int64_t(row.ndim()),
                biased ? int64_t(reinterpret_cast<intptr_t>(bias.data)) : 0, int64_t(bias.dtype), biased ? bias.strides[0] : 0});
  for (int d = 0; d < row.ndim(); ++d) words.insert(words.end(), {row.sizes[size_t(d)], *row.stride(d)});
}

// Every GPU since sm_80 grants a block as many bytes.
constexpr int64_t kMostShared = 96 * 1024;

// The layers that one tile serves.
template <class TileOf>
struct TiledLayers {
  using Tile = TileOf;
  List list{0, 1, false, false};
  int64_t buffer = 0, stage = 0;  // in elements, of the largest layer

  static bool serves(int m, int n) { return m <= Tile::most_m && n <= Tile::ldn; }
  void add(int m, int n, const std::vector<int64_t>& words) {
    list.add_words(words);
    buffer = std::max<int64_t>(buffer, Tile::buffer(m, n));
    stage = std::max<int64_t>(stage, Tile::stage(m));
  }
  int64_t layers() const { return int64_t(list.entries().size()); }
};

// Layers by the tile that serves them and the type that computes.
struct SmallLayers {
  TiledLayers<LayerTile<float, 2, 5>> narrow;
  TiledLayers<LayerTile<float, 4, 9>> wide;
  TiledLayers<LayerTile<double, 4, 9>> twice;
  int64_t layers() const { return narrow.layers() + wide.layers() + twice.layers(); }

  explicit SmallLayers(const LayerViews& v) {
    const Views& weights = *(v.weights != nullptr ? v.weights : v.weight_grads);
    const Views& biases = *(v.weights != nullptr ? v.biases : v.bias_grads);
    for (size_t i = 0; i < weights.size(); ++i) {
      if (weights[i].numel() == 0) continue;
      const int64_t m = weights[i].shape[0], inputs = inputs_of(weights[i]), n = inputs + (biases[i].numel() > 0);
      if (row_layout(weights[i]).ndim() > kMaxDims)
        throw Refusal(v.weights != nullptr ? "weights" : "weight_grads", i, "has too many dimensions");
      if (m > kSmallRows || n > kSmallColumns) throw Refusal("weights", i, "is of a layer too large for one block");
      std::vector<int64_t> words(size_t(kLayerWords - kLayerItem));
      words[kLayerItem - kLayerItem] = int64_t(i);
      words[kLayerSizes - kLayerItem] = m | n << 16 | inputs << 32;
      const Views* matrices[] = {v.input_factors, v.output_factors, v.momentum, v.pull, v.direction};
      for (int which = 0; which < kLayerMatrixCount; ++which) {
        if (matrices[which] == nullptr) continue;
        const View& view = (*matrices[which])[i];
        words[size_t(kLayerMatrices + 2 * which - kLayerItem)] = int64_t(reinterpret_cast<intptr_t>(view.data));
        words[size_t(kLayerMatrices + 2 * which + 1 - kLayerItem)] = view.strides[0];
      }
      const auto describe = [&](int word, const Views* own, const Views* own_biases) {
        if (own == nullptr) return;
        words[size_t(word - kLayerItem)] = int64_t(words.size()) + kLayerItem;
        describe_tensors((*own)[i], (*own_biases)[i], words);
      };
      describe(kLayerParams, v.weights, v.biases);
      describe(kLayerGrads, v.weight_grads, v.bias_grads);
      if ((*v.input_factors)[i].dtype == DType::f64) {
        twice.add(int(m), int(n), words);
      } else if (narrow.serves(int(m), int(n))) {
        narrow.add(int(m), int(n), words);
      } else {
        wide.add(int(m), int(n), words);
      }
    }
  }
};
static_assert(decltype(SmallLayers::wide)::Tile::most_m >= kSmallRows && decltype(SmallLayers::wide)::Tile::ldn >= kSmallColumns &&
                  decltype(SmallLayers::twice)::Tile::most_m >= kSmallRows && decltype(SmallLayers::twice)::Tile::ldn >= kSmallColumns,
              "the wide tiles serve all layers");
static_assert(sizeof(float) * (decltype(SmallLayers::wide)::Tile::buffer(kSmallRows, kSmallColumns) +
                               decltype(SmallLayers::wide)::Tile::stage(kSmallRows)) <=
                  size_t(kMostShared),
              "floats fit");

// The columns of a padded [m, n] matrix that a layer's weight or bias takes, in that tensor's shape.
class Columns {
 public:
  Columns(const View& matrix, const View& along, int64_t first)
      : strides_(contiguous_strides(along)), view_(start(matrix, along, first, strides_)) {}
  Columns(const Columns&) = delete;
  Columns& operator=(const Columns&) = delete;
  const View& view() const { return view_; }

 private:
  std::vector<int64_t> strides_;
  View view_;

  static View start(const View& matrix, const View& along, int64_t first, std::vector<int64_t>& strides) {
    strides[0] = matrix.strides[0];
    return {matrix.data + first * size_of(matrix.dtype),
            along.shape,
            strides.data(),
            along.ndim,
            matrix.dtype,
            matrix.device,
            matrix.device_index};
  }
};

// matrices: the padded ones, of which the first walks in its own order; tensors go behind the first `before` of them.
inline ByCompute layer_lists(const char* argument, const std::vector<const Views*>& matrices, size_t before, const Views& weights,
                             const Views& biases) {
  ByCompute lists(int(matrices.size()) + 1);
  const auto add = [&](size_t i, const View& tensor, int64_t first) {
    if (tensor.numel() == 0) return;
    std::deque<Columns> columns;
    std::vector<const View*> views;
    std::vector<int64_t> notes;
    const auto push = [&](const View& v) {
      views.push_back(&v);
      notes.push_back(operand_note(v.dtype));
    };
    for (size_t o = 0; o < matrices.size(); ++o) {
      if (o == before) push(tensor);
      push(columns.emplace_back((*matrices[o])[i], tensor, first).view());
    }
    if (before == matrices.size()) push(tensor);
    lists.add(argument, i, (*matrices[0])[i].dtype == DType::f64, views, notes);
  };
  for (size_t i = 0; i < weights.size(); ++i) {
    add(i, weights[i], 0);
    if (weights[i].numel() > 0) add(i, biases[i], inputs_of(weights[i]));
  }
  return lists;
}

inline ByCompute momentum_lists(const Views& momentum, const Views& pull, const Views& weight_grads, const Views& bias_grads) {
  return layer_lists("M", {&momentum, &pull}, 2, weight_grads, bias_grads);
}
inline ByCompute apply_lists(const Views& weights, const Views& biases, const Views& pull, const Views& direction, const Views& momentum) {
  return layer_lists("H", {&pull, &direction, &momentum}, 1, weights, biases);
}

}  // namespace fastcl::cuda
