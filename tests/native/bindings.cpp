// fastcl's torch-free arithmetic and CPU ops on NumPy arrays: the code that ships, in a process that sanitizers can watch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <functional>
#include <optional>
#include <thread>

#include "core/child_mask.h"
#include "core/importance.h"
#include "core/quantile.h"
#include "core/scalar.h"
#include "core/soft_mask.h"
#include "core/tanh.h"
#include "core/view.h"
#include "cpu/child_bits.h"
#include "cpu/ops.h"

namespace py = pybind11;
using namespace fastcl;

namespace {

DType parse(const std::string& name) {
  if (name == "f64") return DType::f64;
  if (name == "f32") return DType::f32;
  if (name == "bf16") return DType::bf16;
  if (name == "f16") return DType::f16;
  if (name == "u8") return DType::u8;
  if (name == "i64") return DType::i64;
  throw py::value_error("unknown dtype " + name);
}

// A view on an array's memory, or on addresses that are never touched (address given).
struct Operand {
  py::object owner;
  char* data;
  std::vector<int64_t> shape, strides;
  DType dtype;
  View view() const { return View{data, shape.data(), strides.data(), int32_t(shape.size()), dtype, Device::cpu, 0}; }
};

Operand of_array(const py::array& array, const std::string& dtype) {
  Operand out{array, static_cast<char*>(const_cast<void*>(array.data())), {}, {}, parse(dtype)};
  if (array.itemsize() != size_of(out.dtype)) throw py::value_error("the array's items do not have the size of " + dtype);
  for (py::ssize_t d = 0; d < array.ndim(); ++d) {
    if (array.strides(d) % array.itemsize() != 0) throw py::value_error("a stride is not a multiple of the item's size");
    out.shape.push_back(array.shape(d));
    out.strides.push_back(array.strides(d) / array.itemsize());
  }
  return out;
}

Operand at_address(uintptr_t address, std::vector<int64_t> shape, std::vector<int64_t> strides, const std::string& dtype) {
  return {py::none(), reinterpret_cast<char*>(address), std::move(shape), std::move(strides), parse(dtype)};
}

using Operands = std::vector<Operand>;

Views views(const Operands& operands) {
  Views out;
  for (const Operand& o : operands) out.push_back(o.view());
  return out;
}

int pool_threads = 1;
int64_t largest_part = 0;  // 0: as large as the threads allow

// Threads that fetch part after part: the order in which parts run is another one every time.
void run_on_threads(int64_t count, int64_t grain, Pool::Body body, void* context) {
  int64_t part = std::max(grain, (count + pool_threads - 1) / pool_threads);
  if (largest_part > 0) part = std::min(part, largest_part);
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(part)) < count;) body(begin, std::min(count, begin + part), context);
  };
  std::vector<std::thread> threads;
  for (int t = 1; t < pool_threads; ++t) threads.emplace_back(work);
  work();
  for (std::thread& t : threads) t.join();
}

void run_serially(int64_t count, int64_t, Pool::Body body, void* context) {
  if (count > 0) body(0, count, context);
}

Pool pool() { return Pool{pool_threads > 1 || largest_part > 0 ? run_on_threads : run_serially}; }

template <class In, class Out, class F>
py::array_t<Out> map(const py::array_t<In, py::array::c_style>& in, F&& f) {
  py::array_t<Out> out(in.size());
  const In* from = in.data();
  Out* to = out.mutable_data();
  for (py::ssize_t e = 0; e < in.size(); ++e) to[e] = f(from[e]);
  return out;
}

using Parts = std::vector<std::tuple<double, double, double>>;

Moments combined(const Parts& parts) {
  Moments sum{0, 0, 0};
  for (const auto& [count, mean, m2] : parts) sum = combine(sum, Moments{count, mean, m2});
  return sum;
}

template <class C>
py::array_t<C> normalised(const py::array_t<C, py::array::c_style>& x, double shift, double count, double mean, double m2) {
  const auto normalise = Normaliser<C>::make(shift, Moments{count, mean, m2});
  return map<C, C>(x, [&](C g) { return normalise(g); });
}

// Every element that walk visits in [begin, end): [element, operand] offsets.
py::array_t<int64_t> walked(const Operands& operands, int64_t begin, int64_t end) {
  const Views v = views(operands);
  std::vector<const View*> pointers;
  for (const View& one : v) pointers.push_back(&one);
  const int n_operands = int(v.size());
  const Layout layout = coalesce(pointers.data(), n_operands);
  std::vector<int64_t> rows;
  walk(layout, begin, end, [&](const int64_t* at, int64_t n) {
    for (int64_t e = 0; e < n; ++e)
      for (int o = 0; o < n_operands; ++o) rows.push_back(at[o] + e * layout.stride(0)[o]);
  });
  py::array_t<int64_t> out({py::ssize_t(rows.size()) / n_operands, py::ssize_t(n_operands)});
  std::copy(rows.begin(), rows.end(), out.mutable_data());
  return out;
}

