// How threads share rows, and a row's columns.
#pragma once

#include "../device/merge.cuh"

namespace llmloss::cuda {

// One of `count` groups of threads that write a row. A group takes every count-th piece of the
// row's vectors; a piece has a few vectors (piece_vectors) for each of its threads.
struct Part {
  int thread;   // of the group
  int threads;  // in the group
  int index = 0;
  int count = 1;
};

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
  // This thread's part of a row that is written by pieces.
  __device__ __forceinline__ Part part() const {
    if (is_warp()) return {int(simt::lane()), int(warp_size)};
    return {int(simt::thread_index()), int(simt::block_threads()),
            int(simt::block_index_x() % unsigned(blocks_per_row)), blocks_per_row};
  }
};

}  // namespace llmloss::cuda
