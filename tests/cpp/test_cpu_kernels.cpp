// The CPU kernels of every instruction set against plain double loops: odd sizes, every alignment,
// strided rows, and buffers that end where the row ends (AddressSanitizer watches the edges).
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"

using namespace llmloss;

namespace {

std::mt19937 random_bits(7);

template <typename T>
struct Case {
  using Real = real_t<T>;
  int64_t rows, columns, vocab_size, offset, stride;
  Real scale, cap;
  bool weighted;
};

template <typename T>
constexpr double tolerance() {
  return sizeof(T) == 8 ? 1e-12 : 3e-6;
}

// How far a gradient of order 1 may be from the exact one: a few units in the last place of
// storage.
template <typename T>
constexpr double store_tolerance() {
  if (std::is_same_v<T, BFloat16>) return 5e-3;
  return std::is_same_v<T, Half> ? 6e-4 : tolerance<T>();
}

template <typename T>
void run(cpu::Isa isa, const Case<T>& c) {
  using Real = real_t<T>;
  std::normal_distribution<double> normal(0, 4);
  // A buffer of exactly the needed size: one element more is out of bounds.
  std::vector<T> z(size_t(c.offset + (c.rows - 1) * c.stride + c.columns));
  for (T& v : z) from_real(Real(normal(random_bits)), v);
  T* first = z.data() + c.offset;
  if (c.columns > 2) from_real(-std::numeric_limits<Real>::infinity(), first[c.columns / 2]);
  std::vector<int64_t> targets(size_t(c.rows)), order(size_t(c.rows));
  for (int64_t row = 0; row < c.rows; ++row) {
    targets[size_t(row)] = int64_t(random_bits() % uint32_t(c.vocab_size));
    order[size_t(row)] = row;
  }
  if (c.rows > 2) targets[1] = -100;
  if (targets[0] == c.columns / 2 && c.vocab_size > 1) targets[0] = (targets[0] + 1) % c.vocab_size;
  std::vector<Real> weight(size_t(c.columns));
  for (Real& w : weight) w = Real(random_bits() % 5) / 4;
  weight[size_t(c.columns / 2)] = 0;  // a weight of 0 takes the -inf column out of the mean

  RowInputs<T> in;
  in.logits = first;
  in.layout = {c.rows, 0, c.stride};
  in.rows = c.rows;
  in.columns = c.columns;
  in.vocab_size = c.vocab_size;
  in.transform = {c.scale, c.cap};
  in.targets.data = targets.data();
  in.weights.beta = Real(1) / Real(c.vocab_size);
  if (c.weighted) in.weights.class_weight = weight.data();
  FloatStats<std::vector<Real>> out;
  StateFields<std::vector<Real>> state;
  IntegerStats<std::vector<int64_t>> order_of;
  RowOutputs<Real> outputs;
  for (int stat = 0; stat < Stat::float_count; ++stat) {
    out[stat].assign(size_t(c.rows), Real(-12345));
    outputs.floats[stat] = out[stat].data();
  }
  for (int field = 0; field < StateField::count; ++field) {
    state[field].resize(size_t(c.rows));
    outputs.state[field] = state[field].data();
  }
  for (int stat = Stat::float_count; stat < Stat::count; ++stat) {
    order_of[stat].resize(size_t(c.rows));
    outputs.integers[stat] = order_of[stat].data();
  }
  const auto &argmax = order_of[Stat::argmax], &rank = order_of[Stat::rank];
  const auto& kernels = cpu::kernels<T>(isa);
  kernels.row_stats(in, outputs, order.data(), c.rows);

  FloatStats<std::vector<Real>> up;
  GradSource<Real> source;
  for (int stat = 0; stat < Stat::float_count; ++stat) {
    for (int64_t row = 0; row < c.rows; ++row) up[stat].push_back(Real(normal(random_bits)));
    source.grads[stat] = up[stat].data();
  }
  std::vector<T> grad(size_t(c.rows * c.columns));
  std::memset(static_cast<void*>(grad.data()), 0xff, grad.size() * sizeof(T));
  std::vector<Real> grad_scale(size_t(c.rows));
  const auto saved = SavedStats<Real>::needed_by(source, outputs);
  kernels.row_grad(in, saved, source, {grad.data(), {c.rows, 0, c.columns}, grad_scale.data()},
                   order.data(), c.rows);

  for (int64_t row = 0; row < c.rows; ++row) {
    const size_t r = size_t(row);
    const T* g = grad.data() + row * c.columns;
    if (targets[r] == -100) {
      CHECK(out[Stat::log_prob][r] == 0 && out[Stat::lse][r] == 0 && argmax[r] == -1 &&
            rank[r] == c.vocab_size);
      for (int64_t i = 0; i < c.columns; ++i) CHECK(to_real(g[i]) == 0);
      continue;
    }
    const auto transform = LogitTransform<double>{double(c.scale), double(c.cap)}.resolved();
    const auto tanh = [](double x) { return tanh_of(x); };
    std::vector<double> x(size_t(c.vocab_size));
    double max = -INFINITY, sum = 0, entropy = 0, squares = 0, mean = 0, weights = 0;
    for (int64_t i = 0; i < c.vocab_size; ++i) {
      x[size_t(i)] = transform.apply(to_real(first[row * c.stride + i]), tanh);
      max = std::fmax(max, x[size_t(i)]);
    }
    for (const double v : x) sum += std::exp(v - max);
    const auto log_p = [&](int64_t i) { return (x[size_t(i)] - max) - std::log(sum); };
    const auto a = [&](int64_t i) {
      return (c.weighted ? double(weight[size_t(i)]) : 1.0) / double(c.vocab_size);
    };
    for (int64_t i = 0; i < c.vocab_size; ++i) {
      if (x[size_t(i)] > -INFINITY) entropy -= std::exp(log_p(i)) * log_p(i);
      squares += std::exp(2 * log_p(i));
      if (a(i) != 0) mean += a(i) * log_p(i);
      weights += a(i);
    }
    const double t = tolerance<T>();
    CHECK_CLOSE(out[Stat::log_prob][r], log_p(targets[r]), t);
    CHECK_CLOSE(out[Stat::lse][r], max + std::log(sum), t);
    CHECK_CLOSE(out[Stat::entropy][r], entropy, t * 3);
    CHECK_CLOSE(out[Stat::mean_log_prob][r], mean, t * 3);
    CHECK_CLOSE(out[Stat::log_sum_sq_probs][r], std::log(squares), t * 3);
    CHECK(x[size_t(argmax[r])] >= max - 1e-5);
    double expected_scale = 0;
    for (int64_t i = 0; i < c.columns; ++i) {
      if (i >= c.vocab_size) {
        CHECK(to_real(g[i]) == 0);
        continue;
      }
      const double p = std::exp(log_p(i));
      double dx = up[Stat::lse][r] * p + up[Stat::mean_log_prob][r] * (a(i) - p * weights) +
                  up[Stat::log_prob][r] * ((i == targets[r]) - p);
      if (p > 0) dx -= up[Stat::entropy][r] * p * (log_p(i) + entropy);
      dx += up[Stat::log_sum_sq_probs][r] * 2 * p * (p / squares - 1);
      const auto chain = transform.with_derivatives(to_real(first[row * c.stride + i]), tanh);
      CHECK_CLOSE(to_real(g[i]), dx * chain.dx_dz, store_tolerance<T>() * 20);
      if (chain.dx_dscale > -INFINITY && dx != 0) expected_scale += dx * chain.dx_dscale;
    }
    if (std::isfinite(expected_scale) && !(c.weighted == false && c.cap == 0)) {
      CHECK_CLOSE(grad_scale[r], expected_scale, t * 200);
    }
  }

  // The fused kernel, in place, against the two kernels.
  GradSource<Real> loss;
  loss.from_loss = true;
  loss.options.label_smoothing = Real(0.1);
  loss.options.z_loss = Real(0.01);
  if (c.scale != Real(1)) loss.options.focal_gamma = Real(1.5);
  kernels.row_grad(in, SavedStats<Real>::needed_by(loss, outputs), loss,
                   {grad.data(), {c.rows, 0, c.columns}, nullptr}, order.data(), c.rows);
  std::vector<T> before = z;
  for (int stat = 0; stat < Stat::float_count; ++stat) {
    if (!loss.options.reads(stat)) outputs.floats[stat] = nullptr;
  }
  kernels.fused(in, outputs, loss, {first, in.layout, nullptr}, order.data(), c.rows);
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t i = 0; i < c.columns; ++i) {
      const double fused = to_real(first[row * c.stride + i]);
      const double separate = to_real(grad[size_t(row * c.columns + i)]);
      CHECK(std::isnan(fused) == std::isnan(separate));
      if (!std::isnan(fused)) CHECK_CLOSE(fused, separate, store_tolerance<T>() * 20);
    }
    for (int64_t i = c.columns; row + 1 < c.rows && i < c.stride; ++i) {  // between the rows
      CHECK(std::memcmp(&first[row * c.stride + i], &before[size_t(c.offset + row * c.stride + i)],
                        sizeof(T)) == 0);
    }
  }
}

template <typename T>
void run_all() {
  using Real = real_t<T>;
  for (const cpu::Isa isa : cpu::all_isas) {
    if (!cpu::has_isa(isa)) continue;
    // 1: a row of one column; 17: a vector and one; 67, 131: tails; 2053: a block and a tail.
    for (const int64_t columns : {1, 2, 15, 16, 17, 67, 131, 2048, 2053, 4099}) {
      for (const int64_t offset : {0, 1, 3}) {
        const int64_t stride = columns + offset;
        const int64_t vocab = offset == 3 && columns > 2 ? columns - 2 : columns;
        run<T>(isa, {3, columns, vocab, offset, stride, Real(1), Real(0), offset == 1});
        run<T>(isa, {3, columns, vocab, offset, stride, Real(0.5), Real(0), true});
        run<T>(isa, {2, columns, vocab, offset, stride, Real(1.5), Real(5), offset == 0});
      }
    }
  }
}

}  // namespace

int main() {
  run_all<float>();
  run_all<double>();
  run_all<BFloat16>();
  run_all<Half>();
}
