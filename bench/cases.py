"""The cases: what is timed, and how many bytes the best possible implementation moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import llmloss_ext
from bench.timing import Contender

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Case:
    """A row of the table.

    Attributes:
        name: What is computed.
        rows: N.
        columns: V.
        dtype: Of the logits.
        bytes: Read plus written by the best possible implementation.
        contenders: ``llmloss`` first.
    """

    name: str
    rows: int
    columns: int
    dtype: torch.dtype
    bytes: int
    contenders: list[Contender]

    @property
    def label(self) -> str:
        """The case in one line."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.name}, {self.rows} x {self.columns}, {kind}"


class Inputs:
    """Logits and targets of one size; contenders that overwrite the logits get a fresh copy."""

    def __init__(
        self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        like = {"generator": generator, "device": device}
        self.logits = (torch.randn(rows, columns, **like) * 2).to(dtype)
        self.target = torch.randint(0, columns, (rows,), **like)
        self.half = self.target.clone()
        self.half[torch.randperm(rows, **like)[: rows // 2]] = -100
        self.scratch = self.logits.clone()

    @property
    def bytes(self) -> int:
        """Of the logits."""
        return self.logits.numel() * self.logits.element_size()

    def leaf(self) -> tuple[Tensor]:
        """Logits that want a gradient."""
        return (self.logits.detach().requires_grad_(),)

    def overwritable(self) -> tuple[Tensor]:
        """Logits that are not a leaf, over memory that may be overwritten."""
        self.scratch.copy_(self.logits)
        anchor = torch.zeros((), requires_grad=True, device=self.scratch.device)
        return (_Passed.apply(self.scratch, anchor),)


class _Passed(torch.autograd.Function):
    """The same memory as a non-leaf, as a model's projection would hand it over."""

    @staticmethod
    def forward(ctx, logits, anchor):
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, grad):
        return None, grad.new_zeros(())


def backward_of(loss: Loss, target: Tensor) -> Callable[[Tensor], object]:
    def run(logits: Tensor) -> object:
        value = loss(logits, target)
        value.backward()
        return value

    return run


def torch_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def inplace_loss(logits: Tensor, target: Tensor) -> Tensor:
    return llmloss_ext.cross_entropy(logits, target, inplace=True)


def cross_entropy_cases(rows: int, columns: int) -> list[Case]:
    """The table of the foundation issue at one size."""
    cases = []
    compiled = torch.compile(torch_loss, fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = Inputs(rows, columns, dtype)
        target, size = inputs.target, inputs.bytes

        def copy(inputs: Inputs = inputs) -> Contender:
            return Contender("copy", lambda: inputs.scratch.copy_(inputs.logits))

        def case(
            name: str,
            moved: int,
            contenders: list[Contender],
            dtype: torch.dtype = dtype,
            copy: Callable[[], Contender] = copy,
        ) -> None:
            cases.append(Case(name, rows, columns, dtype, moved, [*contenders, copy()]))

        forward = [
            Contender("llmloss", llmloss_ext.cross_entropy, lambda i=inputs: (i.logits, i.target)),
            Contender("torch", torch_loss, lambda i=inputs: (i.logits, i.target)),
            Contender("compile", compiled, lambda i=inputs: (i.logits, i.target)),
        ]
        case("forward", size, forward)
        peers = [
            Contender("torch", backward_of(torch_loss, target), inputs.leaf),
            Contender("compile", backward_of(compiled, target), inputs.leaf),
        ]
        ours = Contender("llmloss", backward_of(llmloss_ext.cross_entropy, target), inputs.leaf)
        case("forward+backward", 3 * size, [ours, *peers])
        peers = [Contender(p.name, p.run, p.setup) for p in peers]
        ours = Contender("llmloss", backward_of(inplace_loss, target), inputs.overwritable)
        case("forward+backward, inplace", 2 * size, [ours, *peers])
    return cases


def option_cases(rows: int, columns: int) -> list[Case]:
    """What options cost, against the plain forward pass."""
    inputs = Inputs(rows, columns, torch.float32)
    logits, target = inputs.logits, inputs.target

    def plain() -> Contender:
        return Contender("plain", lambda: llmloss_ext.cross_entropy(logits, target))

    def plain_inplace() -> Contender:
        return Contender("plain", backward_of(inplace_loss, target), inputs.overwritable)

    options: list[tuple[str, Callable[[], object]]] = [
        ("half of the rows ignored", lambda: llmloss_ext.cross_entropy(logits, inputs.half)),
        (
            "all statistics and rank",
            lambda: llmloss_ext.token_stats(logits, target, with_rank=True),
        ),
        ("z-loss", lambda: llmloss_ext.cross_entropy(logits, target, z_loss=1e-4)),
        ("label smoothing", lambda: llmloss_ext.cross_entropy(logits, target, label_smoothing=0.1)),
        ("softcap", lambda: llmloss_ext.cross_entropy(logits, target, softcap=30.0)),
    ]
    cases = [
        Case(name, rows, columns, torch.float32, inputs.bytes, [Contender("llmloss", run), plain()])
        for name, run in options
    ]
    half = Contender("llmloss", backward_of(inplace_loss, inputs.half), inputs.overwritable)
    name = "half of the rows ignored, forward+backward inplace"
    return [
        *cases,
        Case(name, rows, columns, torch.float32, 2 * inputs.bytes, [half, plain_inplace()]),
    ]


def small_cases() -> list[Case]:
    """Calls whose cost is their overhead; each is repeated to be long enough for the clock."""
    inputs = Inputs(8, 1000, torch.float32)
    (leaf,) = inputs.leaf()

    def repeated(run: Callable[[], object], times: int = 200) -> Callable[[], object]:
        def all_of_them() -> None:
            for _ in range(times):
                run()

        return all_of_them

    cases = []
    for name, logits in (("forward", inputs.logits), ("forward+backward", leaf)):
        contenders = []
        for who, loss in (("llmloss", llmloss_ext.cross_entropy), ("torch", torch_loss)):
            step = backward_of(loss, inputs.target)

            def run(step=step, loss=loss, logits=logits) -> object:
                return step(logits) if logits.requires_grad else loss(logits, inputs.target)

            contenders.append(Contender(who, repeated(run)))
        cases.append(Case(f"small call, {name}, 200 times", 8, 1000, torch.float32, 0, contenders))
    return cases
