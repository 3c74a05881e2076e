"""Where the gradients of several losses conflict: weights that are made of the gradients.

All of it follows from the terms' Gram matrix, the T x T products of their gradients: the weights of
MGDA and what PCGrad's projections leave are coefficients of the terms, and so is a term's part in
GradNorm. So a weighted sum of the losses has the combined gradient, and no gradient is kept.
Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..composite import real_of
from .combined import Term, check_names, computed_terms

__all__ = [
    "BalancedLoss",
    "GradNorm",
    "GradNormLoss",
    "conflict_backward",
    "conflict_loss",
    "gradient_gram",
    "min_norm_weights",
    "pcgrad_weights",
]

METHODS = ("mgda", "pcgrad", "sum")


class BalancedLoss(NamedTuple):
    """A sum of losses weighted by their gradients; all but ``total`` detached."""

    total: Tensor
    """0-d. Of `conflict_backward`, which has done its backward pass, detached too."""
    terms: dict[str, Tensor]
    """Each term before its weight; those of weight 0 are left out."""
    weights: dict[str, Tensor]
    """The factor of each term's gradient: 0-d, or (G) of G groups of parameters."""
    cosine: Tensor
    """The smallest cosine between the gradients of two terms, 0-d or (G): below 0 they conflict."""


# ---------------------------------------------------------------------------- the Gram matrix


def gradient_gram(
    terms: Sequence[Tensor], parameters: Iterable[Tensor], *, retain_graph: bool = True
) -> Tensor:
    """The products of the terms' gradients, (T, T).

    Args:
        terms: T losses, 0-d.
        parameters: With respect to which: all that the terms share; only the head's weight, or only
            the hidden states that it projects, which saves the pass through the model (the upper
            bound of Sener and Koltun 2018); any tensors of the graph. Where a term does not depend
            on one, its gradient is 0.
        retain_graph: Whether another backward pass follows.

    Returns:
        (T, T) in float64, of products in float32 (float64 for float64).

    Raises:
        ValueError: There is no term or no parameter.
    """
    wanted = list(parameters)
    _check(terms, wanted)
    return _gram(_gradients(terms, wanted, retain_graph))


