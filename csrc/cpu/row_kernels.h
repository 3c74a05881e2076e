// The CPU kernels. They process a row in blocks that fit in the L1 cache: a block's logits are read
// from memory once, and every later pass finds them in the cache.
#pragma once

#include "../core/rows.h"
#include "block_ops.h"
#include "kernels.h"

namespace llmloss::cpu::LLMLOSS_ISA {

// Reads the blocks of one row: raw logits, transformed logits and column weights.
template <typename T>
class RowReader {
 public:
  using Real = real_t<T>;

  RowReader(const RowInputs<T>& in, const LogitTransform<Real>& transform, int64_t row)
      : in_(in),
        transform_(transform),
        row_(row),
        logits_(in.logits + in.layout.offset(row)),
        identity_(transform.kind() == TransformKind::identity) {}

  bool is_identity() const { return identity_; }
  const T* raw(int64_t column) const { return logits_ + column; }

  // x of a column, with the same bits as in a block.
  Real logit(int64_t column) const {
    Real x;
    block_transform(raw(column), 1, transform_, &x);
    return x;
  }

  // The block's x in the arithmetic type.
  const Real* transformed(int64_t column, int n) {
    block_transform(raw(column), n, transform_, x_);
    return x_;
  }

  // The block's weights a, or null if all columns have the weight beta.
  const Real* weights(int64_t column, int n) {
    if (in_.weights.is_constant()) return nullptr;
    for (int i = 0; i < n; ++i) a_[i] = in_.weights.at(row_, column + i);
    return a_;
  }

