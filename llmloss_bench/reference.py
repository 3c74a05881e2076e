"""The float64 reference, and the errors of contenders. A wrong contender is not timed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from llmloss_ext.tolerances import (
    GRADIENT_NORM,
    GRADIENT_NORM_OF_MODEL,
    MEAN_LOSS,
    MEAN_LOSS_OF_PRODUCTS,
    OTHERS_GRADIENT,
    OTHERS_LOSS,
    PAIR_LOSS,
)

from .cases import FROM_HIDDEN, Case
from .contenders import Inputs, Step, eager
from .inputs import IGNORE_INDEX, LinearInputs, PreferenceInputs
from .preference import dpo, log_probs
from .training import ModelInputs, stock

_SAMPLES = 64
_BLOCK = 1 << 23
"""The number of float64 logits in a block of rows."""


@dataclass(frozen=True)
class Reference:
    """The loss, and sampled rows of the gradients.

    Attributes:
        loss: The mean over the valid tokens, or over the pairs.
        samples: For each gradient, the indices of its sampled rows; empty without backward.
        gradients: These rows in float64; empty without backward.
    """

    loss: float
    samples: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def reference(case: Case, inputs: Inputs) -> Reference:
    """Computes the reference block by block: all losses, and the gradients at sampled rows."""
    if isinstance(inputs, ModelInputs):
        return _of_model(inputs)
    if isinstance(inputs, LinearInputs):
        return _of_linear(case, inputs)
    rows = _sampled(inputs.logits.shape[0], inputs.logits.device)
    loss, gradient = (
        0.0,
        torch.zeros(len(rows), case.columns, dtype=torch.float64, device=inputs.logits.device),
    )
    for begin, block in _blocks(inputs.logits, case.columns):
        part, grad = _loss_and_gradient(case, block, inputs.target[begin : begin + len(block)])
        loss += part
        inside = (rows >= begin) & (rows < begin + len(block))
        gradient[inside] = grad[rows[inside] - begin]
    valid = _valid(inputs.target)
    if not case.has_backward:
        return Reference(loss / valid, (), ())
    return Reference(loss / valid, (rows,), (gradient / valid,))


def _of_linear(case: Case, inputs: LinearInputs) -> Reference:
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach().double()
    rows = _sampled(case.rows, hidden.device)
    columns = torch.cat([_sampled(case.columns, hidden.device), inputs.target.clamp_min(0)[rows]])
    loss, valid, slopes = 0.0, _valid(inputs.target), None
    if isinstance(inputs, PreferenceInputs):
        (loss, slopes), valid = _of_pairs(inputs), 1
    grad_hidden = torch.zeros(len(rows), case.features, dtype=torch.float64, device=hidden.device)
    grad_weight = torch.zeros(
        len(columns), case.features, dtype=torch.float64, device=hidden.device
    )
    for begin, block in _blocks(hidden, case.columns):
        block = block.double()
        target = inputs.target[begin : begin + len(block)]
        logits = block @ weight.t()
        if slopes is None:
            part, grad = _loss_and_gradient(case, logits, target)
        else:
            part, grad = 0.0, _of_slopes(logits, target, slopes[begin : begin + len(block)])
        loss += part
        inside = (rows >= begin) & (rows < begin + len(block))
        grad_hidden[inside] = grad[rows[inside] - begin] @ weight
        grad_weight += grad[:, columns].t() @ block
    if not case.has_backward:
        return Reference(loss / valid, (), ())
    return Reference(loss / valid, (rows, columns), (grad_hidden / valid, grad_weight / valid))


def _of_pairs(inputs: PreferenceInputs) -> tuple[float, Tensor]:
    """The loss of a preference step, and its derivative by each token's log-probability."""
    target, reference_hidden, reference_weight = inputs.constants
    models = (
        (inputs.hidden.detach(), inputs.weight.detach()),
        (reference_hidden.flatten(0, 1), reference_weight),
    )
    policy, reference = (
        torch.cat([
            log_probs(block.double() @ weight.double().t(), inputs.target[begin:][: len(block)])
            for begin, block in _blocks(hidden, len(weight))
        ]).view(target.shape)
        for hidden, weight in models
    )  # fmt: skip
    loss = dpo(policy.requires_grad_(), reference)
    (slopes,) = torch.autograd.grad(loss, policy)
    return float(loss.detach()), slopes.flatten()


