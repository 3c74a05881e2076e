// The mathematics of csrc/core: the monoid, the gradient's coefficients, the storage types.
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "core/loss_rows.h"
#include "core/params.h"
#include "core/rows.h"
#include "core/shards.h"

using namespace llmloss;

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

// The state of one column, as a kernel would make it. target: -1: none of the columns.
PartialState<double> column(double x, int64_t index, double a, double target_logit = -inf,
                            int64_t target = -1) {
  PartialState<double> state;
  state.max = x;
  state.argmax = index;
  if (index != target) state.sum_exp = std::exp(x - state.reference());
  state.sum_sq_exp = state.sum_exp * state.sum_exp;
  state.sum_weights = a;
  state.sum_weighted = a == 0 ? 0 : a * (x - state.reference());
  state.rank = x > target_logit || (x == target_logit && index < target);
  return state;
}

std::vector<PartialState<double>> columns(const std::vector<double>& x, size_t target) {
  std::vector<PartialState<double>> states;
  for (size_t i = 0; i < x.size(); ++i) {
    states.push_back(column(x[i], int64_t(i), 1.0 / double(x.size()), x[target], int64_t(target)));
  }
  return states;
}

PartialState<double> merge_all(const std::vector<PartialState<double>>& states) {
  PartialState<double> total;
  for (const auto& state : states) total = merge(total, state);
  return total;
}

template <typename Real>
RowStats<Real> finalized(const PartialState<Real>& state, Real target_logit, int64_t vocab_size) {
  return finalize(state, state.relative(target_logit), vocab_size);
}

void check_same(const PartialState<double>& a, const PartialState<double>& b) {
  CHECK_CLOSE(a.max, b.max, 0);
  CHECK_CLOSE(a.sum_exp, b.sum_exp, 1e-13);
  CHECK_CLOSE(a.sum_x_exp, b.sum_x_exp, 1e-13);
  CHECK_CLOSE(a.sum_sq_exp, b.sum_sq_exp, 1e-13);
  CHECK_CLOSE(a.sum_weighted, b.sum_weighted, 1e-13);
  CHECK_CLOSE(a.sum_weights, b.sum_weights, 1e-13);
  CHECK(a.argmax == b.argmax);
  CHECK(a.rank == b.rank);
}

// x with a common offset, -inf among them: against sums in long double.
void test_statistics_of_a_row() {
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  for (const double offset : {0.0, 1e4, -1e4}) {
    std::vector<double> x(101);
    for (double& v : x) v = normal(random) * 3 + offset;
    x[7] = -inf;
    long double sum = 0, expected_entropy = 0, squares = 0;
    for (const double v : x) sum += std::exp((long double)(v - offset));
    for (const double v : x) {
      if (v == -inf) continue;
      const long double log_p = (long double)(v - offset) - std::log(sum);
      expected_entropy -= std::exp(log_p) * log_p;
      squares += std::exp(2 * log_p);
    }
    auto states = columns(x, 3);
    for (auto& state : states) {  // this sum has no -inf term in it
      if (state.max == -inf) state.sum_weighted = state.sum_weights = 0;
    }
    const auto stats = finalized(merge_all(states), x[3], int64_t(x.size()));
    CHECK_CLOSE(stats.floats[Stat::log_prob], double((long double)(x[3] - offset) - std::log(sum)),
                1e-13);
    CHECK_CLOSE(stats.floats[Stat::lse], offset + double(std::log(sum)), 1e-13);
    CHECK_CLOSE(stats.floats[Stat::entropy], double(expected_entropy), 1e-12);
    CHECK_CLOSE(stats.floats[Stat::log_sum_sq_probs], double(std::log(squares)), 1e-13);
    int64_t rank = 0, best = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      rank += x[i] > x[3];
      if (x[i] > x[size_t(best)]) best = int64_t(i);
    }
    CHECK(stats.integers[Stat::rank] == rank);
    CHECK(stats.integers[Stat::argmax] == best);
  }
}

void test_identity_associativity_commutativity() {
  std::mt19937 random(2);
  std::normal_distribution<double> normal(0, 30);
  for (int round = 0; round < 200; ++round) {
    std::vector<double> x{normal(random), normal(random), normal(random)};
    if (round % 5 == 0) x[round % 3] = -inf;
    auto s = columns(x, 1);
    if (round % 5 == 0) s[round % 3].sum_weighted = s[round % 3].sum_weights = 0;
    check_same(merge(s[0], PartialState<double>()), s[0]);
    check_same(merge(PartialState<double>(), s[0]), s[0]);
    check_same(merge(s[0], s[1]), merge(s[1], s[0]));
    check_same(merge(merge(s[0], s[1]), s[2]), merge(s[0], merge(s[1], s[2])));
  }
}

void test_first_of_equal_maxima_wins_from_either_side() {
  const auto first = column(2.0, 3, 0, 0), second = column(2.0, 9, 0, 0);
  CHECK(merge(first, second).argmax == 3);
  CHECK(merge(second, first).argmax == 3);
  const auto very_first = column(2.0, 0, 0, 0);
  CHECK(merge(very_first, second).argmax == 0);
  CHECK(merge(second, very_first).argmax == 0);
  // Of columns that are all -inf, too; the identity has none.
  const auto lowest = column(-inf, 4, 0, 0);
  CHECK(merge(lowest, PartialState<double>()).argmax == 4);
  CHECK(merge(PartialState<double>(), lowest).argmax == 4);
}

