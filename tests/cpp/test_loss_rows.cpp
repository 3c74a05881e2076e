// Which rows count, by how much, and what the mean divides by.
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "core/loss_rows.h"
#include "core/params.h"
#include "core/rows.h"

using namespace llmloss;

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

// Five rows of three classes: one ignored, and one of weight 0 whose statistics are nan.
struct Example {
  std::vector<int64_t> classes{0, 2, -100, 1, 1};
  std::vector<double> class_weight{0.5, 2, 3};
  std::vector<double> token_weight{1, 4, nan, 0, 2};
  std::vector<double> log_prob{-1, -2, nan, nan, -3};
  std::vector<double> lse{1, 2, nan, nan, 3};

  LossRows<double> rows(double z_loss, bool weighted) {
    LossRows<double> rows;
    rows.options.z_loss = z_loss;
    rows.targets = {classes.data()};
    rows.rows = 5;
    rows.vocab_size = 3;
    rows.class_weight = weighted ? class_weight.data() : nullptr;
    rows.token_weight = token_weight.data();
    rows.stats[Stat::log_prob] = log_prob.data();
    rows.stats[Stat::lse] = lse.data();
    return rows;
  }
};

void test_rows_that_do_not_count_are_nothing() {
  Example example;
  const LossRows<double> rows = example.rows(0.1, true);
  const double weights[] = {1, 4, 0, 0, 2}, shares[] = {0.5, 12, 0, 0, 4};
  const double losses[] = {0.5 + 0.1, 4 * (6 + 0.4), 0, 0, 2 * (6 + 0.9)};
  for (int row = 0; row < 5; ++row) {
    CHECK_CLOSE(rows.weight(rows.read(row)), weights[row], 0);
    CHECK_CLOSE(rows.share(rows.read(row)), shares[row], 0);
    CHECK_CLOSE(rows.loss(rows.read(row)), losses[row], 1e-15);
  }
}

void test_the_z_loss_has_a_mean_of_its_own() {
  Example example;
  for (const bool weighted : {false, true}) {
    LossRows<double> rows = example.rows(0.1, weighted);
    CHECK(rows.counts_weights() == weighted);
    double shares = 0, weights = 0, numbers[2];
    for (int row = 0; row < 5; ++row) {
      shares += rows.share(rows.read(row));
      weights += rows.weight(rows.read(row));
    }
    rows.write_denominator(shares, weights, numbers);
    CHECK_CLOSE(numbers[0], weighted ? 16.5 : 7, 1e-15);
    rows.denominator = {numbers};
    double total = 0;
    for (int row = 0; row < 5; ++row) total += rows.loss(rows.read(row));
    const double ce = weighted ? (0.5 + 24 + 12) / 16.5 : (1 + 8 + 6) / 7.0;
    CHECK_CLOSE(total / rows.denominator.value(), ce + 0.1 * (1 + 4 * 4 + 2 * 9) / 7, 1e-14);
  }
  CHECK(!example.rows(0, true).counts_weights());
  LossRows<double> probabilities = example.rows(0.1, true);
  probabilities.targets = {};
  CHECK(!probabilities.counts_weights());
}

void test_what_the_caller_says_of_the_denominator() {
  Example example;
  LossRows<double> rows = example.rows(0.1, true);
  double numbers[2];
  const double items = 7, none = 0, factor = 0.25;
  rows.num_items = &items;
  rows.write_denominator(nan, nan, numbers);
  CHECK(numbers[0] == 7 && numbers[1] == 1);
  rows.num_items = &none;  // 0 items: whatever is divided by them is 0
  rows.write_denominator(nan, nan, numbers);
  CHECK(numbers[0] == inf && numbers[1] == 1);
  rows.z_factor = &factor;  // a whole denominator is taken as it is
  rows.write_denominator(nan, nan, numbers);
  CHECK(numbers[0] == 0 && numbers[1] == 0.25);
}

void test_a_row_without_a_gradient_vanishes() {
  const double upstream[] = {0, 2}, token_weight[] = {1, 0}, zero = 0, mean[] = {4, 1},
               no_items[] = {inf, 1};
  GradSource<double> of_loss;
  of_loss.from_loss = true;
  CHECK(!of_loss.vanishes(of_loss.read(0)));
  of_loss.grad_loss = upstream;
  of_loss.grad_loss_stride = 1;
  CHECK(of_loss.vanishes(of_loss.read(0)) && !of_loss.vanishes(of_loss.read(1)));
  of_loss.token_weight = token_weight;
  CHECK(of_loss.vanishes(of_loss.read(1)));
  of_loss.token_weight = nullptr;
  of_loss.denominator = {mean};
  CHECK(!of_loss.vanishes(of_loss.read(1)));
  CHECK_CLOSE(of_loss.of_loss(of_loss.read(1)), 0.5, 0);
  of_loss.denominator = {no_items};
  CHECK(of_loss.vanishes(of_loss.read(1)));

  GradSource<double> of_stats;
  CHECK(of_stats.vanishes(of_stats.read(0)));
  for (int stat = 0; stat < Stat::float_count; ++stat) {
    GradSource<double> one;
    one.grads[stat] = upstream;
    CHECK(one.vanishes(one.read(0)) && !one.vanishes(one.read(1)));
    one.grads[(stat + 1) % Stat::float_count] = &zero;  // of row 0
    CHECK(one.vanishes(one.read(0)));
  }
}

void test_the_gradient_knows_the_factor_of_the_z_loss() {
  const double mean[] = {4, 0.5};
  FloatStats<double> values;
  values[Stat::log_prob] = -1;
  values[Stat::lse] = 3;
  GradSource<double> source;
  source.from_loss = true;
  source.options.z_loss = 0.1;
  CHECK_CLOSE(source.upstream(source.read(0), values, 1.0)[Stat::lse], 2 * 0.1 * 3, 1e-15);
  source.denominator = {mean};
  const FloatStats<double> upstream = source.upstream(source.read(0), values, 2.0);
  CHECK_CLOSE(upstream[Stat::lse], 2 * 0.1 * 0.5 * 3 / 4, 1e-15);
  CHECK_CLOSE(upstream[Stat::log_prob], -2.0 / 4, 1e-15);
}

void test_only_active_rows_with_an_upstream_have_a_gradient() {
  const std::vector<int64_t> classes{1, -100, 9, 1};
  const std::vector<double> token_weight{1, 1, 1, 0};
  RowInputs<float> in;
  in.rows = 4;
  in.columns = in.vocab_size = 3;
  in.targets = {classes.data()};
  GradSource<float> source;
  source.from_loss = true;
  const std::vector<float> weights(token_weight.begin(), token_weight.end());
  source.token_weight = weights.data();
  const bool expected[] = {true, false, false, false};
  for (int row = 0; row < 4; ++row) {
    CHECK((is_active(in, row) && !source.vanishes(source.read(row))) == expected[row]);
  }
}

}  // namespace

int main() {
  test_rows_that_do_not_count_are_nothing();
  test_the_z_loss_has_a_mean_of_its_own();
  test_what_the_caller_says_of_the_denominator();
  test_a_row_without_a_gradient_vanishes();
  test_the_gradient_knows_the_factor_of_the_z_loss();
  test_only_active_rows_with_an_upstream_have_a_gradient();
}
