// Cross entropy and its companions as a function of the row statistics, and its derivative.
#pragma once

#include "macros.h"
#include "row_grad.h"
#include "row_stats.h"

namespace llmloss {

template <typename Real>
struct LossOptions {
  Real label_smoothing = 0;  // eps in [0, 1]
  Real z_loss = 0;           // lambda of lambda lse^2
  // Rows of probabilities as targets: the weighted mean carries the whole (smoothed) target, so
  // there is no target column.
  bool probability_targets = false;

  LLMLOSS_HD Real target_share() const {
    return probability_targets ? Real(0) : Real(1) - label_smoothing;
  }
  LLMLOSS_HD Real mean_share() const { return probability_targets ? Real(1) : label_smoothing; }
  LLMLOSS_HD bool needs_mean() const { return mean_share() != Real(0); }
};

// -(1 - eps) w_y log p_y - eps sum_i a_i log p_i + lambda lse^2, in nats.
// A share of exactly 0 leaves its term out, so that log 0 does not become 0 * inf.
template <typename Real>
LLMLOSS_HD Real row_loss(const LossOptions<Real>& options, Real log_prob, Real lse,
                         Real mean_log_prob, Real target_weight) {
  Real loss = 0;
  if (options.target_share() != Real(0)) {
    loss -= options.target_share() * target_weight * log_prob;
  }
  if (options.needs_mean()) loss -= options.mean_share() * mean_log_prob;
  if (options.z_loss != Real(0)) loss += options.z_loss * lse * lse;
  return loss;
}

// d(grad * row_loss)/d(statistics).
template <typename Real>
LLMLOSS_HD RowUpstream<Real> loss_upstream(const LossOptions<Real>& options, Real grad, Real lse,
                                           Real target_weight) {
  RowUpstream<Real> upstream;
  upstream.log_prob = -grad * options.target_share() * target_weight;
  upstream.mean_log_prob = -grad * options.mean_share();
  if (options.z_loss != Real(0)) upstream.lse = grad * Real(2) * options.z_loss * lse;
  return upstream;
}

}  // namespace llmloss
