// What a kernel computes of each row, fixed when it is compiled, so that its loops hold nothing
// else.
//
// A kernel's `tasks` are a sum of the bits below. Not every sum is compiled: TaskList chooses the
// first kernel of a list, the cheapest first, that does all that is needed (launch.cuh has the
// lists). The arithmetic of a statistic does not depend on what else is computed: every product
// that is fused with a sum is written as fma_of, and the compiler may fuse no other (-fmad=false).
// So kernels of different tasks agree bit by bit, but for a gradient with the task `entropy`, which
// has a formula of its own.
#pragma once

#include "../../core/params.h"

namespace llmloss::cuda {

namespace task {

enum : unsigned {
  plain = 0,        // x = z; sum_exp alone, or the gradient c p + constant
  transformed = 1,  // x is z times a scale, or capped
  mean = 2,         // statistics: the sum of x, where all columns have one weight
  entropy = 4,      // statistics: sum x e^x. Gradient: the terms p log p and p^2
  order = 8,        // statistics: argmax and rank
  rest = 16,        // statistics: sum e^2x; both: a weight for each column; gradient: of the scale
  everything = 31,
};

constexpr bool has(unsigned tasks, unsigned bits) { return (tasks & bits) != 0; }

// What the statistics of these outputs need.
template <typename T>
unsigned of_statistics(const RowInputs<T>& in, const RowOutputs<real_t<T>>& out) {
  const Wanted wanted = Wanted::by(out);
  unsigned needed = in.transform.kind() == TransformKind::identity ? plain : transformed;
  if (wanted.floats[Stat::mean_log_prob]) needed |= in.weights.is_constant() ? mean : rest;
  if (wanted.floats[Stat::entropy]) needed |= entropy;
  if (wanted.floats[Stat::log_sum_sq_probs]) needed |= rest;
  if (wanted.order()) needed |= order;
  return needed;
}

// What a gradient needs.
template <typename T>
unsigned of_gradient(const RowInputs<T>& in, const GradSource<real_t<T>>& source, bool with_scale) {
  unsigned needed = in.transform.kind() == TransformKind::identity ? plain : transformed;
  for (int stat = 0; stat < Stat::float_count; ++stat) {
    if (Stat::needs_more_sums(stat) && source.has(stat)) needed |= entropy;
  }
  if (!in.weights.is_constant() && source.has(Stat::mean_log_prob)) needed |= rest;
  if (with_scale) needed |= rest;
  return needed;
}

// The statistics that such kernels compute: they may be more than are asked for.
template <unsigned tasks>
LLMLOSS_HD Wanted wanted() {
  Wanted wanted;
  wanted.floats[Stat::log_prob] = wanted.floats[Stat::lse] = true;
  wanted.floats[Stat::entropy] = has(tasks, entropy | rest);
  wanted.floats[Stat::mean_log_prob] = has(tasks, mean | rest);
  wanted.floats[Stat::log_sum_sq_probs] = has(tasks, rest);
  wanted.integers[Stat::argmax] = wanted.integers[Stat::rank] = has(tasks, order | rest);
  return wanted;
}

}  // namespace task

template <unsigned... listed>
struct TaskList {
  // Kernels::of<tasks>() for the first of the list that does all that is needed. The last one does
  // everything.
  template <typename Kernels>
  static auto first_with(unsigned needed) {
    auto kernel = Kernels::template of<task::everything>();
    bool is_found = false;
    const auto consider = [&](unsigned tasks, auto candidate) {
      if (is_found || task::has(needed, ~tasks)) return;
      kernel = candidate;
      is_found = true;
    };
    (consider(listed, Kernels::template of<listed>()), ...);
    return kernel;
  }
};

}  // namespace llmloss::cuda