 private:
  const RowInputs<T>& in_;
  const LogitTransform<Real>& transform_;
  int64_t row_;
  const T* logits_;
  bool identity_;
  alignas(64) Real x_[block_columns];
  alignas(64) Real a_[block_columns];
};

inline int block_size(int64_t column, int64_t end) {
  return int(end - column < block_columns ? end - column : block_columns);
}

// The exponentials e^(x - reference) of a row, kept between the two passes of the fused kernel, so
// that the second computes none. Each block has its own reference: the largest logit so far.
template <typename Real>
struct KeptExps {
  Real* exps;        // one per column
  Real* references;  // one per block; -inf if every logit so far is -inf
};

// The state of one block, relative to its maximum or to `floor`, whichever is larger. `next` points
// to the logits after the block.
template <typename Real, typename X, typename T>
PartialState<double> block_state(const X* x, const Real* a, double beta, int n,
                                 int64_t first_column, Real floor, const Target<Real>& target,
                                 const Wanted& wanted, const KeptExps<Real>* kept, const T* next) {
  PartialState<double> part;
  const Real max = block_max<Real>(x, n);
  if (wanted.integers[Stat::argmax] && (max > floor || floor == -infinity<Real>())) {
    part.argmax = first_column + (max == -infinity<Real>() ? 0 : block_find<Real>(x, n, max));
  }
  part.max = max > floor ? max : floor;
  const Real reference = Real(part.reference());
  if (wanted.floats[Stat::mean_log_prob]) {
    if (a != nullptr) {
      const WeightedSums weighted = block_weighted_sum(x, a, n, reference);
      part.sum_weighted = weighted.sum;
      part.sum_weights = weighted.weights;
    } else {
      part.sum_weighted = beta * block_sum<Real>(x, n, reference);
      part.sum_weights = beta * n;
    }
  }
  if (wanted.integers[Stat::rank]) {
    const int64_t before = target.column - first_column;
    part.rank = block_rank(x, n, target.logit, before < 0 ? 0 : before < n ? int(before) : n);
  }
  // This comes last, because the exponentials may overwrite x.
  Real* exps = nullptr;
  if (kept != nullptr) {
    exps = kept->exps + first_column;
    kept->references[first_column / block_columns] = Real(part.max);
  }
  const int64_t at = target.column - first_column;
  block_exp_sums(x, n, reference, at >= 0 && at < n ? int(at) : -1, wanted, exps, next, part);
  return part;
}

template <typename T>
RowStats<double> row_statistics(RowReader<T>& reader, const RowInputs<T>& in, const Wanted& wanted,
                                const Target<real_t<T>>& target, const KeptExps<real_t<T>>* kept) {
  using Real = real_t<T>;
  PartialState<double> state;
  for (int64_t column = 0; column < in.vocab_size; column += block_columns) {
    const int n = block_size(column, in.vocab_size);
    const Real* a = wanted.floats[Stat::mean_log_prob] ? reader.weights(column, n) : nullptr;
    const auto state_of = [&](const auto* x) {
      return block_state<Real>(x, a, double(in.weights.beta), n, column, Real(state.max), target,
                               wanted, kept, reader.raw(column + n));
    };
    state = merge(state, reader.is_identity() ? state_of(reader.raw(column))
                                              : state_of(reader.transformed(column, n)));
  }
  return finalize(state, state.relative(double(target.logit)), in.vocab_size);
}

template <typename T>
Target<real_t<T>> target_of(const RowReader<T>& reader, const RowInputs<T>& in, int64_t row) {
  const RowTarget target(in.targets, row);
  if (!target.is_active(in.vocab_size) || !target.is_here()) return {};
  const int64_t column = target.value();
  return {column, reader.logit(column), in.weights.of_class(column)};
}

template <typename T>
RowStats<double> statistics_of(RowReader<T>& reader, const RowInputs<T>& in, const Wanted& wanted,
                               int64_t row, const Target<real_t<T>>& target,
                               const KeptExps<real_t<T>>* kept = nullptr) {
  const RowTarget read_target(in.targets, row);
  if (!read_target.is_active(in.vocab_size)) {
    return absent_statistics<double>(read_target.is_ignored(), in.vocab_size);
  }
  return row_statistics(reader, in, wanted, target, kept);
}

template <typename T>
void row_stats(const RowInputs<T>& in, const RowOutputs<real_t<T>>& out, const int64_t* rows,
               int64_t count) {
  const LogitTransform<real_t<T>> transform = in.transform.resolved();
  for (int64_t i = 0; i < count; ++i) {
    RowReader<T> reader(in, transform, rows[i]);
    const Target<real_t<T>> target = target_of(reader, in, rows[i]);
    write_statistics(out, rows[i], statistics_of(reader, in, Wanted::by(out), rows[i], target));
  }
}

template <typename T>
void fill_zero(T* out, int64_t n) {
  __builtin_memset(static_cast<void*>(out), 0, size_t(n) * sizeof(T));
}

// Converts g = dL/dx of a block to dL/dz. With x = cap tanh u, dx/dz = scale (1 - tanh^2 u), and
// tanh u follows from x.
template <typename T>
void chain_block(const LogitTransform<real_t<T>>& transform, const real_t<T>* x, const real_t<T>* g,
                 int n, T* out) {
  using Real = real_t<T>;
  using V = Vec<Real>;
  const Real per_cap = Real(1) / transform.cap;
  const auto chained = [&](Reg<Real> x, Reg<Real> g) {
    if (!(transform.cap > 0)) return g * V::broadcast(transform.scale);
    const Reg<Real> tanh = x * V::broadcast(per_cap);
    const Reg<Real> slope = V::fma(tanh, x * V::broadcast(-per_cap), V::broadcast(Real(1)));
    return g * (slope * V::broadcast(transform.scale));
  };
  int i = 0;
  for (; i + V::width <= n; i += V::width)
    V::store(out + i, chained(V::load(x + i), V::load(g + i)));
  if (i < n) {
    const Reg<Real> rest =
        chained(load_part<Real>(x + i, n - i, Real(0)), load_part<Real>(g + i, n - i, Real(0)));
    store_part<Real>(out + i, n - i, rest);
  }
}

// sum g dx/dscale of a block.
template <typename T>
double scale_gradient(const LogitTransform<real_t<T>>& transform, const T* z, const real_t<T>* x,
                      const real_t<T>* g, int n) {
  using Real = real_t<T>;
  double sum = 0;
  for (int i = 0; i < n; ++i) {
    const Real tanh = transform.cap > 0 ? x[i] / transform.cap : Real(0);
    const Real slope = Real(1) - tanh * tanh;
    sum += slope == Real(0) || g[i] == Real(0) ? 0.0 : double(g[i] * slope) * to_real(z[i]);
  }
  return sum;
}

// Writes the gradient of one row from its coefficients; out may overwrite the logits and the kept
// exponentials.
template <typename T>
void write_gradient(RowReader<T>& reader, const RowInputs<T>& in,
                    const LogitTransform<real_t<T>>& transform, const GradRow<real_t<T>>& row,
                    const Target<real_t<T>>& target, const KeptExps<real_t<T>>* kept, T* out,
                    real_t<T>* grad_scale) {
  using Real = real_t<T>;
  alignas(64) Real g[block_columns];
  double sum_scale = 0;
  for (int64_t column = 0; column < in.vocab_size; column += block_columns) {
    const int n = block_size(column, in.vocab_size);
    const Real* a = row.c.weight != Real(0) ? reader.weights(column, n) : nullptr;
    const bool has_target = target.column >= column && target.column < column + n;
    Real at_target = 0;
    if (has_target) {
      const Real weight = a != nullptr              ? a[target.column - column]
                          : row.c.weight != Real(0) ? in.weights.beta
                                                    : Real(0);
      at_target = target_gradient(row.c, (target.logit - row.reference) - row.log_sum(), weight);
    }
    if (kept != nullptr) {
      const Real reference = kept->references[column / block_columns];
      const Real factor = exp_of(reference - row.reference) * row.inverse_sum;
      block_gradient_from_exps(kept->exps + column, a, n, row, factor, out + column);
    } else if (reader.is_identity() && grad_scale == nullptr) {
      block_gradient(reader.raw(column), a, n, row, out + column);
    } else {
      const Real* x = reader.transformed(column, n);
      block_gradient(x, a, n, row, g);
      if (has_target) g[target.column - column] = at_target;
      if (grad_scale != nullptr) {
        sum_scale += scale_gradient(transform, reader.raw(column), x, g, n);
      }
      chain_block(transform, x, g, n, out + column);
      continue;
    }
    if (has_target) from_real(at_target, out[target.column]);
  }
  fill_zero(out + in.vocab_size, in.columns - in.vocab_size);
  if (grad_scale != nullptr) *grad_scale = Real(sum_scale);
}

template <typename T>
void row_gradient(RowReader<T>& reader, const RowInputs<T>& in,
                  const LogitTransform<real_t<T>>& transform, const GradSource<real_t<T>>& source,
                  const GradOutputs<T>& out, int64_t row, const RowStats<real_t<T>>& stats,
                  const Target<real_t<T>>& target, const KeptExps<real_t<T>>* kept = nullptr) {
  using Real = real_t<T>;
  T* grad = out.grad + out.layout.offset(row);
  Real* grad_scale = out.grad_scale != nullptr ? out.grad_scale + row : nullptr;
  const auto upstream = source.read(row);
  if (!is_active(in, row) || source.vanishes(upstream)) {
    fill_zero(grad, in.columns);
    if (grad_scale != nullptr) *grad_scale = 0;
    return;
  }
  write_gradient(reader, in, transform, grad_row(in, source, upstream, stats, target.weight),
                 target, kept, grad, grad_scale);
}

template <typename T>
void row_grad(const RowInputs<T>& in, const SavedStats<real_t<T>>& saved,
              const GradSource<real_t<T>>& source, const GradOutputs<T>& out, const int64_t* rows,
              int64_t count) {
  using Real = real_t<T>;
  const LogitTransform<Real> transform = in.transform.resolved();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows[i];
    RowReader<T> reader(in, transform, row);
    row_gradient(reader, in, transform, source, out, row, saved.of_row(row),
                 target_of(reader, in, row));
  }
}

