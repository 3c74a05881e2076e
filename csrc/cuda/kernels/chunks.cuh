// Reduces columns to partial states, in an order that does not depend on the launch.
//
// A row is cut into chunks of whole tiles; a tile is 4 KB, eight 16-byte vectors for each lane of a
// warp. One warp reduces a chunk to one PartialState, and lane i of a warp merges the chunks i,
// i + 32, ... before the lanes are merged. Only the row's length and type decide the cut and the
// order. So a row's bits are the same whether a warp, a block, a cluster or many blocks work on it,
// whatever batch it is in, and wherever in memory it begins.
#pragma once

#include <type_traits>

#include "../../core/row_grad.h"
#include "../../core/rows.h"
#include "../device/exponential.cuh"
#include "../device/merge.cuh"
#include "../device/vector.cuh"
#include "tasks.cuh"

namespace llmloss::cuda {

inline constexpr int tile_vectors = 8;   // for each lane
inline constexpr int batch_vectors = 4;  // that a lane loads and adds to its state at once

template <typename T>
inline constexpr int tile_columns = int{warp_size} * tile_vectors * Vector<T>::size;

template <typename T>
inline constexpr int batch_columns = int{warp_size} * batch_vectors * Vector<T>::size;

// The most threads of a block.
inline constexpr int block_size = 256;

// The same code takes a few registers more on some architectures than on others.
#if defined(__CUDA_ARCH__)
inline constexpr int architecture = __CUDA_ARCH__ / 10;
#else
inline constexpr int architecture = 90;
#endif

// The number of blocks that a multiprocessor should hold, fewer where more is to be held in
// registers, which they bound. tests/test_cuda_build.py checks the compiler's report.
template <typename T>
constexpr int stats_blocks(unsigned tasks) {
  if (sizeof(T) == 8) return tasks == task::plain ? 2 : 1;
  if (task::has(tasks, task::order | task::rest)) return 2;
  if (tasks == task::plain) return architecture < 90 ? 3 : 4;
  const bool has_entropy = task::has(tasks, task::entropy);
  return architecture < 90 && has_entropy && std::is_same_v<T, Half> ? 2 : 3;
}

// How a row is cut.
struct Chunks {
  int columns;  // of a chunk: a multiple of tile_columns
  int count;
};

template <typename T>
struct TanhFor {
  __device__ __forceinline__ real_t<T> operator()(real_t<T> x) const {
    if constexpr (sizeof(T) == 2) {
      return simt::fast_tanh(x);
    } else {
      return tanh_of(x);
    }
  }
};

// Copies the fields that the wanted statistics need. What is not copied is not written either.
template <typename Real>
__device__ __forceinline__ void copy_fields(const PartialState<Real>& from, PartialState<Real>& to,
                                            const Wanted& wanted) {
  to.max = from.max;
  to.sum_exp = from.sum_exp;
  if (wanted.floats[Stat::entropy]) to.sum_x_exp = from.sum_x_exp;
  if (wanted.floats[Stat::log_sum_sq_probs]) to.sum_sq_exp = from.sum_sq_exp;
  if (wanted.floats[Stat::mean_log_prob]) {
    to.sum_weighted = from.sum_weighted;
    to.sum_weights = from.sum_weights;
  }
  if (wanted.order()) {
    to.argmax = from.argmax;
    to.rank = from.rank;
  }
}

// From a lane's vector of a tile or batch to its next, in columns.
template <typename T>
inline constexpr int vector_stride = int{warp_size} * Vector<T>::size;

// The first column of a lane's vector.
template <typename T>
__device__ __forceinline__ int lane_column(int begin, int vector) {
  return begin + int(simt::lane()) * Vector<T>::size + vector * vector_stride<T>;
}

// A lane's vectors of a batch, with -inf from column `end` on. All loads come before anything waits
// for one, so that they overlap; of rows that are not aligned, two at a time, since four would take
// too many registers.
template <typename T, bool is_aligned>
__device__ __forceinline__ void load_batch(const Columns<T, is_aligned>& columns, int batch,
                                           int end, Words (&vectors)[batch_vectors]) {
  constexpr int stride = vector_stride<T>;
  const int first = lane_column<T>(batch, 0);
  const T* const at = columns.at(first);
  const unsigned skew = columns.skew();
  if (batch + batch_columns<T> <= end && columns.is_inside(batch, batch + batch_columns<T>)) {
    if (skew == 0) {
#pragma unroll
      for (int v = 0; v < batch_vectors; ++v) vectors[v] = simt::load_words(at + v * stride);
    } else {
#pragma unroll
      for (int v = 0; v < batch_vectors; v += 2) {
        Words pair[2];
        load_skewed(at + v * stride, stride, skew, pair);
        vectors[v] = pair[0];
        vectors[v + 1] = pair[1];
      }
    }
    return;
  }
  if (skew == 0) {
#pragma unroll
    for (int v = 0; v < batch_vectors; ++v) {
      vectors[v] = filled<T>(-infinity<real_t<T>>());
      if (first + v * stride + Vector<T>::size <= end) {
        vectors[v] = simt::load_words(at + v * stride);
      }
    }
    if (end % Vector<T>::size == 0) return;
  }
#pragma unroll
  for (int v = 0; v < batch_vectors; ++v) {
    const int column = first + v * stride;
    if (skew != 0 || column + Vector<T>::size > end) vectors[v] = columns.load(column, end);
  }
}

// A tile that a warp keeps in registers.
inline constexpr int tile_batches = tile_vectors / batch_vectors;

template <typename T>
struct Tile {
  Words batches[tile_batches][batch_vectors];

