// The operators, once for every device. A Backend knows how to run the kernels:
//   row_stats, row_grad, fused           over RowInputs<T>
//   denominator, reduce_loss             over LossRows<Real>
//   sum                                  of one number a row
//   scale                                a tensor by a number that lies on the device
//   merge_shards                         over ShardRows<Real>
//   new_gradient, check_targets
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "../core/shards.h"
#include "arguments.h"

namespace llmloss::ops {

template <typename Backend>
struct Operators {
  using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  // log_prob, lse, entropy, mean_log_prob, argmax, rank, state. What is not asked has no elements.
  // classes, if not 0: the columns are a shard, a part of so many, and a target of -1 is elsewhere.
  static Stats token_stats(Tensor input, Tensor target, MaybeTensor weight, MaybeTensor logit_scale,
                           double scale, double softcap, int64_t ignore_index, int64_t vocab_size,
                           bool with_entropy, bool with_mean_log_prob, bool with_rank,
                           int64_t classes) {
    return dispatch(input, [&]<typename T>() -> Stats {
      using Real = real_t<T>;
      const Problem<T> problem(
          input, target, {weight, logit_scale, scale, softcap, ignore_index, vocab_size, classes});
      Backend backend(input);
      backend.check_targets(problem);
      const auto shape = problem.row_shape();
      const auto asked = [&](bool is_asked) {
        return is_asked ? new_real<Real>(input, shape) : new_real<Real>(input, {0});
      };
      const auto asked_index = [&](bool is_asked) {
        const int64_t none[] = {0};
        return new_tensor(input, is_asked ? shape : none, ScalarType::Long);
      };
      const Tensor log_prob = asked(true), lse = asked(true), entropy = asked(with_entropy);
      const Tensor mean_log_prob = asked(with_mean_log_prob);
      const Tensor argmax = asked_index(with_rank), rank = asked_index(with_rank);
      const Tensor state = new_real<Real>(input, {State<Real>::size, problem.rows.rows});
      RowOutputs<Real> out;
      out.log_prob = data<Real>(log_prob);
      out.lse = data<Real>(lse);
      if (with_entropy) out.entropy = data<Real>(entropy);
      if (with_mean_log_prob) out.mean_log_prob = data<Real>(mean_log_prob);
      if (with_rank) {
        out.argmax = data<int64_t>(argmax);
        out.rank = data<int64_t>(rank);
      }
      State<Real>(state).write_to(out);
      backend.row_stats(problem.rows, out);
      return {log_prob, lse, entropy, mean_log_prob, argmax, rank, state};
    });
  }

  // The gradients of the input and of logit_scale (no elements unless asked) from those of the
  // statistics; a statistic without a gradient passes none.
  static std::tuple<Tensor, Tensor> token_stats_backward(
      MaybeTensor grad_log_prob, MaybeTensor grad_lse, MaybeTensor grad_entropy,
      MaybeTensor grad_mean_log_prob, Tensor input, Tensor target, MaybeTensor weight,
      MaybeTensor logit_scale, double scale, double softcap, int64_t ignore_index,
      int64_t vocab_size, Tensor entropy, Tensor state, bool with_grad_scale, int64_t classes) {
    const Tensor grad_input = Backend(input).new_gradient(input);
    const Tensor grad_scale = token_stats_backward_into(
        grad_input, {grad_log_prob, grad_lse, grad_entropy, grad_mean_log_prob}, input, target,
        {weight, logit_scale, scale, softcap, ignore_index, vocab_size, classes}, entropy, state,
        with_grad_scale);
    return {grad_input, grad_scale};
  }

  // The same, with the input's gradient written over the input.
  static Tensor token_stats_backward_inplace(
      MaybeTensor grad_log_prob, MaybeTensor grad_lse, MaybeTensor grad_entropy,
      MaybeTensor grad_mean_log_prob, Tensor input, Tensor target, MaybeTensor weight,
      MaybeTensor logit_scale, double scale, double softcap, int64_t ignore_index,
      int64_t vocab_size, Tensor entropy, Tensor state, bool with_grad_scale, int64_t classes) {
    check_writable(input);
    return token_stats_backward_into(
        input, {grad_log_prob, grad_lse, grad_entropy, grad_mean_log_prob}, input, target,
        {weight, logit_scale, scale, softcap, ignore_index, vocab_size, classes}, entropy, state,
        with_grad_scale);
  }

