"""The figures of README and of the documentation, written from the committed results.

``BLOCKS[NAME]`` makes the text between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``, which
stands once on the page that `PAGES` says. ``python -m bench.readme`` writes it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bench import demo
from llmloss_bench.cases import Case
from llmloss_bench.report.tables import Table, mebibytes, milliseconds, percent
from llmloss_bench.results import Results, Row
from llmloss_ext.cli import UserError
from llmloss_ext.cli.errors import OneLineParser, run_command
from llmloss_train.files import replace_file, writing

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": ("summary",),
    "README.zh.md": ("summary-zh",),
    "docs/speed.md": ("machine", "speed", "options", "linear", "steps", "gpu"),
    "docs/training-demo.md": ("demo",),
}
"""The blocks of each page."""
CPU_RESULTS = ROOT / "bench" / "results" / "cpu"
STEP_RESULTS = ROOT / "bench" / "results" / "steps"
GPU_RESULTS = ROOT / "bench" / "results" / "h200"

_BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)


def render(page: str, text: str, results: Results) -> str:
    """Fills in the blocks of the text of a page.

    Raises:
        UserError: A block is unknown or missing.
    """
    seen = []

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        if name not in BLOCKS:
            raise UserError(f"{page} has an unknown block bench:{name}")
        seen.append(name)
        return f"{match[1]}{BLOCKS[name](results)}\n{match[3]}"

    text = _BLOCK.sub(fill, text)
    if sorted(seen) != sorted(PAGES[page]):
        wanted = ", ".join(PAGES[page])
        raise UserError(f"{page} must have each of its blocks once: {wanted}; has {seen}")
    return text


def outdated() -> dict[str, str]:
    """The pages that do not hold the committed figures, as they would."""
    results = Results.load(CPU_RESULTS)
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    filled = {page: render(page, text, results) for page, text in texts.items()}
    return {page: text for page, text in filled.items() if text != texts[page]}


def update() -> list[str]:
    """Writes the committed figures to the pages; returns those that have changed."""
    changed = outdated()
    for page, text in changed.items():
        with writing(ROOT / page):
            replace_file(ROOT / page, partial(_write, text))
    return list(changed)


def _write(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


def _machine(results: Results) -> str:
    facts = results.machine
    return (
        f"Measured on {facts['threads']} cores of {facts['cpu']} ({facts['isa']}), torch "
        f"{facts['torch']}, {_rounds(results)} interleaved rounds, {facts['date']}."
    )


def _rounds(results: Results) -> str:
    """The number of rounds, or its range: slow cases have fewer."""
    counts = sorted(
        {len(m.seconds) for row in results.rows for m in row.contenders.values() if m.seconds}
    )
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])


class _Words(NamedTuple):
    """What `_summary` says, in one language."""

    columns: tuple[str, ...]
    label: str
    work: dict[str, str]
    faster: str
    on_cpu: str
    on_gpu: str


_ENGLISH = _Words(
    columns=(
        "work",
        "time",
        "than eager torch",
        "than torch.compile",
        "peak MiB: eager / compiled / here",
    ),
    label="{place}, {work}, {size}, {dtype}",
    work={
        "forward": "loss",
        "forward+backward": "loss and gradient",
        "inplace": "loss and gradient, in place",
        "linear": "from hidden states",
    },
    faster="{}x faster",
    on_cpu="CPU: {threads} cores of {cpu}, torch {torch}, {date}. ",
    on_gpu="GPU: one {gpu}, torch {torch}, {date}. Medians of interleaved rounds; memory "
    "beyond the inputs, gradients included, where it was measured.",
)
_CHINESE = _Words(
    columns=(
        "计算内容",
        "耗时",
        "相对 eager torch",
        "相对 torch.compile",
        "峰值 MiB：eager / compile / 本库",
    ),
    label="{place}，{work}，{size}，{dtype}",
    work={
        "forward": "损失",
        "forward+backward": "损失和梯度",
        "inplace": "损失和梯度，原地",
        "linear": "从隐藏状态出发",
    },
    faster="{} 倍速",
    on_cpu="CPU：{cpu}，{threads} 核，torch {torch}，{date}。",
    on_gpu="GPU：一块 {gpu}，torch {torch}，{date}。各方案交错轮流计时，取中位数；"
    "内存含梯度、不含输入，空格表示未测得。",
)
_QUOTED_VOCABULARY = 128256
"""Llama 3's: the dense cases of the summary."""


