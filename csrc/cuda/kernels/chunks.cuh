// Reduces columns to partial states, in an order that does not depend on the launch.
//
// A row is cut into chunks of whole tiles; a tile is 4 KB, eight 16-byte vectors for each lane of a
// warp. One warp reduces a chunk to one PartialState, and lane i of a warp merges the chunks i,
// i + 32, ... before the lanes are merged. Only the row's length and type decide the cut and the
// order. So a row's bits are the same whether a warp, a block, a cluster or many blocks work on it,
// whatever batch it is in, and wherever in memory it begins.
#pragma once

#include "../../core/row_grad.h"
#include "../../core/rows.h"
#include "../device/merge.cuh"
#include "../device/vector.cuh"

namespace llmloss::cuda {

inline constexpr int tile_vectors = 8;   // for each lane
inline constexpr int batch_vectors = 4;  // that a lane loads and adds to its state at once

template <typename T>
inline constexpr int tile_columns = int{warp_size} * tile_vectors * Vector<T>::size;

template <typename T>
inline constexpr int batch_columns = int{warp_size} * batch_vectors * Vector<T>::size;

// The most threads of a block, and the number of such blocks that a multiprocessor should hold.
// They bound a kernel's registers; tests/test_cuda_build.py checks the compiler's report.
inline constexpr int block_size = 256;
template <typename T, bool plain>
inline constexpr int planned_blocks = plain && sizeof(T) < 8 ? 3 : 2;

// How a row is cut.
struct Chunks {
  int columns;  // of a chunk: a multiple of tile_columns
  int count;
};

// float is as accurate as torch; for 16-bit logits the hardware's exponential is accurate enough.
template <typename T, typename Real>
__device__ __forceinline__ Real exp_for(Real x) {
  if constexpr (sizeof(T) == 2) {
    return simt::fast_exp(x);
  } else {
    return exp_of(x);
  }
}

// Reduces the columns of a row.
// plain: untransformed logits, and only sum_exp is requested. This is the common case, and a
// compile-time constant.
template <typename T, bool plain>
struct ColumnReducer {
  using Real = real_t<T>;
  using State = PartialState<Real>;
  static constexpr int width = Vector<T>::size;

  static_assert(tile_columns<T> % batch_columns<T> == 0);

  const RowInputs<T>& in;
  LogitTransform<Real> transform;  // resolved
  int64_t row;
  Real target_logit;
  int target;  // its column; -1: none
  Wanted wanted;

  // The state of the columns [begin, end), the same in every lane.
  __device__ __forceinline__ State chunk(const Columns<T>& columns, int begin, int end) const {
    State state;
    const unsigned skew = columns.skew();
#pragma unroll 1
    for (int batch = begin; batch < end; batch += batch_columns<T>) {
      const int first = batch + int(simt::lane()) * width;
      Words vectors[batch_vectors];
      if (batch + batch_columns<T> <= end && columns.is_inside(batch, batch + batch_columns<T>)) {
        // All loads come before the arithmetic, so that they overlap.
        const T* const at = columns.at(first);
        if (skew == 0) {
#pragma unroll
          for (int v = 0; v < batch_vectors; ++v) vectors[v] = simt::load_words(at + v * stride);
        } else {
#pragma unroll
          for (int v = 0; v < batch_vectors; ++v) vectors[v] = load_skewed(at + v * stride, skew);
        }
      } else {
#pragma unroll
        for (int v = 0; v < batch_vectors; ++v) vectors[v] = columns.load(first + v * stride, end);
      }
      if constexpr (plain) {
        add_plain(state, vectors);
      } else {
        add(state, vectors, first, end);
      }
    }
    return warp_merge(state, wanted);
  }

 private:
  static constexpr int stride = int(warp_size) * width;

  // Makes the sums relative to a batch's maximum. There is no branch: lanes find their maxima in
  // different batches, so that some lane of a warp nearly always needs it. Returns the factor for
  // sum_exp.
  __device__ __forceinline__ Real rebase(State& state, Real max) const {
    const Real before = state.max, reference_before = state.reference();
    state.max = larger(before, max);
    const Real shift = before - state.reference();  // -inf for the identity, whose sums are 0
    const Real factor = exp_for<T>(shift);
    if (!plain && wanted.floats[Stat::entropy]) {
      // A factor that underflows leaves 0, not 0 * inf.
      state.sum_x_exp =
          factor == Real(0) ? Real(0) : factor * (state.sum_x_exp + shift * state.sum_exp);
    }
    if (!plain && wanted.floats[Stat::log_sum_sq_probs]) state.sum_sq_exp *= factor * factor;
    if (!plain && wanted.floats[Stat::mean_log_prob] && state.sum_weights != Real(0)) {
      state.sum_weighted += state.sum_weights * (reference_before - state.reference());
    }
    return factor;
  }