  // loss, state, denominator. The loss has the target's shape without a reduction, else no
  // dimensions; the denominator has no elements unless the reduction is the mean.
  static std::tuple<Tensor, Tensor, Tensor> cross_entropy(
      Tensor input, Tensor target, MaybeTensor weight, MaybeTensor token_weight,
      MaybeTensor num_items, MaybeTensor logit_scale, double scale, double softcap,
      int64_t ignore_index, int64_t vocab_size, double label_smoothing, double z_loss,
      int64_t reduction) {
    return dispatch(input, [&]<typename T>() -> std::tuple<Tensor, Tensor, Tensor> {
      Loss<T> loss(input, target, {weight, logit_scale, scale, softcap, ignore_index, vocab_size},
                   {token_weight, num_items, label_smoothing, z_loss, Reduction(reduction)});
      Backend backend(input);
      backend.check_targets(loss.problem);
      backend.row_stats(loss.problem.rows, loss.outputs());
      const Tensor denominator = loss.denominator(backend);
      return {loss.reduce(backend, denominator), loss.state, denominator};
    });
  }

  // The gradients of the input and of logit_scale (no elements unless asked).
  static std::tuple<Tensor, Tensor> cross_entropy_backward(
      Tensor grad_loss, Tensor input, Tensor target, MaybeTensor weight, MaybeTensor token_weight,
      MaybeTensor logit_scale, double scale, double softcap, int64_t ignore_index,
      int64_t vocab_size, double label_smoothing, double z_loss, Tensor state, Tensor denominator,
      bool with_grad_scale) {
    const Tensor grad_input = Backend(input).new_gradient(input);
    const Tensor grad_scale = cross_entropy_backward_into(
        grad_input, grad_loss, input, target, weight, token_weight, logit_scale, scale, softcap,
        ignore_index, vocab_size, label_smoothing, z_loss, state, denominator, with_grad_scale);
    return {grad_input, grad_scale};
  }

  // The same, with the input's gradient written over the input.
  static Tensor cross_entropy_backward_inplace(Tensor grad_loss, Tensor input, Tensor target,
                                               MaybeTensor weight, MaybeTensor token_weight,
                                               MaybeTensor logit_scale, double scale,
                                               double softcap, int64_t ignore_index,
                                               int64_t vocab_size, double label_smoothing,
                                               double z_loss, Tensor state, Tensor denominator,
                                               bool with_grad_scale) {
    check_writable(input);
    return cross_entropy_backward_into(
        input, grad_loss, input, target, weight, token_weight, logit_scale, scale, softcap,
        ignore_index, vocab_size, label_smoothing, z_loss, state, denominator, with_grad_scale);
  }

  // Loss and gradient in one visit: the gradient of the loss, times 1, is written over the input.
  // Returns the loss and the gradient of logit_scale (no elements unless asked).
  static std::tuple<Tensor, Tensor> cross_entropy_fused(
      Tensor input, Tensor target, MaybeTensor weight, MaybeTensor token_weight,
      MaybeTensor num_items, MaybeTensor logit_scale, double scale, double softcap,
      int64_t ignore_index, int64_t vocab_size, double label_smoothing, double z_loss,
      int64_t reduction, bool with_grad_scale) {
    check_writable(input);
    return dispatch(input, [&]<typename T>() -> std::tuple<Tensor, Tensor> {
      using Real = real_t<T>;
      Loss<T> loss(input, target, {weight, logit_scale, scale, softcap, ignore_index, vocab_size},
                   {token_weight, num_items, label_smoothing, z_loss, Reduction(reduction)});
      Backend backend(input);
      backend.check_targets(loss.problem);
      const Tensor denominator = loss.denominator(backend);  // before: the coefficients need it
      GradSource<Real> source = loss.source();
      source.denominator = pointer<Real>(denominator);
      GradRows<T> grad(input, loss.problem.rows.rows, with_grad_scale);
      backend.fused(loss.problem.rows, loss.outputs(), source, grad.outputs());
      return {loss.reduce(backend, denominator), grad.sum(backend)};
    });
  }