  template <bool is_aligned>
  __device__ __forceinline__ void load(const Columns<T, is_aligned>& columns, int begin, int end) {
#pragma unroll
    for (int b = 0; b < tile_batches; ++b) {
      load_batch(columns, begin + b * batch_columns<T>, end, batches[b]);
    }
  }
  __device__ __forceinline__ const Words& vector(int v) const {
    return batches[v / batch_vectors][v % batch_vectors];
  }
};

// Reduces the columns of a row.
template <typename T, unsigned tasks>
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

  // What the states hold.
  static __device__ __forceinline__ Wanted wanted() { return task::wanted<tasks>(); }

  // The state of the columns [begin, end), the same in every lane.
  template <bool is_aligned>
  __device__ __forceinline__ State chunk(const Columns<T, is_aligned>& columns, int begin,
                                         int end) const {
    State state;
#pragma unroll 1
    for (int batch = begin; batch < end; batch += batch_columns<T>) {
      Words vectors[batch_vectors];
      load_batch(columns, batch, end, vectors);
      add(state, vectors, batch, end);
    }
    return merged(state);
  }

  // The same of a chunk that is one tile.
  __device__ __forceinline__ State chunk(const Tile<T>& tile, int begin, int end) const {
    State state;
#pragma unroll
    for (int b = 0; b < tile_batches; ++b) {
      const int batch = begin + b * batch_columns<T>;
      if (batch < end) add(state, tile.batches[b], batch, end);
    }
    return merged(state);
  }

 private:
  static constexpr int stride = vector_stride<T>;
  static constexpr bool has(unsigned bits) { return task::has(tasks, bits | task::rest); }
  // Otherwise a column after the last, which is -inf, adds nothing by itself.
  static constexpr bool looks_at_columns = has(task::transformed | task::mean | task::order);

  using Batch = Real[batch_vectors][width];

