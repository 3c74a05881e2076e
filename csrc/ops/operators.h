// The operators, once for every device. A Backend knows how to run the kernels:
//   row_stats, row_grad, fused           over RowInputs<T>
//   denominator, reduce_loss, mean_loss  over LossRows<Real>
//   sum                                  of one number a row
//   scale                                a tensor by a number that lies on the device
//   merge_shards                         over ShardRows<Real>
//   new_gradient, check_targets
#pragma once

#include <array>
#include <tuple>
#include <utility>

#include "../core/shards.h"
#include "arguments.h"
#include "library.h"

namespace llmloss::ops {

template <typename Backend>
struct Operators {
  using Tensors = std::vector<Tensor>;
  using MaybeTensors = std::vector<MaybeTensor>;

  // The state, and a tensor for each statistic, in the order of Stat. Bit i of `wanted` asks for
  // statistic i; what is not asked for has no elements.
  static Tensors token_stats(Tensor input, Tensor target, MaybeTensor weight,
                             MaybeTensor logit_scale, Floats floats, Ints ints, int64_t wanted) {
    const LogitArguments logits = logits_of(weight, logit_scale, floats, ints);
    STD_TORCH_CHECK(wanted >= 0 && wanted >> Stat::count == 0, "llmloss: wanted has bits for ",
                    Stat::count, " statistics, got ", wanted);
    return dispatch(input, [&]<typename T>() -> Tensors {
      const Problem<T> problem(input, target, logits);
      Backend backend(input);
      backend.check_targets(problem);
      Results<real_t<T>> results(input, problem.row_shape(), problem.rows.rows, wanted);
      backend.row_stats(problem.rows, results.outputs);
      return std::move(results.tensors);
    });
  }

  // The gradients of the input and of logit_scale (no elements unless asked) from those of the
  // float statistics; a statistic without a gradient passes none. `stats` are the float statistics
  // that forward returned; those whose value no gradient needs may have no elements.
  static std::tuple<Tensor, Tensor> token_stats_backward(MaybeTensors grads, Tensor input,
                                                         Tensor target, MaybeTensor weight,
                                                         MaybeTensor logit_scale, Floats floats,
                                                         Ints ints, Tensors stats, Tensor state,
                                                         bool with_grad_scale) {
    const Tensor grad_input = Backend(input).new_gradient(input);
    const Tensor grad_scale = token_stats_backward_into(
        grad_input, grads, input, target, logits_of(weight, logit_scale, floats, ints), stats,
        state, with_grad_scale);
    return {grad_input, grad_scale};
  }

  // The same, with the input's gradient written over the input.
  static Tensor token_stats_backward_inplace(MaybeTensors grads, Tensor input, Tensor target,
                                             MaybeTensor weight, MaybeTensor logit_scale,
                                             Floats floats, Ints ints, Tensors stats, Tensor state,
                                             bool with_grad_scale) {
    check_writable(input);
    return token_stats_backward_into(input, grads, input, target,
                                     logits_of(weight, logit_scale, floats, ints), stats, state,
                                     with_grad_scale);
  }

  // loss, state, denominator. The loss has the target's shape without a reduction, else no
  // dimensions; the state holds the statistics that the loss reads after its own fields; the
  // denominator has no elements unless the reduction is the mean.
  static std::tuple<Tensor, Tensor, Tensor> cross_entropy(
      Tensor input, Tensor target, MaybeTensor weight, MaybeTensor token_weight,
      MaybeTensor num_items, MaybeTensor logit_scale, Floats floats, Ints ints) {
    const LossCall call(weight, token_weight, num_items, logit_scale, floats, ints);
    return dispatch(input, [&]<typename T>() -> std::tuple<Tensor, Tensor, Tensor> {
      const Loss<T> loss(input, target, call);
      Backend backend(input);
      backend.check_targets(loss.problem);
      backend.row_stats(loss.problem.rows, loss.outputs);
      const auto [reduced, denominator] = loss.reduce(backend);
      return {reduced, loss.state, denominator};
    });
  }

