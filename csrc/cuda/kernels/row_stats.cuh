// The statistics of the rows, from one read of the logits.
#pragma once

#include "chunks.cuh"

namespace llmloss::cuda {

// The assignment of threads to rows.
//   warps_per_row == 1: each warp has a row of its own, and a block has as many rows as warps.
//   otherwise:          blocks_per_row blocks of warps_per_row warps share a row.
struct RowShare {
  int warps_per_row;
  int blocks_per_row;

  __device__ __forceinline__ bool is_warp() const { return warps_per_row == 1; }
  __device__ __forceinline__ int64_t row() const {
    if (!is_warp()) return simt::block_index_x() / unsigned(blocks_per_row);
    return int64_t{simt::block_index_x()} * (simt::block_threads() / warp_size) +
           simt::warp_index();
  }
  // The number of rows that the grid works on at a time.
  __device__ __forceinline__ int64_t rows_at_once() const {
    return is_warp() ? int64_t{simt::grid_x()} * (simt::block_threads() / warp_size)
                     : simt::grid_x() / unsigned(blocks_per_row);
  }
  // The index of this warp among the warps of its row, and their number.
  __device__ __forceinline__ int warp() const {
    if (is_warp()) return 0;
    return int(simt::block_index_x() % unsigned(blocks_per_row)) * warps_per_row +
           int(simt::warp_index());
  }
  __device__ __forceinline__ int warps() const { return warps_per_row * blocks_per_row; }
  // The same for threads.
  __device__ __forceinline__ int thread() const {
    return warp() * int(warp_size) + int(simt::lane());
  }
  __device__ __forceinline__ int threads() const { return warps() * int(warp_size); }
};

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
template <typename T, bool plain>
__global__ void __launch_bounds__(block_size, planned_blocks<T, plain>)
    row_stats_kernel(const __grid_constant__ RowInputs<T> in,
                     const __grid_constant__ RowOutputs<real_t<T>> out,
                     PartialState<real_t<T>>* workspace, const Chunks chunks,
                     const RowShare share) {
  using State = PartialState<real_t<T>>;
  const int64_t row = share.row();
  if (row >= in.rows) return;  // a warp with its own row: no block barrier waits for it
  const bool is_split = workspace != nullptr;
  if (!is_active(in, row)) {
    if (!is_split && share.warp() == 0 && simt::lane() == 0) {
      write_statistics(out, row, absent_statistics<double>(in, row));
    }
    return;
  }
  const LogitTransform<real_t<T>> transform = in.transform.resolved();
  const Target<real_t<T>> target = target_of(in, transform, row);
  const Wanted wanted = plain ? Wanted{} : Wanted::by(out);
  const ColumnReducer<T, plain> reducer{in,           transform,          row,
                                        target.logit, int(target.column), wanted};
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
    total = warp_merge(total, wanted);
  } else {
    State* states = is_split ? workspace + row * chunks.count : simt::dynamic_shared<State>();
    for (int chunk = share.warp(); chunk < chunks.count; chunk += share.warps()) {
      const State state = state_of(chunk);
      if (simt::lane() == 0) states[chunk] = state;
    }
    if (is_split) return;
    simt::block_sync();
    if (simt::warp_index() != 0) return;
    total = merge_chunks(states, chunks.count, wanted);
  }
  if (simt::lane() == 0) write_row(in, out, row, total, target.logit);
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
  const Target<real_t<T>> target = target_of(in, in.transform.resolved(), row);
  const auto total = merge_chunks(workspace + row * chunks.count, chunks.count, Wanted::by(out));
  if (simt::lane() == 0) write_row(in, out, row, total, target.logit);
}

}  // namespace llmloss::cuda
