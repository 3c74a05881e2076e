"""``llmloss bench trainer``: a step of `transformers.Trainer`, stock and with this library.

Each contender trains the same random Llama, whose output layer dominates, in a process of its own:
so the peak of one's memory is not another's.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from llmloss_ext.cli import UserError
from llmloss_train.memory import PeakMeter

from .machine import machine
from .report.tables import Table
from .run import Progress
from .training import llama

CONTENDERS = ("transformers", "causal_lm_loss", "use_linear_cross_entropy")


@dataclass(frozen=True)
class Sizes:
    """Of the model and its batches; ``steps`` of which the first is not counted."""

    vocab: int
    hidden: int
    layers: int
    tokens: int
    steps: int
    device: str


@dataclass(frozen=True)
class Measured:
    """Of one contender's run."""

    seconds: float
    """The median step."""
    peak_bytes: int | None
    """Beyond the model, its optimiser and its batch: of a step after the first."""
    losses: list[float]


def compare(sizes: Sizes, rounds: int, out: Path, say: Progress) -> Table:
    """Measures every contender in turn, ``rounds`` times, and writes trainer.json.

    Raises:
        UserError: transformers or accelerate is missing, or the losses differ.
    """
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"llmloss bench trainer needs {error.name}: pip install {error.name}"
        ) from error
    runs: dict[str, list[Measured]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, measured in runs.items():
            say(name, 0)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                measured.append(pool.submit(_train, sizes, name).result())
            say(name, 1)
    out.mkdir(parents=True, exist_ok=True)
    stored = {name: [asdict(m) for m in measured] for name, measured in runs.items()}
    made = {"sizes": asdict(sizes), "machine": machine(), "runs": stored}
    text = json.dumps(made, indent=1)
    (out / "trainer.json").write_text(text + "\n")
    stock = runs["transformers"]
    for name, measured in runs.items():
        pairs = zip(measured[0].losses, stock[0].losses, strict=True)
        if any(abs(a - b) > 1e-3 * abs(b) for a, b in pairs):
            raise UserError(f"{name} trains otherwise: {measured[0].losses}, {stock[0].losses}")
    title = f"A step of the Trainer: {sizes.tokens} tokens, a vocabulary of {sizes.vocab:,}"
    columns = ["loss", "step", "of stock", "tokens/s", "peak memory of a step", "of stock"]
    cells = [[name, *_cells(m, stock, sizes.tokens)] for name, m in runs.items()]
    return Table(title, columns, cells)


def _cells(measured: list[Measured], stock: list[Measured], tokens: int) -> list[str]:
    seconds, of_stock = (statistics.median(m.seconds for m in x) for x in (measured, stock))
    peaks = [[m.peak_bytes for m in x if m.peak_bytes is not None] for x in (measured, stock)]
    times = [f"{seconds:.2f} s", f"{seconds / of_stock:.2f}", f"{tokens / seconds:,.0f}"]
    if not all(peaks):
        return [*times, "-", "-"]
    peak, stock_peak = (statistics.median(x) for x in peaks)
    memory = [f"{peak / 2**20:,.0f} MiB", f"{peak / stock_peak:.2f}" if stock_peak else "-"]
    return [*times, *memory]


def _train(sizes: Sizes, name: str) -> Measured:
    import transformers

    from llmloss_ext.integrations.transformers import causal_lm_loss, use_linear_cross_entropy

    transformers.logging.set_verbosity_error()
    model = llama(sizes.vocab, sizes.hidden, sizes.layers, sizes.tokens)
    model.to(sizes.device)
    if name == "causal_lm_loss":
        model.loss_function = causal_lm_loss
    elif name == "use_linear_cross_entropy":
        use_linear_cross_entropy(model, logits="none")
    clock = _Clock(torch.device(sizes.device))
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=1, max_steps=sizes.steps, optim="sgd",
            learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, report_to=[],
            save_strategy="no", disable_tqdm=True, use_cpu=sizes.device == "cpu",
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=_Batches(sizes), callbacks=[clock.callback()]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Measured(statistics.median(clock.seconds[1:]), clock.peaks[-1], losses)


class _Batches(torch.utils.data.Dataset[Any]):
    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return self.sizes.steps

    def __getitem__(self, i: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(0, self.sizes.vocab, (self.sizes.tokens,), generator=generator)
        return {"input_ids": ids, "labels": ids}


class _Clock:
    """The time and the peak memory of each step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.peaks: list[int | None] = []

    def begin(self) -> None:
        self.meter, self.began = PeakMeter(self.device), time.perf_counter()

    def end(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.began)
        self.peaks.append(self.meter.peak())

    def callback(self) -> Any:
        import transformers

        clock = self

        class Callback(transformers.TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock.begin()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.end()

        return Callback()