  // The gradients of the input and of logit_scale (no elements unless asked).
  static std::tuple<Tensor, Tensor> cross_entropy_backward(
      Tensor grad_loss, Tensor input, Tensor target, MaybeTensor weight, MaybeTensor token_weight,
      MaybeTensor logit_scale, Floats floats, Ints ints, Tensor state, Tensor denominator,
      bool with_grad_scale) {
    const LossCall call(weight, token_weight, std::nullopt, logit_scale, floats, ints);
    const Tensor grad_input = Backend(input).new_gradient(input);
    const Tensor grad_scale = cross_entropy_backward_into(
        grad_input, grad_loss, input, target, call, state, denominator, with_grad_scale);
    return {grad_input, grad_scale};
  }

  // The same, with the input's gradient written over the input.
  static Tensor cross_entropy_backward_inplace(Tensor grad_loss, Tensor input, Tensor target,
                                               MaybeTensor weight, MaybeTensor token_weight,
                                               MaybeTensor logit_scale, Floats floats, Ints ints,
                                               Tensor state, Tensor denominator,
                                               bool with_grad_scale) {
    check_writable(input);
    const LossCall call(weight, token_weight, std::nullopt, logit_scale, floats, ints);
    return cross_entropy_backward_into(input, grad_loss, input, target, call, state, denominator,
                                       with_grad_scale);
  }

  // Loss and gradient in one visit: the gradient of the loss, times 1, is written over the input.
  // Returns the loss and the gradient of logit_scale (no elements unless asked).
  static std::tuple<Tensor, Tensor> cross_entropy_fused(Tensor input, Tensor target,
                                                        MaybeTensor weight,
                                                        MaybeTensor token_weight,
                                                        MaybeTensor num_items,
                                                        MaybeTensor logit_scale, Floats floats,
                                                        Ints ints, bool with_grad_scale) {
    check_writable(input);
    const LossCall call(weight, token_weight, num_items, logit_scale, floats, ints);
    return dispatch(input, [&]<typename T>() -> std::tuple<Tensor, Tensor> {
      const Loss<T> loss(input, target, call);
      Backend backend(input);
      backend.check_targets(loss.problem);
      const Tensor denominator = loss.denominator(backend);  // before: the coefficients need it
      GradSource<real_t<T>> source = loss.source();
      source.denominator = mean_of<real_t<T>>(denominator);
      GradRows<T> grad(input, loss.problem.rows.rows, with_grad_scale);
      backend.fused(loss.problem.rows, loss.outputs, source, grad.outputs());
      return {loss.reduce(backend, denominator), grad.sum(backend)};
    });
  }

  // The state and the statistics of whole rows, as token_stats returns them (the rank has no
  // elements), and the number of ranks that have the target; from the statistics of each rank's
  // columns, (ranks, ShardField, rows). `target` holds classes of all ranks.
  static Tensors merge_shards(Tensor shard_stats, Tensor target, int64_t ignore_index,
                              int64_t vocab_size) {
    return dispatch(shard_stats, [&]<typename T>() -> Tensors {
      using Real = real_t<T>;
      STD_TORCH_CHECK(shard_stats.scalar_type() == scalar_type_of<Real> && shard_stats.dim() == 3 &&
                          shard_stats.size(1) == ShardField::count && shard_stats.is_contiguous(),
                      "llmloss: expected (ranks, ", ShardField::count,
                      ", rows) contiguous float32 or float64");
      STD_TORCH_CHECK(vocab_size <= int64_t{1} << 24, "llmloss: at most 2^24 classes over ranks");
      const int64_t rows = shard_stats.size(2);
      check_device(target, shard_stats, "target");
      STD_TORCH_CHECK(
          is_integer(target.scalar_type()) && target.numel() == rows && target.is_contiguous(),
          "llmloss: expected ", rows, " contiguous int64 or int32 targets");
      constexpr int64_t all_but_rank = (int64_t{1} << Stat::count) - 1 - (int64_t{1} << Stat::rank);
      Results<Real> results(shard_stats, std::array{rows}, rows, all_but_rank);
      const Tensor owners = new_real<Real>(shard_stats, {rows});
      const Targets targets{target.data_ptr(), target.scalar_type() == ScalarType::Long,
                            ignore_index};
      Backend(shard_stats)
          .merge_shards(ShardRows<Real>{data<Real>(shard_stats), shard_stats.size(0), rows, targets,
                                        vocab_size},
                        results.outputs, data<Real>(owners));
      results.tensors.push_back(owners);
      return std::move(results.tensors);
    });
  }

