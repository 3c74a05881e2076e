// The statistics of the rows, from one read of the logits.
#pragma once

#include "chunks.cuh"
#include "share.cuh"

namespace llmloss::cuda {

template <typename T>
__device__ __forceinline__ Columns<T> logits_of(const RowInputs<T>& in, int64_t row) {
  return {in.logits + in.layout.offset(row), 0, int(in.columns)};
}

template <typename T>
__device__ __forceinline__ void write_row(const RowInputs<T>& in, const RowOutputs<real_t<T>>& out,
                                          int64_t row, const PartialState<real_t<T>>& state,
                                          real_t<T> target_logit) {
  write_statistics(out, row, finalize_row(state, target_logit, in.vocab_size));
}

// Reads each active row once and writes its statistics: rows x columns x sizeof(T) bytes of
// traffic. If several blocks share a row, they write its chunks' states to `workspace` (rows x
// chunks) for merge_rows_kernel instead.
template <typename T, unsigned tasks>
__global__ void __launch_bounds__(block_size, planned_blocks(tasks, sizeof(T)))
    row_stats_kernel(const __grid_constant__ RowInputs<T> in,
                     const __grid_constant__ RowOutputs<real_t<T>> out,
                     PartialState<real_t<T>>* workspace, const Chunks chunks,
                     const RowShare share) {
  using State = PartialState<real_t<T>>;
  using Reducer = ColumnReducer<T, tasks>;
  const int64_t row = share.row();
  if (row >= in.rows) return;  // a warp with its own row: no block barrier waits for it
  const bool is_split = workspace != nullptr;
  if (!is_active(in, row)) {
    if (!is_split && share.warp() == 0 && simt::lane() == 0) {
      write_statistics(out, row, absent_statistics<double>(in, row));
    }
    return;
  }
  LogitTransform<real_t<T>> transform;
  if constexpr (task::has(tasks, task::transformed)) transform = in.transform.resolved();
  // Only ranks need the target's logit now. Later it is found in L2, and nobody waits for it here.
  constexpr bool needs_target = task::has(tasks, task::order | task::rest);
  Target<real_t<T>> target = target_class(in, row);
  if constexpr (needs_target) read_logit(in, transform, row, target);
  const Reducer reducer{in, transform, row, target.logit, int(target.column)};
  const Columns<T> columns = logits_of(in, row);
  const auto state_of = [&](int chunk) {
    const int begin = chunk * chunks.columns, end = begin + chunks.columns;
    return reducer.chunk(columns, begin, min_of(end, int(in.vocab_size)));
  };

  State total;
  if (share.is_warp()) {
    for (int chunk = 0; chunk < chunks.count; ++chunk) {
      const State state = state_of(chunk);
      if (unsigned(chunk) % warp_size == simt::lane()) total = merge(total, state);
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
  if constexpr (!needs_target) read_logit(in, transform, row, target);
  write_row(in, out, row, total, target.logit);
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
  if (!is_active(in, row)) {
    if (simt::lane() == 0) write_statistics(out, row, absent_statistics<double>(in, row));
    return;
  }
  Target<real_t<T>> target = target_class(in, row);
  read_logit(in, in.transform.resolved(), row, target);
  const auto total = merge_chunks(workspace + row * chunks.count, chunks.count, Wanted::by(out));
  if (simt::lane() == 0) write_row(in, out, row, total, target.logit);
}

}  // namespace llmloss::cuda
