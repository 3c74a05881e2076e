// The statistics of a row, and the state that forward saves for backward. This is the only list of
// them: a struct that holds one member per statistic is an array indexed by these enumerations.
#pragma once

#include <cstdint>

#include "macros.h"

// The float statistics, which have gradients; the integer ones, which have none; the state's
// fields.
#define LLMLOSS_FLOAT_STATISTICS(X) \
  X(log_prob) X(lse) X(entropy) X(mean_log_prob) X(log_sum_sq_probs)
#define LLMLOSS_INTEGER_STATISTICS(X) X(argmax) X(rank)
#define LLMLOSS_STATE_FIELDS(X) X(reference) X(excess) X(sum_weights)

#define LLMLOSS_ENUMERATOR(name) name,
#define LLMLOSS_STRING(name) #name,
#define LLMLOSS_PLUS_ONE(name) +1

namespace llmloss {

// log_prob          log p_target
// lse               log sum e^x
// entropy           - sum p log p, nats
// mean_log_prob     sum a log p, with the weights a of ColumnWeights
// log_sum_sq_probs  log sum p^2
// argmax            the column of the largest logit, the first if several are equal; -1 if a nan or
//                   +inf spoils the row
// rank              the target's position when columns are sorted by descending logit, equal logits
//                   by column: 0 exactly if the target is argmax; vocab_size if the row is spoilt,
//                   so that no top-k contains it
struct Stat {
  enum : int {
    LLMLOSS_FLOAT_STATISTICS(LLMLOSS_ENUMERATOR) LLMLOSS_INTEGER_STATISTICS(LLMLOSS_ENUMERATOR)
  };
  static constexpr int float_count = LLMLOSS_FLOAT_STATISTICS(LLMLOSS_PLUS_ONE);
  static constexpr int count = float_count LLMLOSS_INTEGER_STATISTICS(LLMLOSS_PLUS_ONE);
  static constexpr const char* names[] = {LLMLOSS_FLOAT_STATISTICS(LLMLOSS_STRING)
                                              LLMLOSS_INTEGER_STATISTICS(LLMLOSS_STRING)};

  // Whether a float statistic needs a sum over the exponentials other than sum_exp. If so, its
  // gradient is not a linear combination of p and the column weights.
  static LLMLOSS_HD constexpr bool needs_more_sums(int stat) {
    return stat != log_prob && stat != lse && stat != mean_log_prob;
  }
};

// p_i = e^(x_i - reference) / (1 + excess), which keeps its precision when lse is large. The
// reference is the largest logit, whose own term is the 1: where that is the target and p -> 1, a
// number that held the 1 too would round the others' sum away. sum_weights is sum a.
struct StateField {
  enum : int { LLMLOSS_STATE_FIELDS(LLMLOSS_ENUMERATOR) };
  static constexpr int count = LLMLOSS_STATE_FIELDS(LLMLOSS_PLUS_ONE);
  static constexpr const char* names[] = {LLMLOSS_STATE_FIELDS(LLMLOSS_STRING)};
};

// One T for each enumerator in [first, end).
template <typename T, int first, int end>
struct Indexed {
  static constexpr int size = end - first;
  T at[size] = {};

  LLMLOSS_HD T& operator[](int i) { return at[i - first]; }
  LLMLOSS_HD const T& operator[](int i) const { return at[i - first]; }

  template <typename To>
  LLMLOSS_HD Indexed<To, first, end> as() const {
    Indexed<To, first, end> result;
    LLMLOSS_UNROLL
    for (int i = 0; i < size; ++i) result.at[i] = To(at[i]);
    return result;
  }
};

template <typename T>
using FloatStats = Indexed<T, 0, Stat::float_count>;
template <typename T>
using IntegerStats = Indexed<T, Stat::float_count, Stat::count>;
template <typename T>
using StateFields = Indexed<T, 0, StateField::count>;

// Reads one row of each array; 0 for a null array.
template <typename Real>
LLMLOSS_HD FloatStats<Real> values_of_row(const FloatStats<const Real*>& arrays, int64_t row) {
  FloatStats<Real> values;
  LLMLOSS_UNROLL
  for (int stat = 0; stat < Stat::float_count; ++stat) {
    if (arrays[stat] != nullptr) values[stat] = arrays[stat][row];
  }
  return values;
}

// Which statistics a call requests.
struct Wanted {
  FloatStats<bool> floats;
  IntegerStats<bool> integers;

  // A statistic is requested if its output is not null.
  template <typename Outputs>
  static LLMLOSS_HD Wanted by(const Outputs& out) {
    return {out.floats.template as<bool>(), out.integers.template as<bool>()};
  }

  static LLMLOSS_HD Wanted everything() {
    Wanted all;
    LLMLOSS_UNROLL
    for (int stat = 0; stat < Stat::float_count; ++stat) all.floats[stat] = true;
    all.integers[Stat::argmax] = all.integers[Stat::rank] = true;
    return all;
  }

  // Whether argmax or rank, which compare columns, is requested.
  LLMLOSS_HD bool order() const { return integers[Stat::argmax] || integers[Stat::rank]; }

  // Whether a requested statistic needs a sum over the exponentials other than sum_exp.
  LLMLOSS_HD bool more_sums() const {
    bool more = false;
    LLMLOSS_UNROLL
    for (int stat = 0; stat < Stat::float_count; ++stat) {
      more = more || (floats[stat] && Stat::needs_more_sums(stat));
    }
    return more;
  }
};

}  // namespace llmloss

#undef LLMLOSS_ENUMERATOR
#undef LLMLOSS_STRING
#undef LLMLOSS_PLUS_ONE
#undef LLMLOSS_FLOAT_STATISTICS
#undef LLMLOSS_INTEGER_STATISTICS
#undef LLMLOSS_STATE_FIELDS