  // x *= factor; touches no memory where the factor is 1.
  static void scale(Tensor x, Tensor factor) {
    check_writable(x);
    dispatch(x, [&]<typename T>() {
      STD_TORCH_CHECK(factor.numel() == 1 && factor.device() == x.device(),
                      "llmloss: the factor must hold one number on the tensor's device");
      const Tensor real = as_real<real_t<T>>(factor);
      const RowLayout layout = layout_of(x);
      const int64_t columns = x.size(x.dim() - 1);
      Backend(x).template scale<T>(data<T>(x), layout, columns == 0 ? 0 : x.numel() / columns,
                                   columns, data<real_t<T>>(real));
    });
  }

 private:
  static void check_writable(const Tensor& t) {
    layout_of(t);
    STD_TORCH_CHECK(
        !rows_overlap(t),
        "llmloss: unsupported operation: more than one element of the written-to tensor "
        "refers to a single memory location. Please clone() it before the operation.");
  }

  static LogitArguments logits_of(const MaybeTensor& weight, const MaybeTensor& logit_scale,
                                  const Floats& floats, const Ints& ints) {
    LogitArguments logits{weight, logit_scale, {}};
    OptionReader::read(floats, ints, logits.options);
    return logits;
  }

  // The arguments that every operator of a loss takes.
  struct LossCall {
    LossCall(const MaybeTensor& weight, const MaybeTensor& token_weight,
             const MaybeTensor& num_items, const MaybeTensor& logit_scale, const Floats& floats,
             const Ints& ints)
        : logits{weight, logit_scale, {}}, loss{token_weight, num_items, {}} {
      OptionReader::read(floats, ints, logits.options, loss.options);
    }

    LogitArguments logits;
    LossArguments loss;
  };

  // Memory for the state and for the statistics of a mask, of one number a row.
  template <typename Real>
  struct Results {
    Results(const Tensor& like, std::span<const int64_t> shape, int64_t rows, int64_t wanted) {
      const int64_t none[] = {0};
      const Tensor state = new_real<Real>(like, {StateField::count, rows});
      tensors.reserve(Stat::count + 2);
      tensors.push_back(state);
      outputs.state = state_rows<Real>(state);
      for (int stat = 0; stat < Stat::count; ++stat) {
        const bool is_float = stat < Stat::float_count, is_wanted = wanted >> stat & 1;
        const Tensor tensor = new_tensor(like, is_wanted ? shape : none,
                                         is_float ? scalar_type_of<Real> : ScalarType::Long);
        tensors.push_back(tensor);
        if (!is_wanted) continue;
        if (is_float) {
          outputs.floats[stat] = data<Real>(tensor);
        } else {
          outputs.integers[stat] = data<int64_t>(tensor);
        }
      }
    }

    Tensors tensors;  // the state, then one for each statistic
    RowOutputs<Real> outputs;
  };

  // The gradient's memory, with a row of numbers for the scale's where asked.
  template <typename T>
  struct GradRows {
    using Real = real_t<T>;

    GradRows(const Tensor& grad, int64_t rows, bool with_grad_scale)
        : grad(grad),
          scale_rows(new_real<Real>(grad, {with_grad_scale ? rows : 0})),
          with_grad_scale(with_grad_scale) {}

    GradOutputs<T> outputs() const {
      return {data<T>(grad), layout_of(grad), with_grad_scale ? data<Real>(scale_rows) : nullptr};
    }

    Tensor sum(Backend& backend) const {
      if (!with_grad_scale) return scale_rows;
      const Tensor total = new_real<Real>(grad, {});
      backend.sum(data<Real>(scale_rows), scale_rows.numel(), data<Real>(total));
      return total;
    }

    Tensor grad;
    Tensor scale_rows;
    bool with_grad_scale;
  };

  template <typename T>
  static Tensor write_gradient(Backend& backend, const Problem<T>& problem,
                               const RowOutputs<real_t<T>>& written,
                               const GradSource<real_t<T>>& source, const Tensor& grad_input,
                               bool with_grad_scale) {
    GradRows<T> grad(grad_input, problem.rows.rows, with_grad_scale);
    backend.row_grad(problem.rows, SavedStats<real_t<T>>::needed_by(source, written), source,
                     grad.outputs());
    return grad.sum(backend);
  }

