// Whole rows from what the ranks of a group say of their columns.
//
// A rank says its statistics of a row, which are a finalized PartialState: taken back to one, it
// merges with the others' as the states of threads and blocks do.
#pragma once

#include "params.h"
#include "row_stats.h"
#include "rows.h"

namespace llmloss {

// What a rank says, in this order: the statistics of its columns, whether the target is one of
// them (1 or 0), the class of its argmax (-1: none), and how many classes its columns are. Classes
// are exact in a float below 2^24.
struct ShardField {
  enum : int {
    log_prob,
    entropy,
    mean_log_prob,
    reference,
    sum_exp,
    sum_weights,
    has_target,
    argmax,
    columns
  };
  static constexpr int count = 9;
};

template <typename Real>
struct ShardRows {
  const Real* said = nullptr;  // (ranks, ShardField::count, rows)
  int64_t ranks = 0;
  int64_t rows = 0;
  Targets targets;  // classes of all ranks
  int64_t vocab_size = 0;

  LLMLOSS_HD double at(int64_t rank, int field, int64_t row) const {
    return said[(rank * ShardField::count + field) * rows + row];
  }

  // The state of a rank's columns, relative to its largest logit.
  LLMLOSS_HD PartialState<double> state(int64_t rank, int64_t row) const {
    PartialState<double> state;
    state.sum_exp = at(rank, ShardField::sum_exp, row);
    state.sum_weights = at(rank, ShardField::sum_weights, row);
    state.argmax = int64_t(at(rank, ShardField::argmax, row));
    if (state.sum_exp == 0) {  // no logit above -inf
      if (state.sum_weights != 0) state.sum_weighted = -infinity<double>();
      return state;
    }
    const double log_sum = log_of(state.sum_exp);
    state.max = at(rank, ShardField::reference, row);
    state.sum_x_exp = state.sum_exp * (log_sum - at(rank, ShardField::entropy, row));
    state.sum_weighted = at(rank, ShardField::mean_log_prob, row) + state.sum_weights * log_sum;
    return state;
  }

  // The target's logit, by a rank that has it.
  LLMLOSS_HD double target_logit(int64_t rank, int64_t row) const {
    const double sum_exp = at(rank, ShardField::sum_exp, row);
    if (sum_exp == 0) return -infinity<double>();
    return at(rank, ShardField::reference, row) + at(rank, ShardField::log_prob, row) +
           log_of(sum_exp);
  }
};

// Writes the statistics of a row, but for the target's rank, and how many ranks have its target
// (-1: the ranks' columns are not as many as the classes). If that is not one, they are nan.
template <typename Real>
LLMLOSS_HD void merge_shards(const ShardRows<Real>& in, const RowOutputs<Real>& out, Real* owners,
                             int64_t row) {
  PartialState<double> whole;
  double target_logit = 0;
  int count = 0;
  double columns = 0;
  for (int64_t rank = 0; rank < in.ranks; ++rank) {
    whole = merge(whole, in.state(rank, row));
    columns += in.at(rank, ShardField::columns, row);
    if (in.at(rank, ShardField::has_target, row) == 0) continue;
    target_logit = in.target_logit(rank, row);
    ++count;
  }
  if (columns != double(in.vocab_size)) count = -1;
  owners[row] = Real(count);
  if (in.targets.ignored(row)) {
    write_statistics(out, row, absent_statistics<double>(true, in.vocab_size));
    return;
  }
  if (count != 1) whole.sum_exp = std::numeric_limits<double>::quiet_NaN();
  write_statistics(out, row, finalize(whole, target_logit, in.vocab_size));
}

}  // namespace llmloss
