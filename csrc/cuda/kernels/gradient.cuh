// The gradient of one row's columns, from the row's coefficients.
#pragma once

#include <type_traits>

#include "chunks.cuh"
#include "share.cuh"

namespace llmloss::cuda {

// The number of blocks that a multiprocessor should hold: see stats_blocks.
template <typename T>
constexpr int grad_blocks(unsigned tasks) {
  if (sizeof(T) == 8) return tasks == task::plain ? 2 : 1;
  if (task::has(tasks, task::rest)) return 2;
  if (architecture >= 120) return tasks == task::plain ? 4 : 3;
  return architecture < 90 && tasks != task::transformed ? 3 : 4;
}

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

  // Writes the gradient of a tile that holds the columns [begin, end) of the logits; `out` points
  // to the first of them, and is a multiple of 16 bytes.
  __device__ __forceinline__ void write(const GradRow<Real>& of_row, const Tile<T>& tile,
                                        const Columns<T, true>& logits, T* out, int begin,
                                        int end) const {
    const Known grad(of_row);
    Found found;
    if (target >= begin && target < end && (target - begin) / width % warp_size == simt::lane()) {
      found = {to_real(*logits.at(target)), true};
    }
    T* const to = out + (lane_column<T>(begin, 0) - begin);
    const auto write_vectors = [&](auto is_whole) {
#pragma unroll
      for (int v = 0; v < tile_vectors; ++v) {
        const int column = lane_column<T>(begin, v);
        const Words words = vector(grad, tile.vector(v), column);
        if (is_whole || column + width <= end) {
          simt::store_words(to + v * vector_stride<T>, words);
        } else {
#pragma unroll
          for (int i = 0; i < width; ++i) {
            if (column + i < end) from_real(element<T>(words, i), to[v * vector_stride<T> + i]);
          }
        }
      }
    };
    if (begin + tile_columns<T> <= end) {
      write_vectors(std::true_type{});
    } else {
      write_vectors(std::false_type{});
    }
    write_target(of_row, found, out, begin);
  }

  // Writes the gradient of the columns [begin, end) of the row; `out` points to the first of them.
  // Returns this thread's part of the scale's gradient.
  template <bool is_aligned>
  __device__ __forceinline__ double write(const GradRow<Real>& of_row,
                                          const Columns<T, is_aligned>& logits, T* out, int begin,
                                          int end, const Part& part) const {
    if constexpr (task::has(tasks, task::rest)) {
      if (with_scale) return write_columns(of_row, logits, out, begin, end, part);
    }
    const Known grad(of_row);
    const Peeled<T> peeled(out, end - begin);
    Found found;
    if (is_aligned || skew_of(out) == skew_of(logits.at(begin))) {
      write_vectors<true>(grad, logits, out, peeled, begin, part, found);
    } else {
      write_vectors<false>(grad, logits, out, peeled, begin, part, found);
    }
    if (part.index == 0) {
#pragma unroll 1
      for (int i = part.thread; i < peeled.singles; i += part.threads) {
        const int at = peeled.single(i);
        write_single(grad, to_real(*logits.at(begin + at)), out + at, begin + at, found);
      }
    }
    write_target(of_row, found, out, begin);
    return 0;
  }

 private:
  static constexpr bool has(unsigned bits) { return task::has(tasks, bits | task::rest); }

  // What the loops need of the row, in registers. What sums of exp are multiplied by, what they
  // divide is, too.
  struct Line {
    ExpFrom<T> from;
    Real p_of_exp, constant;
    __device__ __forceinline__ explicit Line(const GradRow<Real>& row)
        : from(row.reference), p_of_exp(row.p_of_exp * from.correction()), constant(row.constant) {}
  };
  // column_gradient, by E = e^(x - reference) and its exponent e:
  //   dL/dx = E (flat + by_exponent e + by_exp E) + constant.
  struct Curve {
    ExpFrom<T> from;
    Real flat, by_exponent, by_exp, constant;
    Real weight;  // where columns have weights of their own, they make the constant
    __device__ __forceinline__ explicit Curve(const GradRow<Real>& row)
        : from(row.reference), constant(row.constant), weight(row.c.weight) {
      const Real p_of_exp = row.inverse_sum * from.correction();
      // log p = e unit + of_zero
      const Real unit = from.natural(Real(1), Real(0));
      const Real of_zero = from.natural(Real(0), Real(1)) - row.log_sum();
      flat = p_of_exp * fma_of(row.c.plogp, of_zero, row.c.p - row.c.sq);
      by_exponent = p_of_exp * (row.c.plogp * unit);
      by_exp = p_of_exp * p_of_exp * row.c.sq_over_sum;
    }
  };
  using Known = std::conditional_t<has(task::entropy), Curve, Line>;

  // The target's logit, if this thread writes its column: first like any other, and then again.
  struct Found {
    Real logit = 0;
    bool is_here = false;
  };

