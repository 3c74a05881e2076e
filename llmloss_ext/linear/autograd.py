"""The derivatives of the linear losses.

`loss` has its gradients from the forward pass: three products in all. `stats` computes the logits
again in backward: four, for any function of the statistics. What asks for more than first-order
gradients gets torch arithmetic over whole logits: slower, never wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from llmloss_ext import composite
from llmloss_ext.composite import LogitOptions, LossOptions
from llmloss_ext.linear import fake, operators, sharded  # noqa: F401  (fake registers itself)
from llmloss_ext.linear.chunked import ChunkOptions, Inputs, total_items
from llmloss_ext.ops import _Composite, _needs_differentiable_backward
from llmloss_ext.shard import refuse_second_order

__all__ = ["loss", "stats"]

_ops = torch.ops.llmloss


class _Loss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        logit_scale: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        token_weight: Tensor | None,
        num_items: Tensor | None,
        logits: LogitOptions,
        loss: LossOptions,
        chunks: ChunkOptions,
        needs: tuple[bool, ...],
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.options = (logits, loss, chunks)
        ctx.needs = list(needs)
        inputs = (input, linear_weight, linear_bias, logit_scale)
        others = (target, weight, token_weight, num_items)
        value, *gradients = _loss_and_gradients(inputs, others, ctx.options, ctx.needs)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*inputs, *others, *gradients)
        else:
            # Not saved, but handed out by the first backward: then nothing is copied.
            ctx.save_for_backward(*inputs, *others)
            ctx.gradients = gradients
        return value

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 12
        if torch.compiler.is_compiling():
            *gradients, factor = ctx.saved_tensors[8:]
            grad_loss = grad_loss * factor
            results = [
                (g * grad_loss).to(x.dtype) if asked else None
                for g, x, asked in zip(gradients, ctx.saved_tensors[:4], ctx.needs, strict=True)
            ]
            return (*results, *(None,) * 8)
        saved = ctx.saved_tensors
        if _needs_differentiable_backward():
            refuse_second_order(ctx.options[2].shard)
            by_input = _loss_composite(saved[:4], saved[4:], ctx.options).vjp((grad_loss,))
            return (*(by_input.get(i) for i in range(4)), *(None,) * 8)
        if ctx.gradients is None:  # a second backward
            ctx.gradients = _loss_and_gradients(saved[:4], saved[4:], ctx.options, ctx.needs)[1:]
        *gradients, factor = ctx.gradients
        ctx.gradients = None
        factor = grad_loss * factor
        results = [
            _scaled(g, factor, x.dtype) if asked else None
            for g, x, asked in zip(gradients, saved[:4], ctx.needs, strict=True)
        ]
        return (*results, *(None,) * 8)


def _loss_and_gradients(inputs: Any, others: Any, options: Any, needs: list[bool]) -> Any:
    input, linear_weight, linear_bias, logit_scale = inputs
    target, weight, token_weight, num_items = others
    logits, loss, chunks = options
    if chunks.shard is not None:
        return sharded.compute_loss(
            chunks.shard, Inputs(*inputs), target, weight, token_weight, num_items, logits, loss,
            chunks, needs,
        )  # fmt: skip
    is_opaque = operators.must_be_opaque(input)
    run: Any = operators.linear_loss if is_opaque else operators.compute_loss
    return run(
        input, linear_weight, target, linear_bias, weight, token_weight, num_items, logit_scale,
        *logits, *loss, chunks.chunk_tokens, chunks.drop_ignored, needs, chunks.weight_grad_dtype,
    )  # fmt: skip


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies in place, by 1 without touching it; rounds after, if it has to."""
    if gradient.dim() == 2 and gradient.numel():
        _ops.scale_(gradient, factor)
        return gradient.to(dtype)
    return (gradient * factor).to(dtype)


def _loss_composite(inputs: Any, others: Any, options: Any) -> _Composite:
    target, weight, token_weight, num_items = others
    logit_options, loss_options, _ = options

    def loss(input: Tensor, linear_weight: Tensor, bias: Any, logit_scale: Any) -> Any:
        rows = composite.row_losses(
            _logits(input, linear_weight, bias), target, weight, token_weight, logit_scale,
            logit_options, loss_options,
        )  # fmt: skip
        items = (weight, token_weight, num_items, logit_options.ignore_index)
        denominator = total_items(input, target, *items, loss_options.reduction)
        return (composite.reduce(rows, denominator, loss_options.reduction),)

    return _Composite(loss, inputs, [0, 1, 2, 3])