// Memory for the exponentials of one row: the gradient's own if the types match, otherwise
// separate.
template <typename T>
class ExpsRoom {
 public:
  using Real = real_t<T>;

  explicit ExpsRoom(int64_t columns) {
    const size_t blocks = size_t((columns + block_columns - 1) / block_columns);
    const size_t aside = sizeof(T) == sizeof(Real) ? 0 : size_t(columns);
    memory_ = new Real[blocks + aside];
    aside_ = memory_ + blocks;
  }
  ~ExpsRoom() { delete[] memory_; }
  ExpsRoom(const ExpsRoom&) = delete;
  ExpsRoom& operator=(const ExpsRoom&) = delete;

  KeptExps<Real> over(T* grad) const {
    if constexpr (sizeof(T) == sizeof(Real)) {
      return {grad, memory_};
    } else {
      return {aside_, memory_};
    }
  }

 private:
  Real* memory_;
  Real* aside_;
};

template <typename T>
void fused(const RowInputs<T>& in, const RowOutputs<real_t<T>>& out,
           const GradSource<real_t<T>>& source, const GradOutputs<T>& grad, const int64_t* rows,
           int64_t count) {
  using Real = real_t<T>;
  const LogitTransform<Real> transform = in.transform.resolved();
  const Wanted wanted = Wanted::by(out);
  const bool keeps = transform.kind() == TransformKind::identity && grad.grad_scale == nullptr &&
                     !wanted.more_sums();
  const ExpsRoom<T> room(in.vocab_size);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows[i];
    RowReader<T> reader(in, transform, row);
    const Target<Real> target = target_of(reader, in, row);
    const KeptExps<Real> kept = room.over(grad.grad + grad.layout.offset(row));
    const KeptExps<Real>* where = keeps ? &kept : nullptr;
    const RowStats<double> stats = statistics_of(reader, in, wanted, row, target, where);
    write_statistics(out, row, stats);
    row_gradient(reader, in, transform, source, grad, row, stats.template as<Real>(), target,
                 where);
  }
}

template <typename T>
void scale(T* data, int64_t count, real_t<T> factor) {
  if (factor == 0) {  // of nan and inf, too
    for (int64_t i = 0; i < count; ++i) from_real(real_t<T>(0), data[i]);
    return;
  }
  using V = Vec<real_t<T>>;
  const auto by = V::broadcast(factor);
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) V::store(data + i, V::load(data + i) * by);
  for (; i < count; ++i) from_real(to_real(data[i]) * factor, data[i]);
}

template <typename T>
const Kernels<T>& kernels_of() {
  static constexpr Kernels<T> table{row_stats<T>, row_grad<T>, fused<T>, scale<T>};
  return table;
}

template const Kernels<float>& kernels_of();
template const Kernels<double>& kernels_of();
template const Kernels<BFloat16>& kernels_of();
template const Kernels<Half>& kernels_of();

}  // namespace llmloss::cpu::LLMLOSS_ISA