def _summary(results: Results, words: _Words) -> str:
    """What most people want to know: a CPU and a GPU, from logits and from hidden states."""
    gpu = Results.load(GPU_RESULTS)
    lines = []
    for place, of, dtype in (("CPU", results, "float32"), ("GPU", gpu, "bfloat16")):
        for row, name, work in _quoted(of, dtype):
            size = row.case.label.split(", ")[-2]
            ratios = [row.times_faster(than, name) for than in ("torch", "compile")]
            lines.append([
                words.label.format(place=place, work=words.work[work], size=size, dtype=dtype),
                _duration(row, name),
                *("" if r is None else words.faster.format(_two_digits(r)) for r in ratios),
                _memory(row, name),
            ])  # fmt: skip
    table = Table("", list(words.columns), lines).markdown()
    facts = words.on_cpu.format(**results.machine) + words.on_gpu.format(**gpu.machine)
    return f"{table}\n\n{facts}"


def _quoted(results: Results, dtype: str) -> list[tuple[Row, str, str]]:
    """Rows, with a contender and the work that it does there."""
    rows = [row for row in results.of_figure("peers") if row.case.dtype == dtype]
    dense = [r for r in rows if not r.case.is_linear and r.case.columns == _QUOTED_VOCABULARY]
    most = max(row.case.rows for row in dense)
    quoted = [(r, "llmloss", r.case.passes) for r in dense if r.case.rows == most]
    quoted += [
        (row, "llmloss inplace", "inplace")
        for row, *_ in quoted
        if "llmloss inplace" in row.contenders
    ]
    return quoted + [(row, "llmloss", "linear") for row in rows if row.case.is_linear]


def _two_digits(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}"


def _memory(row: Row, name: str) -> str:
    """Of eager torch, of torch.compile and ours; nothing where one was not measured."""
    peaks = [row.contenders[who].peak_bytes for who in ("torch", "compile", name)]
    return " / ".join(map(mebibytes, peaks)) if all(peaks) else ""


def _speed(results: Results) -> str:
    rows = []
    for row in results.of_figure("peers"):
        if row.case.is_linear:
            continue
        names = ("llmloss", "llmloss inplace") if row.case.has_backward else ("llmloss",)
        for name in names:
            label = row.case.label + (", inplace" if name.endswith("inplace") else "")
            rows.append([
                label,
                _duration(row, name),
                _faster(row, "torch", name),
                _faster(row, "compile", name),
                percent(row.share_of_ceiling(name)),
            ])  # fmt: skip
    columns = ["work", "time", "than eager torch", "than torch.compile", "of the limit"]
    return Table("", columns, rows).markdown()


def _linear(results: Results) -> str:
    rows = [r for r in results.of_figure("peers") if r.case.is_linear]
    case = rows[0].case
    few = [results.find(_with_ignored(r.case)) for r in rows]
    title = f"N {case.rows}, D {case.features}, V {case.columns}, {case.passes}"
    peaks = [
        [mebibytes(r.contenders[n].peak_bytes) for n in ("llmloss", "torch", "compile")]
        for r in rows
    ]
    products = [f"{percent(r.share_of_ceiling())} of our time" for r in rows]
    ignored = [_times_faster(a, b) for a, b in zip(few, rows, strict=True)]
    chunked = "torch's `F.linear_cross_entropy` in chunks"
    lines = [
        ["time", *(_duration(r, "llmloss") for r in rows)],
        ["`F.linear` + `F.cross_entropy`", *(_longer(r, "torch") for r in rows)],
        ["the same by torch.compile", *(_longer(r, "compile") for r in rows)],
        [chunked, *(_longer(r, "torch chunked") for r in rows)],
        ["the matrix products alone, at their best chunk", *products],
        ["with 75 % of the tokens ignored", *ignored],
        ["peak memory beyond the inputs, gradients included",
         *(f"{ours} MiB; eager {eager} MiB, compiled {compiled} MiB"
           for ours, eager, compiled in peaks)],
    ]  # fmt: skip
    columns = [title, *(r.case.dtype for r in rows)]
    return Table("", columns, lines).markdown()


def _options(results: Results) -> str:
    options = list(results.of_figure("options"))
    sizes = sorted({f"{row.case.rows} x {row.case.columns}" for row in options})
    costs = [
        f"{row.case.option} {cost:.2f}" for row in options if (cost := results.option_cost(row))
    ]
    ignored = [
        f"{cost:.2f} ({row.case.passes})"
        for row in results.of_figure("ignored")
        if not row.case.is_linear and (cost := results.option_cost(row))
    ]
    small = [
        f"{1 / ratio:.1f} ({row.case.passes})"
        for row in results.of_figure("small")
        if (ratio := row.times_faster("torch"))
    ]
    text = (
        f"What an option costs, forward and backward, over plain cross entropy "
        f"({', '.join(sizes)}): {', '.join(costs)}."
        f"\nWith half of the rows ignored: {', '.join(ignored)}."
    )
    if small:
        text += f" A small call (8 x 1000) takes {', '.join(small)} of eager torch's time."
    return text


