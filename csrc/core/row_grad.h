// One gradient for every loss over the row statistics.
//
// Any upstream gradient of the statistics collapses to five coefficients, with s = sum p^2:
//   dL/dx_i = p_i (c_p + c_plogp log p_i + c_sq (p_i / s - 1)) + c_weight a_i
//           + [i = target] c_target.
#pragma once

#include "macros.h"
#include "math.h"
#include "statistics.h"

namespace llmloss {

template <typename Real>
struct RowCoefficients {
  Real p = 0;
  Real plogp = 0;
  Real sq = 0;
  Real sq_over_sum = 0;  // c_sq / s
  Real log_sum_sq = 0;   // log s
  Real weight = 0;
  Real target = 0;
};

// Whether the gradient of a statistic contains its value.
LLMLOSS_HD constexpr bool gradient_needs_value(int stat) {
  return stat == Stat::entropy || stat == Stat::log_sum_sq_probs;
}

// upstream: dL/d(statistic) of the row. A value is read only where gradient_needs_value, and where
// its upstream gradient is not 0; sum_weights is sum a of the row.
template <typename Real>
LLMLOSS_HD RowCoefficients<Real> collapse(const FloatStats<Real>& upstream,
                                          const FloatStats<Real>& values, Real sum_weights) {
  RowCoefficients<Real> c;
  c.p = upstream[Stat::lse] - upstream[Stat::log_prob];
  c.target = upstream[Stat::log_prob];
  if (upstream[Stat::mean_log_prob] != Real(0)) {
    c.p -= upstream[Stat::mean_log_prob] * sum_weights;
    c.weight = upstream[Stat::mean_log_prob];
  }
  if (upstream[Stat::entropy] != Real(0)) {
    c.p -= upstream[Stat::entropy] * values[Stat::entropy];
    c.plogp = -upstream[Stat::entropy];
  }
  if (upstream[Stat::log_sum_sq_probs] != Real(0)) {
    c.log_sum_sq = values[Stat::log_sum_sq_probs];
    c.sq = Real(2) * upstream[Stat::log_sum_sq_probs];
    c.sq_over_sum = c.sq * exp_of(-c.log_sum_sq);
  }
  return c;
}

// Far enough down that e^x is 0 in every type, near enough that 0 * x stays 0.
template <typename Real>
LLMLOSS_HD constexpr Real lowest_log_prob() {
  return Real(-1e4);
}

// dL/dx_i of a column that is not the target; a is the column's weight. p is best formed as
// e^(x - reference) / sum_exp: e^(log p) would carry the rounding of the logarithm.
template <typename Real>
LLMLOSS_HD Real column_gradient(const RowCoefficients<Real>& c, Real p, Real log_prob, Real a) {
  const Real clamped = max_of(lowest_log_prob<Real>(), log_prob);
  return p * ((c.p - c.sq) + c.plogp * clamped + c.sq_over_sum * p) + c.weight * a;
}

// dL/dx of the target's column. p - 1 and p / s - 1 are formed by expm1, before any rounding: as
// p -> 1 the gradient keeps its relative precision.
template <typename Real>
LLMLOSS_HD Real target_gradient(const RowCoefficients<Real>& c, Real log_prob, Real a) {
  const Real clamped = max_of(lowest_log_prob<Real>(), log_prob);
  const Real g = c.p * expm1_of(clamped) + c.plogp * clamped * exp_of(clamped) + (c.p + c.target) +
                 c.weight * a;
  if (c.sq == Real(0)) return g;
  return g + c.sq * exp_of(clamped) * expm1_of(clamped - c.log_sum_sq);
}

}  // namespace llmloss
