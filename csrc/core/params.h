// The parameters of the row kernels: plain structs of raw pointers and numbers, the same for every
// backend. Pointers refer to memory of the device that runs the kernel; a null output is not
// requested.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "logit_transform.h"
#include "loss.h"
#include "macros.h"
#include "row_grad.h"
#include "row_stats.h"

namespace llmloss {

// Where row r of a (rows, columns) or (outer, inner, columns) tensor starts. Strides in elements;
// columns are adjacent. A slice such as logits[:, :-1] is read in place through it.
struct RowLayout {
  int64_t inner = 1;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;

  LLMLOSS_HD int64_t offset(int64_t row) const {
    if (row < inner) return row * inner_stride;  // two dimensions: spares the division
    return (row / inner) * outer_stride + (row % inner) * inner_stride;
  }
};

// Class indices, int32 or int64, contiguous.
struct Targets {
  const void* data = nullptr;  // null: probability targets
  bool is_int64 = true;
  int64_t ignore_index = -100;
  bool of_shard = false;  // the columns are only some of the classes: see RowTarget::is_elsewhere

  LLMLOSS_HD bool are_indices() const { return data != nullptr; }
  LLMLOSS_HD int64_t operator[](int64_t row) const;
};

// A row's target. It is read here and converted later, so that nobody waits for it before it is
// used: kernels do other work in between.
class RowTarget {
 public:
  LLMLOSS_HD RowTarget(const Targets& targets, int64_t row) : targets_(targets) {
    if (!targets.are_indices()) return;
    if (targets.is_int64) {
      wide_ = static_cast<const int64_t*>(targets.data)[row];
    } else {
      narrow_ = static_cast<const int32_t*>(targets.data)[row];
    }
  }

  LLMLOSS_HD int64_t value() const { return targets_.is_int64 ? wide_ : int64_t{narrow_}; }
  LLMLOSS_HD bool is_ignored() const {
    return targets_.are_indices() && value() == targets_.ignore_index;
  }
  // Whether the target is a column of another shard, which -1 stands for: the row has statistics,
  // but no target column.
  LLMLOSS_HD bool is_elsewhere() const { return targets_.of_shard && value() == -1; }
  LLMLOSS_HD bool is_in_range(int64_t vocab_size) const {
    return !targets_.are_indices() || uint64_t(value()) < uint64_t(vocab_size);
  }
  // Whether the row has statistics and a gradient: its target is neither ignored nor out of range.
  LLMLOSS_HD bool is_active(int64_t vocab_size) const {
    return !is_ignored() && (is_in_range(vocab_size) || is_elsewhere());
  }
  // Whether the target of an active row is one of its columns.
  LLMLOSS_HD bool is_here() const { return targets_.are_indices() && !is_elsewhere(); }

 private:
  const Targets& targets_;
  int64_t wide_ = 0;
  int32_t narrow_ = 0;
};

LLMLOSS_HD int64_t Targets::operator[](int64_t row) const { return RowTarget(*this, row).value(); }

// The weights a_i of the weighted mean of log-probabilities:
//   class indices:         a_i = w_i beta                     (beta = 1 / vocab_size)
//   probability targets q: a_i = w_i (alpha q_i + beta)       (alpha = 1 - eps, beta = eps /
//   vocab_size)
template <typename T>
struct ColumnWeights {
  const real_t<T>* class_weight = nullptr;  // w, one per column; null: 1
  const T* probabilities = nullptr;         // q, laid out by rows
  RowLayout rows;
  real_t<T> alpha = 0;
  real_t<T> beta = 0;

  LLMLOSS_HD bool is_constant() const {
    return class_weight == nullptr && probabilities == nullptr;
  }
  LLMLOSS_HD real_t<T> of_class(int64_t column) const {
    return class_weight == nullptr ? real_t<T>(1) : class_weight[column];
  }
  LLMLOSS_HD real_t<T> at(int64_t row, int64_t column) const {
    const real_t<T> share = probabilities == nullptr
                                ? beta
                                : alpha * to_real(probabilities[rows.offset(row) + column]) + beta;
    return of_class(column) * share;
  }
};

// The inputs of every row kernel.
template <typename T>
struct RowInputs {
  const T* logits = nullptr;
  RowLayout layout;
  int64_t rows = 0;
  int64_t columns = 0;     // of the tensor
  int64_t vocab_size = 0;  // columns that are classes, 1..columns; the rest is padding
  LogitTransform<real_t<T>> transform;
  Targets targets;
  ColumnWeights<T> weights;
};

// The outputs of the statistics kernel: one number per row in each array.
// Ignored rows: 0, argmax -1 and rank vocab_size; their logits are not read.
// Rows with a target outside [0, vocab_size): nan, argmax -1 and rank vocab_size. (The operators
// reject such targets on the CPU; on a GPU that would take a synchronisation.)
// Rows with a target in another shard: log_prob and rank are meaningless.
template <typename Real>
struct RowOutputs {
  FloatStats<Real*> floats;
  IntegerStats<int64_t*> integers;
  StateFields<Real*> state;
};

// The upstream gradient for the backward kernel: either one array per statistic, or the gradient of
// a loss together with the options of the loss.
template <typename Real>
struct GradSource {
  // Of the statistics; null: no gradient.
  FloatStats<const Real*> grads;

