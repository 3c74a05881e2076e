"""The contenders: implementations of a case's loss, by this library and by others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import llmloss_ext
from llmloss_ext.linear import is_upcast

from . import peers, preference, training
from .cases import Case, UnsupportedError
from .inputs import LinearInputs, LogitsInputs, PreferenceInputs

Loss = Callable[..., Tensor]
"""Takes the arguments of a case, which get gradients, then its constants; returns the loss."""

Inputs = LogitsInputs | LinearInputs | training.ModelInputs


@dataclass(frozen=True)
class Contender:
    """An implementation.

    Attributes:
        name: The name in tables.
        loss: Makes the loss of a case; raises `UnsupportedError`, or the error of a failed import.
        overwrites: Whether the gradient overwrites the logits.
        is_ours: Whether it is this library's.
    """

    name: str
    loss: Callable[[Case], Loss]
    overwrites: bool = False
    is_ours: bool = False

    def takes(self, case: Case) -> bool:
        """Whether it differs from this library's other contenders in this case."""
        if not (self.is_ours and self.overwrites):
            return True
        # token_stats has no variant that overwrites the logits.
        return case.has_backward and "entropy" not in case.settings


def eager(case: Case) -> Loss:
    """Plain torch, as most code is written. In float64 it is the reference."""
    settings = dict(case.settings)
    softcap, z_loss = settings.get("softcap", 0.0), settings.get("z_loss", 0.0)
    entropy, smoothing = settings.get("entropy", 0.0), settings.get("label_smoothing", 0.0)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        value = F.cross_entropy(logits, target, label_smoothing=smoothing)
        if z_loss:
            valid = (target != -100).to(logits.dtype)
            squares = torch.logsumexp(logits, -1).square() * valid
            value = value + z_loss * squares.sum() / valid.sum()
        if entropy:
            valid = (target != -100).to(logits.dtype)
            log_p = torch.log_softmax(logits, -1)
            entropies = -(log_p.exp() * log_p).sum(-1) * valid
            value = value - entropy * entropies.sum() / valid.sum()
        if settings.get("rank"):
            at_target = logits.gather(-1, target.clamp_min(0).unsqueeze(-1))
            logits.argmax(-1), (logits > at_target).sum(-1)
        return value

    if "float32_logits" in settings:
        return lambda hidden, weight, target: loss(F.linear(hidden.float(), weight.float()), target)
    if case.is_linear:
        return lambda hidden, weight, target: loss(F.linear(hidden, weight), target)
    return loss


def ours(case: Case) -> Loss:
    """This library's loss, with a gradient in new memory."""
    return _ours(case)


def ours_inplace(case: Case) -> Loss:
    """This library's loss, with a gradient that overwrites the logits."""
    return _ours(case, inplace=True)


def _ours(case: Case, **more: Any) -> Loss:
    settings = dict(case.settings)
    if "entropy" in settings:
        return _with_entropy(settings["entropy"], with_rank="rank" in settings)
    if settings.pop("float32_logits", None):
        more["logits_dtype"] = torch.float32
    name = "linear_cross_entropy" if case.is_linear else "cross_entropy"
    function = getattr(llmloss_ext, name)
    return lambda *tensors: function(*tensors, **settings, **more)


def _with_entropy(beta: float, with_rank: bool) -> Loss:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        stats = llmloss_ext.token_stats(logits, target, with_rank=with_rank)
        valid = (target != -100).sum()
        return -(stats.log_prob + beta * stats.entropy).sum() / valid

    return loss


def compiled(case: Case) -> Loss:
    """The eager loss, compiled by torch.compile for the exact size."""
    return _compiled(eager(case))


def _compiled(loss: Loss) -> Loss:
    torch._dynamo.reset()
    made: Loss = torch.compile(loss, fullgraph=True, dynamic=False)
    return made


