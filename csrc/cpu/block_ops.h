// Passes over one block of a row: a few thousand columns that lie in the L1 cache, so that a pass
// costs arithmetic and no memory traffic.
#pragma once

#include "../core/rows.h"
#include "vec_math.h"

namespace llmloss::cpu::LLMLOSS_ISA {

inline constexpr int block_columns = 2048;
inline constexpr int unroll = 4;  // independent accumulators hide the latency of the additions

// A vector of the first `count` elements of p, then `fill`.
template <typename Real, typename T>
inline Reg<Real> load_part(const T* p, int count, Real fill) {
  using V = Vec<Real>;
  T buffer[V::width];
  for (int i = 0; i < V::width; ++i) {
    if (i < count) {
      buffer[i] = p[i];
    } else {
      from_real(fill, buffer[i]);
    }
  }
  return V::load(buffer);
}

template <typename Real, typename T>
inline void store_part(T* p, int count, Reg<Real> v) {
  T buffer[Vec<Real>::width];
  Vec<Real>::store(buffer, v);
  for (int i = 0; i < count; ++i) p[i] = buffer[i];
}

// Calls step(lane, x) for every vector of x[0..n); `lane` names one of `unroll` accumulators. The
// last vector is filled up with `fill`, which must not change the result.
template <typename Real, typename T, typename Step>
inline void for_each_vector(const T* x, int n, Real fill, Step&& step) {
  using V = Vec<Real>;
  int i = 0;
  for (; i + unroll * V::width <= n; i += unroll * V::width) {
    for (int lane = 0; lane < unroll; ++lane) step(lane, V::load(x + i + lane * V::width));
  }
  for (; i + V::width <= n; i += V::width) step(0, V::load(x + i));
  if (i < n) step(0, load_part<Real>(x + i, n - i, fill));
}

// One accumulator vector per lane, summed in double.
template <typename Real>
struct Accumulators {
  Reg<Real> lanes[unroll];

