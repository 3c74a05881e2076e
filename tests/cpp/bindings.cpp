// The torch-free core bound to numpy, for tests/test_core.py: the monoid itself, and the CPU
// kernels of each instruction set.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <numeric>
#include <vector>

#include "core/row_stats.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace llmloss;

namespace {

using State = PartialState<double>;

// The state of the given columns of a row, joined one by one.
State state_of(py::array_t<double> logits, py::array_t<int64_t> columns, double target_logit) {
  State total;
  for (py::ssize_t i = 0; i < columns.size(); ++i) {
    State one;
    one.max = logits.at(columns.at(i));
    one.argmax = columns.at(i);
    one.sum_exp = exp_of(one.max - one.reference());
    one.rank = one.max > target_logit;
    total = merge(total, one);
  }
  return total;
}

py::dict as_dict(const RowStats<double>& stats) {
  py::dict d;
  d["log_prob"] = stats.log_prob;
  d["lse"] = stats.lse;
  d["entropy"] = stats.entropy;
  d["argmax"] = stats.argmax;
  d["rank"] = stats.rank;
  return d;
}

// The statistics of the rows of a (rows, columns) array whose rows may have a stride.
template <typename T>
py::dict row_stats(int isa, py::array logits, py::array_t<int64_t> targets, int64_t vocab_size) {
  using Real = real_t<T>;
  const int64_t rows = logits.shape(0), columns = logits.shape(1);
  if (logits.itemsize() != sizeof(T) || logits.strides(1) != sizeof(T)) {
    throw py::value_error("the columns must be adjacent and of the asked type");
  }
  if (targets.size() != rows) throw py::value_error("one target per row");
  RowInputs<T> in;
  in.logits = static_cast<const T*>(logits.data());
  in.layout = {rows, 0, logits.strides(0) / int64_t(sizeof(T))};
  in.rows = rows;
  in.columns = columns;
  in.vocab_size = vocab_size;
  in.targets.data = targets.data();
  in.weights.beta = Real(1) / Real(vocab_size);
  py::array_t<Real> log_prob(rows), lse(rows), entropy(rows), mean(rows);
  py::array_t<int64_t> argmax(rows), rank(rows);
  RowOutputs<Real> out;
  out.log_prob = log_prob.mutable_data();
  out.lse = lse.mutable_data();
  out.entropy = entropy.mutable_data();
  out.mean_log_prob = mean.mutable_data();
  out.argmax = argmax.mutable_data();
  out.rank = rank.mutable_data();
  std::vector<int64_t> order(static_cast<size_t>(rows));
  std::iota(order.begin(), order.end(), 0);
  cpu::kernels<T>(cpu::Isa(isa)).row_stats(in, out, order.data(), rows);
  py::dict d;
  d["log_prob"] = log_prob;
  d["lse"] = lse;
  d["entropy"] = entropy;
  d["mean_log_prob"] = mean;
  d["argmax"] = argmax;
  d["rank"] = rank;
  return d;
}

}  // namespace

PYBIND11_MODULE(llmloss_core, m) {
  py::class_<State>(m, "PartialState").def(py::init<>());
  m.def("state_of", state_of);
  m.def("merge", [](const State& a, const State& b) { return merge(a, b); });
  m.def("finalize", [](const State& state, double target_logit, int64_t vocab_size) {
    return as_dict(finalize(state, target_logit, vocab_size));
  });
  m.def("detected_isa", [] { return int(cpu::detected_isa()); });
  m.def("row_stats_float32", row_stats<float>);
  m.def("row_stats_float64", row_stats<double>);
  m.def("row_stats_bfloat16", row_stats<BFloat16>);
  m.def("row_stats_float16", row_stats<Half>);
}