def _steps(_: Results) -> str:
    """Of other results: whole steps and float32 logits, measured on another machine."""
    results = Results.load(STEP_RESULTS)
    lines = []
    for row in [r for r in results.rows if r.case.is_linear]:
        for name in [n for n in row.contenders if n.startswith("llmloss")]:
            how = ", from logits" if name.endswith("logits") else ""
            lines.append([
                row.case.label + how,
                _duration(row, name),
                *(_longer(row, other, name) for other in ("torch", "compile")),
                _memory_beside(row, name),
            ])  # fmt: skip
    columns = ["step", "time", "eager torch", "torch.compile", "peak MiB: eager / compiled / here"]
    return f"{_machine(results)}\n\n{Table('', columns, lines).markdown()}"


def _memory_beside(row: Row, name: str) -> str:
    """Of all that were measured; a dash for one that was not."""
    found = [row.contenders.get(who) for who in ("torch", "compile", name)]
    peaks = [measured and measured.peak_bytes for measured in found]
    return " / ".join(mebibytes(peak) if peak else "-" for peak in peaks) if peaks[-1] else ""


def _gpu(_: Results) -> str:
    """Of other results: one card's."""
    results = Results.load(GPU_RESULTS)
    facts = results.machine
    rows = []
    large = [r for r in results.of_figure("peers") if r.case.rows >= 8192]
    large = [r for r in large if r.case.dtype == "bfloat16"]
    others = [
        other
        for other in ("torch", "compile", "liger", "quack", "cce")
        if any(other in row.contenders for row in large)
    ]
    for row in large:
        names = ("llmloss", "llmloss inplace") if row.case.has_backward else ("llmloss",)
        rows += [
            [
                row.case.label + (", inplace" if name.endswith("inplace") else ""),
                _duration(row, name),
                percent(row.share_of_ceiling(name)),
                *(_than(row, other, name) for other in others),
            ]
            for name in names
            if name in row.contenders
        ]
    columns = ["work", "time", "of the limit", *(f"than {other}" for other in others)]
    table = Table("", columns, rows).markdown()
    return (
        f"Measured on one {facts['gpu']}, torch {facts['torch']}, {_rounds(results)} interleaved "
        f"rounds, {facts['date']}. Medians; above 1 we are faster.\n\n{table}"
    )


def _than(row: Row, other: str, who: str) -> str:
    if other not in row.contenders:
        return ""
    ratio = row.times_faster(other, who)
    return row.contenders[other].status if ratio is None else f"{ratio:.2f}x"


def _duration(row: Row, name: str) -> str:
    median = row.contenders[name].median
    return "" if median is None else f"{milliseconds(median)} ms"


def _faster(row: Row, than: str, who: str) -> str:
    ratio = row.times_faster(than, who)
    return row.contenders[than].status if ratio is None else f"{ratio:.1f}x faster"


def _longer(row: Row, name: str, who: str = "llmloss") -> str:
    measurement = row.contenders.get(name)
    if measurement is None:
        return "not measured"
    ratio = row.times_faster(name, who)
    if ratio is not None:
        return f"{ratio:.2f} times as long"
    error = measurement.loss_error
    return measurement.status if error is None else f"{measurement.status}: loss off by {error:.1%}"


def _with_ignored(case: Case) -> Case:
    return replace(case, ignored=0.75, figure="ignored")


def _times_faster(few: Row | None, whole: Row) -> str:
    times = [row and row.contenders["llmloss"].median for row in (few, whole)]
    return f"{times[1] / times[0]:.1f} times faster" if times[0] and times[1] else "not measured"


BLOCKS: dict[str, Callable[[Results], str]] = {
    "summary": lambda results: _summary(results, _ENGLISH),
    "summary-zh": lambda results: _summary(results, _CHINESE),
    "machine": _machine,
    "speed": _speed,
    "linear": _linear,
    "options": _options,
    "steps": _steps,
    "gpu": _gpu,
    "demo": lambda _: demo.render(),
}


class ReadmeParser(OneLineParser):
    """Reports a wrong option in one line."""

    program = "bench"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the figures, or checks them.

    Returns:
        0; 1 after an error, or if a page is out of date; 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    return run_command("bench", lambda: _run(args))


def _parser() -> ReadmeParser:
    parser = ReadmeParser(
        prog="python -m bench.readme",
        description="Writes the measured figures into README and docs/.",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="only check that they are up to date")
    how.add_argument("--demo", type=Path, metavar="RUN",
                     help="first store the figures of this run of llmloss train")  # fmt: skip
    return parser


def _run(args: argparse.Namespace) -> int:
    if args.demo:
        print(demo.keep(args.demo))
    if args.check:
        if pages := ", ".join(outdated()):
            raise UserError(f"not of the committed figures: {pages}; run python -m bench.readme")
        return 0
    print(f"written: {', '.join(update()) or 'nothing, all were up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
