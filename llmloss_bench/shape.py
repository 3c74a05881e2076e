"""A shape of the user's own: every contender, from hidden states and from logits, in one table."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from llmloss_ext.cli import UserError

from .cases import Case
from .report.tables import Table, mebibytes, milliseconds, percent
from .results import Results

DTYPES = ("float32", "bfloat16", "float16")
_COPIES = 6
"""Of the logits, in memory at once: the inputs', and what eager torch makes of them."""


def cases_of(vocab: int, tokens: int, hidden: int | None, dtype: str, device: str) -> list[Case]:
    """Forward and backward from hidden states, if the shape has them, and from logits.

    Args:
        vocab: V.
        tokens: N.
        hidden: D, or None for logits alone.
        dtype: One of `DTYPES`.
        device: "cpu" or "cuda".

    Raises:
        UserError: The device does not have the memory.
    """
    made = [Case("cross_entropy", "forward+backward", tokens, vocab, dtype, device=device)]
    if hidden is not None:
        made.insert(0, Case("linear_cross_entropy", "forward+backward", tokens, vocab, dtype,
                            features=hidden, device=device))  # fmt: skip
    size, there = _COPIES * made[-1].logits_bytes, _memory(device)
    if size > there:
        raise UserError(
            f"{tokens} x {vocab} {dtype} logits and what torch makes of them take about "
            f"{size / 2**30:,.0f} GiB, and {device} has {there / 2**30:,.0f} GiB: lower --tokens"
        )
    return made


def curves_of(case: Case) -> list[Case]:
    """The same at fewer classes and at fewer tokens, for a report's plots."""
    of_classes = sorted({max(case.columns // by, 2) for by in (64, 16, 4)} - {case.columns})
    of_tokens = sorted({max(case.rows // by, 1) for by in (64, 16, 4)} - {case.rows})
    return [
        *(replace(case, columns=columns, figure="V") for columns in of_classes),
        *(replace(case, rows=rows, figure="N") for rows in of_tokens),
    ]


def end_curves(results: Results) -> None:
    """Adds the shape itself to the curves; it has been measured."""
    whole = results.rows[0]
    named = {n: m for n, m in whole.contenders.items() if n == "torch" or n.startswith("llmloss")}
    results.rows += [
        replace(whole, case=replace(whole.case, figure=figure), contenders=named)
        for figure in ("V", "N")
    ]


def _memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def table(results: Results) -> Table:
    """A line for each contender in each case, ours first."""
    lines = []
    for row in results.of_figure("peers"):
        origin = "hidden states" if row.case.is_linear else "logits"
        for name, m in row.contenders.items():
            ratio = row.times_faster(name)
            time = "" if m.median is None else f"{milliseconds(m.median)} ms"
            memory = "" if m.peak_bytes is None else f"{mebibytes(m.peak_bytes)} MiB"
            lines.append([
                f"{name}, from {origin}",
                time if m.status == "ok" else m.status,
                "" if ratio is None else f"{ratio:.2f}x",
                memory,
                percent(row.share_of_ceiling(name)),
                "" if m.gradient_error is None else f"{m.gradient_error:.0e}",
            ])  # fmt: skip
    columns = ["loss", "time", "of llmloss's", "peak memory", "of the limit", "gradient's error"]
    case = results.rows[0].case
    features = f", D {case.features:,}" if case.is_linear else ""
    title = f"Forward and backward, N {case.rows:,}{features}, V {case.columns:,}, {case.dtype}"
    return Table(title, columns, lines)
