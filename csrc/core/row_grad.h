// One gradient for every loss over the row statistics.
//
// Whatever the upstream gradients of the statistics, five coefficients suffice, with s = sum p^2:
//   dL/dx_i = p_i (c_p + c_plogp log p_i + c_sq (p_i / s - 1)) + c_weight a_i
//           + [i = target] c_target.
// c_target is the gradient of log p_target, and -c_target a part of c_p. As p_target -> 1 the two
// cancel in the target's column; what is left of c_p there is kept: c_sure = c_p + c_target.
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
  Real sure = 0;
};

// Whether the gradient of a statistic is computed from the statistic's value.
LLMLOSS_HD constexpr bool gradient_needs_value(int stat) {
  return stat == Stat::entropy || stat == Stat::log_sum_sq_probs;
}

// The coefficients of a row. upstream: dL/d(statistic); sum_weights: sum a. A value is read only if
// gradient_needs_value and its upstream gradient is not 0.
template <typename Real>
LLMLOSS_HD RowCoefficients<Real> collapse(const FloatStats<Real>& upstream,
                                          const FloatStats<Real>& values, Real sum_weights) {
  RowCoefficients<Real> c;
  c.sure = upstream[Stat::lse];
  if (upstream[Stat::mean_log_prob] != Real(0)) {
    c.sure -= upstream[Stat::mean_log_prob] * sum_weights;
    c.weight = upstream[Stat::mean_log_prob];
  }
  if (upstream[Stat::entropy] != Real(0)) {
    c.sure -= upstream[Stat::entropy] * values[Stat::entropy];
    c.plogp = -upstream[Stat::entropy];
  }
  if (upstream[Stat::log_sum_sq_probs] != Real(0)) {
    c.log_sum_sq = values[Stat::log_sum_sq_probs];
    c.sq = Real(2) * upstream[Stat::log_sum_sq_probs];
    c.sq_over_sum = c.sq * exp_of(-c.log_sum_sq);
  }
  c.p = c.sure - upstream[Stat::log_prob];
  return c;
}

// A finite stand-in for -inf: e^x is 0 in every type, and so is 0 * x.
template <typename Real>
LLMLOSS_HD constexpr Real lowest_log_prob() {
  return Real(-1e4);
}

// dL/dx_i of a column that is not the target; a is the column's weight. This is the definition: the
// loops of both backends have forms of their own. Compute p as
// e^(x - reference) / sum_exp: e^(log p) would add the rounding error of the logarithm.
template <typename Real>
LLMLOSS_HD Real column_gradient(const RowCoefficients<Real>& c, Real p, Real log_prob, Real a) {
  const Real clamped = max_of(lowest_log_prob<Real>(), log_prob);
  return p * ((c.p - c.sq) + c.plogp * clamped + c.sq_over_sum * p) + c.weight * a;
}

// dL/dx of the target's column. expm1 computes p - 1 and p / s - 1 without cancellation, so that
// the gradient keeps its relative precision as p -> 1.
template <typename Real>
LLMLOSS_HD Real target_gradient(const RowCoefficients<Real>& c, Real log_prob, Real a) {
  const Real clamped = max_of(lowest_log_prob<Real>(), log_prob);
  const Real g =
      c.p * expm1_of(clamped) + c.plogp * clamped * exp_of(clamped) + c.sure + c.weight * a;
  if (c.sq == Real(0)) return g;
  return g + c.sq * exp_of(clamped) * expm1_of(clamped - c.log_sum_sq);
}

}  // namespace llmloss
