// The kernels of one logits type, run by the emulator, for Python. Compiled with LLMLOSS_SIMT_TYPE.
// Arrays are passed as addresses (0: not asked), so that tests choose what lies around them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launch/launch.cuh"
#include "simt_settings.h"

namespace py = pybind11;
using namespace llmloss;

namespace {

using T = LLMLOSS_SIMT_TYPE;
using Real = real_t<T>;
using Row = cuda::RowKernels<T>;
using Loss = cuda::LossKernels<Real>;

template <typename P>
P* pointer(const py::dict& d, const char* name) {
  return d.contains(name) ? reinterpret_cast<P*>(d[name].cast<uintptr_t>()) : nullptr;
}

template <typename Number>
Number number(const py::dict& d, const char* name, Number otherwise) {
  return d.contains(name) ? d[name].cast<Number>() : otherwise;
}

// (inner, outer stride, inner stride)
RowLayout layout(const py::dict& d, const char* name) {
  const auto [inner, outer_stride, inner_stride] =
      d[name].cast<std::tuple<int64_t, int64_t, int64_t>>();
  return {inner, outer_stride, inner_stride};
}

RowInputs<T> inputs(const py::dict& d) {
  RowInputs<T> in;
  in.logits = pointer<const T>(d, "logits");
  in.layout = layout(d, "layout");
  in.rows = d["rows"].cast<int64_t>();
  in.columns = d["columns"].cast<int64_t>();
  in.vocab_size = d["vocab_size"].cast<int64_t>();
  in.transform = {number<Real>(d, "scale", 1), number<Real>(d, "softcap", 0),
                  pointer<const Real>(d, "scale_at")};
  in.targets = {pointer<const void>(d, "targets"), number<bool>(d, "is_int64", true),
                number<int64_t>(d, "ignore_index", -100), number<bool>(d, "of_shard", false)};
  in.weights.class_weight = pointer<const Real>(d, "class_weight");
  in.weights.probabilities = pointer<const T>(d, "probabilities");
  if (in.weights.probabilities != nullptr) in.weights.rows = layout(d, "probabilities_layout");
  in.weights.alpha = number<Real>(d, "alpha", 0);
  in.weights.beta = number<Real>(d, "beta", 0);
  return in;
}

// One array for each statistic and state field, by its name behind `prefix`.
FloatStats<Real*> floats(const py::dict& d, const std::string& prefix = "") {
  FloatStats<Real*> arrays;
  for (int stat = 0; stat < Stat::float_count; ++stat) {
    arrays[stat] = pointer<Real>(d, (prefix + Stat::names[stat]).c_str());
  }
  return arrays;
}

RowOutputs<Real> outputs(const py::dict& d) {
  RowOutputs<Real> out{floats(d), {}, {}};
  for (int stat = Stat::float_count; stat < Stat::count; ++stat) {
    out.integers[stat] = pointer<int64_t>(d, Stat::names[stat]);
  }
  for (int field = 0; field < StateField::count; ++field) {
    out.state[field] = pointer<Real>(d, StateField::names[field]);
  }
  return out;
}

LossOptions<Real> loss_options(const py::dict& d) {
  return {number<Real>(d, "label_smoothing", 0), number<Real>(d, "z_loss", 0),
          number<Real>(d, "focal_gamma", 0), d.contains("probabilities")};
}

GradSource<Real> source(const py::dict& d) {
  GradSource<Real> source;
  source.grads = floats(d, "grad_").as<const Real*>();
  source.from_loss = number<bool>(d, "from_loss", false);
  source.options = loss_options(d);
  source.grad_loss = pointer<const Real>(d, "grad_loss");
  source.grad_loss_stride = number<int64_t>(d, "grad_loss_stride", 0);
  source.token_weight = pointer<const Real>(d, "token_weight");
  source.denominator = {pointer<const Real>(d, "denominator")};
  return source;
}

GradOutputs<T> gradient(const py::dict& d) {
  return {pointer<T>(d, "grad"), layout(d, "grad_layout"), pointer<Real>(d, "grad_scale")};
}

LossRows<Real> loss_rows(const py::dict& d) {
  LossRows<Real> rows;
  const RowInputs<T> in = inputs(d);
  rows.options = loss_options(d);
  rows.targets = in.targets;
  rows.rows = in.rows;
  rows.vocab_size = in.vocab_size;
  rows.class_weight = in.weights.class_weight;
  rows.token_weight = pointer<const Real>(d, "token_weight");
  rows.stats = floats(d).as<const Real*>();
  rows.denominator = {pointer<const Real>(d, "denominator")};
  rows.num_items = pointer<const Real>(d, "num_items");
  return rows;
}

cuda::DeviceLimits limits(const py::dict& d) {
  const auto [multiprocessors, shared_per_block, max_cluster] =
      d["device"].cast<std::tuple<int, int64_t, int>>();
  // Room enough in a multiprocessor that only the block's own limit counts.
  const int64_t shared =
      cuda::fused_blocks_per_multiprocessor * (shared_per_block + cuda::reserved_shared);
  return {multiprocessors, shared_per_block, shared, max_cluster};
}

// Device memory of exactly the planned size, and not zero.
std::vector<char> workspace(int64_t bytes) { return std::vector<char>(size_t(bytes), char(0x7f)); }

py::dict row_stats(const py::dict& d) {
  const RowInputs<T> in = inputs(d);
  const auto plan =
      cuda::plan_stats(in.rows, in.vocab_size, sizeof(T), Row::state_bytes, limits(d));
  auto memory = workspace(plan.workspace_bytes);
  if constexpr (simt::emulator::accesses::are_seen) {
    simt::emulator::accesses::watch("workspace", memory.data(), memory.size());
  }
  Row::row_stats(in, outputs(d), plan, memory.data(), nullptr);
  py::dict told;
  told["warps_per_row"] = plan.share.warps_per_row;
  told["blocks_per_row"] = plan.share.blocks_per_row;
  told["chunks"] = plan.chunks.count;
  return told;
}

py::dict row_grad(const py::dict& d) {
  const RowInputs<T> in = inputs(d);
  const GradOutputs<T> out = gradient(d);
  const auto saved = SavedStats<Real>::needed_by(source(d), outputs(d));
  const auto plan =
      cuda::plan_grad(in.rows, in.columns, sizeof(T), out.grad_scale != nullptr, limits(d));
  Row::row_grad(in, saved, source(d), out, plan, nullptr);
  py::dict told;
  told["warps_per_row"] = plan.share.warps_per_row;
  told["blocks_per_row"] = plan.share.blocks_per_row;
  return told;
}

// What the operator does in place, but by the fused kernel also where the plan would rather not.
py::dict in_place(const py::dict& d) {
  const RowInputs<T> in = inputs(d);
  const auto plan = Row::plan_fused(in, gradient(d), limits(d));
  const bool can_fuse = Row::can_fuse(in, outputs(d), source(d), gradient(d));
  if (can_fuse) {
    Row::fused(in, outputs(d), source(d), gradient(d), plan, nullptr);
  } else {
    row_stats(d);
    row_grad(d);
  }
  py::dict told;
  told["is_fused"] = can_fuse;
  told["cluster"] = plan.cluster;
  told["is_staged"] = plan.staged_chunks == plan.slice_chunks;
  told["holds"] = plan.holds;
  told["threads"] = plan.threads;
  told["chunk_columns"] = plan.chunks.columns;
  told["staged_columns"] = plan.staged_chunks * plan.chunks.columns;  // of each block
  return told;
}

void scale(const py::dict& d) {
  const RowInputs<T> in = inputs(d);
  const auto plan = cuda::plan_scale(in.rows, in.columns, sizeof(T), limits(d));
  Row::scale(const_cast<T*>(in.logits), in.layout, in.rows, in.columns,
             pointer<const Real>(d, "factor"), plan, nullptr);
}

void reduce_loss(const py::dict& d, int reduction) {
  Loss::reduce_loss(loss_rows(d), Reduction(reduction), pointer<Real>(d, "loss"), nullptr);
}

void denominator(const py::dict& d) {
  Loss::denominator(loss_rows(d), pointer<Real>(d, "denominator"), nullptr);
}

void mean_loss(const py::dict& d) {
  LossRows<Real> rows = loss_rows(d);
  rows.denominator = {};  // it is not known yet
  Loss::mean_loss(rows, pointer<Real>(d, "denominator"), pointer<Real>(d, "loss"), nullptr);
}

void sum(const py::dict& d, int64_t count) {
  Loss::sum(pointer<const Real>(d, "values"), count, pointer<Real>(d, "loss"), nullptr);
}

void whole_rows(const py::dict& d) {
  ShardRows<Real> in;
  in.shard_stats = pointer<const Real>(d, "shard_stats");
  in.ranks = d["ranks"].cast<int64_t>();
  in.rows = d["rows"].cast<int64_t>();
  in.targets = {pointer<const void>(d, "targets"), number<bool>(d, "is_int64", true),
                number<int64_t>(d, "ignore_index", -100)};
  in.vocab_size = d["vocab_size"].cast<int64_t>();
  Loss::merge_shards(in, outputs(d), pointer<Real>(d, "owners"), nullptr);
}

}  // namespace

PYBIND11_MODULE(LLMLOSS_SIMT_MODULE, m) {
  simt::bind_settings(m);
  m.def("row_stats", row_stats);
  m.def("row_grad", row_grad);
  m.def("in_place", in_place);
  m.def("scale", scale);
  m.def("reduce_loss", reduce_loss);
  m.def("denominator", denominator);
  m.def("mean_loss", mean_loss);
  m.def("sum", sum);
  m.def("merge_shards", whole_rows);
  m.attr("tile_columns") = cuda::tile_columns<T>;
  m.attr("shard_fields") = ShardField::count;
}