def _of_slopes(logits: Tensor, target: Tensor, slopes: Tensor) -> Tensor:
    """The gradient of a block's log-probabilities, weighted by ``slopes``."""
    leaf = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad((log_probs(leaf, target) * slopes).sum(), leaf)
    return gradient


def _of_model(inputs: ModelInputs) -> Reference:
    """Of the stock model in float64; every row of a parameter's gradient may be sampled."""
    model = copy.deepcopy(inputs.model).double()
    leaves = tuple(model.parameters())
    loss = stock()(*leaves, model, inputs.target)
    gradients = torch.autograd.grad(loss, leaves)
    samples = tuple(_sampled(len(gradient), gradient.device) for gradient in gradients)
    rows = tuple(gradient[sample] for gradient, sample in zip(gradients, samples, strict=True))
    return Reference(float(loss.detach()), samples, rows)


def _loss_and_gradient(case: Case, logits: Tensor, target: Tensor) -> tuple[float, Tensor]:
    """The sum of the losses of a block, and its gradient."""
    leaf = logits.detach().double().requires_grad_()
    valid = int((target != IGNORE_INDEX).sum())
    if valid == 0:
        return 0.0, torch.zeros_like(leaf)
    # Not the case itself: if it is linear, eager() expects hidden states instead of logits.
    option = "plain" if case.option in FROM_HIDDEN else case.option
    settings = Case("cross_entropy", case.passes, case.rows, case.columns, "float64",
                    option=option)  # fmt: skip
    loss = eager(settings)(leaf, target) * valid
    (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient


@dataclass(frozen=True)
class Errors:
    """The errors of a contender.

    Attributes:
        loss: The relative error.
        gradient: The largest relative error of a sampled row in the Euclidean norm; None without
            backward.
        tolerances: For loss and gradient. Those of other libraries are wide: they only catch
            results that are plainly wrong.
    """

    loss: float
    gradient: float | None
    tolerances: tuple[float, float]

    @property
    def are_tolerable(self) -> bool:
        """Whether the errors are within the tolerances."""
        loss, gradient = self.tolerances
        # With nan, the comparisons are false.
        return self.loss <= loss and (self.gradient is None or self.gradient <= gradient)


def errors(case: Case, step: Step, truth: Reference, is_ours: bool) -> Errors:
    """Runs the contender once, and compares the result with the reference."""
    loss, gradients = step.outcome()
    dtype = case.torch_dtype
    worst = None
    for samples, gradient, expected in zip(truth.samples, gradients, truth.gradients, strict=True):
        difference = gradient[samples].double() - expected
        norms = expected.norm(dim=-1)
        distances = torch.where(norms > 0, difference.norm(dim=-1) / norms, difference.norm(dim=-1))
        worst = max(worst or 0.0, float(torch.nan_to_num(distances, nan=torch.inf).max()))
    error = abs(float(loss) - truth.loss) / max(abs(truth.loss), 1e-30)
    of_loss = MEAN_LOSS_OF_PRODUCTS[dtype] if case.is_linear else MEAN_LOSS
    if case.operation == "preference":
        of_loss = PAIR_LOSS[dtype]
    if not is_ours:
        return Errors(error, worst, (max(OTHERS_LOSS, of_loss), OTHERS_GRADIENT))
    of_gradient = GRADIENT_NORM_OF_MODEL if case.operation == "training_step" else GRADIENT_NORM
    return Errors(error, worst, (of_loss, of_gradient[dtype]))


def _sampled(size: int, device: torch.device) -> Tensor:
    """Indices of evenly spaced rows, with the first and the last."""
    count = min(size, _SAMPLES)
    return torch.linspace(0, size - 1, count, device=device, dtype=torch.float64).round().long()


def _blocks(tensor: Tensor, columns: int) -> list[tuple[int, Tensor]]:
    size = max(_BLOCK // columns, 1)
    return [(begin, tensor[begin : begin + size]) for begin in range(0, tensor.shape[0], size)]


def _valid(target: Tensor) -> int:
    return max(int((target != IGNORE_INDEX).sum()), 1)
