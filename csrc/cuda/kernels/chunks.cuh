// From columns to partial states, in units whose arithmetic is the same wherever they run.
//
// A row is cut into chunks of whole tiles; a tile is 4 KB, eight 16-byte vectors for each lane of a
// warp. One warp reduces a chunk to one PartialState, and lane i of a warp merges the chunks i,
// i + 32, ... before the lanes are merged. Cut and order depend on the row's length and type alone.
// So the bits of a row are the same whether a warp, a block, a cluster or many blocks work on it,
// in whatever batch it stands, and wherever in memory it begins.
#pragma once

#include "../../core/rows.h"
#include "../device/merge.cuh"
#include "../device/vector.cuh"

namespace llmloss::cuda {

inline constexpr int tile_vectors = 8;  // for each lane

template <typename T>
inline constexpr int tile_columns = int{warp_size} * tile_vectors * Vector<T>::size;

// Threads of a block at most, and how many such blocks a multiprocessor holds: what bounds a
// kernel's registers. tests/test_cuda_build.py reads the compiler's report for them.
inline constexpr int block_size = 256;
template <typename T, bool plain>
inline constexpr int planned_blocks = plain && sizeof(T) < 8 ? 3 : 2;

// How a row is cut.
struct Chunks {
  int columns;  // of a chunk: a multiple of tile_columns
  int count;
};

// float keeps torch's own accuracy; for 16-bit logits the hardware's exponential is exact enough.
template <typename T, typename Real>
__device__ __forceinline__ Real exp_for(Real x) {
  if constexpr (sizeof(T) == 2) {
    return simt::fast_exp(x);
  } else {
    return exp_of(x);
  }
}

// What the columns of a row are asked for.
// plain: logits as they are, and only sum_exp; known to the compiler, since it is the common case.
template <typename T, bool plain>
struct ColumnReducer {
  using Real = real_t<T>;
  using State = PartialState<Real>;
  static constexpr int width = Vector<T>::size;

  const RowInputs<T>& in;
  LogitTransform<Real> transform;  // resolved
  int64_t row;
  Real target_logit;
  Wanted wanted;

  // The state of the columns [begin, end), the same in every lane.
  __device__ __forceinline__ State chunk(const Columns<T>& columns, int begin, int end) const {
    State state;
    for (int tile = begin; tile < end; tile += tile_columns<T>) {
      const int first = tile + int(simt::lane()) * width;
      if (tile + tile_columns<T> <= end && columns.is_inside(tile, tile + tile_columns<T>)) {
        whole_tile(state, columns, first);
      } else {
        for (int column = first; column < end; column += stride) {
          if (column + width <= end) {
            full_vector(state, columns.load(column), column);
          } else {
            single_columns(state, columns, column, end);
          }
        }
        break;
      }
    }
    return warp_merge(state, wanted);
  }

 private:
  __device__ __forceinline__ void whole_tile(State& state, const Columns<T>& columns,
                                             int first) const {
    const unsigned skew = columns.skew();
    // A batch's loads come before its arithmetic, so that they are under way together.
#pragma unroll 1
    for (int done = 0; done < tile_vectors; done += batch, first += batch * stride) {
      Vector<T> vectors[batch];
      const T* const at = columns.at(first);
      if (skew == 0) {
#pragma unroll
        for (int i = 0; i < batch; ++i) vectors[i] = load_aligned(at + i * stride);
      } else {
#pragma unroll
        for (int i = 0; i < batch; ++i) vectors[i] = load_skewed(at + i * stride, skew);
      }
#pragma unroll
      for (int i = 0; i < batch; ++i) full_vector(state, vectors[i], first + i * stride);
    }
  }

  static constexpr int batch = 4;
  static constexpr int stride = int(warp_size) * width;

  // The last columns of a row, fewer than a vector.
  __device__ __forceinline__ void single_columns(State& state, const Columns<T>& columns,
                                                 int column, int end) const {
    for (; column < end; ++column) {
      const Real x[1] = {logit(*columns.at(column))};
      const Real a[1] = {has_weights() ? in.weights.at(row, column) : Real(0)};
      accumulate(state, x, a, column);
    }
  }

  __device__ __forceinline__ void full_vector(State& state, const Vector<T>& raw,
                                              int column) const {
    Real x[width], a[width] = {};
#pragma unroll
    for (int i = 0; i < width; ++i) x[i] = logit(raw.at[i]);
    if (has_weights()) {
#pragma unroll
      for (int i = 0; i < width; ++i) a[i] = in.weights.at(row, column + i);
    }
    accumulate(state, x, a, column);
  }

  __device__ __forceinline__ Real logit(T raw) const {
    return plain ? to_real(raw) : transform.apply(to_real(raw));
  }

  __device__ __forceinline__ bool has_weights() const {
    return !plain && wanted.mean && !in.weights.is_constant();
  }

  // Adds n neighbouring columns to the state.
  template <int n>
  __device__ __forceinline__ void accumulate(State& state, const Real (&x)[n], const Real (&a)[n],
                                             int column) const {
    Real max = x[0];
#pragma unroll
    for (int i = 1; i < n; ++i) max = max_of(max, x[i]);
    if (!plain && wanted.rank) {
      if (max > state.max || state.argmax < 0) {
        int first = 0;
#pragma unroll
        for (int i = n - 1; i >= 0; --i) first = x[i] == max ? i : first;
        state.argmax = column + first;
      }
#pragma unroll
      for (int i = 0; i < n; ++i) state.rank += x[i] > target_logit;
    }
    if (max > state.max) state.rebase(max);
    const Real reference = state.reference();
    Real sum_exp = 0, sum_x_exp = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const Real exp = exp_for<T>(x[i] - reference);
      sum_exp += exp;
      if (!plain && wanted.entropy) {
        sum_x_exp += max_of(lowest_log_prob<Real>(), x[i] - reference) * exp;
      }
    }
    state.sum_exp += sum_exp;
    if (plain) return;
    state.sum_x_exp += sum_x_exp;
    if (has_weights()) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        // A column without weight does not count, even where its logit is -inf.
        if (a[i] == Real(0)) continue;
        state.sum_weighted += a[i] * (x[i] - reference);
        state.sum_weights += a[i];
      }
    } else if (wanted.mean) {
      Real sum = 0;
#pragma unroll
      for (int i = 0; i < n; ++i) sum += x[i] - reference;
      state.sum_weighted += in.weights.beta * sum;
      state.sum_weights += in.weights.beta * Real(n);
    }
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

// The last steps in double: a handful of operations a row, and no digit lost to them.
template <typename Real>
__device__ __forceinline__ RowStats<double> finalize_row(const PartialState<Real>& state,
                                                         Real target_logit, int64_t vocab_size) {
  const PartialState<double> exact{.max = state.max,
                                   .sum_exp = state.sum_exp,
                                   .sum_x_exp = state.sum_x_exp,
                                   .sum_weighted = state.sum_weighted,
                                   .sum_weights = state.sum_weights,
                                   .argmax = state.argmax,
                                   .rank = state.rank};
  return finalize(exact, double(target_logit), vocab_size);
}

// The target of an active row, without its logit.
template <typename T>
__device__ __forceinline__ Target<real_t<T>> target_class(const RowInputs<T>& in, int64_t row) {
  if (!in.targets.are_indices()) return {};
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