def chunked(case: Case) -> Loss:
    """Torch's chunked linear cross entropy."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise UnsupportedError(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    if set(case.settings) - {"label_smoothing"}:
        raise UnsupportedError(f"no {case.option}")
    settings: dict[str, Any] = dict(case.settings)
    return lambda hidden, weight, target: F.linear_cross_entropy(
        hidden, weight, target, options=options(), **settings
    )


def _peer(maker: Callable[[dict[str, float]], Loss]) -> Callable[[Case], Loss]:
    def loss(case: Case) -> Loss:
        try:
            return maker(dict(case.settings))
        except peers.UnknownOptionError as error:
            raise UnsupportedError(f"no {case.option}") from error

    return loss


_ALL = [
    Contender("llmloss", ours, is_ours=True),
    Contender("llmloss inplace", ours_inplace, overwrites=True, is_ours=True),
    Contender("torch", eager),
    Contender("compile", compiled),
]
DENSE = {
    c.name: c
    for c in [
        *_ALL,
        Contender("liger", _peer(peers.liger), overwrites=True),
        Contender("quack", _peer(peers.quack), overwrites=True),
        Contender("flash-attn", _peer(peers.flash_attention), overwrites=True),
        Contender("apex", _peer(peers.apex)),
    ]
}
LINEAR = {
    c.name: c
    for c in [
        *(c for c in _ALL if not c.overwrites),
        Contender("torch chunked", chunked),
        Contender("liger", _peer(peers.liger_linear)),
        Contender("cce", _peer(peers.cce)),
        Contender("quack", _peer(peers.quack_linear)),
    ]
}
PREFERENCE = {
    c.name: c
    for c in [
        Contender("llmloss", lambda case: preference.ours, is_ours=True),
        Contender("torch", lambda case: preference.eager),
        Contender("compile", lambda case: _compiled(preference.eager)),
        Contender("liger", lambda case: peers.liger_dpo(preference.BETA)),
    ]
}
TRAINING = {
    c.name: c
    for c in [
        Contender("llmloss", lambda case: training.from_hidden(), is_ours=True),
        Contender("llmloss logits", lambda case: training.from_logits(), is_ours=True),
        Contender("torch", lambda case: training.stock()),
    ]
}
TABLES = {
    "cross_entropy": DENSE,
    "linear_cross_entropy": LINEAR,
    "preference": PREFERENCE,
    "training_step": TRAINING,
}
NAMES = tuple(dict.fromkeys(name for table in TABLES.values() for name in table))
"""The names of all contenders, this library's first."""

_NOT_COMPARED = {"V", "N", "D", "threads", "options", "ignored", "small"}
"""Figures about this library's own cost, compared with eager torch only."""


def contenders(case: Case, wanted: set[str] | None, absent: set[str]) -> list[Contender]:
    """The contenders in a case, this library's first.

    Args:
        case: The case.
        wanted: The names of the other contenders; None for all that suit the case.
        absent: The names of contenders that cannot be imported.
    """
    chosen = [c for c in TABLES[case.operation].values() if c.takes(case)]
    if case.figure in _NOT_COMPARED:
        chosen = [c for c in chosen if c.is_ours or c.name == "torch"]
    if wanted is not None:
        chosen = [c for c in chosen if c.is_ours or c.name in wanted]
    return [c for c in chosen if c.name not in absent]


_MOST_EMULATED_FLOPS = 1e9
"""A second or two. A larger case would take minutes a call, which nobody waits for."""


def _is_emulated(case: Case) -> bool:
    """Whether torch would take minutes for the products of a case."""
    has_products = case.is_linear and "float32_logits" not in case.settings
    is_large = case.flops > _MOST_EMULATED_FLOPS
    return has_products and is_large and is_upcast(case.torch_dtype, case.device)


class Step:
    """A contender's call on a case's inputs: `prepare` is not timed, `run` is."""

    def __init__(self, case: Case, contender: Contender, inputs: Inputs):
        if contender.name != "llmloss" and _is_emulated(case):
            raise UnsupportedError(f"torch emulates products of {case.dtype} on this CPU")
        self._case, self._inputs = case, inputs
        self._overwrites = contender.overwrites
        self._loss = contender.loss(case)

    def prepare(self) -> tuple[Tensor, ...]:
        """Makes fresh arguments."""
        if not isinstance(self._inputs, LogitsInputs):
            return self._inputs.fresh()
        if not self._case.has_backward:
            return (self._inputs.next(),)
        overwrites = self._overwrites
        return (self._inputs.overwritable() if overwrites else self._inputs.leaf(),)

    def run(self, *arguments: Tensor) -> Tensor:
        """Runs forward, and backward if the case includes it."""
        if not self._case.has_backward:
            with torch.no_grad():
                return self._loss(*arguments, *self._inputs.constants)
        loss = self._loss(*arguments, *self._inputs.constants)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def outcome(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Computes the loss and the gradients of the arguments, for the check."""
        if not self._case.has_backward:
            return self.run(*self.prepare()), ()
        leaves: tuple[Tensor, ...]
        arguments: tuple[Tensor, ...]
        if not isinstance(self._inputs, LogitsInputs):
            leaves = arguments = self._inputs.fresh()
        else:
            leaves = (self._inputs.leaf(),)
            # A leaf must not be overwritten.
            arguments = (leaves[0].clone(),) if self._overwrites else leaves
        loss = self._loss(*arguments, *self._inputs.constants)
        gradients = torch.autograd.grad(loss, leaves)
        return loss.detach(), gradients


_INPUTS: dict[str, Callable[[Case], Inputs]] = {
    "cross_entropy": LogitsInputs,
    "linear_cross_entropy": LinearInputs,
    "preference": PreferenceInputs,
    "training_step": training.ModelInputs,
}


def make_inputs(case: Case) -> Inputs:
    """Makes the tensors of a case.

    Raises:
        UnsupportedError: A package that they need is not installed.
    """
    return _INPUTS[case.operation](case)