  static Tensor token_stats_backward_into(const Tensor& grad_input, const MaybeTensors& grads,
                                          const Tensor& input, const Tensor& target,
                                          const LogitArguments& logits, const Tensors& stats,
                                          const Tensor& state, bool with_grad_scale) {
    STD_TORCH_CHECK(grads.size() == Stat::float_count && stats.size() == Stat::float_count,
                    "llmloss: expected gradients and values of ", Stat::float_count,
                    " statistics, got ", grads.size(), " and ", stats.size());
    return dispatch(input, [&]<typename T>() -> Tensor {
      using Real = real_t<T>;
      const Problem<T> problem(input, target, logits);
      const int64_t rows = problem.rows.rows;
      GradSource<Real> source;
      RowOutputs<Real> written;
      written.state = state_rows<Real>(checked_state<Real>(state, input, StateField::count, rows));
      FloatStats<MaybeTensor> real;
      for (int stat = 0; stat < Stat::float_count; ++stat) {
        real[stat] = as_real<Real>(grads[stat]);
        if (real[stat].has_value()) {
          check_device(*real[stat], input, "a statistic's gradient");
          STD_TORCH_CHECK(real[stat]->numel() == rows,
                          "llmloss: a statistic's gradient must have one number per row");
        }
        source.grads[stat] = pointer<Real>(real[stat]);
        const Tensor& value = stats[stat];
        const bool is_needed = real[stat].has_value() && gradient_needs_value(stat);
        check_device(value, input, Stat::names[stat]);
        STD_TORCH_CHECK(value.scalar_type() == scalar_type_of<Real> && value.is_contiguous() &&
                            (value.numel() == rows || (value.numel() == 0 && !is_needed)),
                        "llmloss: ", Stat::names[stat], " must be what forward returned");
        if (value.numel() > 0) written.floats[stat] = data<Real>(value);
      }
      Backend backend(input);
      return write_gradient(backend, problem, written, source, grad_input, with_grad_scale);
    });
  }

  static Tensor cross_entropy_backward_into(const Tensor& grad_input, const Tensor& grad_loss,
                                            const Tensor& input, const Tensor& target,
                                            const LossCall& call, const Tensor& state,
                                            const Tensor& denominator, bool with_grad_scale) {
    return dispatch(input, [&]<typename T>() -> Tensor {
      using Real = real_t<T>;
      const Loss<T> loss(input, target, call, state);
      const Tensor grad = as_real<Real>(grad_loss);
      check_device(grad, input, "the loss's gradient");
      STD_TORCH_CHECK(grad.numel() == 1 || grad.numel() == loss.problem.rows.rows,
                      "llmloss: the loss's gradient must have one number, or one per row");
      check_device(denominator, input, "denominator");
      STD_TORCH_CHECK(
          denominator.scalar_type() == scalar_type_of<Real> &&
              (denominator.numel() == 0 || denominator.numel() == MeanDenominator<Real>::count),
          "llmloss: denominator must be what forward returned");
      GradSource<Real> source = loss.source();
      source.grad_loss = data<Real>(grad);
      source.grad_loss_stride = grad.numel() == 1 ? 0 : 1;
      source.denominator = mean_of<Real>(denominator);
      Backend backend(input);
      return write_gradient(backend, loss.problem, loss.outputs, source, grad_input,
                            with_grad_scale);
    });
  }

  // A cross entropy: its options, and the statistics of its rows.
  template <typename T>
  struct Loss {
    using Real = real_t<T>;

    Loss(const Tensor& input, const Tensor& target, const LossCall& call,
         const MaybeTensor& saved_state = std::nullopt)
        : problem(input, target, call.logits, call.loss.options.loss.label_smoothing),
          arguments(call.loss),
          token_weight(as_real<Real>(arguments.token_weight)),
          num_items(as_real<Real>(arguments.num_items)),
          options(arguments.options.template checked<Real>(!problem.has_indices())),
          state(saved_state.has_value()
                    ? checked_state<Real>(*saved_state, input, fields(), problem.rows.rows)
                    : new_real<Real>(input, {fields(), problem.rows.rows})) {
      const int64_t rows = problem.rows.rows;
      outputs.state = state_rows<Real>(state);
      int64_t field = StateField::count;
      for (int stat = 0; stat < Stat::float_count; ++stat) {
        if (options.reads(stat)) outputs.floats[stat] = data<Real>(state) + field++ * rows;
      }
      if (!token_weight.has_value()) return;
      check_device(*token_weight, input, "token_weight");
      STD_TORCH_CHECK(token_weight->numel() == rows,
                      "llmloss: token_weight must have one number per row");
    }