  explicit Accumulators(Real initial) {
    for (auto& lane : lanes) lane = Vec<Real>::broadcast(initial);
  }
  double sum() const {
    const Reg<Real> total = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    Real parts[Vec<Real>::width];
    Vec<Real>::store(parts, total);
    double sum = 0;
    for (Real part : parts) sum += part;
    return sum;
  }
};

// The largest element, nan left out; -inf of an empty block.
template <typename Real, typename T>
inline Real block_max(const T* x, int n) {
  using V = Vec<Real>;
  Accumulators<Real> acc(-infinity<Real>());
  for_each_vector<Real>(x, n, -infinity<Real>(), [&](int lane, Reg<Real> v) {
    acc.lanes[lane] = V::max(v, acc.lanes[lane]);
  });
  Real parts[V::width];
  V::store(parts, V::max(V::max(acc.lanes[0], acc.lanes[1]), V::max(acc.lanes[2], acc.lanes[3])));
  Real max = parts[0];
  for (Real part : parts) max = part > max ? part : max;
  return max;
}

// out = transform(z), all in the arithmetic type.
template <typename Real, typename T>
inline void block_transform(const T* z, int n, const LogitTransform<Real>& transform, Real* out) {
  using V = Vec<Real>;
  const bool identity = transform.kind() == TransformKind::identity;
  const auto apply = [&](Reg<Real> v) { return identity ? v : transform_logits(transform, v); };
  int i = 0;
  for (; i + V::width <= n; i += V::width) V::store(out + i, apply(V::load(z + i)));
  if (i < n) store_part<Real>(out + i, n - i, apply(load_part<Real>(z + i, n - i, Real(0))));
}

// Fetches `bytes` from there into the L1 cache, while arithmetic goes on. May point anywhere.
inline void prefetch(const void* from, int bytes) {
  constexpr int line = 64;
  const char* p = static_cast<const char*>(from);
  for (int i = 0; i < bytes; i += line) __builtin_prefetch(p + i);
}

// Calls body with a type whose `value` is the flag, known to the compiler.
template <bool flag>
struct Flag {
  static constexpr bool value = flag;
};
template <typename Body>
inline void with_flag(bool flag, const Body& body) {
  flag ? body(Flag<true>()) : body(Flag<false>());
}

// Into `part`: sum e^(x - reference) and, if asked, sum (x - reference) e^(x - reference) and the
// sum of the squares of e^(x - reference). Unless exps is null, every e^(x - reference) is kept
// there; exps may be x. `next` is what will be read after this block: this pass computes and reads
// the L1 cache alone, so that memory would idle.
//
// target: the target's column in the block, or -1; the sums leave it out (see PartialState), and
// what is kept for it is 0.
template <bool with_entropy, bool with_squares, bool keep, typename Real, typename T, typename Next>
inline void block_exp_sums(const T* x, int n, Real reference, int target, Real* exps,
                           const Next* next, PartialState<double>& part) {
  using V = Vec<Real>;
  const Reg<Real> ref = V::broadcast(reference);
  Accumulators<Real> sum_exp(0), sum_x_exp(0), sum_sq_exp(0);
  const auto step = [&](int lane, Reg<Real> v) {
    const Reg<Real> d = v - ref;
    const Reg<Real> e = exp_nonpositive<Real>(d);
    sum_exp.lanes[lane] = sum_exp.lanes[lane] + e;
    if constexpr (with_entropy) {
      // -inf * 0 must be 0: e is 0 long before the clamp.
      const Reg<Real> clamped = V::max(V::broadcast(lowest_log_prob<Real>()), d);
      sum_x_exp.lanes[lane] = V::fma(clamped, e, sum_x_exp.lanes[lane]);
    }
    if constexpr (with_squares) {
      sum_sq_exp.lanes[lane] = V::fma(e, e, sum_sq_exp.lanes[lane]);
    }
    return e;
  };
  const auto walk = [&](int i, int end) {
    for (; i + unroll * V::width <= end; i += unroll * V::width) {
      prefetch(next + i, unroll * V::width * int(sizeof(Next)));
      for (int lane = 0; lane < unroll; ++lane) {
        const int at = i + lane * V::width;
        const Reg<Real> e = step(lane, V::load(x + at));
        if constexpr (keep) V::store(exps + at, e);
      }
    }
    for (; i < end; i += V::width) {
      const int part = end - i < V::width ? end - i : V::width;
      const Reg<Real> e = step(
          0, part == V::width ? V::load(x + i) : load_part<Real>(x + i, part, -infinity<Real>()));
      if constexpr (keep) store_part<Real>(exps + i, part, e);
    }
  };
  // Up to the vector that holds the target, that vector without it, and the rest: with one place
  // that walks, whose accumulators stay in registers.
  const int target_vector = target < 0 ? n : target / V::width * V::width;
  for (int begin = 0, end = target_vector;; end = n) {
    walk(begin, end);
    if (end == n) break;
    const int count = n - end < V::width ? n - end : V::width;
    Real lanes[V::width];
    V::store(lanes, load_part<Real>(x + end, count, -infinity<Real>()));
    lanes[target - end] = -infinity<Real>();
    const Reg<Real> e = step(0, V::load(lanes));
    if constexpr (keep) store_part<Real>(exps + end, count, e);
    begin = end + count;
  }
  part.sum_exp = sum_exp.sum();
  if constexpr (with_entropy) part.sum_x_exp = sum_x_exp.sum();
  if constexpr (with_squares) part.sum_sq_exp = sum_sq_exp.sum();
}

// Exponentials are kept only where no other sum is asked for.
template <typename Real, typename T, typename Next>
inline void block_exp_sums(const T* x, int n, Real reference, int target, const Wanted& wanted,
                           Real* exps, const Next* next, PartialState<double>& part) {
  if (exps != nullptr) {
    return block_exp_sums<false, false, true>(x, n, reference, target, exps, next, part);
  }
  with_flag(wanted.floats[Stat::entropy], [&](auto entropy) {
    with_flag(wanted.floats[Stat::log_sum_sq_probs], [&](auto squares) {
      block_exp_sums<decltype(entropy)::value, decltype(squares)::value, false>(
          x, n, reference, target, exps, next, part);
    });
  });
}

// sum (x - reference)
template <typename Real, typename T>
inline double block_sum(const T* x, int n, Real reference) {
  const Reg<Real> ref = Vec<Real>::broadcast(reference);
  Accumulators<Real> acc(0);
  for_each_vector<Real>(x, n, reference, [&](int lane, Reg<Real> v) {
    acc.lanes[lane] = acc.lanes[lane] + (v - ref);
  });
  return acc.sum();
}

struct WeightedSums {
  double sum;
  double weights;
};

// sum a (x - reference) and sum a; a weight of 0 takes a -inf logit out.
template <typename Real, typename T>
inline WeightedSums block_weighted_sum(const T* x, const Real* a, int n, Real reference) {
  using V = Vec<Real>;
  const Reg<Real> ref = V::broadcast(reference);
  Accumulators<Real> sum(0), weights(0);
  int i = 0;
  for (; i < n; i += V::width) {
    const int part = n - i < V::width ? n - i : V::width;
    const bool full = part == V::width;
    const Reg<Real> weight = full ? V::load(a + i) : load_part<Real>(a + i, part, Real(0));
    const Reg<Real> v = full ? V::load(x + i) : load_part<Real>(x + i, part, Real(0));
    const int lane = (i / V::width) % unroll;
    const Reg<Real> term = V::zero_where_zero(weight, weight * (v - ref));
    sum.lanes[lane] = sum.lanes[lane] + term;
    weights.lanes[lane] = weights.lanes[lane] + weight;
  }
  return {sum.sum(), weights.sum()};
}

// Elements of a larger logit than the target's, or of the same among the first `before`: those that
// stand before the target's column.
template <typename Real, typename T>
inline int64_t block_rank(const T* x, int n, Real target_logit, int before) {
  using V = Vec<Real>;
  const Reg<Real> bound = V::broadcast(target_logit);
  int counts[unroll] = {};
  for_each_vector<Real>(x, before, infinity<Real>(),
                        [&](int lane, Reg<Real> v) { counts[lane] -= V::count_greater(bound, v); });
  for_each_vector<Real>(x + before, n - before, -infinity<Real>(),
                        [&](int lane, Reg<Real> v) { counts[lane] += V::count_greater(v, bound); });
  return int64_t{before} + counts[0] + counts[1] + counts[2] + counts[3];
}

// The first element equal to a value that the block holds.
template <typename Real, typename T>
inline int block_find(const T* x, int n, Real value) {
  using V = Vec<Real>;
  const Reg<Real> wanted = V::broadcast(value);
  int i = 0;
  while (i + V::width <= n && !V::any_equal(V::load(x + i), wanted)) i += V::width;
  while (i < n && to_real(x[i]) != value) ++i;
  return i;
}

// out = dL/dx by column_gradient of every column; out may be x. a is null unless the columns'
// weights differ.
template <bool with_entropy, bool with_squares, bool with_weights, typename Real, typename In,
          typename Out>
inline void block_gradient_of(const In* x, const Real* a, int n, const GradRow<Real>& row,
                              Out* out) {
  using V = Vec<Real>;
  const Reg<Real> ref = V::broadcast(row.reference);
  const Reg<Real> log_sum = V::broadcast(with_entropy ? row.log_sum() : Real(0));
  const Reg<Real> c_p = V::broadcast((row.c.p - row.c.sq) * row.inverse_sum);
  const Reg<Real> c_plogp = V::broadcast(row.c.plogp * row.inverse_sum);
  const Reg<Real> c_sq = V::broadcast(row.c.sq_over_sum * row.inverse_sum * row.inverse_sum);
  const Reg<Real> c_weight = V::broadcast(row.c.weight), constant = V::broadcast(row.constant);
  const Reg<Real> lowest = V::broadcast(lowest_log_prob<Real>());
  const auto gradient = [&](Reg<Real> v, const Real* weights, int part) {
    const Reg<Real> d = v - ref, e = exp_nonpositive<Real>(d);
    Reg<Real> factor = c_p;
    if constexpr (with_entropy) factor = V::fma(c_plogp, V::max(lowest, d - log_sum), c_p);
    if constexpr (with_squares) factor = V::fma(c_sq, e, factor);
    Reg<Real> rest = constant;
    if constexpr (with_weights) {
      rest = c_weight *
             (part == V::width ? V::load(weights) : load_part<Real>(weights, part, Real(0)));
    }
    return V::fma(e, factor, rest);
  };
  int i = 0;
  for (; i + 2 * V::width <= n; i += 2 * V::width) {
    const Reg<Real> first = gradient(V::load(x + i), a + i, V::width);
    const Reg<Real> second = gradient(V::load(x + i + V::width), a + i + V::width, V::width);
    V::store(out + i, first);
    V::store(out + i + V::width, second);
  }
  for (; i < n; i += V::width) {
    const int part = n - i < V::width ? n - i : V::width;
    const Reg<Real> v = part == V::width ? V::load(x + i) : load_part<Real>(x + i, part, Real(0));
    const Reg<Real> g = gradient(v, a + i, part);
    if (part == V::width) {
      V::store(out + i, g);
    } else {
      store_part<Real>(out + i, part, g);
    }
  }
}

template <typename Real, typename In, typename Out>
inline void block_gradient(const In* x, const Real* a, int n, const GradRow<Real>& row, Out* out) {
  with_flag(row.c.plogp != Real(0), [&](auto entropy) {
    with_flag(row.c.sq != Real(0), [&](auto squares) {
      with_flag(a != nullptr, [&](auto weights) {
        block_gradient_of<decltype(entropy)::value, decltype(squares)::value,
                          decltype(weights)::value>(x, a, n, row, out);
      });
    });
  });
}

// The same from kept e^(x - reference of the block): p = factor * e, times c.p.
template <bool with_weights, typename Real, typename Out>
inline void block_gradient_from_exps_of(const Real* exps, const Real* a, int n,
                                        const GradRow<Real>& row, Real factor, Out* out) {
  using V = Vec<Real>;
  const Reg<Real> c_p = V::broadcast(row.c.p * factor), constant = V::broadcast(row.constant);
  const Reg<Real> c_weight = V::broadcast(row.c.weight);
  const auto rest = [&](const Real* weights, int part) {
    if constexpr (!with_weights) return constant;
    return c_weight *
           (part == V::width ? V::load(weights) : load_part<Real>(weights, part, Real(0)));
  };
  int i = 0;
  for (; i + V::width <= n; i += V::width) {
    V::store(out + i, V::fma(V::load(exps + i), c_p, rest(a + i, V::width)));
  }
  if (i < n) {
    const Reg<Real> e = load_part<Real>(exps + i, n - i, Real(0));
    store_part<Real>(out + i, n - i, V::fma(e, c_p, rest(a + i, n - i)));
  }
}

template <typename Real, typename Out>
inline void block_gradient_from_exps(const Real* exps, const Real* a, int n,
                                     const GradRow<Real>& row, Real factor, Out* out) {
  a != nullptr ? block_gradient_from_exps_of<true>(exps, a, n, row, factor, out)
               : block_gradient_from_exps_of<false>(exps, a, n, row, factor, out);
}

}  // namespace llmloss::cpu::LLMLOSS_ISA
