// Merging partial states across the lanes of a warp.
#pragma once

#include "../../core/row_stats.h"
#include "simt.cuh"

namespace llmloss::cuda {

inline constexpr unsigned warp_size = 32;

template <typename Real>
__device__ __forceinline__ Real warp_max(Real value) {
  for (unsigned mask = warp_size / 2; mask > 0; mask /= 2) {
    value = max_of(value, simt::shuffle_xor(value, mask));
  }
  return value;
}

template <typename Number>
__device__ __forceinline__ Number warp_sum(Number value) {
  for (unsigned mask = warp_size / 2; mask > 0; mask /= 2) {
    value += simt::shuffle_xor(value, mask);
  }
  return value;
}

// The smallest of the lanes' columns; -1 counts as none.
__device__ __forceinline__ int64_t warp_first(int64_t column) {
  for (unsigned mask = warp_size / 2; mask > 0; mask /= 2) {
    const int64_t other = simt::shuffle_xor(column, mask);
    if (other >= 0 && (column < 0 || other < column)) column = other;
  }
  return column;
}

// Which of the optional statistics a kernel is asked for.
struct Wanted {
  bool entropy = false;
  bool mean = false;
  bool rank = false;  // with argmax

  template <typename Real>
  static LLMLOSS_HD Wanted by(const RowOutputs<Real>& out) {
    return {.entropy = out.entropy != nullptr,
            .mean = out.mean_log_prob != nullptr,
            .rank = out.argmax != nullptr || out.rank != nullptr};
  }
};

// The merge of all lanes' states, in every lane: all move to the common maximum at once, so that
// only sums are left to exchange.
template <typename Real>
__device__ __forceinline__ PartialState<Real> warp_merge(PartialState<Real> state,
                                                         const Wanted& wanted) {
  const Real max = warp_max(state.max);
  if (wanted.rank) {
    state.argmax = warp_first(state.max == max ? state.argmax : -1);
    state.rank = warp_sum(state.rank);
  }
  state.rebase(max);
  state.sum_exp = warp_sum(state.sum_exp);
  state.sum_x_exp = wanted.entropy ? warp_sum(state.sum_x_exp) : Real(0);
  if (wanted.mean) {
    state.sum_weighted = warp_sum(state.sum_weighted);
    state.sum_weights = warp_sum(state.sum_weights);
  }
  return state;
}

}  // namespace llmloss::cuda
