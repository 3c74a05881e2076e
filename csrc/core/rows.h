// What every backend does with a row besides walking its columns: whether it takes part, what is
// written for it, and what its gradient is made of.
#pragma once

#include "params.h"
#include "row_stats.h"

namespace llmloss {

// Whether the row has statistics and a gradient: not if it is ignored or its target out of range.
template <typename T>
LLMLOSS_HD bool is_active(const RowInputs<T>& in, int64_t row) {
  return in.targets.active(row, in.vocab_size);
}

// The target of a row, read before anything is written: the gradient may lie over the logits.
template <typename Real>
struct Target {
  int64_t column = -1;  // -1: none here, or probability targets
  Real logit = 0;       // transformed
  Real weight = 1;      // of its class
};

// Whether an active row has a target among its columns.
template <typename T>
LLMLOSS_HD bool target_is_here(const RowInputs<T>& in, int64_t row) {
  return in.targets.are_indices() && !in.targets.is_elsewhere(row);
}

// A number into each array; what nobody asked for has none.
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

// What stands in the outputs of a row that is not active: 0 where it is ignored, nan where its
// target is out of range.
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

template <typename Real, typename T>
LLMLOSS_HD RowStats<Real> absent_statistics(const RowInputs<T>& in, int64_t row) {
  return absent_statistics<Real>(in.targets.ignored(row), in.vocab_size);
}

// What a row's gradient needs: its coefficients, and how p follows from x.
template <typename Real>
struct GradRow {
  RowCoefficients<Real> c;
  Real reference;
  Real log_sum;
  Real inverse_sum;  // 1 / sum e^(x - reference)
  Real constant;     // c.weight times the constant column weight
};

// upstream_of: from the values of the row's statistics to their gradients.
template <typename T, typename UpstreamOf>
LLMLOSS_HD GradRow<real_t<T>> grad_row(const RowInputs<T>& in, const RowStats<real_t<T>>& stats,
                                       const UpstreamOf& upstream_of) {
  using Real = real_t<T>;
  const Real reference = stats.state[StateField::reference];
  const Real sum_exp = stats.state[StateField::sum_exp];
  const Real log_sum = log_of(sum_exp);
  FloatStats<Real> values = stats.floats;
  values[Stat::lse] = reference + log_sum;  // spares a read of what forward wrote
  GradRow<Real> grad{
      .c = collapse(upstream_of(values), values, stats.state[StateField::sum_weights]),
      .reference = reference,
      .log_sum = log_sum,
      .inverse_sum = Real(1) / sum_exp,
      .constant = 0};
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
