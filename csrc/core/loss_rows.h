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
  FloatStats<const Real*> stats;  // those that the loss reads

  // w_y. It is 1 without class weights, for probability targets (mean_log_prob contains their
  // weights) and for a target out of range (whose statistics are nan anyway).
  LLMLOSS_HD Real target_weight(int64_t row) const {
    if (class_weight == nullptr || !targets.are_indices()) return Real(1);
    return targets.in_range(row, vocab_size) ? class_weight[targets[row]] : Real(1);
  }

  // The row's term in the denominator of the mean: token weight times class weight.
  LLMLOSS_HD Real denominator(int64_t row) const {
    if (targets.ignored(row)) return Real(0);
    return target_weight(row) * (token_weight ? token_weight[row] : Real(1));
  }

  LLMLOSS_HD Real loss(int64_t row) const {
    if (targets.ignored(row)) return Real(0);
    const Real loss = row_loss(options, values_of_row(stats, row), target_weight(row));
    return token_weight ? token_weight[row] * loss : loss;
  }
};

}  // namespace llmloss
