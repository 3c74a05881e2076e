// The mathematics of csrc/core: the monoid, the gradient's coefficients, the storage types.
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "core/loss_rows.h"
#include "core/params.h"

using namespace llmloss;

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();

// The state of one column, as a kernel would make it.
PartialState<double> column(double x, int64_t index, double a, double target_logit) {
  PartialState<double> state;
  state.max = x;
  state.argmax = index;
  state.sum_exp = std::exp(x - state.reference());
  state.sum_sq_exp = state.sum_exp * state.sum_exp;
  state.sum_weights = a;
  state.sum_weighted = a == 0 ? 0 : a * (x - state.reference());
  state.rank = x > target_logit;
  return state;
}

std::vector<PartialState<double>> columns(const std::vector<double>& x, double target_logit) {
  std::vector<PartialState<double>> states;
  for (size_t i = 0; i < x.size(); ++i) {
    states.push_back(column(x[i], int64_t(i), 1.0 / double(x.size()), target_logit));
  }
  return states;
}

PartialState<double> merge_all(const std::vector<PartialState<double>>& states) {
  PartialState<double> total;
  for (const auto& state : states) total = merge(total, state);
  return total;
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
    auto states = columns(x, x[3]);
    for (auto& state : states) {  // this sum has no -inf term in it
      if (state.max == -inf) state.sum_weighted = state.sum_weights = 0;
    }
    const auto stats = finalize(merge_all(states), x[3], int64_t(x.size()));
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
    auto s = columns(x, x[1]);
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
}

void test_rows_without_statistics() {
  // All -inf: the sum is 0, and every statistic but lse is nan, as in torch.
  const auto all = finalize(merge_all(columns({-inf, -inf}, -inf)), -inf, 2).floats;
  CHECK(std::isnan(all[Stat::log_prob]) && std::isnan(all[Stat::entropy]));
  CHECK(std::isnan(all[Stat::log_sum_sq_probs]));
  CHECK(all[Stat::lse] == -inf);
  // nan and +inf spoil their row only.
  for (const double bad : {inf, std::numeric_limits<double>::quiet_NaN()}) {
    auto states = columns({1.0, bad, 2.0}, 1.0);
    if (std::isnan(bad)) states[1].max = -inf;  // what the kernels' maxima make of nan
    const auto stats = finalize(merge_all(states), 1.0, 3);
    CHECK(std::isnan(stats.floats[Stat::log_prob]) && std::isnan(stats.floats[Stat::entropy]));
    CHECK(std::isnan(stats.floats[Stat::log_sum_sq_probs]));
    CHECK(stats.integers[Stat::rank] == 3 && stats.integers[Stat::argmax] == -1);
  }
}

// The gradient by coefficients against central differences, for every statistic.
void test_gradient() {
  const std::vector<double> x{0.3, -1.2, 2.5, 0.9}, a{0.1, 0.0, 0.4, 0.2};
  const int64_t target = 2;
  const auto statistics = [&](const std::vector<double>& at) {
    PartialState<double> total;
    for (size_t i = 0; i < at.size(); ++i) {
      auto state = column(at[i], int64_t(i), a[i], at[size_t(target)]);
      total = merge(total, state);
    }
    return finalize(total, at[size_t(target)], 4);
  };
  FloatStats<double> upstream;
  upstream[Stat::log_prob] = 0.7;
  upstream[Stat::lse] = -0.3;
  upstream[Stat::mean_log_prob] = 1.9;
  upstream[Stat::entropy] = 0.45;
  upstream[Stat::log_sum_sq_probs] = -1.1;
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
                     stats.state[StateField::sum_exp],
                 log_prob = std::log(p);
    const double gradient = int64_t(i) == target ? target_gradient(c, log_prob, a[i])
                                                 : column_gradient(c, p, log_prob, a[i]);
    CHECK_CLOSE(gradient, expected, 1e-9);
  }
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
  auto states = columns(x, x[2]);
  for (auto& state : states) {
    if (state.max == -inf) state.sum_weighted = state.sum_weights = 0;
  }
  PartialState<double> merged;
  for (size_t begin = 0; begin < x.size(); begin += 2) {
    const auto part = merge(states[begin], states[begin + 1]);
    const auto stats = finalize(part, x[2], 6);
    auto again = state_of(stats);
    again.rank = part.rank;  // not among what is sent
    check_same(again, part);
    CHECK_CLOSE(target_logit_of(stats), x[2], 1e-15);
    merged = merge(merged, again);
  }
  check_same(merged, merge_all(states));
}

void test_transform() {
  for (const double z : {-50.0, -1.0, 0.0, 0.3, 40.0}) {
    const LogitTransform<double> cap{1.7, 30.0};
    const auto t = cap.with_derivatives(z);
    CHECK_CLOSE(t.x, 30.0 * std::tanh(1.7 * z / 30.0), 1e-15);
    CHECK_CLOSE(t.x, cap.apply(z), 0);
    const double h = 1e-6;
    CHECK_CLOSE(t.dx_dz, (cap.apply(z + h) - cap.apply(z - h)) / (2 * h), 1e-8);
    const LogitTransform<double> up{1.7 + h, 30.0}, down{1.7 - h, 30.0};
    CHECK_CLOSE(t.dx_dscale, (up.apply(z) - down.apply(z)) / (2 * h), 1e-8);
  }
  CHECK(LogitTransform<double>().kind() == TransformKind::identity);
  const auto flat = LogitTransform<double>{1.0, 30.0}.with_derivatives(-inf);
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
    // Half-way between this and the next larger magnitude: to the even one.
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
  from_real(1.00390625f, brain);  // half-way between 1 and 1.0078125
  CHECK(brain.bits == 0x3f80);
}

void test_layouts_targets_and_weights() {
  const RowLayout rows{3, 100, 10};
  CHECK(rows.offset(0) == 0 && rows.offset(2) == 20 && rows.offset(3) == 100);
  const int32_t ids[] = {4, -100, 9};
  const Targets targets{ids, false, -100};
  CHECK(targets[0] == 4 && targets.ignored(1) && !targets.in_range(2, 9));
  const float q[] = {0.25f, 0.75f}, w[] = {2.0f, 4.0f};
  ColumnWeights<float> weights;
  weights.class_weight = w;
  weights.probabilities = q;
  weights.rows = {1, 0, 2};
  weights.alpha = 0.5f;
  weights.beta = 0.1f;
  CHECK_CLOSE(weights.at(0, 1), 4.0 * (0.5 * 0.75 + 0.1), 1e-6);
}

}  // namespace

int main() {
  test_statistics_of_a_row();
  test_identity_associativity_commutativity();
  test_first_of_equal_maxima_wins_from_either_side();
  test_rows_without_statistics();
  test_gradient();
  test_target_gradient_near_one();
  test_loss_and_its_upstream();
  test_focal_loss();
  test_values_that_a_gradient_needs();
  test_finalized_states_merge_as_states_do();
  test_transform();
  test_half_types();
  test_layouts_targets_and_weights();
}
