"""Runs the emulated CUDA kernels on numpy arrays, beside the float64 oracle.

A `Case` is a problem in a storage type, laid out in guarded memory: the logits begin at a chosen
misalignment and end where an unreadable page begins. Its methods run one kernel each and return
float64 arrays.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from oracle import Problem

from simt import build
from simt.memory import GuardedMemory

TYPES = {"float32": "float", "float64": "double", "bfloat16": "BFloat16", "float16": "Half"}
STORAGE = {
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": np.uint16,
    "float16": np.float16,
}
# Multiprocessors, shared memory of a block in bytes, largest cluster. With one multiprocessor and
# large blocks no row is split.
ONE = (1, 227 << 10, 1)
STATISTICS = (
    *("log_prob", "lse", "entropy", "mean_log_prob", "log_sum_sq_probs"),
    *("argmax", "rank"),
)
STATE = ("reference", "excess", "sum_weights")
SCHEDULES = {"forward": (0, 0), "reverse": (1, 0), "random": (2, 1)}


SANITIZED = os.environ.get("LLMLOSS_SIMT_SANITIZE") == "1"
FLAGS = ("-O1", *build.SANITIZERS) if SANITIZED else ("-O1",)


def library(
    dtype: str, flags: tuple[str, ...] = FLAGS, root: Any = build.ROOT, name: str = ""
) -> build.Library:
    """The emulated kernels of a logits type. A process loads a module of one name only once."""
    name = name or f"simt_{dtype}"
    defines = (f"-DLLMLOSS_SIMT_TYPE={TYPES[dtype]}", f"-DLLMLOSS_SIMT_MODULE={name}")
    source = build.HERE / "kernels.cpp"
    return build.Library(name, source, (*flags, *defines), root=root, pybind=True)


def to_storage(x: Any, dtype: str) -> Any:
    """Rounded to the type, to nearest even; bfloat16 as its 16 bits."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return np.asarray(x).astype(STORAGE[dtype])
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def to_float64(stored: Any, dtype: str) -> Any:
    if dtype != "bfloat16":
        return stored.astype(np.float64)
    return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


class Rows:
    """A (rows, columns) array of a storage type in guarded memory."""

    def __init__(self, values: Any, dtype: str, skew: int | None = None, gap: int = 0) -> None:
        """skew: elements from a 16-byte boundary to the first row; gap: between the rows.

        Without a skew the last row ends where unreadable memory begins; with one, up to 15 bytes
        before.
        """
        rows, columns = values.shape
        self.dtype, self.stride, self.columns = dtype, columns + gap, columns
        self.rows = rows
        size = np.dtype(STORAGE[dtype]).itemsize
        count = max(rows * self.stride - gap, 0)
        behind = 0 if skew is None else (-(count + skew) * size) % 16
        self.memory = GuardedMemory(count * size + behind)
        self.array = self.memory.bytes[: count * size].view(STORAGE[dtype])
        self.array[...] = to_storage(np.full(count, 7.0), dtype)
        for row in range(rows):
            self.row(row)[...] = to_storage(values[row], dtype)

    def row(self, row: int) -> Any:
        return self.array[row * self.stride : row * self.stride + self.columns]

    def values(self) -> Any:
        rows = [to_float64(self.row(r).copy(), self.dtype) for r in range(self.rows)]
        return np.stack(rows) if rows else np.zeros((0, self.columns))

    def gaps(self) -> Any:
        """What lies between the rows, which nobody may write."""
        gaps = [
            self.array[(r + 1) * self.stride - (self.stride - self.columns) :][
                : self.stride - self.columns
            ]
            for r in range(self.rows - 1)
        ]
        return (
            np.concatenate([to_float64(gap, self.dtype) for gap in gaps]) if gaps else np.zeros(0)
        )

    @property
    def address(self) -> int:
        return int(self.array.ctypes.data)

    @property
    def layout(self) -> tuple[int, int, int]:
        return (max(self.rows, 1), 0, self.stride)