  // The same, and the scale's gradient: a sum whose order must not depend on where in memory the
  // row begins.
  template <bool is_aligned>
  __device__ __forceinline__ double write_columns(const GradRow<Real>& of_row,
                                                  const Columns<T, is_aligned>& logits, T* out,
                                                  int begin, int end, const Part& part) const {
    const Known grad(of_row);
    double sum = 0;
    for (int column = begin + part.thread; column < end; column += part.threads) {
      const Real z = to_real(*logits.at(column));
      const Real g = column == target ? target_column(of_row, z, sum) : other(grad, z, column, sum);
      from_real(g, out[column - begin]);
    }
    return sum;
  }

  // Writes whole vectors. Stores are aligned; loads are too if both rows have the same offset from
  // 16 bytes.
  template <bool same_offset, bool is_aligned>
  __device__ __forceinline__ void write_vectors(const Known& grad,
                                                const Columns<T, is_aligned>& logits, T* out,
                                                const Peeled<T>& peeled, int begin,
                                                const Part& part, Found& found) const {
    const T* const from = logits.at(begin) + peeled.head;
    T* const to = out + peeled.head;
    const int first_column = begin + peeled.head;
    const int piece = unroll * part.threads;
    // The vector that holds the target's column, or none.
    const int target_vector = target < first_column || target >= begin + peeled.tail
                                  ? -1
                                  : (target - first_column) / width;
    const auto write_piece = [&](int first, auto is_whole) {
      // In one piece at most, for all threads alike.
      if (unsigned(target_vector - (first - part.thread)) < unsigned(piece)) {
        const bool is_mine = (target_vector - first) % part.threads == 0;
        if (is_mine) found = {to_real(*logits.at(target)), true};
      }
      Words loaded[unroll];
#pragma unroll
      for (int i = 0; i < unroll; ++i) {
        const int v = first + i * part.threads;
        if (!is_whole && v >= peeled.vectors) break;
        if constexpr (same_offset) {
          loaded[i] = simt::load_words(from + v * width);
        } else {
          const int column = first_column + v * width;
          loaded[i] = logits.load(column, column + width);
        }
      }
#pragma unroll
      for (int i = 0; i < unroll; ++i) {
        const int v = first + i * part.threads;
        if (!is_whole && v >= peeled.vectors) break;
        simt::store_words(to + v * width, vector(grad, loaded[i], first_column + v * width));
      }
    };
    int first = part.index * piece + part.thread;
    for (; first - part.thread + piece <= peeled.vectors; first += part.count * piece) {
      write_piece(first, std::true_type{});
    }
    if (first < peeled.vectors) write_piece(first, std::false_type{});
  }

  __device__ __forceinline__ Words vector(const Known& grad, const Words& raw, int column) const {
    Real g[width];
    const auto each = [&](const auto& of) {
#pragma unroll
      for (int i = 0; i < width; ++i) g[i] = of(element<T>(raw, i), column + i);
    };
    double unused = 0;
    if constexpr (!has(task::transformed)) {
      each([&](Real z, int at) { return gradient(grad, z, at); });
    } else if (transform.cap > 0) {  // one branch for the vector, and not one for each column
      each([&](Real z, int at) {
        const auto logit = transform.capped_with_derivatives(z, TanhFor<T>{});
        return chained(gradient(grad, logit.x, at), logit, unused);
      });
    } else {
      each([&](Real z, int at) {
        const auto logit = transform.scaled_with_derivatives(z);
        return chained(gradient(grad, logit.x, at), logit, unused);
      });
    }
    return packed<T>(g);
  }

  __device__ __forceinline__ void write_single(const Known& grad, Real z, T* to, int column,
                                               Found& found) const {
    if (column == target) found = {z, true};
    double unused = 0;
    from_real(other(grad, z, column, unused), *to);
  }

  __device__ __forceinline__ void write_target(const GradRow<Real>& of_row, const Found& found,
                                               T* out, int begin) const {
    double unused = 0;
    if (found.is_here) from_real(target_column(of_row, found.logit, unused), out[target - begin]);
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
    const Real exponent = grad.from.exponent(x), exp = grad.from.exp(exponent);
    if constexpr (!has(task::entropy)) {
      return fma_of(exp, grad.p_of_exp, grad.constant);
    } else {
      // Where e^x is 0 its exponent may be -inf.
      const Real finite = larger(lowest_log_prob<Real>(), exponent);
      const Real each = fma_of(grad.by_exp, exp, fma_of(grad.by_exponent, finite, grad.flat));
      Real constant = grad.constant;
      if constexpr (task::has(tasks, task::rest))
        constant = grad.weight * weight(grad.weight, column);
      return fma_of(exp, each, constant);
    }
  }

  __device__ __forceinline__ Real target_column(const GradRow<Real>& grad, Real z,
                                                double& sum) const {
    TransformedLogit<Real> logit{z, Real(1), Real(0)};
    if constexpr (has(task::transformed)) logit = transform.with_derivatives(z, TanhFor<T>{});
    const Real log_p = (logit.x - grad.reference) - grad.log_sum();
    return chained(target_gradient(grad.c, log_p, weight(grad.c.weight, target)), logit, sum);
  }

  // A column's weight in the mean, whose gradient is `upstream`; 0 if that is 0.
  __device__ __forceinline__ Real weight(Real upstream, int column) const {
    if (upstream == Real(0)) return Real(0);
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
