// Merges partial states across the lanes of a warp.
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

// The smallest of the lanes' columns; -1 means none.
__device__ __forceinline__ int64_t warp_first(int64_t column) {
  for (unsigned mask = warp_size / 2; mask > 0; mask /= 2) {
    const int64_t other = simt::shuffle_xor(column, mask);
    if (other >= 0 && (column < 0 || other < column)) column = other;
  }
  return column;
}

// The merge of all lanes' states, which have the same maximum, in every lane.
template <typename Real>
__device__ __forceinline__ PartialState<Real> warp_join(PartialState<Real> state,
                                                        const Wanted& wanted) {
  if (wanted.order()) {
    state.argmax = warp_first(state.argmax);
    state.rank = warp_sum(state.rank);
  }
  state.join_sums(wanted, [](Real sum) { return warp_sum(sum); });
  return state;
}

// The same of states with any maxima. They move to the common one first, so that only sums remain
// to be exchanged.
template <typename Real>
__device__ __forceinline__ PartialState<Real> warp_merge(PartialState<Real> state,
                                                         const Wanted& wanted) {
  const Real max = warp_max(state.max);
  if (state.max != max) state.argmax = -1;
  state.rebase(max);
  return warp_join(state, wanted);
}

}  // namespace llmloss::cuda
