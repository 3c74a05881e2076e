// The work on a row that is the same for every backend, apart from the loop over its columns:
// whether it is active, which results are written for it, and the inputs of its gradient.
#pragma once

#include "params.h"
#include "row_stats.h"

namespace llmloss {

// Whether the row has statistics and a gradient.
template <typename T>
LLMLOSS_HD bool is_active(const RowInputs<T>& in, int64_t row) {
  return RowTarget(in.targets, row).is_active(in.vocab_size);
}

// The target of a row. Read it before writing the gradient, which may overwrite the logits.
template <typename Real>
struct Target {
  int64_t column = -1;             // -1: in another shard, or probability targets
  Real logit = -infinity<Real>();  // transformed; -inf if there is none
  Real weight = 1;                 // of its class
};

// Writes one number to each array that is not null.
template <typename To, typename From, int first, int end>
LLMLOSS_HD void write_each(const Indexed<To*, first, end>& arrays, int64_t row,
                           const Indexed<From, first, end>& numbers) {
  LLMLOSS_UNROLL
  for (int i = first; i < end; ++i) {
    if (arrays[i] != nullptr) arrays[i][row] = To(numbers[i]);
  }
}

template <typename Real, typename From>
LLMLOSS_HD void write_statistics(const RowOutputs<Real>& out, int64_t row,
                                 const RowStats<From>& stats) {
  write_each(out.floats, row, stats.floats);
  write_each(out.state, row, stats.state);
  write_each(out.integers, row, stats.integers);
}

// The outputs for a row that is not active: 0 if it is ignored, nan if its target is out of range.
template <typename Real>
LLMLOSS_HD RowStats<Real> absent_statistics(bool is_ignored, int64_t vocab_size) {
  RowStats<Real> stats;
  LLMLOSS_UNROLL
  for (int stat = 0; stat < Stat::float_count; ++stat) {
    stats.floats[stat] = is_ignored ? Real(0) : std::numeric_limits<Real>::quiet_NaN();
  }
  stats.integers[Stat::argmax] = -1;
  stats.integers[Stat::rank] = vocab_size;
  return stats;
}

// Whether the row has a gradient that is not 0.
template <typename T>
LLMLOSS_HD bool has_gradient(const RowInputs<T>& in, const GradSource<real_t<T>>& source,
                             int64_t row) {
  return is_active(in, row) && !source.vanishes(row);
}

// The inputs of a row's gradient: its coefficients, and how to compute p from x.
template <typename Real>
struct GradRow {
  RowCoefficients<Real> c;
  Real reference;
  Real log_sum;
  Real inverse_sum;  // 1 / sum e^(x - reference)
  Real p_of_exp;     // c.p / sum e^(x - reference)
  Real constant;     // c.weight times the column weight, if all columns share one
};

// upstream_of maps the values of the row's statistics to their upstream gradients.
template <typename T, typename UpstreamOf>
LLMLOSS_HD GradRow<real_t<T>> grad_row(const RowInputs<T>& in, const RowStats<real_t<T>>& stats,
                                       const UpstreamOf& upstream_of) {
  using Real = real_t<T>;
  const Real reference = stats.state[StateField::reference];
  const Real excess = stats.state[StateField::excess];
  const Real log_sum = log1p_of(excess), sum_exp = Real(1) + excess;
  FloatStats<Real> values = stats.floats;
  values[Stat::lse] = reference + log_sum;  // cheaper than loading what forward wrote
  GradRow<Real> grad{
      .c = collapse(upstream_of(values), values, stats.state[StateField::sum_weights]),
      .reference = reference,
      .log_sum = log_sum,
      .inverse_sum = Real(1) / sum_exp,
      .p_of_exp = 0,
      .constant = 0};
  grad.p_of_exp = grad.c.p * grad.inverse_sum;
  if (grad.c.weight != Real(0)) grad.constant = grad.c.weight * in.weights.beta;
  return grad;
}

template <typename T>
LLMLOSS_HD GradRow<real_t<T>> grad_row(const RowInputs<T>& in, const GradSource<real_t<T>>& source,
                                       int64_t row, const RowStats<real_t<T>>& stats,
                                       real_t<T> target_weight) {
  return grad_row(in, stats, [&](const FloatStats<real_t<T>>& values) {
    return source.upstream(row, values, target_weight);
  });
}

}  // namespace llmloss
