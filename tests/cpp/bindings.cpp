// The torch-free core bound to numpy, for tests/test_core.py: the monoid itself, and the CPU
// kernels of each instruction set. bfloat16 arrays travel as uint16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <numeric>
#include <string>
#include <vector>

#include "core/row_stats.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace llmloss;

namespace {

using State = PartialState<double>;
using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Indices = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// The state of the given columns of a row, joined one by one. The target's exponential is left out.
State columns_state(Array logits, Array weights, Indices columns, int64_t target) {
  const double target_logit = logits.at(target);
  State total;
  for (py::ssize_t i = 0; i < columns.size(); ++i) {
    const int64_t column = columns.at(i);
    State one;
    one.max = logits.at(column);
    one.argmax = column;
    if (column != target) one.sum_exp = exp_of(one.max - one.reference());
    one.sum_sq_exp = one.sum_exp * one.sum_exp;
    one.sum_weights = weights.at(column);
    if (one.sum_weights != 0) one.sum_weighted = one.sum_weights * (one.max - one.reference());
    one.rank = one.max > target_logit || (one.max == target_logit && column < target);
    total = merge(total, one);
  }
  return total;
}

py::dict as_dict(const RowStats<double>& stats) {
  py::dict d;
  for (int stat = 0; stat < Stat::count; ++stat) {
    const bool is_float = stat < Stat::float_count;
    d[Stat::names[stat]] = is_float ? py::cast(stats.floats[stat]) : py::cast(stats.integers[stat]);
  }
  return d;
}

// A call of the kernels on a (rows, columns) array whose rows may have a stride.
template <typename T>
struct Call {
  using Real = real_t<T>;

  Call(int isa, const py::array& logits, const Indices& targets, int64_t vocab_size)
      : kernels(cpu::kernels<T>(cpu::Isa(isa))), order(size_t(logits.shape(0))) {
    if (!cpu::has_isa(cpu::Isa(isa))) throw py::value_error("this CPU lacks the instruction set");
    if (logits.ndim() != 2 || logits.itemsize() != sizeof(T) || logits.strides(1) != sizeof(T)) {
      throw py::value_error("the columns must be adjacent and of the asked type");
    }
    const int64_t rows = logits.shape(0);
    if (targets.size() != rows) throw py::value_error("one target per row");
    in.logits = static_cast<const T*>(logits.data());
    in.layout = {rows, 0, logits.strides(0) / int64_t(sizeof(T))};
    in.rows = rows;
    in.columns = logits.shape(1);
    in.vocab_size = vocab_size;
    in.targets.data = targets.data();
    in.weights.beta = Real(1) / Real(vocab_size);
    std::iota(order.begin(), order.end(), 0);
    for (int stat = 0; stat < Stat::float_count; ++stat) {
      floats[stat] = py::array_t<Real>(rows);
      out.floats[stat] = floats[stat].mutable_data();
    }
    for (int stat = Stat::float_count; stat < Stat::count; ++stat) {
      integers[stat] = Indices(rows);
      out.integers[stat] = integers[stat].mutable_data();
    }
    for (int field = 0; field < StateField::count; ++field) {
      state[field] = py::array_t<Real>(rows);
      out.state[field] = state[field].mutable_data();
    }
  }

  // Only what is asked for is there afterwards.
  void ask_for(const LossOptions<Real>& options) {
    for (int stat = 0; stat < Stat::float_count; ++stat) {
      if (!options.reads(stat)) out.floats[stat] = nullptr;
    }
    out.integers = {};
  }

  py::dict statistics() const {
    py::dict d;
    for (int stat = 0; stat < Stat::float_count; ++stat) {
      if (out.floats[stat] != nullptr) d[Stat::names[stat]] = floats[stat];
    }
    for (int stat = Stat::float_count; stat < Stat::count; ++stat) {
      if (out.integers[stat] != nullptr) d[Stat::names[stat]] = integers[stat];
    }
    return d;
  }