// One class has all of the probability: rounding may leave a little less than no entropy.
void test_rounding_is_cut_off() {
  PartialState<double> state;
  state.max = 0;
  state.sum_x_exp = 1e-17;
  state.sum_sq_exp = 1e-15;
  const auto stats = finalized(state, 0.0, 2).floats;
  CHECK(stats[Stat::entropy] == 0 && stats[Stat::log_sum_sq_probs] == 0);
}

// Logits as far apart as float allows: the factor underflows, and the shift times a sum overflows.
void test_parts_far_apart() {
  PartialState<float> low, high;
  low.max = -1.5e38f;
  low.sum_exp = low.sum_sq_exp = 4;  // four equal logits
  low.sum_x_exp = -1;
  high.max = 1.5e38f;
  high.sum_exp = high.sum_sq_exp = 1;
  for (const auto& whole : {merge(low, high), merge(high, low)}) {
    CHECK(whole.sum_exp == 1 && whole.sum_x_exp == 0 && whole.sum_sq_exp == 1);
    CHECK(finalized(whole, -std::numeric_limits<float>::infinity(), 5).floats[Stat::entropy] == 0);
  }
}

// What a call wants, and that a sum which nobody wants is 0 after it is joined.
void test_wanted_statistics() {
  double number = 0;
  RowOutputs<double> out;
  const auto nothing = Wanted::by(out);
  CHECK(!nothing.order() && !nothing.more_sums());
  for (const int stat : {int(Stat::argmax), int(Stat::rank)}) {
    Wanted wanted;
    wanted.integers[stat] = true;
    CHECK(wanted.order() && !wanted.more_sums());
  }
  for (int stat = 0; stat < Stat::float_count; ++stat) {
    RowOutputs<double> one;
    one.floats[stat] = &number;
    const auto wanted = Wanted::by(one);
    const bool more = stat == Stat::entropy || stat == Stat::log_sum_sq_probs;
    CHECK(wanted.more_sums() == more && !wanted.order());
    PartialState<double> state;
    state.sum_exp = state.sum_x_exp = state.sum_sq_exp = 2;
    state.sum_weighted = state.sum_weights = 2;
    state.join_sums(wanted, [](double sum) { return sum + 1; });
    CHECK(state.sum_exp == 3);
    CHECK(state.sum_x_exp == (stat == Stat::entropy ? 3 : 0));
    CHECK(state.sum_sq_exp == (stat == Stat::log_sum_sq_probs ? 3 : 0));
    CHECK(state.sum_weighted == (stat == Stat::mean_log_prob ? 3 : 0));
    CHECK(state.sum_weights == (stat == Stat::mean_log_prob ? 3 : 0));
  }
}

void test_rows_without_statistics() {
  // All -inf: the sum is 0, and every statistic but lse is nan, as in torch.
  const auto all = finalized(merge_all(columns({-inf, -inf}, 0)), -inf, 2).floats;
  CHECK(std::isnan(all[Stat::log_prob]) && std::isnan(all[Stat::entropy]));
  CHECK(std::isnan(all[Stat::log_sum_sq_probs]));
  CHECK(all[Stat::lse] == -inf);
  // nan and +inf spoil their row only.
  for (const double bad : {inf, nan}) {
    for (const size_t target : {0, 1}) {  // the bad logit is the target's, too
      const std::vector<double> x{1.0, bad, 2.0};
      auto states = columns(x, target);
      if (std::isnan(bad)) states[1].max = -inf;  // what the kernels' maxima make of nan
      const auto stats = finalized(merge_all(states), x[target], 3);
      CHECK(std::isnan(stats.floats[Stat::log_prob]) && std::isnan(stats.floats[Stat::entropy]));
      CHECK(std::isnan(stats.floats[Stat::log_sum_sq_probs]));
      CHECK(stats.integers[Stat::rank] == 3 && stats.integers[Stat::argmax] == -1);
    }
  }
}

// The gradient by coefficients against central differences.
void check_gradient(const FloatStats<double>& upstream) {
  const std::vector<double> x{0.3, -1.2, 2.5, 0.9}, a{0.1, 0.0, 0.4, 0.2};
  const int64_t target = 2;
  const auto statistics = [&](const std::vector<double>& at) {
    PartialState<double> total;
    for (size_t i = 0; i < at.size(); ++i) {
      total = merge(total, column(at[i], int64_t(i), a[i], at[size_t(target)], target));
    }
    return finalized(total, at[size_t(target)], 4);
  };
  const auto value = [&](const std::vector<double>& at) {
    const auto s = statistics(at);
    double sum = 0;
    for (int stat = 0; stat < Stat::float_count; ++stat) sum += upstream[stat] * s.floats[stat];
    return sum;
  };
  const auto stats = statistics(x);
  const auto c = collapse(upstream, stats.floats, stats.state[StateField::sum_weights]);
  for (size_t i = 0; i < x.size(); ++i) {
    auto above = x, below = x;
    above[i] += 1e-5;
    below[i] -= 1e-5;
    const double expected = (value(above) - value(below)) / 2e-5;
    const double p = std::exp(x[i] - stats.state[StateField::reference]) /
                     (1 + stats.state[StateField::excess]),
                 log_prob = std::log(p);
    const double gradient = int64_t(i) == target ? target_gradient(c, log_prob, a[i])
                                                 : column_gradient(c, p, log_prob, a[i]);
    CHECK_CLOSE(gradient, expected, 1e-9);
  }
}