  // Adds a batch to a lane's state.
  __device__ __forceinline__ void add(State& state, const Words (&vectors)[batch_vectors],
                                      int batch, int end) const {
    const int first = lane_column<T>(batch, 0);
    // The same in every lane.
    const bool has_target = unsigned(target - batch) < unsigned(batch_columns<T>);
    // It counts in the maximum, but not in the sums of exponentials.
    const Real max = has(task::transformed) ? Real(0) : largest<T>(vectors);
    if constexpr (looks_at_columns) {
      if (batch + batch_columns<T> <= end && !has_target) {
        add_columns<true>(state, vectors, max, first, end);
      } else {
        add_columns<false>(state, vectors, max, first, end);
      }
    } else {
      Words others[batch_vectors];
#pragma unroll
      for (int v = 0; v < batch_vectors; ++v) others[v] = vectors[v];
      if (has_target) {
#pragma unroll
        for (int v = 0; v < batch_vectors; ++v) {
          hide_element<T>(others[v], target - first - v * stride);
        }
      }
      add_columns<true>(state, others, max, first, end);
    }
  }

  // The state of all lanes.
  __device__ __forceinline__ State merged(State& state) const {
    if (has(task::mean) && has_equal_weights()) {
      state.sum_weighted *= in.weights.beta;
      state.sum_weights *= in.weights.beta;
    }
    return warp_merge(state, wanted());
  }

