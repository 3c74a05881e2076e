// The statistics of the rows, from one read of the logits.
#pragma once

#include "chunks.cuh"
#include "share.cuh"

namespace llmloss::cuda {

template <typename T>
__device__ __forceinline__ Columns<T> logits_of(const RowInputs<T>& in, int64_t row) {
  return {in.logits + in.layout.offset(row), 0, int(in.columns)};
}

// Reads each active row once and writes its statistics: rows x columns x sizeof(T) bytes of
// traffic. If several blocks share a row, they write its chunks' states to `workspace` (rows x
// chunks) for merge_rows_kernel instead.
template <typename T, unsigned tasks>
__global__ void __launch_bounds__(block_size, stats_blocks<T>(tasks))
    row_stats_kernel(const __grid_constant__ RowInputs<T> in,
                     const __grid_constant__ RowOutputs<real_t<T>> out,
                     PartialState<real_t<T>>* workspace, const Chunks chunks,
                     const RowShare share) {
  using State = PartialState<real_t<T>>;
  using Reducer = ColumnReducer<T, tasks>;
  const int64_t row = share.row();
  if (row >= in.rows) return;  // a warp with its own row: no block barrier waits for it
  const bool is_split = workspace != nullptr;
  const RowTarget read_target(in.targets, row);
  if (!read_target.is_active(in.vocab_size)) {
    if (!is_split && share.warp() == 0 && simt::lane() == 0) {
      write_statistics(out, row,
                       absent_statistics<double>(read_target.is_ignored(), in.vocab_size));
    }
    return;
  }
  LogitTransform<real_t<T>> transform;
  if constexpr (task::has(tasks, task::transformed)) transform = in.transform.resolved();
  const int target = int(target_class(in, read_target).column);
  // Ranks need the target's logit now, nobody else before the end. It is on its way meanwhile, but
  // where the loop needs the register, and takes longer for its arithmetic than for its loads:
  // there it is read again.
  constexpr bool needs_target = task::has(tasks, task::order | task::rest);
  constexpr bool reads_early =
      tasks == task::plain || tasks == task::transformed || tasks == task::mean;
  const bool is_read = needs_target || (reads_early && !is_split && share.warp() == 0);
  StoredTarget<T> stored(in, row, is_read ? target : -1);
  const Reducer reducer{in, transform, row,
                        needs_target ? stored.transformed(transform) : real_t<T>(0), target};
  const Columns<T> columns = logits_of(in, row);
  const auto state_of = [&](int chunk) {
    const int begin = chunk * chunks.columns, end = begin + chunks.columns;
    return reducer.chunk(columns, begin, min_of(end, int(in.vocab_size)));
  };

  State total;
  if (share.is_warp()) {
    for (int chunk = 0; chunk < chunks.count; ++chunk) {  // a few: see plan_share
      const State state = state_of(chunk);
      if (unsigned(chunk) == simt::lane()) total = state;
    }
    total = warp_merge(total, Reducer::wanted());
  } else {
    State* states = is_split ? workspace + row * chunks.count : simt::dynamic_shared<State>();
    for (int chunk = share.warp(); chunk < chunks.count; chunk += share.warps()) {
      const State state = state_of(chunk);
      if (simt::lane() == 0) copy_fields(state, states[chunk], Reducer::wanted());
    }
    if (is_split) return;
    simt::block_sync();
    if (simt::warp_index() != 0) return;
    total = merge_chunks(states, chunks.count, Reducer::wanted());
  }
  if (simt::lane() != 0) return;
  if constexpr (!reads_early) stored = {in, row, target};
  write_statistics(
      out, row,
      finalize_row(total, stored.transformed(transform), in.vocab_size, Reducer::wanted()));
}

// Reads the workspace and writes the statistics of rows that several blocks have shared; one warp
// per row.
template <typename T>
__global__ void __launch_bounds__(block_size)
    merge_rows_kernel(const __grid_constant__ RowInputs<T> in,
                      const __grid_constant__ RowOutputs<real_t<T>> out,
                      const PartialState<real_t<T>>* workspace, const Chunks chunks) {
  const int64_t row = RowShare{1, 1}.row();
  if (row >= in.rows) return;
  const RowTarget read_target(in.targets, row);
  if (!read_target.is_active(in.vocab_size)) {
    if (simt::lane() != 0) return;
    write_statistics(out, row, absent_statistics<double>(read_target.is_ignored(), in.vocab_size));
    return;
  }
  const StoredTarget<T> stored(in, row, target_class(in, read_target).column);
  const Wanted wanted = Wanted::by(out);
  const auto total = merge_chunks(workspace + row * chunks.count, chunks.count, wanted);
  if (simt::lane() != 0) return;
  const real_t<T> target = stored.transformed(in.transform.resolved());
  write_statistics(out, row, finalize_row(total, target, in.vocab_size, wanted));
}

}  // namespace llmloss::cuda