    LossRows<Real> rows() const {
      LossRows<Real> rows;
      rows.options = options;
      rows.targets = problem.rows.targets;
      rows.rows = problem.rows.rows;
      rows.vocab_size = problem.rows.vocab_size;
      rows.class_weight = problem.rows.weights.class_weight;
      rows.token_weight = pointer<Real>(token_weight);
      rows.stats = outputs.floats.template as<const Real*>();
      return rows;
    }

    GradSource<Real> source() const {
      GradSource<Real> source;
      source.from_loss = true;
      source.options = options;
      source.token_weight = pointer<Real>(token_weight);
      return source;
    }

    // The numbers of MeanDenominator; none without a mean.
    Tensor denominator(Backend& backend) const {
      const Tensor denominator = new_denominator();
      if (is_mean()) backend.denominator(counted_rows(), data<Real>(denominator));
      return denominator;
    }

    Tensor reduce(Backend& backend, const Tensor& denominator) const {
      const Tensor loss = new_loss();
      LossRows<Real> of_loss = rows();
      of_loss.denominator = mean_of<Real>(denominator);
      backend.reduce_loss(of_loss, arguments.reduction(), data<Real>(loss));
      return loss;
    }

    // The loss and the denominator.
    std::pair<Tensor, Tensor> reduce(Backend& backend) const {
      const Tensor denominator = new_denominator();
      if (!is_mean()) return {reduce(backend, denominator), denominator};
      const Tensor loss = new_loss();
      backend.mean_loss(counted_rows(), data<Real>(denominator), data<Real>(loss));
      return {loss, denominator};
    }

    Problem<T> problem;
    LossArguments arguments;
    MaybeTensor token_weight, num_items;
    LossOptions<Real> options;
    Tensor state;              // of backward, then the statistics that the loss reads
    RowOutputs<Real> outputs;  // in `state`

   private:
    bool is_mean() const { return arguments.reduction() == Reduction::mean; }

    Tensor new_loss() const {
      return new_real<Real>(problem.input, arguments.reduction() != Reduction::none
                                               ? std::vector<int64_t>{}
                                               : problem.row_shape());
    }

    Tensor new_denominator() const {
      return new_real<Real>(problem.input, {is_mean() ? MeanDenominator<Real>::count : 0});
    }

    // With what the caller says of the denominator.
    LossRows<Real> counted_rows() const {
      LossRows<Real> counted = rows();
      counted.num_items = pointer<Real>(num_items);
      if (!num_items.has_value()) return counted;
      check_device(*num_items, problem.input, "num_items");
      STD_TORCH_CHECK(num_items->numel() == 1 || num_items->numel() == MeanDenominator<Real>::count,
                      "llmloss: num_items must hold one number, or a denominator and the "
                      "z-loss's factor");
      if (num_items->numel() > 1) counted.z_factor = counted.num_items + 1;
      return counted;
    }

    // Rows of the state.
    int64_t fields() const {
      int64_t count = StateField::count;
      for (int stat = 0; stat < Stat::float_count; ++stat) count += options.reads(stat);
      return count;
    }
  };
};

// The kernels of every schema of library.cpp that takes tensors.
template <typename Backend>
void register_operators(Library& m) {
  using Device = Operators<Backend>;
  m.impl("token_stats", TORCH_BOX(&Device::token_stats));
  m.impl("token_stats_backward", TORCH_BOX(&Device::token_stats_backward));
  m.impl("token_stats_backward_", TORCH_BOX(&Device::token_stats_backward_inplace));
  m.impl("cross_entropy", TORCH_BOX(&Device::cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&Device::cross_entropy_backward));
  m.impl("cross_entropy_backward_", TORCH_BOX(&Device::cross_entropy_backward_inplace));
  m.impl("cross_entropy_fused_", TORCH_BOX(&Device::cross_entropy_fused));
  m.impl("merge_shards", TORCH_BOX(&Device::merge_shards));
  m.impl("scale_", TORCH_BOX(&Device::scale));
}

}  // namespace llmloss::ops
