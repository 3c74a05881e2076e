// The monoid behind every loss: the contribution of a set of vocabulary columns to its row.
//
// PartialState has an identity (the default value) and an associative, commutative merge. SIMD
// lanes, threads, warps, blocks, clusters, vocabulary chunks and process ranks all combine their
// parts with it. Sums are relative to the largest logit, so that nothing overflows, and a large
// offset common to all logits costs no precision.
//
// The sums of exponentials leave the target's column out; finalize adds it. Where p_target -> 1,
// the loss and the target's gradient are the sum of the others, which a sum that held the target's
// own 1 would round away.
#pragma once

#include <cstdint>

#include "macros.h"
#include "math.h"
#include "statistics.h"

namespace llmloss {

template <typename Real>
struct PartialState {
  Real max = -infinity<Real>();  // m, the largest logit
  Real sum_exp = 0;              // sum e^(x - m)
  Real sum_x_exp = 0;            // sum (x - m) e^(x - m), for the entropy
  Real sum_sq_exp = 0;           // sum e^(2 (x - m)), for the sum of squared probabilities
  Real sum_weighted = 0;         // sum a (x - m), for the weighted mean of log-probabilities
  Real sum_weights = 0;          // sum a
  int64_t argmax = -1;           // the first column whose logit is m
  int64_t rank = 0;              // columns that sort before the target: see Stat

  // The sums are relative to this: m, or 0 if every logit is -inf.
  LLMLOSS_HD Real reference() const { return max == -infinity<Real>() ? Real(0) : max; }

  LLMLOSS_HD Real relative(Real logit) const { return logit - reference(); }

  // Replaces each sum by join(sum) if a requested statistic needs it, otherwise by 0.
  template <typename Join>
  LLMLOSS_HD void join_sums(const Wanted& wanted, const Join& join) {
    const bool mean = wanted.floats[Stat::mean_log_prob];
    sum_exp = join(sum_exp);
    sum_x_exp = wanted.floats[Stat::entropy] ? join(sum_x_exp) : Real(0);
    sum_sq_exp = wanted.floats[Stat::log_sum_sq_probs] ? join(sum_sq_exp) : Real(0);
    sum_weighted = mean ? join(sum_weighted) : Real(0);
    sum_weights = mean ? join(sum_weights) : Real(0);
  }

  template <typename To>
  LLMLOSS_HD PartialState<To> as() const {
    return {.max = To(max),
            .sum_exp = To(sum_exp),
            .sum_x_exp = To(sum_x_exp),
            .sum_sq_exp = To(sum_sq_exp),
            .sum_weighted = To(sum_weighted),
            .sum_weights = To(sum_weights),
            .argmax = argmax,
            .rank = rank};
  }

  // Adds sums that are relative to the same maximum.
  LLMLOSS_HD void add(const PartialState& other) {
    sum_exp += other.sum_exp;
    sum_x_exp += other.sum_x_exp;
    sum_sq_exp += other.sum_sq_exp;
    sum_weighted += other.sum_weighted;
    sum_weights += other.sum_weights;
    rank += other.rank;
  }

  // Makes the sums relative to a new maximum, new_max >= max.
  LLMLOSS_HD void rebase(Real new_max) {
    if (new_max == max) return;
    const Real before = reference();
    max = new_max;
    const Real shift = before - reference();
    if (sum_exp != Real(0)) {  // also false for the identity, whose shift may be anything
      const Real factor = exp_of(shift);
      sum_x_exp = factor * (sum_x_exp + shift * sum_exp);
      sum_exp *= factor;
      sum_sq_exp *= factor * factor;
      // A factor that underflows leaves 0, not 0 * inf.
      if (factor == Real(0)) sum_x_exp = Real(0);
    }
    if (sum_weights != Real(0)) sum_weighted += sum_weights * shift;
  }
};

template <typename Real>
LLMLOSS_HD PartialState<Real> merge(PartialState<Real> a, PartialState<Real> b) {
  // Of equal maxima the first column wins, in whichever argument it is.
  const bool take_b =
      b.max > a.max || (b.max == a.max && b.argmax >= 0 && (a.argmax < 0 || b.argmax < a.argmax));
  if (take_b) a.argmax = b.argmax;
  const Real max = max_of(a.max, b.max);
  a.rebase(max);
  b.rebase(max);
  a.add(b);
  return a;
}

// The results of a whole row.
template <typename Real>
struct RowStats {
  FloatStats<Real> floats;
  IntegerStats<int64_t> integers;
  StateFields<Real> state;

