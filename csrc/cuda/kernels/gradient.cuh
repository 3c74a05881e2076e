// The gradient of one row's columns, from the row's coefficients.
#pragma once

#include "chunks.cuh"

namespace llmloss::cuda {

// plain: untransformed logits, no gradient of a statistic that needs more sums, and the same weight
// for all columns. A compile-time constant.
template <typename T, bool plain>
struct ColumnGradient {
  using Real = real_t<T>;
  static constexpr int width = Vector<T>::size;
  static constexpr int unroll = sizeof(T) == 8 ? 2 : 4;  // vectors in flight

  const RowInputs<T>& in;
  LogitTransform<Real> transform;  // resolved
  int64_t row;
  GradRow<Real> grad;
  int target;       // its column; -1: none
  bool with_scale;  // whether the scale's gradient is requested

  // Writes the gradient of the columns [begin, end) of the row; `out` points to the first of them.
  // This is thread `thread` of the `threads` that share the work. Returns its part of the scale's
  // gradient.
  __device__ __forceinline__ double write(const Columns<T>& logits, T* out, int begin, int end,
                                          int thread, int threads) const {
    const Peeled<T> peeled(out, end - begin);
    // A thread first writes the target's column like any other, and then overwrites it. The same
    // thread does both, so that the order is certain, and the loops need not look for the target.
    const int place = target - begin;
    const bool has_target = target >= begin && target < end &&
                            (with_scale ? place % threads : peeled.owner(place, threads)) == thread;
    const Real at_target = has_target ? to_real(*logits.at(target)) : Real(0);
    double sum = 0;
    if (with_scale) {
      // The order of this sum must not depend on where in memory the row begins.
      for (int column = begin + thread; column < end; column += threads) {
        from_real(other(to_real(*logits.at(column)), column, sum), out[column - begin]);
      }
    } else {
      write_vectors(logits, out, peeled, begin, thread, threads);
    }
    if (has_target) from_real(target_column(at_target, sum), out[place]);
    return sum;
  }

 private:
  __device__ __forceinline__ void write_vectors(const Columns<T>& logits, T* out,
                                                const Peeled<T>& peeled, int begin, int thread,
                                                int threads) const {
    // Stores are aligned. Loads are too if both rows have the same offset from 16 bytes.
    const T* const from = logits.at(begin);
    int v = thread;
    if (skew_of(out) == skew_of(from)) {
      for (; v + (unroll - 1) * threads < peeled.vectors; v += unroll * threads) {
        Words loaded[unroll];
#pragma unroll
        for (int i = 0; i < unroll; ++i) {
          loaded[i] = simt::load_words(from + peeled.vector(v + i * threads));
        }
#pragma unroll
        for (int i = 0; i < unroll; ++i) {
          const int at = peeled.vector(v + i * threads);
          simt::store_words(out + at, vector(loaded[i], begin + at));
        }
      }
#pragma unroll 1
      for (; v < peeled.vectors; v += threads) {
        const int at = peeled.vector(v);
        simt::store_words(out + at, vector(simt::load_words(from + at), begin + at));
      }
    } else {
#pragma unroll 1
      for (; v < peeled.vectors; v += threads) {
        const int at = peeled.vector(v), column = begin + at;
        simt::store_words(out + at, vector(logits.load(column, column + width), column));
      }
    }
#pragma unroll 1
    for (int i = thread; i < peeled.singles; i += threads) {
      const int at = peeled.single(i);
      double unused = 0;
      from_real(other(to_real(from[at]), begin + at, unused), out[at]);
    }
  }

  __device__ __forceinline__ Words vector(const Words& raw, int column) const {
    Real g[width];
    double unused = 0;
#pragma unroll
    for (int i = 0; i < width; ++i) g[i] = other(element<T>(raw, i), column + i, unused);
    return packed<T>(g);
  }

  // The gradient of a column that is not the target, from its raw logit. Adds to the scale's
  // gradient.
  __device__ __forceinline__ Real other(Real z, int column, double& sum) const {
    if constexpr (plain) {
      const Real exp = exp_for<T>(z - grad.reference);
      return fma_of(exp, grad.c.p * grad.inverse_sum, grad.constant);
    } else {
      const Real x = transform.apply(z);
      const Real p = exp_for<T>(x - grad.reference) * grad.inverse_sum;
      const Real log_p = (x - grad.reference) - grad.log_sum;
      const Real g = column_gradient(grad.c, p, log_p, weight(column));
      return chained(g, z, column != target, sum);
    }
  }

  __device__ __forceinline__ Real target_column(Real z, double& sum) const {
    const Real x = plain ? z : transform.apply(z);
    const Real g = target_gradient(grad.c, (x - grad.reference) - grad.log_sum, weight(target));
    return plain ? g : chained(g, z, true, sum);
  }

  __device__ __forceinline__ Real weight(int column) const {
    if (grad.c.weight == Real(0)) return Real(0);
    return plain || in.weights.is_constant() ? in.weights.beta : in.weights.at(row, column);
  }

  // Converts dL/dx to dL/dz.
  __device__ __forceinline__ Real chained(Real g, Real z, bool counts, double& sum) const {
    if (transform.kind() == TransformKind::identity && !with_scale) return g;
    const TransformedLogit<Real> logit = transform.with_derivatives(z);
    if (with_scale && counts && g != Real(0) && logit.dx_dscale != Real(0)) {
      sum += double(g) * logit.dx_dscale;
    }
    return g * logit.dx_dz;
  }
};

// Writes zeros to the columns [begin, end) of a row.
template <typename T>
__device__ __forceinline__ void write_zeros(T* row, int begin, int end, int thread, int threads) {
  T* const at = row + begin;
  Peeled<T>(at, end - begin)
      .each(
          thread, threads, [&](int i) { simt::store_words(at + i, Words{}); },
          [&](int i) { at[i] = T{}; });
}

}  // namespace llmloss::cuda
