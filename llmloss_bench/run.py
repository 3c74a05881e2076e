"""Runs a suite: checks every contender, measures its time and memory, and saves the results."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from llmloss_ext.cli import UserError, first_line

from . import memory, peers
from .cases import Case, UnsupportedError
from .contenders import NAMES, Inputs, Step, contenders, make_inputs
from .inputs import LinearInputs, LogitsInputs
from .machine import machine
from .reference import Errors, errors, reference
from .results import FILE, Ceiling, Measurement, Results, Row
from .timing import Timed, measure

Progress = Callable[[str, float], None]
"""Takes a line that says what is running, and the fraction of the case done since the last call."""


class Runner:
    """Measures cases, and saves the results after each."""

    def __init__(
        self,
        suite: str,
        rounds: int,
        folder: Path | None,
        wanted: set[str] | None = None,
        with_memory: bool = True,
        overwrite: bool = False,
    ) -> None:
        """Prepares a run.

        Args:
            suite: The name of the suite, for the results.
            rounds: The number of measurements of each contender.
            folder: The folder for the results; None to keep them in memory alone.
            wanted: The contenders besides this library; None for all that suit the cases.
            with_memory: Whether to measure peak memory; on a CPU this takes a process each.
            overwrite: Whether to replace earlier results in the folder.

        Raises:
            UserError: The folder holds results already, or a contender is unknown.
        """
        unknown = (wanted or set()) - set(NAMES)
        if unknown:
            names = ", ".join(n for n in NAMES if not n.startswith("llmloss"))
            raise UserError(
                f"unknown contenders: {', '.join(sorted(unknown))}; choose from {names}"
            )
        self._path = folder and folder / FILE
        if self._path and self._path.exists() and not overwrite:
            raise UserError(f"{self._path} exists: choose another --out, or give --overwrite")
        self._rounds, self._wanted, self._with_memory = rounds, wanted, with_memory
        settings = {"suite": suite, "rounds": rounds, "memory": with_memory}
        self.results = Results(machine(), settings, peers.status())
        states = self.results.peers.items()
        self._absent = {name for name, state in states if peers.is_missing(state)}
        self._save()

    def _save(self) -> None:
        if self._path:
            self.results.save(self._path)

    def run(self, cases: list[Case], progress: Progress = lambda line, share: None) -> Results:
        """Measures every case."""
        threads = torch.get_num_threads()
        for case in cases:
            torch.set_num_threads(case.threads or threads)
            try:
                self.results.rows.append(self._measure(case, progress))
            finally:
                torch.set_num_threads(threads)
            self._save()
        self.results.complete = True
        self._save()
        return self.results

    def _measure(self, case: Case, progress: Progress) -> Row:
        on_gpu = case.device != "cpu"
        if on_gpu:
            torch.cuda.empty_cache()
        progress(f"{case.label}: float64", 0.0)
        row, timed = Row(case), {}
        competing = contenders(case, self._wanted, self._absent)
        try:
            inputs = make_inputs(case)
        except (UnsupportedError, torch.OutOfMemoryError) as error:
            for contender in competing:
                row.contenders[contender.name] = Measurement("unsupported", first_line(error))
            progress(case.label, 1.0)
            return row
        truth = reference(case, inputs)
        share = 1 / (2 * len(competing) + 1)
        for contender in competing:
            progress(f"{case.label}: {contender.name}, checked", share)
            measurement = Measurement()
            row.contenders[contender.name] = measurement
            try:
                step = Step(case, contender, inputs)
                _check(measurement, errors(case, step, truth, contender.is_ours))
                if measurement.status != "ok":
                    continue
                if on_gpu:
                    measurement.launches = memory.launches(step)
                each = Timed(step.run, step.prepare, not (contender.overwrites or case.is_linear))
                each.warm_up(on_gpu)
                timed[contender.name] = each
            except UnsupportedError as error:
                measurement.status, measurement.reason = "unsupported", str(error)
            except Exception as error:
                # Any failure is a result, and must not stop the others from being measured.
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                measurement.status, measurement.reason = "failed", reason
        ceilings = _ceilings(case, inputs)
        for each, _ in ceilings.values():
            each.warm_up(on_gpu)
        everyone = [*timed.values(), *(t for t, _ in ceilings.values())]
        part = share * len(competing) / max(len(everyone) * self._rounds, 1)
        measure(everyone, self._rounds, on_gpu, lambda: progress(f"{case.label}: timed", part))
        for name, each in timed.items():
            row.contenders[name].seconds = each.seconds
        for name, (each, ceiling) in ceilings.items():
            ceiling.seconds = each.seconds
            row.ceilings[name] = ceiling
        del inputs, everyone, timed, ceilings
        gc.collect()
        if self._with_memory and case.figure in ("peers", "steps", "V", "N", "D"):
            for name, measurement in row.contenders.items():
                if measurement.status == "ok":
                    progress(f"{case.label}: {name}, memory", 0.0)
                    measurement.peak_bytes = memory.peak_bytes(case, name)
        progress(case.label, share)
        return row


def _check(measurement: Measurement, found: Errors) -> None:
    """Records the errors, and marks a contender that is out of tolerance as wrong."""
    measurement.loss_error, measurement.gradient_error = found.loss, found.gradient
    if found.are_tolerable:
        return
    loss, gradient = found.tolerances
    parts = [f"loss {found.loss:.1e} (allowed {loss:.0e})"]
    if found.gradient is not None:
        parts.append(f"gradient {found.gradient:.1e} (allowed {gradient:.0e})")
    measurement.status = "wrong"
    measurement.reason = "error of the " + ", of the ".join(parts)


def _ceilings(case: Case, inputs: Inputs) -> dict[str, tuple[Timed, Ceiling]]:
    """The machine's limits at the shapes of the case."""
    if isinstance(inputs, LinearInputs):
        products = 3 if case.has_backward else 1
        flops = 2 * products * case.rows * case.columns * case.features
        return {
            f"products/{chunk}": (
                Timed(lambda chunk=chunk: inputs.products(chunk), repeatable=False),
                Ceiling(flops=flops),
            )
            for chunk in inputs.product_chunks()
        }
    if case.figure == "small" or not isinstance(inputs, LogitsInputs):
        return {}
    size = case.logits_bytes
    return {
        "copy": (Timed(inputs.copy), Ceiling(bytes=2 * size)),
        "read": (Timed(inputs.read), Ceiling(bytes=size)),
    }