void test_gradient() {
  for (int stat = 0; stat < Stat::float_count; ++stat) {
    FloatStats<double> alone;
    alone[stat] = 1.0;
    check_gradient(alone);
  }
  FloatStats<double> all;
  all[Stat::log_prob] = 0.7;
  all[Stat::lse] = -0.3;
  all[Stat::mean_log_prob] = 1.9;
  all[Stat::entropy] = 0.45;
  all[Stat::log_sum_sq_probs] = -1.1;
  check_gradient(all);
  // Nothing is read that has no gradient, and a class that p leaves at 0 takes no part.
  FloatStats<double> upstream, values;
  upstream[Stat::log_prob] = 0.5;
  for (double& value : values.at) value = nan;
  const auto c = collapse(upstream, values, nan);
  CHECK(column_gradient(c, 0.25, std::log(0.25), 1.0) == -0.125);
  upstream[Stat::entropy] = 1.0;
  values[Stat::entropy] = 0.1;
  CHECK(column_gradient(collapse(upstream, values, 0.0), 0.0, -inf, 0.0) == 0);
  CHECK(target_gradient(collapse(upstream, values, 0.0), -inf, 0.0) == 0.5);
}

template <typename Real>
void test_next_above() {
  const Real values[] = {Real(-3e38), Real(-1.5), -std::numeric_limits<Real>::denorm_min(),
                         Real(-0.0),  Real(0),    std::numeric_limits<Real>::denorm_min(),
                         Real(1),     Real(7e9)};
  for (const Real x : values) {
    CHECK(next_above(x) == std::nextafter(x, std::numeric_limits<Real>::infinity()));
  }
  const Real infinite = std::numeric_limits<Real>::infinity();
  CHECK(next_above(-infinite) == -std::numeric_limits<Real>::max());
  CHECK(!(infinite >= next_above(infinite)));
}

// p -> 1: float keeps the relative precision of p - 1.
void test_target_gradient_near_one() {
  FloatStats<float> upstream;
  upstream[Stat::log_prob] = -1;
  const auto c = collapse(upstream, FloatStats<float>(), 0.0f);
  const float log_prob = -1e-9f;
  CHECK_CLOSE(target_gradient(c, log_prob, 0.0f) / -1e-9, 1.0, 1e-6);
  // 2 p (p / s - 1), where log s = 2 log p.
  FloatStats<float> squares, values;
  squares[Stat::log_sum_sq_probs] = 0.5f;
  values[Stat::log_sum_sq_probs] = 2 * log_prob;
  const auto c_sq = collapse(squares, values, 0.0f);
  CHECK_CLOSE(target_gradient(c_sq, log_prob, 0.0f) / 1e-9, 1.0, 1e-6);
  // What is left where the gradient of log p has gone: of the z-loss, say.
  FloatStats<float> both = upstream;
  both[Stat::lse] = 1e-6f;
  CHECK_CLOSE(target_gradient(collapse(both, values, 0.0f), 0.0f, 0.0f) / 1e-6, 1.0, 1e-6);
}

// p -> 1: every statistic of a float row keeps its relative precision, and so does the gradient
// that backward makes of the state; the largest logit may be far from 0.
void test_confident_rows() {
  for (const float gap : {0.75f, 5.0f, 9.5f, 14.0f, 20.75f, 46.0f}) {  // to two equal logits
    for (const float offset : {0.0f, 1e4f, -1e4f}) {
      PartialState<float> state;
      for (const int64_t index : {0, 1, 2}) {
        const double x = index == 1 ? offset : offset - gap;
        state = merge(state, column(x, index, 0, offset, 1).as<float>());
      }
      const auto stats = finalized(state, offset, 3);
      const double each = std::exp(-double(gap)), others = 2 * each, sum = std::log1p(others);
      const double squares = std::log1p(2 * each * each) - 2 * sum;
      CHECK_CLOSE(stats.floats[Stat::log_prob] / -sum, 1, 1e-6);
      CHECK_CLOSE(stats.floats[Stat::entropy] / (sum + gap * others / (1 + others)), 1, 1e-6);
      CHECK_CLOSE(stats.floats[Stat::log_sum_sq_probs] / squares, 1, 1e-6);
      CHECK(stats.state[StateField::reference] == offset);

      GradSource<float> source;
      source.from_loss = true;
      const auto row = grad_row(RowInputs<float>(), source, source.read(0), stats, 1.0f);
      const float gradient = target_gradient(row.c, -row.log_sum(), 0.0f);
      CHECK_CLOSE(gradient / -(others / (1 + others)), 1, 1e-6);
    }
  }
}

FloatStats<double> loss_stats(double log_prob, double lse, double mean_log_prob) {
  FloatStats<double> stats;
  stats[Stat::log_prob] = log_prob;
  stats[Stat::lse] = lse;
  stats[Stat::mean_log_prob] = mean_log_prob;
  return stats;
}

