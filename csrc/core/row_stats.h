// The monoid behind every loss: what a set of vocabulary columns contributes to its row.
//
// A PartialState has an identity (the default) and an associative, commutative merge, so that SIMD
// lanes, threads, warps, blocks, clusters, vocabulary chunks and process ranks all join their parts
// with the same few lines. Sums are kept relative to the largest logit: nothing overflows, and
// logits with a large common offset lose no digits.
#pragma once

#include <cstdint>

#include "macros.h"
#include "math.h"

namespace llmloss {

template <typename Real>
struct PartialState {
  Real max = -infinity<Real>();  // m, the largest logit
  Real sum_exp = 0;              // sum e^(x - m)
  Real sum_x_exp = 0;            // sum (x - m) e^(x - m), for the entropy
  Real sum_weighted = 0;         // sum a (x - m), for the weighted mean of log-probabilities
  Real sum_weights = 0;          // sum a
  int64_t argmax = -1;           // the first column that holds m
  int64_t rank = 0;              // columns strictly above the target's logit

  // The point that the sums are relative to: m, or 0 where every logit is -inf.
  LLMLOSS_HD Real reference() const { return max == -infinity<Real>() ? Real(0) : max; }

  // Moves the sums to a new maximum, new_max >= max.
  LLMLOSS_HD void rebase(Real new_max) {
    if (new_max == max) return;
    const Real before = reference();
    max = new_max;
    const Real shift = before - reference();
    if (sum_exp != Real(0)) {  // also false for the identity, whose shift may be anything
      const Real factor = exp_of(shift);
      sum_x_exp = factor * (sum_x_exp + shift * sum_exp);
      sum_exp *= factor;
      // A part that underflows is gone; 0 * inf must not make it nan.
      if (factor == Real(0)) sum_x_exp = Real(0);
    }
    if (sum_weights != Real(0)) sum_weighted += sum_weights * shift;
  }
};

template <typename Real>
LLMLOSS_HD PartialState<Real> merge(PartialState<Real> a, PartialState<Real> b) {
  // The first of equal maxima wins, whichever side it is on.
  const bool take_b =
      b.max > a.max || (b.max == a.max && b.argmax >= 0 && (a.argmax < 0 || b.argmax < a.argmax));
  if (take_b) a.argmax = b.argmax;
  const Real max = max_of(a.max, b.max);
  a.rebase(max);
  b.rebase(max);
  a.sum_exp += b.sum_exp;
  a.sum_x_exp += b.sum_x_exp;
  a.sum_weighted += b.sum_weighted;
  a.sum_weights += b.sum_weights;
  a.rank += b.rank;
  return a;
}

// Everything that losses and their gradients need to know of one row.
template <typename Real>
struct RowStats {
  Real log_prob;       // log p_target
  Real lse;            // log sum e^x
  Real entropy;        // - sum p log p, nats
  Real mean_log_prob;  // sum a log p
  Real reference;      // p_i = e^(x_i - reference) / sum_exp: no digits lost to a large lse
  Real sum_exp;
  Real sum_weights;
  int64_t argmax;  // -1 where a nan or +inf leaves the row without statistics
  int64_t rank;    // vocab_size there, so that the row is in no top-k
};

template <typename Real>
LLMLOSS_HD RowStats<Real> finalize(const PartialState<Real>& state, Real target_logit,
                                   int64_t vocab_size) {
  const Real reference = state.reference();
  const Real log_sum = log_of(state.sum_exp);
  const Real entropy = log_sum - state.sum_x_exp / state.sum_exp;
  const bool is_nan = !(state.sum_exp == state.sum_exp);
  return {.log_prob = (target_logit - reference) - log_sum,
          .lse = reference + log_sum,
          .entropy = entropy < Real(0) ? Real(0) : entropy,  // rounding; nan stays nan
          .mean_log_prob = state.sum_weighted - state.sum_weights * log_sum,
          .reference = reference,
          .sum_exp = state.sum_exp,
          .sum_weights = state.sum_weights,
          .argmax = is_nan ? -1 : state.argmax,
          .rank = is_nan ? vocab_size : state.rank};
}

}  // namespace llmloss