  // Of the loss: grad_loss * token_weight / denominator for each row.
  bool from_loss = false;
  LossOptions<Real> options;
  const Real* grad_loss = nullptr;  // null: 1
  int64_t grad_loss_stride = 0;     // 0: one number for all rows
  const Real* token_weight = nullptr;
  MeanDenominator<Real> denominator;

  // Whether a statistic has a gradient.
  LLMLOSS_HD bool has(int stat) const {
    return from_loss ? options.reads(stat) : grads[stat] != nullptr;
  }
  // Whether the gradient of the logits needs the statistic's value.
  LLMLOSS_HD bool needs_value(int stat) const {
    const bool of_loss = from_loss && options.gradient_reads_values();
    return has(stat) && (of_loss || gradient_needs_value(stat));
  }

  // Whether it needs lse, which follows from the state.
  LLMLOSS_HD bool needs_lse() const { return from_loss && options.z_loss != Real(0); }

  // What is read of a row before anything is decided.
  struct Row {
    Real share = 0, denominator = 1;
    FloatStats<Real> grads;
  };
  LLMLOSS_HD Row read(int64_t row) const {
    if (from_loss) return {share(row), denominator.value(), {}};
    return {0, 1, values_of_row(grads, row)};
  }

  // Whether the row's gradient is 0 whatever its logits hold: nan there must not spoil it.
  LLMLOSS_HD bool vanishes(const Row& row) const {
    if (from_loss) return row.share == Real(0) || row.denominator == infinity<Real>();
    bool vanishes = true;
    LLMLOSS_UNROLL
    for (int stat = 0; stat < Stat::float_count; ++stat) vanishes &= row.grads[stat] == Real(0);
    return vanishes;
  }

  // dL/d(loss of the row), which does not depend on the row's statistics.
  LLMLOSS_HD static Real of_loss(const Row& row) { return row.share / row.denominator; }

  // dL/d(statistic). `values` holds the statistics for which needs_value or needs_lse is true.
  LLMLOSS_HD FloatStats<Real> upstream(const Row& row, const FloatStats<Real>& values,
                                       Real target_weight) const {
    if (!from_loss) return row.grads;
    return loss_upstream(denominator.options(options), of_loss(row), values, target_weight);
  }

 private:
  // of_loss before it is divided.
  LLMLOSS_HD Real share(int64_t row) const {
    const Real grad = grad_loss ? grad_loss[row * grad_loss_stride] : Real(1);
    return token_weight ? grad * token_weight[row] : grad;
  }
};

// The part of forward's outputs that the backward kernel reads.
template <typename Real>
struct SavedStats {
  FloatStats<const Real*> floats;  // null: not needed
  StateFields<const Real*> state;

  static SavedStats needed_by(const GradSource<Real>& source, const RowOutputs<Real>& written) {
    SavedStats saved;
    saved.state = written.state.template as<const Real*>();
    for (int stat = 0; stat < Stat::float_count; ++stat) {
      if (source.needs_value(stat)) saved.floats[stat] = written.floats[stat];
    }
    return saved;
  }

  LLMLOSS_HD RowStats<Real> of_row(int64_t row) const {
    RowStats<Real> stats;
    stats.floats = values_of_row(floats, row);
    LLMLOSS_UNROLL
    for (int field = 0; field < StateField::count; ++field) stats.state[field] = state[field][row];
    return stats;
  }
};

// The outputs of the gradient kernels. They write every column: zeros from vocab_size on, in rows
// without a valid target and in rows whose upstream gradient is 0. The gradient may overwrite the
// logits.
template <typename T>
struct GradOutputs {
  T* grad = nullptr;
  RowLayout layout;
  real_t<T>* grad_scale = nullptr;  // one per row: sum_i dL/dx_i dx_i/dscale; null: not requested
};

}  // namespace llmloss
