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

template <typename Real, typename From>
LLMLOSS_HD void write_statistics(const RowOutputs<Real>& out, int64_t row,
                                 const RowStats<From>& stats) {
  const auto write = [row](Real* to, From value) {
    if (to != nullptr) to[row] = Real(value);
  };
  write(out.log_prob, stats.log_prob);
  write(out.lse, stats.lse);
  write(out.entropy, stats.entropy);
  write(out.mean_log_prob, stats.mean_log_prob);
  write(out.reference, stats.reference);
  write(out.sum_exp, stats.sum_exp);
  write(out.sum_weights, stats.sum_weights);
  if (out.argmax != nullptr) out.argmax[row] = stats.argmax;
  if (out.rank != nullptr) out.rank[row] = stats.rank;
}

// What stands in the outputs of a row that is not active: 0 where it is ignored, nan where its
// target is out of range.
template <typename Real>
LLMLOSS_HD RowStats<Real> absent_statistics(bool is_ignored, int64_t vocab_size) {
  const Real value = is_ignored ? Real(0) : std::numeric_limits<Real>::quiet_NaN();
  return {.log_prob = value,
          .lse = value,
          .entropy = value,
          .mean_log_prob = value,
          .reference = 0,
          .sum_exp = 0,
          .sum_weights = 0,
          .argmax = -1,
          .rank = vocab_size};
}

template <typename Real, typename T>
LLMLOSS_HD RowStats<Real> absent_statistics(const RowInputs<T>& in, int64_t row) {
  return absent_statistics<Real>(in.targets.ignored(row), in.vocab_size);
}

// What the statistics of a row tell its gradient.
template <typename Real>
struct RowFacts {
  Target<Real> target;
  Real reference;
  Real sum_exp;
  Real entropy;
  Real sum_weights;
};

// What a row's gradient needs: its coefficients, and how p follows from x.
template <typename Real>
struct GradRow {
  RowCoefficients<Real> c;
  Real reference;
  Real log_sum;
  Real inverse_sum;  // 1 / sum e^(x - reference)
  Real constant;     // c.weight times the constant column weight
};

// upstream_of: from the row's lse to the gradients of its statistics.
template <typename T, typename UpstreamOf>
LLMLOSS_HD GradRow<real_t<T>> grad_row(const RowInputs<T>& in, const RowFacts<real_t<T>>& facts,
                                       const UpstreamOf& upstream_of) {
  using Real = real_t<T>;
  const Real log_sum = log_of(facts.sum_exp);
  const RowUpstream<Real> upstream = upstream_of(facts.reference + log_sum);
  GradRow<Real> grad{.c = collapse(upstream, facts.entropy, facts.sum_weights),
                     .reference = facts.reference,
                     .log_sum = log_sum,
                     .inverse_sum = Real(1) / facts.sum_exp,
                     .constant = 0};
  if (grad.c.weight != Real(0)) grad.constant = grad.c.weight * in.weights.beta;
  return grad;
}

template <typename T>
LLMLOSS_HD GradRow<real_t<T>> grad_row(const RowInputs<T>& in, const GradSource<real_t<T>>& source,
                                       int64_t row, const RowFacts<real_t<T>>& facts) {
  return grad_row(in, facts,
                  [&](real_t<T> lse) { return source.upstream(row, lse, facts.target.weight); });
}

}  // namespace llmloss