void test_loss_and_its_upstream() {
  LossOptions<double> options;
  options.label_smoothing = 0.1;
  options.z_loss = 0.01;
  const auto stats = loss_stats(-2.0, 3.0, -5.0);
  CHECK_CLOSE(row_loss(options, stats, 1.5), 0.9 * 1.5 * 2.0 + 0.1 * 5.0 + 0.01 * 9.0, 1e-15);
  const auto upstream = loss_upstream(options, 2.0, stats, 1.5);
  CHECK_CLOSE(upstream[Stat::log_prob], -2.0 * 0.9 * 1.5, 1e-15);
  CHECK_CLOSE(upstream[Stat::mean_log_prob], -0.2, 1e-15);
  CHECK_CLOSE(upstream[Stat::lse], 2.0 * 2.0 * 0.01 * 3.0, 1e-15);
  CHECK(upstream[Stat::entropy] == 0);
  // A share of 0 leaves out a log-probability of -inf.
  CHECK(row_loss(LossOptions<double>{}, loss_stats(-2.0, 3.0, -inf), 1.0) == 2.0);
  options.label_smoothing = 1.0;
  options.z_loss = 0;
  CHECK(row_loss(options, loss_stats(-inf, 3.0, -5.0), 1.0) == 5.0);
  // So do options that are not asked for: 0 times lse^2, or (1 - p)^0 where p = 1, is no number.
  CHECK(row_loss(LossOptions<double>{}, loss_stats(-2.0, inf, -5.0), 1.0) == 2.0);
  CHECK(loss_upstream(LossOptions<double>{}, 1.0, loss_stats(-2.0, inf, -5.0), 1.0)[Stat::lse] ==
        0);
  CHECK(row_loss(options, loss_stats(0.0, 3.0, -5.0), 1.0) == 5.0);
  options.z_loss = 1.0;
  CHECK(row_loss(options, loss_stats(-2.0, 3.0, -5.0), 1.0) == 5.0 + 9.0);
  CHECK(loss_upstream(options, 1.0, loss_stats(-2.0, 3.0, -5.0), 1.0)[Stat::lse] == 6.0);
}

// (1 - p)^gamma times the smoothed and weighted part alone; derivatives by central differences.
void test_focal_loss() {
  for (const double gamma : {0.3, 1.0, 2.0, 5.5}) {
    LossOptions<double> options;
    options.label_smoothing = 0.1;
    options.z_loss = 0.01;
    options.focal_gamma = gamma;
    for (const double log_prob : {-20.0, -2.0, -0.3, -1e-4}) {
      const auto stats = loss_stats(log_prob, 3.0, -5.0);
      const double factor = std::pow(1 - std::exp(log_prob), gamma);
      const double expected = factor * (0.9 * 1.5 * -log_prob + 0.1 * 5.0) + 0.01 * 9.0;
      CHECK_CLOSE(row_loss(options, stats, 1.5), expected, 1e-12);
      const auto upstream = loss_upstream(options, 2.0, stats, 1.5);
      for (int stat = 0; stat < Stat::float_count; ++stat) {
        const double h = stat == Stat::log_prob ? 1e-6 * -log_prob : 1e-6;
        auto above = stats, below = stats;
        above[stat] += h;
        below[stat] -= h;
        const double difference =
            (row_loss(options, above, 1.5) - row_loss(options, below, 1.5)) / (2 * h);
        CHECK_CLOSE(upstream[stat], 2.0 * difference, 1e-6);
      }
    }
    // p = 1: factor and slope 0. p = 0: factor 1.
    const auto sure = loss_stats(0.0, 3.0, -5.0);
    CHECK(row_loss(options, sure, 1.5) == 0.01 * 3.0 * 3.0);
    CHECK(loss_upstream(options, 2.0, sure, 1.5)[Stat::log_prob] == 0);
    const auto lost = loss_stats(-inf, 3.0, -5.0);
    CHECK(row_loss(options, lost, 1.5) == inf);
    CHECK_CLOSE(loss_upstream(options, 2.0, lost, 1.5)[Stat::log_prob], -2.0 * 0.9 * 1.5, 1e-15);
    options.label_smoothing = 1.0;  // finite without focal_gamma
    CHECK_CLOSE(row_loss(options, lost, 1.5), 5.0 + 0.01 * 9.0, 1e-15);
    const auto spoilt = loss_stats(std::nan(""), 3.0, -5.0);
    CHECK(std::isnan(row_loss(options, spoilt, 1.5)));
    CHECK(std::isnan(loss_upstream(options, 2.0, spoilt, 1.5)[Stat::mean_log_prob]));
  }
  // p -> 1, where 1 - p has no digits left: the loss is (1 - p)^(gamma + 1).
  LossOptions<float> options;
  options.focal_gamma = 0.5f;
  FloatStats<float> stats;
  stats[Stat::log_prob] = -1e-9f;
  CHECK_CLOSE(row_loss(options, stats, 1.0f) / std::pow(1e-9, 1.5), 1.0, 1e-6);
  const float slope = loss_upstream(options, 1.0f, stats, 1.0f)[Stat::log_prob];
  CHECK_CLOSE(slope / -(1.5 * std::sqrt(1e-9)), 1.0, 1e-6);
}

