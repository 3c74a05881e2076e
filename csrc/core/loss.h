// Cross entropy and its companions as a function of the row statistics, and its derivative.
#pragma once

#include "macros.h"
#include "math.h"
#include "statistics.h"

namespace llmloss {

template <typename Real>
struct LossOptions {
  Real label_smoothing = 0;  // eps in [0, 1]
  Real z_loss = 0;           // lambda of lambda lse^2
  Real focal_gamma = 0;      // gamma >= 0 of (1 - p_y)^gamma; 0 unless targets are indices
  // Rows of probabilities as targets: the weighted mean carries the whole (smoothed) target, so
  // there is no target column.
  bool probability_targets = false;

  template <typename To>
  LLMLOSS_HD LossOptions<To> as() const {
    return {To(label_smoothing), To(z_loss), To(focal_gamma), probability_targets};
  }

  LLMLOSS_HD Real target_share() const {
    return probability_targets ? Real(0) : Real(1) - label_smoothing;
  }
  LLMLOSS_HD Real mean_share() const { return probability_targets ? Real(1) : label_smoothing; }

  // Whether the loss depends on a statistic. log_prob and lse cost nothing besides.
  LLMLOSS_HD bool reads(int stat) const {
    if (stat == Stat::mean_log_prob) return mean_share() != Real(0);
    return stat == Stat::log_prob || stat == Stat::lse;
  }

  // Whether the gradient needs the value of a statistic besides lse, which follows from the state.
  LLMLOSS_HD bool gradient_reads_values() const { return focal_gamma != Real(0); }
};

// The denominator of the mean, in memory of the device. Class weights belong to the cross entropy
// and count in its mean; z_factor takes them out of the z-loss's, which is a plain mean of lse^2.
template <typename Real>
struct MeanDenominator {
  enum Field { value_field, z_factor_field, count };
  static constexpr const char* names[] = {"value", "z_factor"};

  const Real* numbers = nullptr;  // one for each field; null: 1

  LLMLOSS_HD bool given() const { return numbers != nullptr; }
  LLMLOSS_HD Real value() const { return given() ? numbers[value_field] : Real(1); }

  // The options of a row's loss before it is divided by value().
  LLMLOSS_HD LossOptions<Real> options(LossOptions<Real> options) const {
    if (given() && options.z_loss != Real(0)) options.z_loss *= numbers[z_factor_field];
    return options;
  }
};

// -(1 - eps) w_y log p_y - eps sum_i a_i log p_i, in nats.
// A share of exactly 0 leaves its term out, so that log 0 does not become 0 * inf.
template <typename Real>
LLMLOSS_HD Real log_loss(const LossOptions<Real>& options, const FloatStats<Real>& stats,
                         Real target_weight) {
  Real loss = 0;
  if (options.target_share() != Real(0)) {
    loss -= options.target_share() * target_weight * stats[Stat::log_prob];
  }
  if (options.mean_share() != Real(0)) loss -= options.mean_share() * stats[Stat::mean_log_prob];
  return loss;
}

// (1 - p_y)^gamma, and its derivative by log p_y.
template <typename Real>
struct FocalFactor {
  Real value;
  Real slope;
};

template <typename Real>
LLMLOSS_HD FocalFactor<Real> focal_factor(Real gamma, Real log_prob) {
  const Real others = -expm1_of(log_prob);  // 1 - p_y, with all its digits as p_y -> 1
  if (others <= Real(0)) return {0, 0};     // the derivative has no limit for gamma < 1
  const Real value = exp_of(gamma * log_of(others));
  return {value, -gamma * value * exp_of(log_prob) / others};
}

// log_loss (1 - p_y)^gamma + lambda lse^2.
template <typename Real>
LLMLOSS_HD Real row_loss(const LossOptions<Real>& options, const FloatStats<Real>& stats,
                         Real target_weight) {
  Real loss = log_loss(options, stats, target_weight);
  if (options.focal_gamma != Real(0)) {
    loss *= focal_factor(options.focal_gamma, stats[Stat::log_prob]).value;
  }
  const Real lse = stats[Stat::lse];
  if (options.z_loss != Real(0)) loss += options.z_loss * lse * lse;
  return loss;
}

// d(grad * row_loss)/d(statistics).
template <typename Real>
LLMLOSS_HD FloatStats<Real> loss_upstream(const LossOptions<Real>& options, Real grad,
                                          const FloatStats<Real>& stats, Real target_weight) {
  FloatStats<Real> upstream;
  upstream[Stat::log_prob] = -grad * options.target_share() * target_weight;
  upstream[Stat::mean_log_prob] = -grad * options.mean_share();
  if (options.focal_gamma != Real(0)) {
    const auto factor = focal_factor(options.focal_gamma, stats[Stat::log_prob]);
    upstream[Stat::log_prob] *= factor.value;
    upstream[Stat::mean_log_prob] *= factor.value;
    // As p_y -> 0 the slope vanishes faster than the loss grows.
    if (factor.slope != Real(0)) {
      upstream[Stat::log_prob] += grad * factor.slope * log_loss(options, stats, target_weight);
    }
  }
  if (options.z_loss != Real(0)) {
    upstream[Stat::lse] = grad * Real(2) * options.z_loss * stats[Stat::lse];
  }
  return upstream;
}

}  // namespace llmloss