  // is_plain: every column is there, and none is the target's; or what is not to be counted is
  // -inf, and nobody looks at columns.
  template <bool is_plain>
  __device__ __forceinline__ void add_columns(State& state, const Words (&vectors)[batch_vectors],
                                              Real max, int first, int end) const {
    Batch x;
    read(vectors, x);
    // Columns are known by how far they are from `first`.
    const int to_end = end - first, to_target = target - first;
    if constexpr (has(task::transformed) && !is_plain) hide_missing(x, to_end);
    if constexpr (has(task::order)) add_order<is_plain>(state, x, first, to_end, to_target);
    if constexpr (has(task::transformed)) max = largest_of(x);
    const Real factor = rebase(state, max);
    const Real reference = state.reference();
    const ExpFrom<T> from(reference);
    Real sums[batch_vectors], exponents[batch_vectors];
    Real sum_x_exp = 0, sum_sq_exp = 0;
#pragma unroll
    for (int v = 0; v < batch_vectors; ++v) {
      exponents[v] = 0;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const Real exponent = from.exponent(x[v][i]);
        const bool is_target = !is_plain && v * stride + i == to_target;
        const Real exp = is_target ? Real(0) : from.exp(exponent);
        sums[v] = i == 0 ? exp : sums[v] + exp;
        if constexpr (has(task::entropy)) {
          sum_x_exp = fma_of(larger(lowest_log_prob<Real>(), exponent), exp, sum_x_exp);
        }
        if constexpr (has(task::rest)) sum_sq_exp = fma_of(exp, exp, sum_sq_exp);
        if constexpr (has(task::mean)) {
          exponents[v] += is_plain || v * stride + i < to_end ? exponent : Real(0);
        }
      }
    }
    if constexpr (has(task::mean)) {
      if (has_equal_weights()) {
        // They are multiplied in later.
        int count = batch_vectors * width;
        if (!is_plain) {
          count = 0;
#pragma unroll
          for (int v = 0; v < batch_vectors; ++v) count += clamp_of(to_end - v * stride, 0, width);
        }
        const Real all = (exponents[0] + exponents[1]) + (exponents[2] + exponents[3]);
        state.sum_weighted += from.natural(all, Real(count));
        state.sum_weights += Real(count);
      } else {
        add_weighted(state, x, reference, first, end);
      }
    }
    const Real sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    const Real correction = from.correction();
    if constexpr (has(task::entropy)) {
      state.sum_x_exp = fma_of(from.natural(sum_x_exp, sum), correction, state.sum_x_exp);
    }
    if constexpr (has(task::rest)) {
      state.sum_sq_exp = fma_of(sum_sq_exp, correction * correction, state.sum_sq_exp);
    }
    state.sum_exp = fma_of(state.sum_exp, factor, sum * correction);
  }

  // The logits that the loss uses.
  __device__ __forceinline__ void read(const Words (&vectors)[batch_vectors], Batch& x) const {
#pragma unroll
    for (int v = 0; v < batch_vectors; ++v) {
#pragma unroll
      for (int i = 0; i < width; ++i) x[v][i] = element<T>(vectors[v], i);
    }
    if constexpr (has(task::transformed)) {
      // One branch for the batch, and not one for each column.
      if (transform.cap > 0) {
        each(x, [&](Real z) { return transform.capped(z, TanhFor<T>{}); });
      } else {
        each(x, [&](Real z) { return transform.scale * z; });
      }
    }
  }

  template <typename Of>
  static __device__ __forceinline__ void each(Batch& x, const Of& of) {
#pragma unroll
    for (int v = 0; v < batch_vectors; ++v) {
#pragma unroll
      for (int i = 0; i < width; ++i) x[v][i] = of(x[v][i]);
    }
  }

  static __device__ __forceinline__ void hide_missing(Batch& x, int to_end) {
#pragma unroll
    for (int v = 0; v < batch_vectors; ++v) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        if (!(v * stride + i < to_end)) x[v][i] = -infinity<Real>();
      }
    }
  }

  static __device__ __forceinline__ Real largest_of(const Batch& x) {
    Real max = x[0][0];
#pragma unroll
    for (int v = 0; v < batch_vectors; ++v) {
#pragma unroll
      for (int i = 0; i < width; ++i) max = larger(max, x[v][i]);
    }
    return max;
  }

  // Makes the sums relative to a batch's maximum. There is no branch: lanes find their maxima in
  // different batches, so that some lane of a warp nearly always needs it. Returns the factor for
  // sum_exp.
  __device__ __forceinline__ Real rebase(State& state, Real max) const {
    const Real before = state.max, reference_before = state.reference();
    state.max = larger(before, max);
    const Real shift = before - state.reference();  // -inf for the identity, whose sums are 0
    const Real factor = ExpFrom<T>::exp_once(shift);
    if constexpr (has(task::entropy)) {
      // A factor that underflows leaves 0, not 0 * inf.
      const Real moved = factor * fma_of(shift, state.sum_exp, state.sum_x_exp);
      state.sum_x_exp = factor == Real(0) ? Real(0) : moved;
    }
    if constexpr (has(task::rest)) state.sum_sq_exp *= factor * factor;
    if constexpr (has(task::mean)) {
      const Real moved =
          fma_of(state.sum_weights, reference_before - state.reference(), state.sum_weighted);
      state.sum_weighted = state.sum_weights == Real(0) ? state.sum_weighted : moved;
    }
    return factor;
  }

  // Whether all columns have the same weight in the mean.
  __device__ __forceinline__ bool has_equal_weights() const {
    return !task::has(tasks, task::rest) || in.weights.is_constant();
  }

  // Adds a batch to a mean whose columns have weights of their own. One of weight 0 adds nothing,
  // even if its logit is -inf.
  __device__ __forceinline__ void add_weighted(State& state, const Batch& x, Real reference,
                                               int first, int end) const {
#pragma unroll
    for (int v = 0; v < batch_vectors; ++v) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const int column = first + v * stride + i;
        const Real a = column < end ? in.weights.at(row, column) : Real(0);
        if (a == Real(0)) continue;
        state.sum_weighted = fma_of(a, x[v][i] - reference, state.sum_weighted);
        state.sum_weights += a;
      }
    }
  }

  // Adds a batch to argmax and rank.
  template <bool is_plain>
  __device__ __forceinline__ void add_order(State& state, const Batch& x, int first, int to_end,
                                            int to_target) const {
    Real max = state.max;
    // The target is in another batch: all columns of this one win ties with it, or none does.
    const Real at_least = to_target > 0 ? target_logit : next_above(target_logit);
#pragma unroll
    for (int v = 0; v < batch_vectors; ++v) {
      const int before_v = v * stride;
      Real largest = x[v][0];
#pragma unroll
      for (int i = 1; i < width; ++i) largest = larger(largest, x[v][i]);
      if ((is_plain || before_v < to_end) && (largest > max || state.argmax < 0)) {
        int place = 0;
#pragma unroll
        for (int i = width - 1; i >= 0; --i) place = x[v][i] == largest ? i : place;
        state.argmax = first + before_v + place;
      }
      max = larger(max, largest);
      int before = 0;  // fewer instructions than with 64 bits
#pragma unroll
      for (int i = 0; i < width; ++i) {
        if constexpr (is_plain) {
          before += x[v][i] >= at_least;
        } else {
          const bool wins_ties = before_v + i < to_target;
          before += x[v][i] > target_logit || (wins_ties && x[v][i] == target_logit);
        }
      }
      state.rank += before;
    }
  }
};

