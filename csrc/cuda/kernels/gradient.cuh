// The gradient of one row's columns, from the row's coefficients.
#pragma once

#include <type_traits>

#include "chunks.cuh"
#include "share.cuh"

namespace llmloss::cuda {

template <typename T>
inline constexpr int piece_vectors = sizeof(T) == 8 ? 2 : 4;  // that a thread has in flight

template <typename T, unsigned tasks>
struct ColumnGradient {
  using Real = real_t<T>;
  static constexpr int width = Vector<T>::size;
  static constexpr int unroll = piece_vectors<T>;

  const RowInputs<T>& in;
  LogitTransform<Real> transform;  // resolved
  int64_t row;
  int target;       // its column; -1: none
  bool with_scale;  // whether the scale's gradient is requested

  // Writes the gradient of the columns [begin, end) of the row; `out` points to the first of them.
  // Returns this thread's part of the scale's gradient.
  __device__ __forceinline__ double write(const GradRow<Real>& of_row, const Columns<T>& logits,
                                          T* out, int begin, int end, const Part& part) const {
    if constexpr (task::has(tasks, task::rest)) {
      if (with_scale) return write_columns(of_row, logits, out, begin, end, part);
    }
    const Known grad(of_row);
    const Peeled<T> peeled(out, end - begin);
    // The target's column is first written like any other, and then, by the same thread, again.
    Real at_target = 0;
    bool has_target = false;
    if (skew_of(out) == skew_of(logits.at(begin))) {
      write_vectors<true>(grad, logits, out, peeled, begin, part, at_target, has_target);
    } else {
      write_vectors<false>(grad, logits, out, peeled, begin, part, at_target, has_target);
    }
    if (part.index == 0) {
#pragma unroll 1
      for (int i = part.thread; i < peeled.singles; i += part.threads) {
        const int at = peeled.single(i);
        const Real z = to_real(*logits.at(begin + at));
        if (begin + at == target) {
          has_target = true;
          at_target = z;
        }
        double unused = 0;
        from_real(other(grad, z, begin + at, unused), out[at]);
      }
    }
    double unused = 0;
    if (has_target) from_real(target_column(of_row, at_target, unused), out[target - begin]);
    return 0;
  }

 private:
  static constexpr bool has(unsigned bits) { return task::has(tasks, bits | task::rest); }

  // What the loops need of the row, in registers.
  struct Line {
    Real reference, p_of_exp, constant;
    __device__ __forceinline__ explicit Line(const GradRow<Real>& row)
        : reference(row.reference), p_of_exp(row.p_of_exp), constant(row.constant) {}
  };
  using Known = std::conditional_t<has(task::entropy), GradRow<Real>, Line>;

  // The same, and the scale's gradient: a sum whose order must not depend on where in memory the
  // row begins.
  __device__ __forceinline__ double write_columns(const GradRow<Real>& of_row,
                                                  const Columns<T>& logits, T* out, int begin,
                                                  int end, const Part& part) const {
    const GradRow<Real> grad(of_row);
    double sum = 0;
    for (int column = begin + part.thread; column < end; column += part.threads) {
      const Real z = to_real(*logits.at(column));
      const Real g = column == target ? target_column(grad, z, sum) : other(grad, z, column, sum);
      from_real(g, out[column - begin]);
    }
    return sum;
  }

  // Writes whole vectors. Stores are aligned; loads are too if both rows have the same offset from
  // 16 bytes.
  template <bool is_aligned>
  __device__ __forceinline__ void write_vectors(const Known& grad, const Columns<T>& logits, T* out,
                                                const Peeled<T>& peeled, int begin,
                                                const Part& part, Real& at_target,
                                                bool& has_target) const {
    const T* const from = logits.at(begin) + peeled.head;
    T* const to = out + peeled.head;
    const int first_column = begin + peeled.head;
    const int to_target = target - first_column;
    const int piece = unroll * part.threads;
    for (int first = part.index * piece + part.thread; first < peeled.vectors;
         first += part.count * piece) {
      Words loaded[unroll];
#pragma unroll
      for (int i = 0; i < unroll; ++i) {
        const int v = first + i * part.threads;
        if (v >= peeled.vectors) break;
        if constexpr (is_aligned) {
          loaded[i] = simt::load_words(from + v * width);
        } else {
          const int column = first_column + v * width;
          loaded[i] = logits.load(column, column + width);
        }
      }
#pragma unroll
      for (int i = 0; i < unroll; ++i) {
        const int v = first + i * part.threads;
        if (v >= peeled.vectors) break;
        const int place = to_target - v * width;
        if (unsigned(place) < unsigned(width)) {
          has_target = true;
          at_target = element_at<T>(loaded[i], place);
        }
        simt::store_words(to + v * width, vector(grad, loaded[i], first_column + v * width));
      }
    }
  }

  __device__ __forceinline__ Words vector(const Known& grad, const Words& raw, int column) const {
    Real g[width];
    double unused = 0;
#pragma unroll
    for (int i = 0; i < width; ++i) g[i] = other(grad, element<T>(raw, i), column + i, unused);
    return packed<T>(g);
  }

  // The gradient of a column that is not the target (or not only), from its raw logit. Adds to the
  // scale's gradient.
  __device__ __forceinline__ Real other(const Known& grad, Real z, int column, double& sum) const {
    if constexpr (!has(task::transformed)) {
      return gradient(grad, z, column);
    } else {
      const TransformedLogit<Real> logit = transform.with_derivatives(z, TanhFor<T>{});
      return chained(gradient(grad, logit.x, column), logit, sum);
    }
  }

  // dL/dx.
  __device__ __forceinline__ Real gradient(const Known& grad, Real x, int column) const {
    const Real exp = exp_for<T>(x - grad.reference);
    if constexpr (!has(task::entropy)) {
      return fma_of(exp, grad.p_of_exp, grad.constant);
    } else {
      const Real log_p = (x - grad.reference) - grad.log_sum;
      return column_gradient(grad.c, exp * grad.inverse_sum, log_p, weight(grad, column));
    }
  }

  __device__ __forceinline__ Real target_column(const GradRow<Real>& grad, Real z,
                                                double& sum) const {
    TransformedLogit<Real> logit{z, Real(1), Real(0)};
    if constexpr (has(task::transformed)) logit = transform.with_derivatives(z, TanhFor<T>{});
    const Real log_p = (logit.x - grad.reference) - grad.log_sum;
    return chained(target_gradient(grad.c, log_p, weight(grad, target)), logit, sum);
  }

  __device__ __forceinline__ Real weight(const GradRow<Real>& grad, int column) const {
    if (grad.c.weight == Real(0)) return Real(0);
    return !has(task::rest) || in.weights.is_constant() ? in.weights.beta
                                                        : in.weights.at(row, column);
  }

  // Converts dL/dx to dL/dz.
  __device__ __forceinline__ Real chained(Real g, const TransformedLogit<Real>& logit,
                                          double& sum) const {
    if constexpr (!has(task::transformed)) return g;
    if (task::has(tasks, task::rest) && g != Real(0) && logit.dx_dscale != Real(0)) {
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
