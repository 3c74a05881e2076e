// The statistics of whole rows, merged from the statistics of each rank's columns.
//
// A rank sends the results of finalize for its columns. state_of turns them back into a
// PartialState, and the states of the ranks merge like those of threads and blocks.
#pragma once

#include "params.h"
#include "row_stats.h"
#include "rows.h"

namespace llmloss {

// The fields that a rank sends for a row: the float statistics and the state of its columns,
// whether the target is one of them (1 or 0; if so, log_prob tells what the others add up to), the
// class of their argmax (-1: none), and their number. A float represents classes exactly below
// 2^24.
struct ShardField {
  enum : int { state = Stat::float_count, has_target = state + StateField::count, argmax, columns };
  static constexpr int count = columns + 1;
  static constexpr const char* names[] = {"has_target", "argmax", "columns"};  // after the state
};

template <typename Real>
struct ShardRows {
  const Real* shard_stats = nullptr;  // (ranks, ShardField::count, rows)
  int64_t ranks = 0;
  int64_t rows = 0;
  Targets targets;  // indices into the whole vocabulary
  int64_t vocab_size = 0;

  LLMLOSS_HD double at(int64_t rank, int field, int64_t row) const {
    return shard_stats[(rank * ShardField::count + field) * rows + row];
  }

  // The statistics of a rank's columns, except Stat::rank, which is not sent.
  LLMLOSS_HD RowStats<double> of_rank(int64_t rank, int64_t row) const {
    RowStats<double> stats;
    LLMLOSS_UNROLL
    for (int stat = 0; stat < Stat::float_count; ++stat) stats.floats[stat] = at(rank, stat, row);
    LLMLOSS_UNROLL
    for (int field = 0; field < StateField::count; ++field) {
      stats.state[field] = at(rank, ShardField::state + field, row);
    }
    stats.integers[Stat::argmax] = int64_t(at(rank, ShardField::argmax, row));
    return stats;
  }
};

// Writes the statistics of a row, except Stat::rank, and the number of ranks that own its target
// (-1 if the ranks' columns do not add up to the vocabulary). If that number is not 1, the
// statistics are nan.
template <typename Real>
LLMLOSS_HD void merge_shards(const ShardRows<Real>& in, const RowOutputs<Real>& out, Real* owners,
                             int64_t row) {
  PartialState<double> whole;
  double at_target = 0, reference = 0;  // the first relative to the second
  int count = 0;
  double columns = 0;
  for (int64_t rank = 0; rank < in.ranks; ++rank) {
    const double own = in.at(rank, ShardField::columns, row);
    if (own == 0) continue;  // nothing but zeros was sent
    columns += own;
    const RowStats<double> stats = in.of_rank(rank, row);
    const bool has_target = in.at(rank, ShardField::has_target, row) != 0;
    whole = merge(whole, state_of(stats, has_target));
    if (!has_target) continue;
    at_target = at_target_of(stats);
    reference = stats.state[StateField::reference];
    ++count;
  }
  if (columns != double(in.vocab_size)) count = -1;
  owners[row] = Real(count);
  if (RowTarget(in.targets, row).is_ignored()) {
    write_statistics(out, row, absent_statistics<double>(true, in.vocab_size));
    return;
  }
  if (count != 1) whole.sum_exp = std::numeric_limits<double>::quiet_NaN();
  at_target += whole.relative(reference);
  write_statistics(out, row, finalize(whole, at_target, in.vocab_size));
}

}  // namespace llmloss