  const cpu::Kernels<T>& kernels;
  RowInputs<T> in;
  RowOutputs<Real> out;
  std::vector<int64_t> order;
  FloatStats<py::array_t<Real>> floats;
  IntegerStats<Indices> integers;
  StateFields<py::array_t<Real>> state;
};

template <typename T>
py::dict row_stats(int isa, py::array logits, Indices targets, int64_t vocab_size) {
  Call<T> call(isa, logits, targets, vocab_size);
  call.kernels.row_stats(call.in, call.out, call.order.data(), call.in.rows);
  return call.statistics();
}

// dL/dlogits for the upstream gradients (float statistics, rows).
template <typename T>
void row_grad(int isa, py::array logits, Indices targets, int64_t vocab_size, Array upstream,
              py::array grad) {
  using Real = real_t<T>;
  Call<T> call(isa, logits, targets, vocab_size);
  const int64_t rows = call.in.rows;
  if (grad.size() != rows * call.in.columns || grad.itemsize() != sizeof(T) ||
      upstream.size() != Stat::float_count * rows) {
    throw py::value_error("grad is shaped like logits, upstream is (float statistics, rows)");
  }
  const std::vector<Real> up(upstream.data(), upstream.data() + upstream.size());
  GradSource<Real> source;
  for (int stat = 0; stat < Stat::float_count; ++stat) source.grads[stat] = up.data() + stat * rows;
  call.kernels.row_stats(call.in, call.out, call.order.data(), rows);
  call.kernels.row_grad(call.in, SavedStats<Real>::needed_by(source, call.out), source,
                        {static_cast<T*>(grad.mutable_data()), {rows, 0, call.in.columns}, nullptr},
                        call.order.data(), rows);
}

// The gradient of the summed loss written over the logits; returns the statistics that it reads.
template <typename T>
py::dict fused(int isa, py::array logits, Indices targets, int64_t vocab_size,
               double label_smoothing, double z_loss, double focal_gamma) {
  using Real = real_t<T>;
  Call<T> call(isa, logits, targets, vocab_size);
  GradSource<Real> source;
  source.from_loss = true;
  source.options = {Real(label_smoothing), Real(z_loss), Real(focal_gamma)};
  call.ask_for(source.options);
  call.kernels.fused(call.in, call.out, source,
                     {static_cast<T*>(logits.mutable_data()), call.in.layout, nullptr},
                     call.order.data(), call.in.rows);
  return call.statistics();
}

template <typename T>
void bind_kernels(py::module_& m, const std::string& dtype) {
  m.def(("row_stats_" + dtype).c_str(), row_stats<T>);
  m.def(("row_grad_" + dtype).c_str(), row_grad<T>);
  m.def(("fused_" + dtype).c_str(), fused<T>);
}

}  // namespace

PYBIND11_MODULE(llmloss_core, m) {
  py::class_<State>(m, "PartialState")
      .def(py::init<>())
      .def_readonly("max", &State::max)
      .def_readonly("sum_exp", &State::sum_exp)
      .def_readonly("sum_x_exp", &State::sum_x_exp)
      .def_readonly("sum_sq_exp", &State::sum_sq_exp)
      .def_readonly("sum_weighted", &State::sum_weighted)
      .def_readonly("sum_weights", &State::sum_weights)
      .def_readonly("argmax", &State::argmax)
      .def_readonly("rank", &State::rank);
  m.attr("statistics") = std::vector<std::string>(std::begin(Stat::names), std::end(Stat::names));
  m.attr("float_statistics") = Stat::float_count;
  m.def("state_of", columns_state);
  m.def("merge", [](const State& a, const State& b) { return merge(a, b); });
  m.def("finalize", [](const State& state, double target_logit, int64_t vocab_size) {
    return as_dict(finalize(state, state.relative(target_logit), vocab_size));
  });
  std::vector<std::string> isas;
  for (const cpu::Isa isa : cpu::all_isas) isas.emplace_back(cpu::name_of(isa));
  m.attr("isas") = isas;
  m.def("has_isa", [](int isa) { return cpu::has_isa(cpu::Isa(isa)); });
  bind_kernels<float>(m, "float32");
  bind_kernels<double>(m, "float64");
  bind_kernels<BFloat16>(m, "bfloat16");
  bind_kernels<Half>(m, "float16");
}