  // Columns after the last are -inf, which adds nothing.
  __device__ __forceinline__ void add_plain(State& state,
                                            const Words (&vectors)[batch_vectors]) const {
    const Real factor = rebase(state, largest<T>(vectors));
    const Real reference = state.reference();
    Real sums[batch_vectors];
#pragma unroll
    for (int v = 0; v < batch_vectors; ++v) {
      sums[v] = exp_for<T>(element<T>(vectors[v], 0) - reference);
#pragma unroll
      for (int i = 1; i < width; ++i) {
        sums[v] += exp_for<T>(element<T>(vectors[v], i) - reference);
      }
    }
    state.sum_exp = fma_of(state.sum_exp, factor, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  // The same with every statistic that can be requested, and the same bits of sum_exp.
  __device__ __forceinline__ void add(State& state, const Words (&vectors)[batch_vectors],
                                      int first, int end) const {
    const auto is_there = [end](int column) { return column < end; };
    Real x[batch_vectors][width], max = -infinity<Real>();
#pragma unroll
    for (int v = 0; v < batch_vectors; ++v) {
      const int column = first + v * stride;
      Real largest = -infinity<Real>();
#pragma unroll
      for (int i = 0; i < width; ++i) {
        x[v][i] =
            is_there(column + i) ? transform.apply(element<T>(vectors[v], i)) : -infinity<Real>();
        largest = larger(largest, x[v][i]);
      }
      if (wanted.order()) {
        if (is_there(column) && (largest > larger(state.max, max) || state.argmax < 0)) {
          int place = 0;
#pragma unroll
          for (int i = width - 1; i >= 0; --i) place = x[v][i] == largest ? i : place;
          state.argmax = column + place;
        }
#pragma unroll
        for (int i = 0; i < width; ++i) {
          const bool is_before = column + i < target;  // and so wins a tie
          state.rank += x[v][i] > target_logit || (is_before && x[v][i] == target_logit);
        }
      }
      max = larger(max, largest);
    }
    const Real factor = rebase(state, max);
    const Real reference = state.reference();
    Real sums[batch_vectors];
#pragma unroll
    for (int v = 0; v < batch_vectors; ++v) {
      const int column = first + v * stride;
      Real sum_x_exp = 0, sum_sq_exp = 0, sum_shifted = 0;
      int count = 0;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const Real shifted = x[v][i] - reference;
        const Real exp = exp_for<T>(shifted);
        sums[v] = i == 0 ? exp : sums[v] + exp;
        if (wanted.floats[Stat::entropy])
          sum_x_exp += max_of(lowest_log_prob<Real>(), shifted) * exp;
        if (wanted.floats[Stat::log_sum_sq_probs]) sum_sq_exp = fma_of(exp, exp, sum_sq_exp);
        if (!wanted.floats[Stat::mean_log_prob] || !is_there(column + i)) continue;
        if (in.weights.is_constant()) {
          sum_shifted += shifted;
          ++count;
        } else {
          // A column of weight 0 adds nothing, even if its logit is -inf.
          const Real a = in.weights.at(row, column + i);
          if (a == Real(0)) continue;
          state.sum_weighted += a * shifted;
          state.sum_weights += a;
        }
      }
      if (wanted.floats[Stat::entropy]) state.sum_x_exp += sum_x_exp;
      if (wanted.floats[Stat::log_sum_sq_probs]) state.sum_sq_exp += sum_sq_exp;
      if (wanted.floats[Stat::mean_log_prob] && in.weights.is_constant()) {
        state.sum_weighted += in.weights.beta * sum_shifted;
        state.sum_weights += in.weights.beta * Real(count);
      }
    }
    state.sum_exp = fma_of(state.sum_exp, factor, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
};

// The state of a whole row from those of its chunks, the same in every lane.
template <typename Real>
__device__ __forceinline__ PartialState<Real> merge_chunks(const PartialState<Real>* chunks,
                                                           int count, const Wanted& wanted) {
  PartialState<Real> state;
  for (int i = int(simt::lane()); i < count; i += int(warp_size)) state = merge(state, chunks[i]);
  return warp_merge(state, wanted);
}

// In double: these are few operations per row, and their rounding errors do not matter then.
template <typename Real>
__device__ __forceinline__ RowStats<double> finalize_row(const PartialState<Real>& state,
                                                         Real target_logit, int64_t vocab_size) {
  return finalize(state.template as<double>(), double(target_logit), vocab_size);
}

// The target of an active row, without its logit.
template <typename T>
__device__ __forceinline__ Target<real_t<T>> target_class(const RowInputs<T>& in, int64_t row) {
  if (!target_is_here(in, row)) return {};
  const int64_t column = in.targets[row];
  return {.column = column, .weight = in.weights.of_class(column)};
}

template <typename T>
__device__ __forceinline__ Target<real_t<T>> target_of(const RowInputs<T>& in,
                                                       const LogitTransform<real_t<T>>& transform,
                                                       int64_t row) {
  Target<real_t<T>> target = target_class(in, row);
  if (target.column >= 0) {
    target.logit = transform.apply(to_real(in.logits[in.layout.offset(row) + target.column]));
  }
  return target;
}

}  // namespace llmloss::cuda