// What the gradient does not need is not handed to it, so that the kernels do not read it.
void test_values_that_a_gradient_needs() {
  const double array[1] = {};
  RowOutputs<double> written;
  for (int stat = 0; stat < Stat::float_count; ++stat) {
    written.floats[stat] = const_cast<double*>(array);
  }
  GradSource<double> source;
  const auto needed = [&] { return SavedStats<double>::needed_by(source, written).floats; };
  source.grads[Stat::log_prob] = source.grads[Stat::mean_log_prob] = array;
  for (const double* values : needed().at) CHECK(values == nullptr);
  source.grads[Stat::entropy] = array;
  CHECK(needed()[Stat::entropy] == array && needed()[Stat::log_prob] == nullptr);
  source.grads[Stat::log_sum_sq_probs] = array;
  CHECK(needed()[Stat::log_sum_sq_probs] == array);
  source.from_loss = true;
  source.options.label_smoothing = 0.1;
  source.options.z_loss = 0.1;
  for (const double* values : needed().at) CHECK(values == nullptr);
  source.options.focal_gamma = 2.0;
  CHECK(needed()[Stat::log_prob] == array && needed()[Stat::mean_log_prob] == array);
  source.options.label_smoothing = 0;
  CHECK(needed()[Stat::log_prob] == array && needed()[Stat::mean_log_prob] == nullptr);
}

// A shard's statistics taken back to a state: what threads would have merged.
void test_finalized_states_merge_as_states_do() {
  const std::vector<double> x{0.3, -inf, 2.5, 0.9, -1.2, -inf};
  auto states = columns(x, 2);
  for (auto& state : states) {
    if (state.max == -inf) state.sum_weighted = state.sum_weights = 0;
  }
  PartialState<double> merged;
  for (size_t begin = 0; begin < x.size(); begin += 2) {
    const auto part = merge(states[begin], states[begin + 1]);
    const bool has_target = begin == 2;
    const auto stats = finalized(part, has_target ? x[2] : -inf, 6);
    auto again = state_of(stats, has_target);
    again.rank = part.rank;  // not among what is sent
    check_same(again, part);
    if (has_target) CHECK_CLOSE(at_target_of(stats), part.relative(x[2]), 1e-15);
    merged = merge(merged, again);
  }
  check_same(merged, merge_all(states));
}

// A shard whose logits are all -inf, with and without weights in the mean.
void test_a_shard_of_minus_infinity() {
  for (const double weight : {0.0, 0.5, 1.0}) {
    const auto part = column(-inf, 3, weight, 0.0);
    const auto stats = finalized(part, -inf, 6);
    for (const bool has_target : {false, true}) check_same(state_of(stats, has_target), part);
    CHECK(at_target_of(stats) == -inf);
  }
}

void test_transform() {
  const auto tanh = [](double x) { return tanh_of(x); };
  const auto resolved = [](double scale, double cap) {
    return LogitTransform<double>{scale, cap}.resolved();
  };
  for (const double at : {30.0, 0.5}) {
    for (const double z : {-50.0, -1.0, 0.0, 0.3, 40.0}) {
      const auto cap = resolved(1.7, at);
      const auto t = cap.with_derivatives(z, tanh);
      CHECK_CLOSE(t.x, at * std::tanh(1.7 * z / at), 1e-15);
      CHECK_CLOSE(t.x, cap.apply(z, tanh), 0);
      const double h = 1e-6;
      CHECK_CLOSE(t.dx_dz, (cap.apply(z + h, tanh) - cap.apply(z - h, tanh)) / (2 * h), 1e-8);
      const auto up = resolved(1.7 + h, at), down = resolved(1.7 - h, at);
      CHECK_CLOSE(t.dx_dscale, (up.apply(z, tanh) - down.apply(z, tanh)) / (2 * h), 1e-8);
    }
    CHECK((LogitTransform<double>{1.0, at}.kind() == TransformKind::softcap));
  }
  CHECK(LogitTransform<double>().kind() == TransformKind::identity);
  const auto flat = resolved(1.0, 30.0).with_derivatives(-inf, tanh);
  CHECK(flat.x == -30.0 && flat.dx_dz == 0 && flat.dx_dscale == 0);
  const double learned = 2.0;
  const LogitTransform<double> by_pointer{1.0, 0.0, &learned};
  CHECK(by_pointer.kind() == TransformKind::scale);
  CHECK(by_pointer.resolved().scale == 2.0);
}

// Every half and bfloat16 there and back; rounding of every tie between neighbours.
void test_half_types() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Half half{uint16_t(bits)};
    const float value = to_real(half);
    const bool is_nan = (bits & 0x7c00) == 0x7c00 && (bits & 0x3ff) != 0;
    CHECK(std::isnan(value) == is_nan);
    const int exponent = int(bits >> 10 & 31), fraction = int(bits & 0x3ff);
    if (exponent < 31) {
      const double expected =
          (bits & 0x8000 ? -1.0 : 1.0) *
          (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
      CHECK(value == float(expected));
    }
    if (is_nan) continue;
    Half back;
    from_real(value, back);
    CHECK(back.bits == bits);
    const BFloat16 brain{uint16_t(bits)};
    const float brain_value = to_real(brain);
    BFloat16 brain_back;
    from_real(brain_value, brain_back);
    CHECK(std::isnan(brain_value) || brain_back.bits == bits);
    if (std::isfinite(brain_value)) {
      from_real(bit_cast<float>(bits << 16 | 0x8000u), brain_back);
      CHECK(brain_back.bits == ((bits & 1) ? bits + 1 : bits));
    }
    // Half-way between this and the next larger magnitude: to the even one, in both types.
    if (exponent < 30) {
      const float next = to_real(Half{uint16_t(bits + 1)});
      from_real((value + next) / 2, back);
      CHECK(back.bits == ((bits & 1) ? bits + 1 : bits));
    }
  }
  Half half;
  from_real(65519.9f, half);
  CHECK(half.bits == 0x7bff);
  from_real(65520.0f, half);
  CHECK(half.bits == 0x7c00);
  from_real(std::numeric_limits<float>::quiet_NaN(), half);
  CHECK(std::isnan(to_real(half)));
  BFloat16 brain;
  from_real(std::numeric_limits<float>::quiet_NaN(), brain);
  CHECK(std::isnan(to_real(brain)));
}