  template <typename To>
  LLMLOSS_HD RowStats<To> as() const {
    return {floats.template as<To>(), integers, state.template as<To>()};
  }
};

// What backward needs of a whole row. target_exp: the target's e^(x - m), 0 if no column is the
// target.
template <typename Real>
LLMLOSS_HD StateFields<Real> state_fields(const PartialState<Real>& state, Real target_exp) {
  StateFields<Real> fields;
  fields[StateField::reference] = state.reference();
  // Exactly sum_exp if the target is the largest; otherwise the largest's 1 is in sum_exp.
  fields[StateField::excess] = state.sum_exp + (target_exp - Real(1));
  fields[StateField::sum_weights] = state.sum_weights;
  return fields;
}

// at_target: state.relative(the target's logit), -inf if no column is the target. Those statistics
// that are not wanted and cost a division or a logarithm are 0.
template <typename Real>
LLMLOSS_HD RowStats<Real> finalize(const PartialState<Real>& state, Real at_target,
                                   int64_t vocab_size,
                                   const Wanted& wanted = Wanted::everything()) {
  const Real target_exp = exp_of(at_target);
  RowStats<Real> stats;
  stats.state = state_fields(state, target_exp);
  const Real excess = stats.state[StateField::excess];
  const Real log_sum = log1p_of(excess);
  const bool is_nan = !(excess == excess);
  stats.floats[Stat::log_prob] = at_target - log_sum;
  stats.floats[Stat::lse] = stats.state[StateField::reference] + log_sum;
  if (wanted.floats[Stat::entropy]) {
    const Real target_x_exp = target_exp == Real(0) ? Real(0) : at_target * target_exp;
    const Real entropy = log_sum - (state.sum_x_exp + target_x_exp) / (Real(1) + excess);
    stats.floats[Stat::entropy] = entropy < Real(0) ? Real(0) : entropy;  // rounding; nan stays nan
  }
  stats.floats[Stat::mean_log_prob] = state.sum_weighted - state.sum_weights * log_sum;
  if (wanted.floats[Stat::log_sum_sq_probs]) {
    const Real excess_sq = state.sum_sq_exp + (target_exp * target_exp - Real(1));
    const Real log_sum_sq = log1p_of(excess_sq) - Real(2) * log_sum;
    stats.floats[Stat::log_sum_sq_probs] = log_sum_sq > Real(0) ? Real(0) : log_sum_sq;  // likewise
  }
  stats.integers[Stat::argmax] = is_nan ? -1 : state.argmax;
  stats.integers[Stat::rank] = is_nan ? vocab_size : state.rank;
  return stats;
}

// What was given to finalize, recovered from its results.
template <typename Real>
LLMLOSS_HD Real at_target_of(const RowStats<Real>& stats) {
  const Real excess = stats.state[StateField::excess];
  if (excess == Real(-1)) return -infinity<Real>();  // no logit above -inf
  return stats.floats[Stat::log_prob] + log1p_of(excess);
}

// The inverse of finalize, except for the rank.
template <typename Real>
LLMLOSS_HD PartialState<Real> state_of(const RowStats<Real>& stats, bool has_target) {
  PartialState<Real> state;
  const Real excess = stats.state[StateField::excess];
  state.sum_weights = stats.state[StateField::sum_weights];
  state.argmax = stats.integers[Stat::argmax];
  if (excess == Real(-1)) {  // no logit above -inf
    if (state.sum_weights != 0) state.sum_weighted = -infinity<Real>();
    return state;
  }
  const Real log_sum = log1p_of(excess), sum = Real(1) + excess;
  state.max = stats.state[StateField::reference];
  state.sum_exp = sum;
  state.sum_x_exp = sum * (log_sum - stats.floats[Stat::entropy]);
  state.sum_sq_exp = exp_of(stats.floats[Stat::log_sum_sq_probs] + Real(2) * log_sum);
  state.sum_weighted = stats.floats[Stat::mean_log_prob] + state.sum_weights * log_sum;
  if (!has_target) return state;
  const Real at_target = at_target_of(stats), target_exp = exp_of(at_target);
  state.sum_exp *= -expm1_of(stats.floats[Stat::log_prob]);
  if (target_exp != Real(0)) state.sum_x_exp -= at_target * target_exp;
  state.sum_sq_exp -= target_exp * target_exp;
  return state;
}

}  // namespace llmloss