def _check(terms: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    if not terms or not parameters:
        raise ValueError(
            f"expected losses and parameters, got {len(terms)} losses and {len(parameters)} "
            "parameters"
        )


def _gradients(
    terms: Sequence[Tensor], parameters: Sequence[Tensor], retain_graph: bool
) -> list[tuple[Tensor | None, ...]]:
    """Of each term, those of all parameters; None: it does not depend on that one."""
    last = len(terms) - 1
    return [
        torch.autograd.grad(
            term, parameters, retain_graph=retain_graph or i < last, allow_unused=True
        )
        for i, term in enumerate(terms)
    ]


def _gram(gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
    total: Tensor | None = None
    for of_parameter in zip(*gradients, strict=True):
        given = next((g for g in of_parameter if g is not None), None)
        if given is None:
            continue
        zero, real = torch.zeros_like(given), real_of(given)
        rows = torch.stack([(zero if g is None else g).flatten().to(real) for g in of_parameter])
        # No matrix product: autocast or TF32 would make it of fewer bits.
        products = torch.stack([(rows * row).sum(-1, dtype=torch.float64) for row in rows])
        total = products if total is None else total + products.to(total.device)
    if total is None:
        raise ValueError("no term depends on any of the parameters")
    return total


def min_norm_weights(gram: Tensor) -> Tensor:
    """The convex combination of gradients that is shortest: MGDA (Sener and Koltun 2018).

    The a >= 0 with sum 1 that minimise |sum_i a_i g_i|^2 = a' gram a. Along its negative, to first
    order, no term grows. Where the paper has a closed form for two terms and Frank-Wolfe steps for
    more, which need very many where gradients differ in size, this is an active-set method, which
    is exact after a few steps a term; as many are always done, so that nobody waits to see that it
    has converged.

    Args:
        gram: (T, T) of `gradient_gram`, or (..., T, T).

    Returns:
        (..., T), of the Gram matrix's dtype.

    Raises:
        ValueError: It is not square.
    """
    _check_gram(gram)
    tasks, double = gram.shape[-1], gram.double()
    # Of any size: relative to the largest gradient. The ridge decides between equal gradients.
    scale = double.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    identity = torch.eye(tasks, dtype=torch.float64, device=gram.device)
    scaled = double / torch.where(scale > 0, scale, 1.0) + _RIDGE * identity
    first = scaled.diagonal(dim1=-2, dim2=-1).argmin(-1, keepdim=True)
    weights = torch.zeros(gram.shape[:-1], dtype=torch.float64, device=gram.device)
    weights = weights.scatter(-1, first, 1.0)
    has_weight = weights > 0
    for _ in range(_STEPS * tasks):
        weights, has_weight = _active_set_step(scaled, weights, has_weight)
    return weights.to(gram.dtype)


_RIDGE = 1e-14
_STEPS = 4


def _active_set_step(gram: Tensor, weights: Tensor, has_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Towards the shortest combination of those that have weight, as far as none gets less than 0.

    There, the one whose product with it is the smallest gets weight, too; where one is in the way,
    it loses its weight.
    """
    free = has_weight.to(gram.dtype)
    tasks = gram.shape[-1]
    system = torch.zeros(*gram.shape[:-2], tasks + 1, tasks + 1, dtype=gram.dtype,
                         device=gram.device)  # fmt: skip
    system[..., :tasks, :tasks] = gram * free[..., None, :] * free[..., :, None]
    system.diagonal(dim1=-2, dim2=-1)[..., :tasks] += 1 - free
    system[..., :tasks, tasks] = system[..., tasks, :tasks] = free
    sides = torch.zeros_like(system[..., 0])
    sides[..., tasks] = 1
    solved = torch.linalg.solve_ex(system, sides).result[..., :tasks] * free
    in_the_way = has_weight & (solved < 0)
    blocked = in_the_way.any(-1, keepdim=True)
    room = torch.where(in_the_way, weights / (weights - solved), torch.inf)
    share = room.amin(-1, keepdim=True).clamp_max(1.0)
    leaves = in_the_way & (room <= share)
    reached = weights + share * (solved - weights)
    weights = torch.where(leaves, 0.0, reached.clamp_min(0.0))
    weights = weights / weights.sum(-1, keepdim=True)
    products = (gram @ weights.unsqueeze(-1)).squeeze(-1)
    least = (products * weights).sum(-1, keepdim=True)
    outside = torch.where(has_weight, torch.inf, products)
    place = outside.argmin(-1, keepdim=True)
    enters = torch.zeros_like(has_weight).scatter(-1, place, outside.amin(-1, keepdim=True) < least)
    return weights, torch.where(blocked, has_weight & ~leaves, has_weight | enters)


def pcgrad_weights(gram: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """The coefficients of the terms after PCGrad's projections (Yu et al. 2020).

    Each gradient, in turn with every other one in a random order, loses its part along the other if
    the two conflict; what is left of all is summed. Each projection takes a multiple of an original
    gradient away, so the sum is one of the original gradients with these coefficients.

    Args:
        gram: (T, T) of `gradient_gram`.
        generator: Of the orders, for repeatability: one on the CPU, whatever the device.

    Returns:
        (T), of the Gram matrix's dtype; 1 each where nothing conflicts.

    Raises:
        ValueError: It is not square, or more than one.
    """
    _check_gram(gram)
    if gram.dim() != 2:
        raise ValueError(f"pcgrad_weights takes one Gram matrix (T, T), got {tuple(gram.shape)}")
    tasks = gram.shape[0]
    identity = torch.eye(tasks, dtype=gram.dtype, device=gram.device)
    parts = []
    for i in range(tasks):
        part = identity[i]
        # On the CPU: the order of operations is one of Python's, and nobody waits for it.
        for j in torch.randperm(tasks, generator=generator).tolist():
            if j == i:
                continue
            product, square = part @ gram[j], gram[j, j]
            factor = product.clamp_max(0.0) / torch.where(square > 0, square, 1.0)
            part = part - factor * identity[j]
        parts.append(part)
    return torch.stack(parts).sum(0)


def _check_gram(gram: Tensor) -> None:
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2] or not gram.shape[-1]:
        raise ValueError(f"expected a Gram matrix (T, T), got shape {tuple(gram.shape)}")


def _smallest_cosine(gram: Tensor) -> Tensor:
    """Of two different terms; 1 for a single one, 0 where a gradient is 0."""
    norms = gram.diagonal().clamp_min(0.0).sqrt()
    products = norms[:, None] * norms[None, :]
    cosines = torch.where(products > 0, gram / torch.where(products > 0, products, 1.0), 0.0)
    own = torch.eye(len(gram), dtype=torch.bool, device=gram.device)
    return torch.where(own, 1.0, cosines).amin()


# ---------------------------------------------------------------------------- the losses


def conflict_loss(
    terms: Mapping[str, Term],
    parameters: Iterable[Tensor],
    *,
    method: str = "mgda",
    weights: Mapping[str, float] | None = None,
    generator: torch.Generator | None = None,
) -> BalancedLoss:
    """The terms' sum, weighted by what their gradients have in common; its backward is to come.

    Costs a backward pass of each term down to ``parameters``: choose few and near the losses (the
    head's weight; the hidden states) and the model itself is passed through once, as ever.

    Args:
        terms: Losses, as in `combined_loss`. Those of weight 0 are not computed.
        parameters: See `gradient_gram`; the weights then hold for the whole model.
        method: ``"mgda"``, ``"pcgrad"``, or ``"sum"``, which only looks.
        weights: Factors of the terms, and of their gradients before these are compared; 1 each by
            default.
        generator: Of "pcgrad"; see `pcgrad_weights`.

    Returns:
        A `BalancedLoss`. Of several ranks, each has the weights of its own gradients.

    Raises:
        ValueError: As `combined_loss`, or there is no such method.
    """
    names, losses, factors = _weighted(terms, weights, method)
    wanted = list(parameters)
    gram = gradient_gram(factors, wanted)
    found = _coefficients(gram, method, generator)
    total = (torch.stack([f.to(gram.device) for f in factors]) * found.to(factors[0].dtype)).sum()
    by_name = dict(zip(names, found.unbind(), strict=True))
    of_terms = {name: loss.detach() for name, loss in zip(names, losses, strict=True)}
    return BalancedLoss(total, of_terms, by_name, _smallest_cosine(gram))


def conflict_backward(
    terms: Mapping[str, Term],
    parameters: Iterable[Tensor] | Iterable[Mapping[str, Any]],
    *,
    method: str = "mgda",
    weights: Mapping[str, float] | None = None,
    generator: torch.Generator | None = None,
) -> BalancedLoss:
    """In place of ``total.backward()``: adds the combined gradient to each parameter's ``grad``.

    Conflicts are resolved in each group of parameters on its own. Costs a backward pass of each
    term, no further one, and the memory of T gradients.

    Args:
        terms: Losses, as in `combined_loss`. Those of weight 0 are not computed.
        parameters: Leaves: tensors, which are one group, or groups as optimizers have them
            (``optimizer.param_groups``): dictionaries with ``"params"``. No others get a gradient.
        method: ``"mgda"``, ``"pcgrad"`` or ``"sum"``.
        weights: As in `conflict_loss`.
        generator: Of "pcgrad".

    Returns:
        A `BalancedLoss`; ``total`` is the sum with the factors of ``weights``. Gradients reach no
        hook of a data-parallel wrapper: reduce them yourself.

    Raises:
        ValueError: As `combined_loss`; there is no such method; or a group has no parameter, or
            none that a term depends on.
    """
    names, losses, factors = _weighted(terms, weights, method)
    groups = _groups(parameters)
    flat = [p for group in groups for p in group]
    _check(factors, flat)
    gradients = _gradients(factors, flat, retain_graph=False)
    found, cosines, begin = [], [], 0
    for group in groups:
        of_group = [g[begin : begin + len(group)] for g in gradients]
        gram = _gram(of_group)
        found.append(_coefficients(gram, method, generator))
        cosines.append(_smallest_cosine(gram))
        for parameter, each in zip(group, zip(*of_group, strict=True), strict=True):
            _add_gradient(parameter, each, found[-1])
        begin += len(group)
    is_one = len(groups) == 1
    every = found[0] if is_one else torch.stack(found, -1)
    by_name = dict(zip(names, every.unbind(), strict=True))
    of_terms = {name: loss.detach() for name, loss in zip(names, losses, strict=True)}
    total = torch.stack([f.detach().to(factors[0].device) for f in factors]).sum()
    return BalancedLoss(total, of_terms, by_name, cosines[0] if is_one else torch.stack(cosines))


def _weighted(
    terms: Mapping[str, Term], weights: Mapping[str, float] | None, method: str
) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Names, terms, and terms with their factors, of those whose factor is not 0."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    factors = dict.fromkeys(terms, 1.0) if weights is None else weights
    computed = computed_terms(terms, factors)
    names = list(computed)
    losses = [computed[name] for name in names]
    return names, losses, [computed[name] * factors[name] for name in names]


def _coefficients(gram: Tensor, method: str, generator: torch.Generator | None) -> Tensor:
    if method == "mgda":
        return min_norm_weights(gram)
    if method == "pcgrad":
        return pcgrad_weights(gram, generator=generator)
    return torch.ones(len(gram), dtype=gram.dtype, device=gram.device)


def _groups(parameters: Iterable[Tensor] | Iterable[Mapping[str, Any]]) -> list[list[Tensor]]:
    given = list(parameters)
    if all(isinstance(p, Tensor) for p in given):
        groups = [given]
    elif all(isinstance(p, Mapping) and "params" in p for p in given):
        groups = [list(p["params"]) for p in given]  # type: ignore[index, call-overload]
    else:
        raise ValueError('parameters must be tensors, or all of them groups: {"params": tensors}')
    leaves = [[p for p in group if p.requires_grad] for group in groups]  # type: ignore[union-attr, attr-defined]
    if not all(leaves):
        raise ValueError("a group of parameters has none that requires a gradient")
    return leaves  # type: ignore[return-value]


def _add_gradient(parameter: Tensor, each: Sequence[Tensor | None], weights: Tensor) -> None:
    """The weighted sum, added up in float32 (float64 for float64) and rounded once."""
    real = real_of(parameter)
    total: Tensor | None = None
    for gradient, weight in zip(each, weights.to(parameter.device, real).unbind(), strict=True):
        if gradient is not None:
            part = gradient.to(real) * weight
            total = part if total is None else total + part
    if total is None:
        return
    total = total.to(parameter.dtype)
    parameter.grad = total if parameter.grad is None else parameter.grad + total


class GradNormLoss(NamedTuple):
    """What `GradNorm` returns."""

    total: Tensor
    """The weighted sum, with a gradient for the model and none for the weights."""
    balance: Tensor
    """The distance of the gradients' norms from their goals; its gradient is the weights' only."""
    terms: dict[str, Tensor]
    """Each term before its weight, detached."""
    weights: dict[str, Tensor]
    """Detached."""


class GradNorm(torch.nn.Module):
    """Learned weights that let all terms train at similar rates (Chen et al. 2018).

    With G_i = w_i |d L_i / d parameters| and the relative progress r_i = (L_i / L_i at first) over
    the mean of these, the weights move down the gradient of sum_i |G_i - mean(G) r_i^alpha|, whose
    goals are constants.

    Args:
        names: Of the terms.
        alpha: >= 0: how strongly slow terms are pulled along; the paper's is 1.5 or 0.12.
        initial_losses: By name, what the progress is measured from, such as log V of a cross
            entropy; by default the first losses that are seen, which the state_dict holds.

    Attributes:
        weights: The parameter, (T): 1 each at first. After each step of its optimizer, call
            `renormalize_`, which keeps their sum at T.

    Example:
        >>> result = balance({"lm": lm, "mlm": mlm}, [model.head.weight])
        >>> (result.total + result.balance).backward()
        >>> optimizer.step()  # of the model and of balance.parameters()
        >>> balance.renormalize_()

    Raises:
        ValueError: There is no name or one twice, or an option is out of range.
    """

    initial: Tensor

    def __init__(
        self,
        names: Sequence[str],
        alpha: float = 1.5,
        initial_losses: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= alpha < math.inf:
            raise ValueError(f"alpha must be a finite number >= 0, got {alpha}")
        self.names, self.alpha = check_names(names), alpha
        self.weights = torch.nn.Parameter(torch.ones(len(self.names)))
        initial = torch.full((len(self.names),), math.nan)
        if initial_losses is not None:
            if set(initial_losses) != set(self.names):
                raise ValueError(
                    f"expected the initial losses of {sorted(self.names)}, got "
                    f"{sorted(initial_losses)}"
                )
            initial = torch.tensor([float(initial_losses[name]) for name in self.names])
        self.register_buffer("initial", initial)

    def forward(self, terms: Mapping[str, Tensor], parameters: Iterable[Tensor]) -> GradNormLoss:
        """The weighted sum, and the loss of the weights.

        Args:
            terms: A positive 0-d loss for each name.
            parameters: Whose gradients are to be of similar size: the last layer that the terms
                share, which is cheap. Costs a backward pass of each term down to them.

        Returns:
            A `GradNormLoss`.

        Raises:
            ValueError: The names differ, a term is not 0-d, or none depends on the parameters.
        """
        computed = computed_terms(terms, dict.fromkeys(self.names, 1.0))
        each = [computed[name] for name in self.names]
        norms = gradient_gram(each, parameters).diagonal().clamp_min(0.0).sqrt()
        norms = norms.to(self.weights.device, self.weights.dtype)
        losses = torch.stack([loss.to(self.weights.device) for loss in each])
        now = losses.detach().to(self.weights.dtype)
        if self.training:
            with torch.no_grad():
                self.initial.copy_(torch.where(self.initial.isnan(), now, self.initial))
        first = torch.where(self.initial.isnan(), now, self.initial)
        progress = now / first
        progress = progress / progress.mean()
        sizes = self.weights * norms
        goals = (sizes.mean() * progress.pow(self.alpha)).detach()
        weights = self.weights.detach()
        return GradNormLoss(
            (losses * weights.to(losses.dtype)).sum(),
            (sizes - goals).abs().sum(),
            {name: loss.detach() for name, loss in zip(self.names, each, strict=True)},
            dict(zip(self.names, weights.clone().unbind(), strict=True)),
        )

    @torch.no_grad()
    def renormalize_(self) -> None:
        """Brings the weights' sum back to T; none falls below a thousandth of the mean."""
        positive = self.weights.clamp_min(1e-3)
        self.weights.copy_(positive * (len(self.names) / positive.sum()))
