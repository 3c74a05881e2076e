// The losses of the rows, from their statistics, and the denominator of the mean.
#pragma once

#include "loss.h"
#include "macros.h"
#include "params.h"

namespace llmloss {

enum class Reduction : int { none = 0, mean = 1, sum = 2 };

template <typename Real>
struct LossRows {
  LossOptions<Real> options;
  Targets targets;
  int64_t rows = 0;
  int64_t vocab_size = 0;
  const Real* class_weight = nullptr;
  const Real* token_weight = nullptr;
  FloatStats<const Real*> stats;      // those that the loss reads
  MeanDenominator<Real> denominator;  // read by loss()

  // What the caller says of the denominator: a number of items, or a whole MeanDenominator. Null:
  // it is counted.
  const Real* num_items = nullptr;
  const Real* z_factor = nullptr;

  // What is read of a row before anything is decided, so that the reads of many rows overlap.
  struct Row {
    int64_t target = 0;
    Real token_weight = 1;
    FloatStats<Real> stats;
  };

  LLMLOSS_HD Row read(int64_t row) const {
    Row read;
    if (targets.are_indices()) read.target = targets[row];
    if (token_weight != nullptr) read.token_weight = token_weight[row];
    read.stats = values_of_row(stats, row);
    return read;
  }

  // w_y. It is 1 without class weights, for probability targets (mean_log_prob contains their
  // weights) and for a target out of range (whose statistics are nan anyway).
  LLMLOSS_HD Real target_weight(const Row& row) const {
    if (class_weight == nullptr || !targets.are_indices()) return Real(1);
    return row.target >= 0 && row.target < vocab_size ? class_weight[row.target] : Real(1);
  }

  // The weight of the row's token: 0 if it is ignored.
  LLMLOSS_HD Real weight(const Row& row) const {
    const bool is_ignored = targets.are_indices() && row.target == targets.ignore_index;
    return is_ignored ? Real(0) : row.token_weight;
  }

  // The row's term in the denominator of the mean.
  LLMLOSS_HD Real share(const Row& row) const {
    const Real w = weight(row);
    return w == Real(0) ? Real(0) : w * target_weight(row);
  }

  // Whether the z-loss's mean has another denominator than the cross entropy's.
  LLMLOSS_HD bool counts_weights() const {
    return options.z_loss != Real(0) && class_weight != nullptr && targets.are_indices();
  }

  // Writes the numbers of a MeanDenominator. shares and weights: the sums over the rows of share()
  // and, if counts_weights(), of weight(). A step of 0 items has a loss and gradients of 0: what is
  // divided by infinity is.
  LLMLOSS_HD void write_denominator(double shares, double weights, Real* numbers) const {
    using Mean = MeanDenominator<Real>;
    if (num_items != nullptr && z_factor != nullptr) {
      numbers[Mean::value_field] = *num_items;
      numbers[Mean::z_factor_field] = *z_factor;
    } else if (num_items != nullptr) {
      numbers[Mean::value_field] = *num_items == Real(0) ? infinity<Real>() : *num_items;
      numbers[Mean::z_factor_field] = Real(1);
    } else {
      numbers[Mean::value_field] = Real(shares);
      numbers[Mean::z_factor_field] = counts_weights() ? Real(shares / weights) : Real(1);
    }
  }

  // Before the division by the denominator. A weight of 0 counts for nothing, even times nan.
  LLMLOSS_HD Real loss(const Row& row) const {
    const Real w = weight(row);
    if (w == Real(0)) return Real(0);
    return w * row_loss(denominator.options(options), row.stats, target_weight(row));
  }
};

}  // namespace llmloss
