// What the CPU kernels do at the edges, on every instruction set: targets out of range, int32 and
// probability targets, rows spoilt by nan or +inf, rows of -inf, the scale kernel, and the choice
// of the instruction set.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"

using namespace llmloss;

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

// `rows` rows of `columns` logits with every statistic, and the gradient of the plain loss.
template <typename T>
struct Table {
  using Real = real_t<T>;

  Table(int64_t rows_, int64_t columns_) : rows(rows_), columns(columns_) {
    for (int64_t i = 0; i < rows * columns; ++i) {
      T value;
      from_real(Real((i * 37 % 101) / 25.0 - 2), value);
      logits.push_back(value);
    }
    for (auto& v : floats.at) v.assign(size_t(rows), Real(-1));
    for (auto& v : integers.at) v.assign(size_t(rows), -7);
    for (auto& v : state.at) v.resize(size_t(rows));
    grad.resize(logits.size());
    for (int64_t row = 0; row < rows; ++row) order.push_back(row);
    targets.assign(size_t(rows), 0);
  }

  void set(int64_t row, int64_t column, double value) {
    from_real(Real(value), logits[size_t(row * columns + column)]);
  }

  RowInputs<T> inputs() const {
    RowInputs<T> in;
    in.logits = logits.data();
    in.layout = {rows, 0, columns};
    in.rows = rows;
    in.columns = in.vocab_size = columns;
    in.targets.data = targets.data();
    in.weights.beta = Real(1) / Real(columns);
    return in;
  }

  void run(cpu::Isa isa, const RowInputs<T>& in, const LossOptions<Real>& options = {}) {
    RowOutputs<Real> out;
    for (int i = 0; i < floats.size; ++i) out.floats.at[i] = floats.at[i].data();
    for (int i = 0; i < integers.size; ++i) out.integers.at[i] = integers.at[i].data();
    for (int i = 0; i < state.size; ++i) out.state.at[i] = state.at[i].data();
    GradSource<Real> source;
    source.from_loss = true;
    source.options = options;
    const auto& kernels = cpu::kernels<T>(isa);
    kernels.row_stats(in, out, order.data(), rows);
    kernels.row_grad(in, SavedStats<Real>::needed_by(source, out), source,
                     {grad.data(), {rows, 0, columns}, nullptr}, order.data(), rows);
  }

  double gradient(int64_t row, int64_t column) const {
    return to_real(grad[size_t(row * columns + column)]);
  }
  double log_prob(int64_t row) const { return floats[Stat::log_prob][size_t(row)]; }
  double lse(int64_t row) const { return floats[Stat::lse][size_t(row)]; }
  int64_t argmax(int64_t row) const { return integers[Stat::argmax][size_t(row)]; }
  int64_t rank(int64_t row) const { return integers[Stat::rank][size_t(row)]; }
  double mean_log_prob(int64_t row) const { return floats[Stat::mean_log_prob][size_t(row)]; }

  int64_t rows, columns;
  std::vector<T> logits, grad;
  FloatStats<std::vector<Real>> floats;
  IntegerStats<std::vector<int64_t>> integers;
  StateFields<std::vector<Real>> state;
  std::vector<int64_t> targets, order;
};

template <typename T>
void test_targets_out_of_range(cpu::Isa isa) {
  Table<T> table(4, 37);
  table.targets = {5, 37, -1, int64_t{1} << 40};
  table.run(isa, table.inputs());
  CHECK(std::isfinite(table.log_prob(0)));
  for (int64_t row = 1; row < 4; ++row) {
    CHECK(std::isnan(table.log_prob(row)) && std::isnan(table.lse(row)));
    CHECK(table.argmax(row) == -1 && table.rank(row) == 37);
    for (int64_t i = 0; i < 37; ++i) CHECK(table.gradient(row, i) == 0);
  }
}

template <typename T>
void test_int32_targets_are_int64_targets(cpu::Isa isa) {
  Table<T> wide(3, 70), narrow(3, 70);
  wide.targets = {69, -100, 3};
  wide.run(isa, wide.inputs());
  // Off the alignment of 8 bytes, as the slice of a tensor is.
  const std::vector<int32_t> ids{0, 69, -100, 3};
  RowInputs<T> in = narrow.inputs();
  in.targets.data = ids.data() + 1;
  in.targets.is_int64 = false;
  narrow.run(isa, in);
  for (int64_t row = 0; row < 3; ++row) {
    CHECK(wide.log_prob(row) == narrow.log_prob(row));
    for (int64_t i = 0; i < 70; ++i) CHECK(wide.gradient(row, i) == narrow.gradient(row, i));
  }
}

// Probability targets that hold one 1 are class indices.
template <typename T>
void test_one_hot_probabilities_are_indices(cpu::Isa isa) {
  Table<T> by_index(3, 41), by_probability(3, 41);
  by_index.targets = {0, 40, 17};
  by_index.run(isa, by_index.inputs());
  std::vector<T> q(3 * 41);
  for (T& v : q) from_real(real_t<T>(0), v);
  for (int64_t row = 0; row < 3; ++row) {
    from_real(real_t<T>(1), q[size_t(row * 41 + by_index.targets[size_t(row)])]);
  }
  RowInputs<T> in = by_probability.inputs();
  in.targets.data = nullptr;
  in.weights = {nullptr, q.data(), {3, 0, 41}, 1, 0};
  LossOptions<real_t<T>> options;
  options.probability_targets = true;
  by_probability.run(isa, in, options);
  for (int64_t row = 0; row < 3; ++row) {
    CHECK_CLOSE(by_probability.mean_log_prob(row), by_index.log_prob(row), 1e-6);
    for (int64_t i = 0; i < 41; ++i) {
      CHECK_CLOSE(by_probability.gradient(row, i), by_index.gradient(row, i), 4e-3);
    }
  }
}