def _logits(input: Tensor, linear_weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = input @ linear_weight.to(input.dtype).t()
    return logits if bias is None else logits + bias.to(input.dtype)


def needs_gradients(inputs: tuple[Tensor | None, ...]) -> tuple[bool, ...]:
    """Which of input, linear_weight, linear_bias and logit_scale get a gradient.

    Asked before a Function is entered: inside, ``needs_input_grad`` knows nothing of no_grad.
    """
    enabled = torch.is_grad_enabled()
    return tuple(enabled and x is not None and x.requires_grad for x in inputs)


def loss(*inputs: Any) -> Tensor:
    """The mean or sum over tokens; arguments as `_Loss.forward`, without the last."""
    needs = needs_gradients(inputs[:4])
    if not any(needs):
        value: Tensor = _loss_and_gradients(inputs[:4], inputs[4:8], inputs[8:], list(needs))[0]
        return value
    return _Loss.apply(*inputs, needs)  # type: ignore[no-untyped-call]


class _Stats(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        logit_scale: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        accumulator: Tensor | None,
        logits: LogitOptions,
        wanted: tuple[bool, bool, bool],
        chunks: ChunkOptions,
    ) -> tuple[Tensor, ...]:
        if chunks.shard is not None:
            inputs = Inputs(input, linear_weight, linear_bias, logit_scale)
            output = sharded.compute_stats(
                chunks.shard, inputs, target, weight, logits, wanted, chunks
            )
        else:
            is_opaque = operators.must_be_opaque(input)
            run: Any = operators.linear_stats if is_opaque else operators.compute_stats
            output = run(
                input, linear_weight, target, linear_bias, weight, logit_scale, *logits,
                list(wanted), chunks.chunk_tokens, chunks.drop_ignored,
            )  # fmt: skip
        *_, argmax, rank, states = output
        ctx.mark_non_differentiable(argmax, rank, states)
        ctx.set_materialize_grads(False)
        ctx.options = (logits, chunks)
        ctx.asked = (True, True, wanted[0], wanted[1])
        ctx.accumulator = accumulator
        ctx.save_for_backward(
            input, linear_weight, linear_bias, logit_scale, target, weight, output[2], states
        )
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # A compiled graph also passes gradients of what was not asked for.
        grads = tuple(g if asked else None for g, asked in zip(grads, ctx.asked, strict=False))
        if all(grad is None for grad in grads):
            return (None,) * 10
        *inputs, target, weight, entropy, states = ctx.saved_tensors
        logits, chunks = ctx.options
        if _needs_differentiable_backward():
            refuse_second_order(chunks.shard)
            if ctx.accumulator is not None:
                raise RuntimeError("weight_grad_accumulator has no second-order gradient")
            used = [i for i, grad in enumerate(grads) if grad is not None]
            stats = _stats_composite(inputs, target, weight, logits, used)
            by_input = stats.vjp(tuple(grad for grad in grads if grad is not None))
            return (*(by_input.get(i) for i in range(4)), *(None,) * 6)
        needs = list(ctx.needs_input_grad[:4])
        where = (Inputs(*inputs), target, weight, logits, entropy, states, chunks, needs)
        if chunks.shard is not None:
            results = sharded.stats_backward(chunks.shard, grads, *where, ctx.accumulator)
        elif ctx.accumulator is not None:
            results = operators.stats_backward(grads, *where, ctx.accumulator)
        else:
            input, linear_weight, linear_bias, logit_scale = inputs
            results = operators.linear_stats_backward(
                *grads, input, linear_weight, target, linear_bias, weight, logit_scale, *logits,
                entropy, states, chunks.chunk_tokens, chunks.drop_ignored, needs,
                chunks.weight_grad_dtype,
            )  # fmt: skip
        if ctx.accumulator is not None:
            needs[1] = False
        return (*(r if asked else None for r, asked in zip(results, needs, strict=True)),
                *(None,) * 6)  # fmt: skip


def _stats_composite(
    inputs: Any, target: Tensor, weight: Tensor | None, options: LogitOptions, used: list[int]
) -> _Composite:
    def stats(input: Tensor, linear_weight: Tensor, bias: Any, logit_scale: Any) -> Any:
        logits = _logits(input, linear_weight, bias)
        every = composite.token_stats(logits, target, weight, logit_scale, options)
        return tuple(every[i] for i in used)

    return _Composite(stats, inputs, [0, 1, 2, 3])


def stats(*inputs: Any) -> tuple[Tensor, ...]:
    """log_prob, lse, entropy, mean_log_prob, argmax, rank, states; as `_Stats.forward`."""
    return _Stats.apply(*inputs)  # type: ignore[no-untyped-call]