// The state of a whole row from those of its chunks, the same in every lane. The maximum comes
// first, so that every sum is moved once, and they are added in an order of their own.
template <typename Real>
__device__ __forceinline__ PartialState<Real> merge_chunks(const PartialState<Real>* chunks,
                                                           int count, const Wanted& wanted) {
  PartialState<Real> state;
  for (int i = int(simt::lane()); i < count; i += int(warp_size)) {
    state.max = larger(state.max, chunks[i].max);
  }
  state.max = warp_max(state.max);
  for (int i = int(simt::lane()); i < count; i += int(warp_size)) {
    PartialState<Real> chunk;
    copy_fields(chunks[i], chunk, wanted);
    // A lane meets its chunks in the order of their columns.
    if (wanted.order() && chunk.max == state.max && state.argmax < 0) state.argmax = chunk.argmax;
    chunk.rebase(state.max);
    state.add(chunk);
  }
  return warp_join(state, wanted);
}

// What a gradient needs of a row.
template <typename Real>
__device__ __forceinline__ StateFields<Real> row_state(const PartialState<Real>& state,
                                                       Real target_logit) {
  return state_fields(state, exp_of(state.relative(target_logit)));
}

// In double: these are few operations per row, and their rounding errors do not matter then. Not so
// the state: the fused kernel, where all threads of the row wait for it, shall compute the same.
template <typename Real>
__device__ __forceinline__ RowStats<double> finalize_row(const PartialState<Real>& state,
                                                         Real target_logit, int64_t vocab_size,
                                                         const Wanted& wanted) {
  const PartialState<double> exact = state.template as<double>();
  const double at_target = exact.relative(double(target_logit));
  RowStats<double> stats = finalize(exact, at_target, vocab_size, wanted);
  stats.state = row_state(state, target_logit).template as<double>();
  return stats;
}

// The target of an active row, without its logit.
template <typename T>
__device__ __forceinline__ Target<real_t<T>> target_class(const RowInputs<T>& in,
                                                          const RowTarget& target) {
  if (!target.is_here()) return {};
  return {.column = target.value(), .weight = in.weights.of_class(target.value())};
}

// The target's logit as it is stored: nobody waits for it before it is used.
template <typename T>
struct StoredTarget {
  bool is_here;
  T logit;

  __device__ __forceinline__ StoredTarget(const RowInputs<T>& in, int64_t row, int64_t column)
      : is_here(column >= 0), logit() {
    if (is_here) logit = in.logits[in.layout.offset(row) + column];
  }

  // -inf if there is none.
  __device__ __forceinline__ real_t<T> transformed(
      const LogitTransform<real_t<T>>& transform) const {
    if (!is_here) return -infinity<real_t<T>>();
    const real_t<T> z = to_real(logit);
    return transform.kind() == TransformKind::identity ? z : transform.apply(z, TanhFor<T>{});
  }
};

}  // namespace llmloss::cuda
