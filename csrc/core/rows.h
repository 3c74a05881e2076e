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

// The inputs of a row's gradient: its coefficients, and how to compute p from x.
template <typename Real>
struct GradRow {
  RowCoefficients<Real> c;
  Real reference;
  Real excess;       // of the state: sum e^(x - reference) - 1
  Real inverse_sum;  // 1 / sum e^(x - reference)
  Real p_of_exp;     // c.p / sum e^(x - reference)
  Real constant;     // c.weight times the column weight, if all columns share one

  // log p = x - reference - log_sum(). Most columns do not need it.
  LLMLOSS_HD Real log_sum() const { return log1p_of(excess); }
};

template <typename T>
LLMLOSS_HD GradRow<real_t<T>> grad_row(const RowInputs<T>& in, const GradSource<real_t<T>>& source,
                                       const typename GradSource<real_t<T>>::Row& read,
                                       const RowStats<real_t<T>>& stats, real_t<T> target_weight) {
  using Real = real_t<T>;
  GradRow<Real> grad{.c = {},
                     .reference = stats.state[StateField::reference],
                     .excess = stats.state[StateField::excess],
                     .inverse_sum = Real(1) / (Real(1) + stats.state[StateField::excess]),
                     .p_of_exp = 0,
                     .constant = 0};
  FloatStats<Real> values = stats.floats;
  // Cheaper than loading what forward wrote.
  if (source.needs_lse()) values[Stat::lse] = grad.reference + grad.log_sum();
  grad.c = collapse(source.upstream(read, values, target_weight), values,
                    stats.state[StateField::sum_weights]);
  grad.p_of_exp = grad.c.p * grad.inverse_sum;
  if (grad.c.weight != Real(0)) grad.constant = grad.c.weight * in.weights.beta;
  return grad;
}

}  // namespace llmloss