@dataclass
class Case:
    """A problem as the kernels see it. ``problem.logits`` are rounded to the type first."""

    kernels: ModuleType
    dtype: str
    problem: Problem
    skew: int | None = None
    gap: int = 0
    int64: bool = True
    scale_on_device: bool = False
    device: tuple[int, int, int] = ONE
    focal_gamma: float = 0.0
    logits: Rows = field(init=False)
    told: dict[str, Any] = field(init=False, default_factory=dict)
    _parts: dict[int, list[Any]] = field(init=False, default_factory=dict)
    """The arrays that lie from an address on."""

    def __post_init__(self) -> None:
        self.real = np.float64 if self.dtype == "float64" else np.float32
        self.logits = Rows(self.problem.logits, self.dtype, self.skew, self.gap)
        changes: dict[str, Any] = {"logits": self.logits.values()}
        self._keep: list[Any] = []
        if not self.problem.has_indices:
            self._probabilities = Rows(self.problem.target, self.dtype, None, self.gap)
            changes["target"] = self._probabilities.values()
        for name in ("weight", "token_weight"):
            value = getattr(self.problem, name)
            if value is not None:
                changes[name] = value.astype(self.real).astype(np.float64)
        self.problem = dataclasses.replace(self.problem, **changes)

    def _address(self, values: Any, dtype: Any) -> int:
        """Of a copy that lives as long as the case, and ends where it can be read no more."""
        array = np.ascontiguousarray(values, dtype)
        memory = GuardedMemory(array.nbytes)
        memory.bytes[...] = array.reshape(-1).view(np.uint8)
        self._keep.append(memory)
        return self._address_of(memory.bytes)

    def _address_of(self, array: Any) -> int:
        address = int(array.ctypes.data)
        self._parts[address] = [array]
        return address

    def _address_of_rows(self, rows: Rows) -> int:
        few = rows.rows <= 8
        parts = [rows.row(i) for i in range(rows.rows)] if few else [rows.array]
        self._parts[rows.address] = parts
        return rows.address

    def _run(self, kernel: str, arguments: dict[str, Any], *more: int) -> Any:
        """Calls a binding of kernels.cpp, which knows the arrays by the arguments' names.

        Where accesses are seen, the arrays are watched by these names; a few rows as "logits 0".
        """
        if hasattr(self.kernels, "watch"):
            self.kernels.forget_all()
            watched: set[int] = set()
            for name, value in arguments.items():
                if type(value) is int and value in self._parts and value not in watched:
                    watched.add(value)
                    parts = self._parts[value]
                    for i, part in enumerate(parts):
                        of_part = f"{name} {i}" if len(parts) > 1 else name
                        self.kernels.watch(of_part, int(part.ctypes.data), part.nbytes)
        return getattr(self.kernels, kernel)(arguments, *more)

    def _arguments(self) -> dict[str, Any]:
        p = self.problem
        d: dict[str, Any] = {
            "logits": self._address_of_rows(self.logits),
            "layout": self.logits.layout,
            "rows": p.rows,
            "columns": p.columns,
            "vocab_size": p.vocab,
            "softcap": p.softcap,
            "ignore_index": p.ignore_index,
            "of_shard": p.of_shard,
            "label_smoothing": p.label_smoothing,
            "z_loss": p.z_loss,
            "focal_gamma": self.focal_gamma,
            "beta": 1 / p.vocab,
            "device": self.device,
        }
        if self.scale_on_device:
            d["scale_at"] = self._address([p.scale], self.real)
        else:
            d["scale"] = p.scale
        if p.has_indices:
            d["targets"] = self._address(p.target, np.int64 if self.int64 else np.int32)
            d["is_int64"] = self.int64
        else:
            d["probabilities"] = self._address_of_rows(self._probabilities)
            d["probabilities_layout"] = self._probabilities.layout
            d["alpha"] = 1 - p.label_smoothing
            d["beta"] = p.label_smoothing / p.vocab
        if p.weight is not None:
            d["class_weight"] = self._address(p.weight, self.real)
        if p.token_weight is not None:
            d["token_weight"] = self._address(p.token_weight, self.real)
        return d

    def _outputs(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {
            name: np.full(
                self.problem.rows, 77, np.int64 if name in ("argmax", "rank") else self.real
            )
            for name in names
        }

    def _addresses(self, arrays: dict[str, Any]) -> dict[str, int]:
        return {name: self._address_of(array) for name, array in arrays.items()}

    def row_stats(self, wanted: tuple[str, ...] = STATISTICS) -> dict[str, Any]:
        """The asked statistics, and what backward needs."""
        out = self._outputs((*wanted, *STATE))
        self.told = self._run("row_stats", {**self._arguments(), **self._addresses(out)})
        return out

    def _gradient(self, arguments: dict[str, Any], with_scale: bool, **where: int | None) -> Any:
        """Calls with the gradient's memory: in place, or elsewhere at another misalignment."""
        p = self.problem
        skew = where.get("skew")
        out = (
            self.logits
            if skew is None
            else Rows(np.full((p.rows, p.columns), 3.0), self.dtype, skew, 0)
        )
        scale = np.full(p.rows, 77, self.real)
        arguments |= {"grad": self._address_of_rows(out), "grad_layout": out.layout}
        if with_scale:
            arguments["grad_scale"] = self._address_of(scale)
        return arguments, out, scale

    def row_grad(
        self,
        upstream: dict[str, Any] | None = None,
        grad_loss: Any = None,
        skew: int | None = None,
        with_scale: bool = False,
        mean: tuple[float, float] | None = None,
    ) -> tuple[Any, Any]:
        """The gradient from statistics' upstreams, or of the loss; skew None: in place.

        ``mean``: the denominator of the loss, and the z-loss's factor.
        """
        stats = self.row_stats()
        arguments = self._arguments() | self._addresses(stats)
        for name, values in (upstream or {}).items():
            arguments[f"grad_{name}"] = self._address(values, self.real)
        if upstream is None:
            arguments |= {"from_loss": True, "grad_loss": self._address(grad_loss, self.real)}
            arguments["grad_loss_stride"] = 1
        if mean is not None:
            arguments["denominator"] = self._address(mean, self.real)
        arguments, out, scale = self._gradient(arguments, with_scale, skew=skew)
        self.told = self._run("row_grad", arguments)
        return out.values(), scale

    def in_place(self, mean: tuple[float, float] | None = None) -> Any:
        """Statistics, and the gradient of the sum (or a mean) of the losses, over the logits.

        In one kernel where there is one that does it: ``told["is_fused"]``.
        """
        has_mean = self.problem.label_smoothing or not self.problem.has_indices
        wanted = ("log_prob", "lse", "mean_log_prob") if has_mean else ("log_prob", "lse")
        out = self._outputs((*wanted, *STATE))
        arguments = self._arguments() | self._addresses(out) | {"from_loss": True}
        if mean is not None:
            arguments["denominator"] = self._address(mean, self.real)
        arguments, rows, _ = self._gradient(arguments, False, skew=None)
        self.told = self._run("in_place", arguments)
        return out, rows.values()

    def fused(self) -> Any:
        """The same of a plain loss, which is in one kernel."""
        result = self.in_place()
        assert self.told["is_fused"]
        return result

    def scaled(self, factor: float) -> Any:
        self._run("scale", self._arguments() | {"factor": self._address([factor], self.real)})
        return self.logits.values()

    def merged(self, bounds: list[int]) -> tuple[dict[str, Any], Any]:
        """The statistics of the rows from shards of their columns; and each target's owners."""
        p = self.problem
        shards = np.zeros((len(bounds) - 1, self.kernels.shard_fields, p.rows), self.real)
        for shard, (begin, end) in zip(shards, itertools.pairwise(bounds), strict=True):
            owned = p.valid & (p.target >= begin) & (p.target < end)
            target = np.where(p.valid, np.where(owned, p.target - begin, -1), p.target)
            columns = dataclasses.replace(
                p, logits=p.logits[:, begin:end], target=target, of_shard=True
            )
            one = Case(self.kernels, self.dtype, columns).row_stats()
            # The kernels of this test know no more classes than the shard's own.
            for name in ("mean_log_prob", "sum_weights"):
                one[name] *= (end - begin) / p.vocab
            argmax = np.where(one["argmax"] < 0, -1, one["argmax"] + begin)
            floats = [one[name] for name in STATISTICS if name not in ("argmax", "rank")]
            state = [one[name] for name in STATE]
            shard[...] = [*floats, *state, owned, argmax, np.full(p.rows, end - begin)]
        out = self._outputs((*(name for name in STATISTICS if name != "rank"), *STATE))
        owners = np.full(p.rows, 77, self.real)
        arguments = self._arguments() | self._addresses(out)
        arguments |= {"shard_stats": self._address(shards, self.real), "ranks": len(shards)}
        arguments["owners"] = self._address_of(owners)
        self._run("merge_shards", arguments)
        return out, owners

    def loss(self, reduction: str, num_items: float | None = None) -> Any:
        """The loss from the statistics kernel's statistics; and the mean's denominator.

        The denominator is followed by the factor of the z-loss.
        """
        loss, denominator, arguments, _stats = self._loss(reduction, num_items)
        if reduction == "mean":
            self._run("denominator", arguments)
        self._run("reduce_loss", arguments, ["none", "mean", "sum"].index(reduction))
        return (loss if reduction == "none" else loss[0]), denominator

    def mean_loss(self, num_items: float | None = None) -> Any:
        """The mean loss and its denominator, from one kernel."""
        loss, denominator, arguments, _stats = self._loss("mean", num_items)
        self._run("mean_loss", arguments)
        return loss[0], denominator

    def _loss(self, reduction: str, num_items: float | None) -> Any:
        stats = self.row_stats(("log_prob", "lse", "mean_log_prob"))
        arguments = self._arguments() | self._addresses(stats)
        loss = np.full(self.problem.rows if reduction == "none" else 1, 77, self.real)
        denominator = np.full(2, 77, self.real)
        arguments["loss"] = self._address_of(loss)
        if reduction == "mean":
            arguments["denominator"] = self._address_of(denominator)
            if num_items is not None:
                arguments["num_items"] = self._address([num_items], self.real)
        return loss, denominator, arguments, stats  # arguments has their addresses alone
