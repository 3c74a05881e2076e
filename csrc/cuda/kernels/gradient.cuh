// The gradient of one row's columns, from its few coefficients.
#pragma once

#include "chunks.cuh"

namespace llmloss::cuda {

// plain: logits as they are, no entropy, and one weight for all columns; known to the compiler.
template <typename T, bool plain>
struct ColumnGradient {
  using Real = real_t<T>;
  static constexpr int width = Vector<T>::size;
  static constexpr int unroll = sizeof(T) == 8 ? 2 : 4;  // vectors under way together

  const RowInputs<T>& in;
  LogitTransform<Real> transform;  // resolved
  int64_t row;
  GradRow<Real> grad;
  int target;       // its column; -1: none
  bool with_scale;  // whether the scale's gradient is asked for

  // Writes the columns [begin, end) of the row to `out`, their place in memory. The threads of the
  // row's share work side by side: this one is `thread` of `threads`. Returns its part of the
  // scale's gradient.
  __device__ __forceinline__ double write(const Columns<T>& logits, T* out, int begin, int end,
                                          int thread, int threads) const {
    Pass pass;
    if (with_scale) {
      // A sum, whose order must not depend on where in memory the row begins.
      for (int column = begin + thread; column < end; column += threads) {
        out[column - begin] = single(*logits.at(column), column, pass);
      }
    } else {
      write_vectors(logits, out, begin, end, thread, threads, pass);
    }
    // From the column's own logit: another thread's read of it could come after this one's write.
    if (pass.has_target) out[target - begin] = at_target(pass.target, pass);
    return pass.sum;
  }

 private:
  // What a thread carries from column to column.
  struct Pass {
    double sum = 0;           // of the scale's gradient
    bool has_target = false;  // whether the target's column is among this thread's
    T target{};               // the raw logit there
  };

  __device__ __forceinline__ void write_vectors(const Columns<T>& logits, T* out, int begin,
                                                int end, int thread, int threads,
                                                Pass& pass) const {
    const Peeled<T> peeled(out, end - begin);
    int v = thread;
    // Stores are aligned; so are loads where both tensors begin alike.
    if (skew_of(out) == skew_of(logits.at(begin))) {
      const T* const from = logits.at(begin);
      for (; v + (unroll - 1) * threads < peeled.vectors; v += unroll * threads) {
        Vector<T> loaded[unroll];
#pragma unroll
        for (int i = 0; i < unroll; ++i) {
          loaded[i] = load_aligned(from + peeled.vector(v + i * threads));
        }
#pragma unroll
        for (int i = 0; i < unroll; ++i) {
          const int at = peeled.vector(v + i * threads);
          store_aligned(out + at, vector(loaded[i], begin + at, pass));
        }
      }
    }
    for (; v < peeled.vectors; v += threads) {
      const int at = peeled.vector(v);
      store_aligned(out + at, vector(logits.load(begin + at), begin + at, pass));
    }
    for (int i = thread; i < peeled.singles; i += threads) {
      const int at = peeled.single(i);
      out[at] = single(*logits.at(begin + at), begin + at, pass);
    }
  }

  __device__ __forceinline__ Vector<T> vector(const Vector<T>& raw, int column, Pass& pass) const {
    const unsigned place = unsigned(target) - unsigned(column);
    if (place < unsigned(width)) {
      pass.has_target = true;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        if (place == unsigned(i)) pass.target = raw.at[i];
      }
    }
    Vector<T> written;
#pragma unroll
    for (int i = 0; i < width; ++i) written.at[i] = other(raw.at[i], column + i, pass);
    return written;
  }

  __device__ __forceinline__ T single(T raw, int column, Pass& pass) const {
    if (column == target) {
      pass.has_target = true;
      pass.target = raw;
    }
    return other(raw, column, pass);
  }

  // A column that is not the target. (What it writes where it is will be written over.)
  __device__ __forceinline__ T other(T raw, int column, Pass& pass) const {
    if constexpr (plain) {
      const Real exp = exp_for<T>(to_real(raw) - grad.reference);
      return stored(exp * (grad.c.p * grad.inverse_sum) + grad.constant);
    } else {
      const Real x = transform.apply(to_real(raw));
      const Real p = exp_for<T>(x - grad.reference) * grad.inverse_sum;
      const Real log_p = (x - grad.reference) - grad.log_sum;
      const Real g = column_gradient(grad.c, p, log_p, weight(column));
      return chained(g, raw, column != target, pass);
    }
  }

  __device__ __forceinline__ T at_target(T raw, Pass& pass) const {
    const Real x = plain ? to_real(raw) : transform.apply(to_real(raw));
    const Real g = target_gradient(grad.c, (x - grad.reference) - grad.log_sum, weight(target));
    if constexpr (plain) {
      return stored(g);
    } else {
      return chained(g, raw, true, pass);
    }
  }

  __device__ __forceinline__ Real weight(int column) const {
    if (grad.c.weight == Real(0)) return Real(0);
    return plain || in.weights.is_constant() ? in.weights.beta : in.weights.at(row, column);
  }

  // From dL/dx to dL/dz.
  __device__ __forceinline__ T chained(Real g, T raw, bool counts, Pass& pass) const {
    if (transform.kind() == TransformKind::identity && !with_scale) return stored(g);
    const TransformedLogit<Real> logit = transform.with_derivatives(to_real(raw));
    if (counts && g != Real(0) && logit.dx_dscale != Real(0)) {
      pass.sum += double(g) * logit.dx_dscale;
    }
    return stored(g * logit.dx_dz);
  }

  static __device__ __forceinline__ T stored(Real g) {
    T out;
    from_real(g, out);
    return out;
  }
};

// Zeros in the columns [begin, end) of a row.
template <typename T>
__device__ __forceinline__ void write_zeros(T* row, int begin, int end, int thread, int threads) {
  T* const at = row + begin;
  Peeled<T>(at, end - begin)
      .each(
          thread, threads, [&](int i) { store_aligned(at + i, Vector<T>{}); },
          [&](int i) { at[i] = T{}; });
}

}  // namespace llmloss::cuda