  // log_prob, lse, entropy, mean_log_prob, argmax, state and the number of ranks that have the
  // target, of whole rows: from what each rank says of its columns, (ranks, fields, rows), in the
  // words of shards.h. `target` holds classes of all ranks.
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> merge_shards(
      Tensor said, Tensor target, int64_t ignore_index, int64_t vocab_size) {
    using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
    return dispatch(said, [&]<typename T>() -> Results {
      using Real = real_t<T>;
      STD_TORCH_CHECK(said.scalar_type() == scalar_type_of<Real> && said.dim() == 3 &&
                          said.size(1) == ShardField::count && said.is_contiguous(),
                      "llmloss: expected (ranks, ", ShardField::count,
                      ", rows) contiguous float32 or float64");
      STD_TORCH_CHECK(vocab_size <= int64_t{1} << 24, "llmloss: at most 2^24 classes over ranks");
      const int64_t rows = said.size(2);
      check_device(target, said, "target");
      STD_TORCH_CHECK(
          is_integer(target.scalar_type()) && target.numel() == rows && target.is_contiguous(),
          "llmloss: expected ", rows, " contiguous int64 or int32 targets");
      const auto column = [&] { return new_real<Real>(said, {rows}); };
      const Tensor log_prob = column(), lse = column(), entropy = column(), mean = column();
      const Tensor argmax = new_tensor(said, std::array{rows}, ScalarType::Long);
      const Tensor state = new_real<Real>(said, {State<Real>::size, rows}), owners = column();
      RowOutputs<Real> out;
      out.log_prob = data<Real>(log_prob);
      out.lse = data<Real>(lse);
      out.entropy = data<Real>(entropy);
      out.mean_log_prob = data<Real>(mean);
      out.argmax = data<int64_t>(argmax);
      State<Real>(state).write_to(out);
      const Targets targets{target.data_ptr(), target.scalar_type() == ScalarType::Long,
                            ignore_index};
      Backend(said).merge_shards(
          ShardRows<Real>{data<Real>(said), said.size(0), rows, targets, vocab_size}, out,
          data<Real>(owners));
      return {log_prob, lse, entropy, mean, argmax, state, owners};
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
                               const SavedStats<real_t<T>>& saved,
                               const GradSource<real_t<T>>& source, const Tensor& grad_input,
                               bool with_grad_scale) {
    GradRows<T> grad(grad_input, problem.rows.rows, with_grad_scale);
    backend.row_grad(problem.rows, saved, source, grad.outputs());
    return grad.sum(backend);
  }

  // upstream: of log_prob, lse, entropy, mean_log_prob.
  static Tensor token_stats_backward_into(const Tensor& grad_input,
                                          const std::array<MaybeTensor, 4>& upstream,
                                          const Tensor& input, const Tensor& target,
                                          const LogitArguments& logits, const Tensor& entropy,
                                          const Tensor& state, bool with_grad_scale) {
    return dispatch(input, [&]<typename T>() -> Tensor {
      using Real = real_t<T>;
      const Problem<T> problem(input, target, logits);
      const MaybeTensor grads[] = {as_real<Real>(upstream[0]), as_real<Real>(upstream[1]),
                                   as_real<Real>(upstream[2]), as_real<Real>(upstream[3])};
      for (const MaybeTensor& grad : grads) {
        if (!grad.has_value()) continue;
        check_device(*grad, input, "a statistic's gradient");
        STD_TORCH_CHECK(grad->numel() == problem.rows.rows,
                        "llmloss: a statistic's gradient must have one number per row");
      }
      check_device(entropy, input, "entropy");
      STD_TORCH_CHECK(
          entropy.scalar_type() == scalar_type_of<Real> && entropy.is_contiguous() &&
              (entropy.numel() == problem.rows.rows || (entropy.numel() == 0 && !grads[2])),
          "llmloss: entropy must be what forward returned");
      GradSource<Real> source;
      source.log_prob = pointer<Real>(grads[0]);
      source.lse = pointer<Real>(grads[1]);
      source.entropy = pointer<Real>(grads[2]);
      source.mean_log_prob = pointer<Real>(grads[3]);
      Backend backend(input);
      const State<Real> saved(State<Real>::checked(state, input, problem.rows.rows));
      return write_gradient(backend, problem, saved.saved(pointer<Real>(entropy)), source,
                            grad_input, with_grad_scale);
    });
  }

  static Tensor cross_entropy_backward_into(
      const Tensor& grad_input, const Tensor& grad_loss, const Tensor& input, const Tensor& target,
      const MaybeTensor& weight, const MaybeTensor& token_weight, const MaybeTensor& logit_scale,
      double scale, double softcap, int64_t ignore_index, int64_t vocab_size,
      double label_smoothing, double z_loss, const Tensor& state, const Tensor& denominator,
      bool with_grad_scale) {
    return dispatch(input, [&]<typename T>() -> Tensor {
      using Real = real_t<T>;
      const Loss<T> loss(
          input, target, {weight, logit_scale, scale, softcap, ignore_index, vocab_size},
          {token_weight, std::nullopt, label_smoothing, z_loss, Reduction::none}, state);
      const Tensor grad = as_real<Real>(grad_loss);
      const int64_t rows = loss.problem.rows.rows;
      check_device(grad, input, "the loss's gradient");
      STD_TORCH_CHECK(grad.numel() == 1 || grad.numel() == rows,
                      "llmloss: the loss's gradient must have one number, or one per row");
      check_device(denominator, input, "denominator");
      STD_TORCH_CHECK(denominator.scalar_type() == scalar_type_of<Real> && denominator.numel() <= 1,
                      "llmloss: denominator must be what forward returned");
      const State<Real> saved(State<Real>::checked(state, input, rows));
      GradSource<Real> source = loss.source();
      source.grad_loss = data<Real>(grad);
      source.grad_loss_stride = grad.numel() == 1 ? 0 : 1;
      source.denominator = pointer<Real>(denominator);
      Backend backend(input);
      return write_gradient(backend, loss.problem, saved.saved(), source, grad_input,
                            with_grad_scale);
    });
  }

  // A cross entropy: its options, and the statistics of its rows.
  template <typename T>
  struct Loss {
    using Real = real_t<T>;

    Loss(const Tensor& input, const Tensor& target, const LogitArguments& logits,
         const LossArguments& arguments, const MaybeTensor& saved_state = std::nullopt)
        : problem(input, target, logits, arguments.label_smoothing),
          arguments(arguments),
          token_weight(as_real<Real>(arguments.token_weight)),
          options{Real(arguments.label_smoothing), Real(arguments.z_loss), !problem.has_indices()},
          state(saved_state.has_value()
                    ? *saved_state
                    : new_real<Real>(input, {State<Real>::size + 2 + options.needs_mean(),
                                             problem.rows.rows})) {
      if (!token_weight.has_value()) return;
      check_device(*token_weight, input, "token_weight");
      STD_TORCH_CHECK(token_weight->numel() == problem.rows.rows,
                      "llmloss: token_weight must have one number per row");
    }

    RowOutputs<Real> outputs() const {
      RowOutputs<Real> out;
      out.log_prob = stat(0);
      out.lse = stat(1);
      if (options.needs_mean()) out.mean_log_prob = stat(2);
      State<Real>(state).write_to(out);
      return out;
    }

    LossRows<Real> rows() const {
      LossRows<Real> rows;
      rows.options = options;
      rows.targets = problem.rows.targets;
      rows.rows = problem.rows.rows;
      rows.vocab_size = problem.rows.vocab_size;
      rows.class_weight = problem.rows.weights.class_weight;
      rows.token_weight = pointer<Real>(token_weight);
      rows.log_prob = stat(0);
      rows.lse = stat(1);
      if (options.needs_mean()) rows.mean_log_prob = stat(2);
      return rows;
    }

    GradSource<Real> source() const {
      GradSource<Real> source;
      source.from_loss = true;
      source.options = options;
      source.token_weight = pointer<Real>(token_weight);
      return source;
    }

    Tensor denominator(Backend& backend) const {
      if (arguments.reduction != Reduction::mean) return new_real<Real>(problem.input, {0});
      if (arguments.num_items.has_value()) {
        STD_TORCH_CHECK(arguments.num_items->numel() == 1 &&
                            arguments.num_items->device() == problem.input.device(),
                        "llmloss: num_items must hold one number on the input's device");
        const Tensor items = as_real<Real>(*arguments.num_items);
        // An operator's output must not be one of its inputs.
        return items.data_ptr() == arguments.num_items->data_ptr() ? torch::stable::clone(items)
                                                                   : items;
      }
      const Tensor total = new_real<Real>(problem.input, {});
      backend.denominator(rows(), data<Real>(total));
      return total;
    }

    Tensor reduce(Backend& backend, const Tensor& denominator) const {
      const bool reduced = arguments.reduction != Reduction::none;
      const Tensor loss =
          new_real<Real>(problem.input, reduced ? std::vector<int64_t>{} : problem.row_shape());
      backend.reduce_loss(rows(), arguments.reduction, pointer<Real>(denominator),
                          data<Real>(loss));
      return loss;
    }

    Problem<T> problem;
    LossArguments arguments;
    MaybeTensor token_weight;
    LossOptions<Real> options;
    Tensor state;  // of backward; then log_prob, lse and, where needed, mean_log_prob of forward

   private:
    Real* stat(int index) const {
      return data<Real>(state) + (State<Real>::size + index) * state.size(1);
    }
  };
};

// The kernels of every schema of library.cpp that takes tensors.
template <typename Backend, typename Library>
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