// nan and +inf, in the vectors and in the tail, spoil their own row and no other.
template <typename T>
void test_spoilt_rows(cpu::Isa isa) {
  for (const double bad : {nan, inf}) {
    for (const int64_t column : {1, 64, 2048, 2058}) {
      Table<T> table(3, 2059), clean(3, 2059);
      clean.run(isa, clean.inputs());
      table.set(1, column, bad);
      table.run(isa, table.inputs());
      CHECK(std::isnan(table.log_prob(1)));
      CHECK(table.argmax(1) == -1 && table.rank(1) == 2059);
      for (const int64_t row : {0, 2}) {
        CHECK(table.log_prob(row) == clean.log_prob(row));
        for (int64_t i = 0; i < 2059; ++i) CHECK(table.gradient(row, i) == clean.gradient(row, i));
      }
    }
  }
}

// A row of -inf has no distribution; -inf in a whole block of another row changes nothing.
template <typename T>
void test_rows_of_minus_infinity(cpu::Isa isa) {
  Table<T> table(2, 4100);
  for (int64_t i = 0; i < 4100; ++i) table.set(0, i, -inf);
  for (int64_t i = 0; i < 4100; ++i) table.set(1, i, i == 4099 ? 1.5 : -inf);
  table.targets = {0, 4099};
  RowInputs<T> in = table.inputs();
  in.weights.beta = 0;
  table.run(isa, in);
  CHECK(std::isnan(table.log_prob(0)) && table.lse(0) == -inf);
  CHECK(table.log_prob(1) == 0 && table.lse(1) == 1.5);
  CHECK(table.argmax(1) == 4099 && table.rank(1) == 0);
  for (int64_t i = 0; i < 4100; ++i) CHECK(table.gradient(1, i) == 0);
}

template <typename T>
void test_scale(cpu::Isa isa) {
  for (const int64_t count : {0, 1, 7, 33, 130}) {
    Table<T> table(1, count + 1);
    std::vector<T> data(table.logits.begin() + 1, table.logits.end());  // exactly `count`
    cpu::kernels<T>(isa).scale(data.data(), count, real_t<T>(0.5));
    for (int64_t i = 0; i < count; ++i) {
      CHECK(to_real(data[size_t(i)]) == to_real(table.logits[size_t(i + 1)]) / 2);
    }
  }
}

// Vectors round as from_real does: to nearest, ties to even, and nan stays nan. Half of the
// products are ties. (The conversion of AVX512_BF16 flushes subnormal numbers.)
template <typename T>
void test_rounding(cpu::Isa isa) {
  if constexpr (sizeof(T) == 2) {
    std::vector<T> data(1 << 16);
    for (size_t i = 0; i < data.size(); ++i) data[i].bits = uint16_t(i);
    const std::vector<T> before = data;
    cpu::kernels<T>(isa).scale(data.data(), int64_t(data.size()), 1.5f);
    for (size_t i = 0; i < data.size(); ++i) {
      const float product = to_real(before[i]) * 1.5f;
      T expected;
      from_real(product, expected);
      const float found = to_real(data[i]);
      if (std::isnan(product)) {
        CHECK(std::isnan(found));
      } else if (std::abs(product) >= std::numeric_limits<float>::min()) {
        CHECK(found == to_real(expected));
      }
    }
  }
}

template <typename T>
void run_all(cpu::Isa isa) {
  test_rounding<T>(isa);
  test_targets_out_of_range<T>(isa);
  test_int32_targets_are_int64_targets<T>(isa);
  test_one_hot_probabilities_are_indices<T>(isa);
  test_spoilt_rows<T>(isa);
  test_rows_of_minus_infinity<T>(isa);
  test_scale<T>(isa);
}

void test_choice_of_instruction_set() {
  const auto asked = [](const char* name) {
    setenv("LLMLOSS_CPU_ISA", name, 1);
    return cpu::active_isa();
  };
  CHECK(asked("portable") == cpu::Isa::portable);
  for (const cpu::Isa isa : cpu::all_isas) {
    CHECK(asked(std::string(cpu::name_of(isa)).c_str()) ==
          (cpu::has_isa(isa) ? isa : cpu::detected_isa()));
  }
#if defined(__aarch64__)
  CHECK(asked("avx2") == cpu::Isa::neon);
#endif
  unsetenv("LLMLOSS_CPU_ISA");
  CHECK(cpu::active_isa() == cpu::detected_isa());
}

}  // namespace

int main() {
  test_choice_of_instruction_set();
  for (const cpu::Isa isa : cpu::all_isas) {
    if (!cpu::has_isa(isa)) continue;
    run_all<float>(isa);
    run_all<double>(isa);
    run_all<BFloat16>(isa);
    run_all<Half>(isa);
  }
}