// The runs themselves, for layouts too large to list their elements: [(offsets, n)].
py::list runs(const Operands& operands, int64_t begin, int64_t end) {
  const Views v = views(operands);
  std::vector<const View*> pointers;
  for (const View& one : v) pointers.push_back(&one);
  const Layout layout = coalesce(pointers.data(), int(v.size()));
  py::list out;
  walk(layout, begin, end, [&](const int64_t* at, int64_t n) { out.append(py::make_tuple(std::vector<int64_t>(at, at + v.size()), n)); });
  return out;
}

py::tuple layout_of(const Operands& operands) {
  const Views v = views(operands);
  std::vector<const View*> pointers;
  for (const View& one : v) pointers.push_back(&one);
  const Layout layout = coalesce(pointers.data(), int(v.size()));
  return py::make_tuple(layout.sizes, layout.strides);
}

bool overlap(const Operands& written, const std::vector<Operands>& reads) {
  std::vector<Views> lists;
  for (const Operands& r : reads) lists.push_back(views(r));
  std::vector<const Views*> pointers;
  for (const Views& l : lists) pointers.push_back(&l);
  return writes_overlap(views(written), pointers);
}

std::vector<Views> lists_of(const std::vector<Operands>& lists) {
  std::vector<Views> out;
  for (const Operands& l : lists) out.push_back(views(l));
  return out;
}

py::array_t<double> returned(std::vector<py::ssize_t> shape, const std::function<void(double*)>& fill) {
  py::array_t<double> out(std::move(shape));
  double* data = out.mutable_data();
  py::gil_scoped_release release;
  fill(data);
  return out;
}

using PlaceTuples = std::vector<std::tuple<int64_t, int64_t, std::vector<int64_t>>>;

// Without places: each tensor is whole.
void child_mask(const Operands& grads, double keep, uint64_t seed, uint32_t step, const PlaceTuples& tuples) {
  const Views g = views(grads);
  std::vector<Place> places;
  for (const auto& [tensor, offset, strides] : tuples) places.push_back({tensor, offset, strides.data()});
  for (size_t i = places.size(); i < g.size(); ++i) places.push_back({int64_t(i), 0, nullptr});
  py::gil_scoped_release release;
  cpu::child_mask_at_(g, keep, seed, step, places, pool());
}

// Whether each element is kept, one by one.
py::array_t<bool> child_kept(double keep, uint64_t seed, uint32_t tensor, uint32_t step,
                             const py::array_t<int64_t, py::array::c_style>& elements) {
  const ChildDraw draw = ChildDraw::make(keep, seed);
  return map<int64_t, bool>(elements, [&](int64_t e) { return draw.kept(uint64_t(e), tensor, step); });
}

double spg(const Operands& accumulated, const std::vector<Operands>& heads) {
  std::vector<Views> lists;
  for (const Operands& h : heads) lists.push_back(views(h));
  const Views a = views(accumulated);
  py::gil_scoped_release release;
  return cpu::spg_importance_(a, lists, pool());
}

// (kind, number, seed, operands, anchors, coefficient) for each transform.
using TransformArguments = std::tuple<int, double, uint64_t, Operands, Operands, Operands>;

struct OptimizerArguments {
  Operands params, grads, first, second, steps;
  std::vector<TransformArguments> transforms;
  std::vector<std::tuple<int64_t, int64_t, std::vector<int64_t>>> places;
  Operands bits, ranks, scale, found_inf, lr;

  OptimizerInputs inputs() const {
    OptimizerInputs out{views(params), views(grads), views(first), views(second),    views(steps), {}, {},
                        views(bits),   views(ranks), views(scale), views(found_inf), views(lr)};
    for (const auto& [kind, number, seed, operands, anchors, coefficient] : transforms)
      out.transforms.push_back({TransformKind(kind), number, seed, views(operands), views(anchors), views(coefficient)});
    for (const auto& [tensor, offset, strides] : places) out.places.push_back({tensor, offset, strides.data()});
    return out;
  }
};

// Lists: params, grads, momenta, anchors, diagonal, basis.
LowRankStep low_rank_step(const std::vector<Operands>& lists, double momentum, double strength) {
  const std::vector<Views> v = lists_of(lists);
  return {v.at(0), v.at(1), v.at(2), v.at(3), v.at(4), v.at(5), momentum, strength};
}

}  // namespace

