"""``python -m bench``: the losses beside torch, and beside a plain copy of the same bytes."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.cases import Case, cross_entropy_cases, option_cases, small_cases
from bench.gpu_cases import gpu_suites, missing_peers
from bench.linear_cases import linear_cases
from bench.timing import measure
from llmloss_ext.cli.info import ISAS


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "isa": ISAS[torch.ops.llmloss.cpu_isa()],
        "torch": torch.__version__,
        "python": platform.python_version(),
        **_gpu(),
        "date": date.today().isoformat(),
        "commit": commit,
    }


def _gpu() -> dict[str, object]:
    if not torch.cuda.is_available():
        return {}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver, clock": told}


def result(case: Case) -> dict[str, object]:
    """A case's figures."""
    times = {c.name: c.median for c in case.contenders}
    ours = times["llmloss"]
    figures: dict[str, object] = {
        "case": case.label,
        "milliseconds": {name: round(t * 1e3, 3) for name, t in times.items()},
        "spread": {c.name: round(c.spread, 3) for c in case.contenders},
        "times_faster_than": {
            name: round(t / ours, 2)
            for name, t in times.items()
            if name not in ("llmloss", "copy", "read")
        },
    }
    if "read" in times:
        figures["share_of_read_bandwidth"] = round(times["read"] / ours, 3)
    if "copy" in times:
        size = case.rows * case.columns * case.dtype.itemsize
        figures["gigabytes_per_second"] = round(case.bytes / ours / 1e9, 2)
        figures["copy_gigabytes_per_second"] = round(2 * size / times["copy"] / 1e9, 2)
        figures["share_of_copy_bandwidth"] = round(
            (case.bytes / ours) / (2 * size / times["copy"]), 3
        )
    return figures


def show(console: Console, results: list[dict]) -> None:
    """The figures as a table."""
    names = list(dict.fromkeys(name for r in results for name in r["times_faster_than"]))
    table = Table(title="llmloss_ext beside others (median milliseconds; x: times faster)")
    for column in ("case", "llmloss", *names, "GB/s", "of copy"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for r in results:
        cells = [r["case"], f"{r['milliseconds']['llmloss']:.2f}"]
        for peer in names:
            time, ratio = r["milliseconds"].get(peer), r["times_faster_than"].get(peer)
            cells.append("" if time is None else f"{time:.2f} ({ratio}x)")
        cells.append(str(r.get("gigabytes_per_second", "")))
        share = r.get("share_of_copy_bandwidth")
        table.add_row(*cells, "" if share is None else f"{share:.2f}")
    console.print(table)


def main() -> None:
    """Runs the suites and writes the results."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each contender")
    parser.add_argument("--only", default="", help="run only cases whose label contains this")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    console = Console(width=150)
    suites: list[Callable[[], list[Case]]] = [
        small_cases,
        lambda: cross_entropy_cases(2048, 32000),
        lambda: cross_entropy_cases(1024, 128256),
        lambda: option_cases(1024, 128256),
        linear_cases,
    ]
    if torch.cuda.is_available():
        suites = gpu_suites()
        for line in missing_peers():
            console.print(line)
    results = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("timing", total=len(suites))
        for suite in suites:
            for case in suite():
                if args.only in case.label:
                    progress.update(task, description=case.label)
                    measure(case.contenders, args.rounds)
                    results.append(result(case))
            progress.advance(task)
    show(console, results)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
        console.print(f"figures written to {args.out}")


if __name__ == "__main__":
    main()