void test_layouts_targets_and_weights() {
  const RowLayout layout{3, 100, 10};
  CHECK(layout.offset(0) == 0 && layout.offset(2) == 20 && layout.offset(3) == 100);
  CHECK(layout.offset(4) == 110 && layout.offset(8) == 220);
  CHECK(RowLayout{}.offset(5) == 0);  // one row for all

  const int32_t ids[] = {0, -100, 9, -1};
  const Targets targets{ids, false, -100};
  CHECK(targets[2] == 9 && targets.are_indices());
  const auto of = [&](int row) { return RowTarget(targets, row); };
  CHECK(of(0).is_in_range(9) && !of(2).is_in_range(9) && of(2).is_in_range(10));
  CHECK(!of(3).is_in_range(9));
  CHECK(of(0).is_active(9) && !of(1).is_active(9) && !of(2).is_active(9));
  CHECK(of(1).is_ignored() && !of(0).is_ignored());
  CHECK(!of(3).is_elsewhere() && !of(3).is_active(9) && of(0).is_here());
  const Targets of_shard{ids, false, -100, true};
  const auto there = [&](int row) { return RowTarget(of_shard, row); };
  CHECK(there(3).is_elsewhere() && there(3).is_active(9) && !there(3).is_here());
  CHECK(!there(0).is_elsewhere() && there(0).is_here());
  CHECK(!there(2).is_active(9) && !there(1).is_active(9));
  const Targets ignores_a_class{ids, false, 9};
  CHECK(!RowTarget(ignores_a_class, 2).is_active(10));
  const int64_t wide[] = {int64_t{1} << 32, -100};
  const Targets of_64_bits{wide, true, -100};
  CHECK(of_64_bits[0] == wide[0] && RowTarget(of_64_bits, 1).is_ignored());
  CHECK(!RowTarget(of_64_bits, 0).is_active(9));
  const Targets probabilities{};
  const RowTarget none(probabilities, 0);
  CHECK(!probabilities.are_indices() && !none.is_ignored() && none.is_active(1) && !none.is_here());

  const float q[] = {0.25f, 0.75f}, w[] = {2.0f, 4.0f};
  ColumnWeights<float> weights;
  weights.beta = 0.1f;
  CHECK(weights.is_constant() && weights.of_class(1) == 1 && weights.at(0, 1) == 0.1f);
  weights.class_weight = w;
  CHECK(!weights.is_constant() && weights.of_class(1) == 4 && weights.at(0, 1) == 4 * 0.1f);
  weights.probabilities = q;
  weights.rows = {1, 0, 2};
  weights.alpha = 0.5f;
  CHECK_CLOSE(weights.at(0, 1), 4.0 * (0.5 * 0.75 + 0.1), 1e-6);
  weights.class_weight = nullptr;
  CHECK(!weights.is_constant());
}

// The upstream gradient of a row's loss, and the statistics that a row of arrays holds.
void test_sources_of_gradients() {
  const double grads[] = {2.0, 3.0}, weights[] = {5.0, 7.0}, denominator[] = {4.0, 1e9};
  GradSource<double> source;
  source.from_loss = true;
  CHECK(source.of_loss(source.read(1)) == 1);
  source.grad_loss = grads;
  CHECK(source.of_loss(source.read(1)) == 2);  // one number for all rows
  source.grad_loss_stride = 1;
  CHECK(source.of_loss(source.read(0)) == 2 && source.of_loss(source.read(1)) == 3);
  source.token_weight = weights;
  source.denominator = {denominator};
  CHECK(source.of_loss(source.read(1)) == 3.0 * 7.0 / 4.0);

  source.from_loss = false;
  source.grads[Stat::entropy] = grads;
  CHECK(source.has(Stat::entropy) && !source.has(Stat::lse));
  const auto of_stats = source.upstream(source.read(1), loss_stats(-2.0, 3.0, -5.0), 1.0);
  CHECK(of_stats[Stat::entropy] == 3 && of_stats[Stat::log_prob] == 0);
  source.from_loss = true;
  CHECK(!source.has(Stat::entropy) && source.has(Stat::lse) && source.has(Stat::log_prob));
  CHECK(!source.has(Stat::mean_log_prob));
  const auto of_loss = source.upstream(source.read(1), loss_stats(-2.0, 3.0, -5.0), 1.5);
  CHECK(of_loss[Stat::log_prob] == -3.0 * 7.0 / 4.0 * 1.5 && of_loss[Stat::entropy] == 0);

  SavedStats<double> saved;
  saved.floats[Stat::entropy] = weights;
  for (auto& field : saved.state.at) field = grads;
  saved.state[StateField::sum_weights] = denominator;
  const auto row = saved.of_row(1);
  for (int stat = 0; stat < Stat::float_count; ++stat) {
    CHECK(row.floats[stat] == (stat == Stat::entropy ? 7 : 0));
  }
  CHECK(row.state[StateField::reference] == 3 && row.state[StateField::excess] == 3);
  CHECK(row.state[StateField::sum_weights] == 1e9);
}