PYBIND11_MODULE(_fastcl_numpy, m) {
  py::class_<Operand>(m, "Operand")
      .def_property_readonly("numel", [](const Operand& o) { return o.view().numel(); })
      .def_property_readonly(
          "span", [](const Operand& o) { return reinterpret_cast<uintptr_t>(o.view().end()) - reinterpret_cast<uintptr_t>(o.data); });
  m.def("of_array", &of_array);
  m.def("at_address", &at_address);
  m.def("set_pool", [](int threads, int64_t part) {
    pool_threads = threads;
    largest_part = part;
  });

  m.def("widen_f16", [](const py::array_t<uint16_t, py::array::c_style>& x) {
    return map<uint16_t, float>(x, [](uint16_t b) { return widen(Float16{b}); });
  });
  m.def("widen_bf16", [](const py::array_t<uint16_t, py::array::c_style>& x) {
    return map<uint16_t, float>(x, [](uint16_t b) { return widen(BFloat16{b}); });
  });
  m.def("to_f16", [](const py::array_t<float, py::array::c_style>& x) {
    return map<float, uint16_t>(x, [](float v) { return to_float16(v).bits; });
  });
  m.def("to_bf16", [](const py::array_t<float, py::array::c_style>& x) {
    return map<float, uint16_t>(x, [](float v) { return to_bfloat16(v).bits; });
  });
  m.def("store_f16_f64", [](const py::array_t<double, py::array::c_style>& x) {
    return map<double, uint16_t>(x, [](double v) { return store<Float16>(v).bits; });
  });
  m.def("store_bf16_f64", [](const py::array_t<double, py::array::c_style>& x) {
    return map<double, uint16_t>(x, [](double v) { return store<BFloat16>(v).bits; });
  });
  m.def("load_u8_f32",
        [](const py::array_t<uint8_t, py::array::c_style>& x) { return map<uint8_t, float>(x, [](uint8_t v) { return load<float>(v); }); });
  m.def("load_u8_f64", [](const py::array_t<uint8_t, py::array::c_style>& x) {
    return map<uint8_t, double>(x, [](uint8_t v) { return load<double>(v); });
  });
  m.def("store_u8_f32",
        [](const py::array_t<float, py::array::c_style>& x) { return map<float, uint8_t>(x, [](float v) { return store<uint8_t>(v); }); });
  m.def("store_u8_f64", [](const py::array_t<double, py::array::c_style>& x) {
    return map<double, uint8_t>(x, [](double v) { return store<uint8_t>(v); });
  });
  m.def("abs_tanh_f32",
        [](const py::array_t<float, py::array::c_style>& x) { return map<float, float>(x, [](float v) { return abs_tanh(v); }); });
  m.def("abs_tanh_f64",
        [](const py::array_t<double, py::array::c_style>& x) { return map<double, double>(x, [](double v) { return abs_tanh(v); }); });
  m.def("combine", [](const Parts& parts) {
    const Moments sum = combined(parts);
    return py::make_tuple(sum.count, sum.mean, sum.m2);
  });
  m.def("normalise_f32", &normalised<float>);
  m.def("normalise_f64", &normalised<double>);

  m.def("walked", &walked);
  m.def("runs", &runs);
  m.def("layout", &layout_of);
  m.def("overlaps_itself", [](const Operand& o) { return overlaps_itself(o.view()); });
  m.def("is_contiguous", [](const Operand& o) { return is_contiguous(o.view()); });
  m.def("broadcasts", [](const Operand& read, const Operand& written) { return broadcasts(read.view(), written.view()); });
  m.def("writes_overlap", &overlap);

  m.def("soft_mask_", [](const Operands& grads, const Operands& importance, double strength) {
    const Views g = views(grads), i = views(importance);
    py::gil_scoped_release release;
    cpu::soft_mask_(g, i, strength, pool());
  });
  m.def("emax_", [](const Operands& importance, const Operands& fresh) {
    const Views i = views(importance), n = views(fresh);
    py::gil_scoped_release release;
    cpu::emax_(i, n, pool());
  });
  m.def("bit_mask_", [](const Operands& grads, const Operands& bits) {
    const Views g = views(grads), b = views(bits);
    py::gil_scoped_release release;
    cpu::bit_mask_(g, b, pool());
  });
  m.def("threshold_bits_", [](const Operands& bits, const Operands& tensors, double threshold) {
    const Views b = views(bits), t = views(tensors);
    py::gil_scoped_release release;
    cpu::threshold_bits_(b, t, threshold, pool());
  });
  m.def("quantile", [](const Operands& tensors, double q) {
    const Views t = views(tensors);
    py::gil_scoped_release release;
    return cpu::quantile(t, q, pool());
  });
  m.def("quantile_by_counts", [](const Operands& tensors, double q) {
    const Views t = views(tensors);
    py::gil_scoped_release release;
    return cpu::quantile_by_counts(t, q, pool());
  });
  m.def("radix_counts", [](const Operands& tensors, const std::vector<uint64_t>& prefixes, int level, bool wide) {
    const Views t = views(tensors);
    const int64_t own[] = {int64_t(prefixes.at(0)), int64_t(prefixes.at(1))};
    py::array_t<int64_t> counts({2, kRadixColumns});
    int64_t* data = counts.mutable_data();
    py::gil_scoped_release release;
    cpu::radix_counts(t, own, level, wide, data, pool());
    py::gil_scoped_acquire acquire;
    return counts;
  });
  m.def("spg_importance_", &spg);
  m.def("grad_dot", [](const Operands& a, const Operands& b) {
    const Views x = views(a), y = views(b);
    py::gil_scoped_release release;
    return cpu::grad_dot(x, y, pool());
  });
  m.def("gram", [](const std::vector<Operands>& vectors) {
    const std::vector<Views> v = lists_of(vectors);
    const auto k = py::ssize_t(v.size());
    return returned({k, k}, [&](double* out) { cpu::gram(v, out, pool()); });
  });
  m.def("project_", [](const Operands& grads, const Operands& reference) {
    const Views g = views(grads), r = views(reference);
    return returned({3}, [&](double* out) { cpu::project_(g, r, out, pool()); });
  });
  m.def("gem_project_", [](const Operands& grads, const std::vector<Operands>& memories, double margin, double ridge) {
    const Views g = views(grads);
    const std::vector<Views> v = lists_of(memories);
    return returned({py::ssize_t(2 * v.size() + 1)}, [&](double* out) { cpu::gem_project_(g, v, margin, ridge, out, pool()); });
  });
  m.def("philox", [](const std::vector<uint32_t>& c, const std::vector<uint32_t>& k) {
    const Philox drawn = Philox::draw(c.at(0), c.at(1), c.at(2), c.at(3), k.at(0), k.at(1));
    return std::vector<uint32_t>(drawn.word, drawn.word + 4);
  });
  m.def("draw_blocks", [](uint64_t block, int64_t blocks, uint32_t tensor, uint32_t step, uint64_t seed) {
    std::vector<uint16_t> bits(size_t(8 * (blocks + cpu::kBlocksAtOnce)));
    cpu::draw_blocks(ChildDraw::make(0.5, seed), block, blocks, tensor, step, bits.data());
    bits.resize(size_t(8 * blocks));
    return bits;
  });
  m.def("child_kept", &child_kept);
  m.def("child_mask_", &child_mask, py::arg("grads"), py::arg("keep"), py::arg("seed"), py::arg("step"), py::arg("places") = PlaceTuples{});
  m.def("fisher_add_", [](const Operands& fisher, const Operands& grads, double weight, std::optional<double> max_norm) {
    const Views f = views(fisher), g = views(grads);
    py::gil_scoped_release release;
    cpu::fisher_add_(f, g, weight, max_norm ? &*max_norm : nullptr, pool());
  });
  m.def("fisher_squares", [](const Operands& grads) {
    const Views g = views(grads);
    return returned({py::ssize_t(g.size())}, [&](double* out) { cpu::fisher_squares(g, out, pool()); });
  });
  m.def("fisher_update_", [](const Operands& fisher, const Operands& grads, double weight, const std::vector<double>& coefficients) {
    const Views f = views(fisher), g = views(grads);
    py::gil_scoped_release release;
    cpu::fisher_update_(f, g, weight, coefficients.data(), pool());
  });
  m.def("ewc_pull_", [](const Operands& grads, const Operands& params, const Operands& precision, const Operands& anchor, double strength) {
    const Views g = views(grads), p = views(params), a = views(precision), c = views(anchor);
    py::gil_scoped_release release;
    cpu::ewc_pull_(g, p, a, c, strength, pool());
  });
  m.def("gem_coefficients", [](const py::array_t<double, py::array::c_style>& products, double margin, double ridge) {
    const int k = int(products.shape(0)) - 1;
    return returned({2 * k + 1}, [&](double* out) { cpu::gem_coefficients(products.data(), k, margin, ridge, out); });
  });

  py::class_<OptimizerArguments>(m, "OptimizerArguments")
      .def(py::init<>())
      .def_readwrite("params", &OptimizerArguments::params)
      .def_readwrite("grads", &OptimizerArguments::grads)
      .def_readwrite("first", &OptimizerArguments::first)
      .def_readwrite("second", &OptimizerArguments::second)
      .def_readwrite("steps", &OptimizerArguments::steps)
      .def_readwrite("transforms", &OptimizerArguments::transforms)
      .def_readwrite("places", &OptimizerArguments::places)
      .def_readwrite("bits", &OptimizerArguments::bits)
      .def_readwrite("ranks", &OptimizerArguments::ranks)
      .def_readwrite("scale", &OptimizerArguments::scale)
      .def_readwrite("found_inf", &OptimizerArguments::found_inf)
      .def_readwrite("lr", &OptimizerArguments::lr);
  m.def("adamw_", [](const OptimizerArguments& a, double lr, double beta1, double beta2, double eps, double decay, bool hf, bool maximize) {
    const OptimizerInputs inputs = a.inputs();
    py::gil_scoped_release release;
    cpu::adamw_(inputs, {lr, beta1, beta2, eps, decay, hf, maximize}, pool());
  });
  m.def("sgd_", [](const OptimizerArguments& a, double lr, double momentum, double dampening, double decay, bool nesterov, bool maximize,
                   bool first) {
    const OptimizerInputs inputs = a.inputs();
    py::gil_scoped_release release;
    cpu::sgd_(inputs, {lr, momentum, dampening, decay, nesterov, maximize, first}, pool());
  });
  m.def("transformed_dot", [](const OptimizerArguments& a, const Operands& reference) {
    const OptimizerInputs inputs = a.inputs();
    const Views r = views(reference);
    return returned({2}, [&](double* out) { cpu::transformed_dot(inputs, r, out, pool()); });
  });
  m.def("low_rank_products", [](const Operands& vectors, const Operands& diagonal, const Operands& basis, bool inverse) {
    const Views x = views(vectors), d = views(diagonal), b = views(basis);
    return returned({b[0].shape[0] + 1}, [&](double* out) { cpu::low_rank_products(x, d, b, inverse, out, pool()); });
  });
  m.def("low_rank_update_",
        [](const Operands& grads, const Operands& diagonal, const Operands& basis, const std::vector<double>& coefficients) {
          const Views g = views(grads), d = views(diagonal), b = views(basis);
          py::gil_scoped_release release;
          cpu::low_rank_update_(g, d, b, coefficients.data(), pool());
        });
  m.def("low_rank_step_products", [](const std::vector<Operands>& lists, double momentum, double strength) {
    const LowRankStep step = low_rank_step(lists, momentum, strength);
    return returned({2 * step.basis[0].shape[0] + 3}, [&](double* out) { cpu::low_rank_step_products(step, out, pool()); });
  });
  m.def("low_rank_step_update_",
        [](const std::vector<Operands>& lists, const std::vector<double>& coefficients, double size, double momentum, double strength) {
          const LowRankStep step = low_rank_step(lists, momentum, strength);
          py::gil_scoped_release release;
          cpu::low_rank_step_update_(step, coefficients.data(), size, pool());
        });
  m.def("low_rank_gram",
        [](const Operands& diagonal, const Operands& basis, const std::vector<double>& sigma, const std::vector<Operands>& vectors) {
          const Views d = views(diagonal), b = views(basis);
          const std::vector<Views> v = lists_of(vectors);
          const auto rows = py::ssize_t(sigma.size() + v.size());
          return returned({rows, rows}, [&](double* out) { cpu::low_rank_gram(d, b, sigma.data(), v, out, pool()); });
        });
  m.def("low_rank_compress_", [](const Operands& diagonal, const Operands& basis, const std::vector<double>& sigma,
                                 const std::vector<Operands>& vectors, const py::array_t<double, py::array::c_style>& mix) {
    const Views d = views(diagonal), b = views(basis);
    const std::vector<Views> v = lists_of(vectors);
    const auto rows = py::ssize_t(sigma.size());
    return returned({rows, rows}, [&](double* out) { cpu::low_rank_compress_(d, b, sigma.data(), v, mix.data(), out, pool()); });
  });
  m.def("low_rank_rotate_", [](const Operands& basis, const py::array_t<double, py::array::c_style>& mix) {
    const Views b = views(basis);
    return returned({mix.shape(0), mix.shape(0)}, [&](double* out) { cpu::low_rank_rotate_(b, mix.data(), out, pool()); });
  });
  m.def("kept", [](double keep, uint64_t seed, uint64_t element, uint32_t tensor, uint32_t step) {
    return ChildDraw::make(keep, seed).kept(element, tensor, step);
  });
}
