// The statistics of rows whose columns are spread over the ranks of a group.
#pragma once

#include "../../core/shards.h"
#include "../device/simt.cuh"

namespace llmloss::cuda {

inline constexpr int merge_threads = 256;

// Reads every rank's statistics and writes those of the whole rows; one thread per row.
template <typename Real>
__global__ void __launch_bounds__(merge_threads, 2)
    merge_shards_kernel(const __grid_constant__ ShardRows<Real> in,
                        const __grid_constant__ RowOutputs<Real> out, Real* owners) {
  const int64_t first = int64_t{simt::block_index_x()} * merge_threads;
  const int64_t row = first + simt::thread_index();
  if (row < in.rows) merge_shards(in, out, owners, row);
}

}  // namespace llmloss::cuda