// The arrays of some rows, of which each statistic can be asked for.
struct Arrays {
  explicit Arrays(size_t rows) {
    for (auto& v : floats.at) v.assign(rows, -7);
    for (auto& v : integers.at) v.assign(rows, -7);
    for (auto& v : state.at) v.assign(rows, -7);
  }

  RowOutputs<double> outputs() {
    RowOutputs<double> out;
    for (int i = 0; i < floats.size; ++i) out.floats.at[i] = floats.at[i].data();
    for (int i = 0; i < integers.size; ++i) out.integers.at[i] = integers.at[i].data();
    for (int i = 0; i < state.size; ++i) out.state.at[i] = state.at[i].data();
    return out;
  }

  FloatStats<std::vector<double>> floats;
  IntegerStats<std::vector<int64_t>> integers;
  StateFields<std::vector<double>> state;
};

// What is written for a row that is not active, and that nothing is where nobody asked.
void test_rows_that_are_not_active() {
  const int64_t ids[] = {2, -100, 5, -1};
  RowInputs<double> in;
  in.rows = 4;
  in.vocab_size = in.columns = 5;
  in.targets.data = ids;
  CHECK(is_active(in, 0) && !is_active(in, 1) && !is_active(in, 2) && !is_active(in, 3));
  in.targets.of_shard = true;
  CHECK(is_active(in, 3));

  Arrays arrays(3);
  RowOutputs<double> out = arrays.outputs();
  out.floats[Stat::lse] = nullptr;
  for (const int64_t row : {1, 2}) {
    const bool is_ignored = RowTarget(in.targets, row).is_ignored();
    write_statistics(out, row, absent_statistics<double>(is_ignored, in.vocab_size));
  }
  for (int stat = 0; stat < Stat::float_count; ++stat) {
    const auto& values = arrays.floats[stat];
    CHECK(values[0] == -7);
    CHECK(stat == Stat::lse ? values[1] == -7 : values[1] == 0);
    CHECK(stat == Stat::lse ? values[2] == -7 : std::isnan(values[2]));
  }
  for (const size_t row : {1, 2}) {
    CHECK(arrays.integers[Stat::argmax][row] == -1 && arrays.integers[Stat::rank][row] == 5);
    for (const auto& values : arrays.state.at) CHECK(values[0] == -7 && values[row] == 0);
  }
}

// The coefficients of a row whose target's class has a weight, from the gradient of its loss.
void test_gradient_of_a_row() {
  RowInputs<double> in;
  in.weights.beta = 0.25;
  RowStats<double> stats;
  stats.state[StateField::reference] = 2.0;
  stats.state[StateField::excess] = 3.0;
  stats.state[StateField::sum_weights] = 1.0;
  GradSource<double> source;
  source.from_loss = true;
  source.options.z_loss = 0.5;
  auto row = grad_row(in, source, source.read(0), stats, 3.0);
  CHECK(row.reference == 2 && row.log_sum() == std::log1p(3.0) && row.inverse_sum == 0.25);
  CHECK(row.c.weight == 0 && row.constant == 0);
  CHECK_CLOSE(row.c.sure, 2 * 0.5 * (2.0 + std::log(4.0)), 1e-15);
  CHECK_CLOSE(row.c.p, 3.0 + row.c.sure, 1e-15);
  source.options.label_smoothing = 0.5;
  row = grad_row(in, source, source.read(0), stats, 3.0);
  CHECK_CLOSE(row.c.p - row.c.sure, 1.5, 1e-15);
  CHECK(row.c.weight == -0.5 && row.constant == -0.5 * 0.25);
}

void test_losses_of_rows() {
  const int32_t ids[] = {1, -100, 7};
  const double class_weight[] = {1.0, 3.0}, token_weight[] = {5.0, 6.0, 7.0};
  const double log_prob[] = {-2.0, -9.0, nan};
  CHECK(int(Reduction::none) == 0 && int(Reduction::mean) == 1);  // as Python numbers them
  LossRows<double> rows;
  rows.targets = {ids, false, -100};
  rows.vocab_size = 2;
  rows.stats[Stat::log_prob] = rows.stats[Stat::lse] = log_prob;
  CHECK(rows.loss(rows.read(0)) == 2 && rows.share(rows.read(0)) == 1);
  rows.class_weight = class_weight;
  CHECK(rows.loss(rows.read(0)) == 6 && rows.share(rows.read(0)) == 3);
  rows.token_weight = token_weight;
  CHECK(rows.loss(rows.read(0)) == 30 && rows.share(rows.read(0)) == 15);
  CHECK(rows.loss(rows.read(1)) == 0 && rows.share(rows.read(1)) == 0);
  CHECK(std::isnan(rows.loss(rows.read(2))) && rows.share(rows.read(2)) == 7);
  rows.targets = {};  // probability targets, whose weights mean_log_prob contains
  CHECK(rows.target_weight(rows.read(0)) == 1 && rows.share(rows.read(0)) == 5);
}

// What two ranks send for their columns becomes what one rank has for all of them.
void test_shards() {
  enum { good, ignored, without_owner, with_two, without_a_column, rows };
  const std::vector<double> x{0.3, -1.2, 2.5, 0.9, -0.4};
  const int64_t first_of_rank[] = {0, 2, 5};
  const auto states = columns(x, 3);
  std::vector<double> sent(size_t(2 * ShardField::count * rows));
  for (int rank = 0; rank < 2; ++rank) {
    PartialState<double> part;
    for (int64_t i = first_of_rank[rank]; i < first_of_rank[rank + 1]; ++i) {
      part = merge(part, states[size_t(i)]);
    }
    const bool owns = rank == 1;
    const auto stats = finalized(part, owns ? x[3] : -inf, 5);
    for (int row = 0; row < rows; ++row) {
      const auto send = [&](int field, double value) {
        sent[size_t((rank * ShardField::count + field) * rows + row)] = value;
      };
      for (int i = 0; i < Stat::float_count; ++i) send(i, stats.floats[i]);
      for (int i = 0; i < StateField::count; ++i) send(ShardField::state + i, stats.state[i]);
      send(ShardField::has_target, row == with_two || (owns && row != without_owner));
      send(ShardField::argmax, double(stats.integers[Stat::argmax]));
      const int64_t own = first_of_rank[rank + 1] - first_of_rank[rank];
      send(ShardField::columns, double(row == without_a_column ? own - rank : own));
    }
  }
  const int64_t targets[] = {3, -100, 3, 3, 3};
  Arrays arrays(rows);
  std::vector<double> owners(rows);
  for (int64_t row = 0; row < rows; ++row) {
    merge_shards(ShardRows<double>{sent.data(), 2, rows, {targets}, 5}, arrays.outputs(),
                 owners.data(), row);
  }
  CHECK((owners == std::vector<double>{1, 1, 0, 2, -1}));
  const auto expected = finalized(merge_all(states), x[3], 5);
  for (int stat = 0; stat < Stat::float_count; ++stat) {
    const auto& values = arrays.floats[stat];
    CHECK_CLOSE(values[good], expected.floats[stat], 1e-14);
    CHECK(values[ignored] == 0);
    for (const int row : {without_owner, with_two, without_a_column})
      CHECK(std::isnan(values[row]));
  }
  for (int field = 0; field < StateField::count; ++field) {
    CHECK_CLOSE(arrays.state[field][good], expected.state[field], 1e-14);
  }
  CHECK((arrays.integers[Stat::argmax] == std::vector<int64_t>{2, -1, -1, -1, -1}));
}

// A row that is nearly sure of its target, whose others lie on the target's rank, on another, or on
// both; a rank without columns sends zeros. The largest logit may be far from 0.
void test_shards_of_a_confident_row() {
  for (const double gap : {1.0, 9.0, 20.0, 50.0}) {
    for (const double offset : {0.0, 1e4, -1e4}) {
      for (const int on_its_own : {0, 1, 3}) {
        constexpr int ranks = 3;
        std::vector<float> sent(size_t(ranks * ShardField::count));
        for (int rank = 0; rank < 2; ++rank) {
          PartialState<double> part;
          const int count = rank == 0 ? 1 + on_its_own : 4 - on_its_own;
          for (int i = 0; i < count; ++i) {
            const bool is_target = rank == 0 && i == 0;
            part = merge(part, column(is_target ? offset : offset - gap, i, 0.2, offset,
                                      rank == 0 ? 0 : -1));
          }
          const auto stats = finalized(part, rank == 0 ? offset : -inf, 5);
          float* const to = sent.data() + rank * ShardField::count;
          for (int i = 0; i < Stat::float_count; ++i) to[i] = float(stats.floats[i]);
          for (int i = 0; i < StateField::count; ++i) {
            to[ShardField::state + i] = float(stats.state[i]);
          }
          to[ShardField::has_target] = rank == 0;
          to[ShardField::columns] = float(count);
        }
        const int64_t target = 0;
        float log_prob = 0, excess = 0, reference = 0, entropy = 0, squares = 0, owners = 0;
        RowOutputs<float> out;
        out.floats[Stat::log_prob] = &log_prob;
        out.floats[Stat::entropy] = &entropy;
        out.floats[Stat::log_sum_sq_probs] = &squares;
        out.state[StateField::excess] = &excess;
        out.state[StateField::reference] = &reference;
        merge_shards(ShardRows<float>{sent.data(), ranks, 1, {&target}, 5}, out, &owners, 0);
        const double others = 4 * std::exp(-gap), sum = std::log1p(others);
        CHECK(owners == 1 && reference == float(offset));
        CHECK_CLOSE(log_prob / -sum, 1, 1e-6);
        CHECK_CLOSE(excess / others, 1, 1e-6);
        CHECK_CLOSE(entropy / (sum + gap * others / (1 + others)), 1, 1e-6);
        CHECK_CLOSE(squares / (std::log1p(4 * std::exp(-2 * gap)) - 2 * sum), 1, 1e-6);
      }
    }
  }
}

}  // namespace

int main() {
  test_statistics_of_a_row();
  test_identity_associativity_commutativity();
  test_first_of_equal_maxima_wins_from_either_side();
  test_rounding_is_cut_off();
  test_parts_far_apart();
  test_wanted_statistics();
  test_rows_without_statistics();
  test_gradient();
  test_target_gradient_near_one();
  test_next_above<float>();
  test_next_above<double>();
  test_confident_rows();
  test_loss_and_its_upstream();
  test_focal_loss();
  test_values_that_a_gradient_needs();
  test_finalized_states_merge_as_states_do();
  test_a_shard_of_minus_infinity();
  test_transform();
  test_half_types();
  test_layouts_targets_and_weights();
  test_sources_of_gradients();
  test_rows_that_are_not_active();
  test_gradient_of_a_row();
  test_losses_of_rows();
  test_shards();
  test_shards_of_a_confident_row();
}
