"""llmloss train on two processes: the curve of one, whatever they share, and how they end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_close

for package in ("matplotlib", "mistral_common", "numpy", "rich"):
    pytest.importorskip(package)

from llmloss_ext.cli import UserError  # noqa: E402
from llmloss_ext.cli.main import _parser, main  # noqa: E402

WAYS = ("ddp", "fsdp", "tp")
V = 509  # instead of 131,072: the ranks have different numbers of classes
SMALL = (
    *("--dim", "8", "--layers", "2", "--heads", "2", "--seq-len", "16", "--batch-size", "4"),
    *("--eval-every", "3", "--log-every", "1", "--save-every", "3", "--steps", "6", "--seed", "5"),
    *("--max-tokens", "1600"),  # 5 windows to validate on: a rank gets none of the last
)
# What each rank has a part of: micro-batches, masked tokens, the pairs of a batch.
TERMS = (
    "--accumulate",
    "2",
    "--mlm",
    "0.5",
    "--contrastive",
    "0.1",
    "--z-loss",
    "0.001",
    "--mtp",
    "2",
    "--focal-gamma",
    "0.5",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its second half are short documents, so that ranks have unequal numbers of valid tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("".join(f"Line {i}: the quick brown fox.\n" for i in range(90)))
    for i in range(300):
        (folder / f"b{i}.txt").write_text(f"No {i}")
    return folder


@contextmanager
def few_words(cache: Path, stop_at: int | None = None) -> Iterator[None]:
    """A small vocabulary; Ctrl-C in the last rank alone after a step."""
    from llmloss_train import loop, tokens

    load_tokens, advance = tokens.load_tokens, loop.Run._advance

    def few(documents, max_tokens):
        text = load_tokens(documents, max_tokens)
        return replace(text, ids=text.ids % V, vocab_size=V, separator=text.separator % V)

    def and_stop(self, show):
        advance(self, show)
        if self.step == stop_at and self.world.rank == self.world.size - 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr(tokens, "load_tokens", few)
        patch.setattr(loop.Run, "_advance", and_stop)
        yield


def rank_train(rank, ranks, argv, cache, stop_at):
    from llmloss_train.command import _train
    from llmloss_train.world import World

    parser, _ = _parser(["train"])
    args = parser.parse_args(["train", *map(str, argv)])
    with few_words(cache, stop_at):
        return _train(args, World(rank, ranks, rank, ranks, is_joined=True))


@pytest.fixture
def train(two, tmp_path_factory):
    """``train(way, out, *options)`` runs one process, or two for a way to share the work."""
    cache = tmp_path_factory.getbasetemp() / "cache"

    def run(way: str, out: Path, *options: object, stop_at: int | None = None) -> None:
        argv = ["--out", out, *options]
        if way == "one":
            with few_words(cache, stop_at):
                statuses = [main(["train", *map(str, argv)])]
        else:
            statuses = two.run(rank_train, ["--parallel", way, *argv], cache, stop_at)
        assert set(statuses) == {0 if stop_at is None else 130}

    return run


@pytest.fixture(scope="module")
def whole(groups, corpus, tmp_path_factory) -> Path:
    """The run of one process that the others must equal."""
    out = tmp_path_factory.mktemp("whole")
    with few_words(tmp_path_factory.getbasetemp() / "cache"):
        assert main(["train", *SMALL, *TERMS, "--text", str(corpus), "--out", str(out)]) == 0
    return out


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_curve(out: Path, expected: Path) -> None:
    ours, theirs = records(out), records(expected)
    assert [(r["kind"], r["step"]) for r in ours] == [(r["kind"], r["step"]) for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"kind", "grad_norm", "tokens_per_second", "loss_seconds"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("way", WAYS)
def test_the_curve_is_that_of_one_process(train, corpus, whole, tmp_path, way):
    train(way, tmp_path, *SMALL, *TERMS, "--text", corpus, "--compare-to", whole)
    assert_same_curve(tmp_path, whole)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert f"2 processes ({way})" in summary["run"]
    assert summary["compared_to"] == str(whole)
    assert summary["compared_losses"] == len(records(whole))
    assert summary["largest_difference"] < 1e-3
    ours, theirs, torchs = (one["loss"] for one in summary["losses"])
    assert ours == pytest.approx(torchs, rel=1e-5)
    assert theirs == pytest.approx(torchs, rel=1e-5)
    # One process writes these, and no other file.
    parts = [path.name for path in tmp_path.glob("checkpoint-parts-*")]
    names = {"metrics.jsonl", "summary.json", "loss.png", "checkpoint.pt", *parts}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert len(parts) == 1


def problem(way, kind, rank, ranks):
    """The mean of a step's loss over the ranks, the norm of its gradient, and the gradients."""
    from llmloss_ext.losses import combined_loss
    from llmloss_ext.training import count_items
    from llmloss_train.auxiliary import Auxiliary
    from llmloss_train.config import TrainConfig
    from llmloss_train.losses import Objective, create_loss
    from llmloss_train.model import GPT
    from llmloss_train.parallel import clip_gradients, divide, whole
    from llmloss_train.world import World

    torch.manual_seed(0)
    model = GPT(V, 16, 6, 2, 2, 2).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(V, (ranks, 16))
    targets = ids.roll(-1, 1)
    targets[0, :13] = targets[1, ::5] = -100
    cpu, world = torch.device("cpu"), World(rank, ranks, rank, ranks, is_joined=way != "none")
    config = TrainConfig(
        batch_size=ranks, dim=6, heads=2, contrastive=0.3, mlm=0.5, mtp=2, parallel=way
    )
    layout = divide(model, config, world, cpu)
    loss = create_loss(kind, cpu, Objective(0.1, 1e-3, 0.5, 0.2 if kind != "torch" else 0.0))
    auxiliary = Auxiliary(config, model, layout, separator=0)
    auxiliary.begin_step([(ids, targets)])
    mine = targets[layout.rows(ranks)]
    items = layout.divisor(count_items([mine], group=layout.group))

    def use(hidden, weight):
        lm, _ = loss.train(hidden, weight, mine, items, True)
        return combined_loss(
            {"lm": lm, **auxiliary.terms(0, hidden)}, {"lm": 1.0} | auxiliary.weights
        )

    total = layout.forward(ids[layout.rows(ranks)], use).total
    total.backward()
    value = torch.tensor(world.mean([float(total.detach())]))
    norm = clip_gradients(model.parameters(), 0.5)
    return value, norm, {name: whole(p.grad) for name, p in model.named_parameters()}


def rank_gradients(rank, ranks, kind):
    value, norm, gradients = problem("none", kind, rank, ranks)
    for way in WAYS:
        its_value, its_norm, its_gradients = problem(way, kind, rank, ranks)
        assert_close(its_value, value, 1e-12)
        assert_close(its_norm, norm, 1e-12)
        for name, gradient in gradients.items():
            assert_close(its_gradients[name], gradient, 1e-13)


@pytest.mark.parametrize("kind", ["linear", "logits", "torch"])
def test_gradients_are_those_of_one_process(ranks, kind):
    ranks.run(rank_gradients, kind)


@pytest.mark.parametrize(
    ("before", "after"), [("fsdp", "one"), ("one", "tp"), ("tp", "ddp"), ("ddp", "fsdp")]
)
def test_another_number_of_processes_resumes(train, corpus, whole, tmp_path, before, after):
    train(before, tmp_path, *SMALL, *TERMS, "--text", corpus, stop_at=4)
    assert [r["step"] for r in records(tmp_path)][-1] == 4
    train(after, tmp_path, "--resume")
    assert_same_curve(tmp_path, whole)
    assert len(list(tmp_path.glob("checkpoint-parts-*"))) == (after != "one")


def test_parts_that_cannot_be_read(train, corpus, tmp_path, capsys):
    train("ddp", tmp_path, *SMALL, "--text", corpus, stop_at=1)
    (parts,) = tmp_path.glob("checkpoint-parts-*")
    next(parts.glob("*.distcp")).write_bytes(b"broken")
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"llmloss: error: cannot read the checkpoint .*parts-1: .+\n", error)


def rank_save(rank, ranks, folder):
    from llmloss_train import checkpoint
    from llmloss_train.world import World

    world = World(rank, ranks, rank, ranks, is_joined=True)
    tensors = {"model": {"weight": torch.ones(3)}}
    checkpoint.save(folder, {"step": 1}, tensors, world)
    torch.distributed.barrier()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "replace_file", full)
        if rank == 0:
            with pytest.raises(UserError, match=r"cannot write .*checkpoint.pt: No space left"):
                checkpoint.save(folder, {"step": 2}, tensors, world)
        else:
            checkpoint.save(folder, {"step": 2}, tensors, world)
    torch.distributed.barrier()
    (folder / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/checkpoint-parts-1: Not a directory"):
        checkpoint.save(folder / "file", {"step": 3}, tensors, world)
    weight = torch.zeros(3)
    state = checkpoint.load(folder)
    assert state["step"] == 1
    checkpoint.restore(folder, state, {"model": {"weight": weight}}, world)
    assert_close(weight, torch.ones(3), 0)


def full(*_):
    raise OSError(28, os.strerror(28))


def test_an_earlier_checkpoint_survives_a_full_disk(two, tmp_path):
    two.run(rank_save, tmp_path)


def rank_worlds(rank, ranks):
    from llmloss_train.world import World

    world = World(rank, ranks, rank, ranks, is_joined=True)
    assert world.mean([rank, 1.0]) == [(ranks - 1) / 2, 1.0]
    assert world.any(rank == ranks - 1)
    assert not world.any(False)
    assert world.of_first(7 - rank) == 7
    world.require_same("text", "texts differ")
    with pytest.raises(UserError, match="texts differ"):
        world.require_same(f"text {rank}", "texts differ")
    with pytest.raises(UserError, match="cuda:0 is one GPU for all processes"):
        world.open_device("cuda:0")


def test_what_processes_tell_each_other(ranks):
    ranks.run(rank_worlds)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(corpus, tmp_path, *options):
    command = [*TORCHRUN, "-m", "llmloss_ext", "train", *SMALL, "--text", str(corpus), *options]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def lines_of(error: str) -> list[str]:
    return [line for line in error.splitlines() if line.startswith("llmloss: ")]


def test_the_end_of_one_process_ends_the_other(corpus, tmp_path):
    options = ("--steps", "100000", "--parallel", "ddp", "--out", str(tmp_path))
    process = start(corpus, tmp_path, *options)
    log, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and '"train"' in log.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    (line,) = lines_of(error)
    assert line.startswith("llmloss: error: another process of this run has ended: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--parallel", "fsdp", "--out", "file/run"), "cannot write file/run"),  # rank 0 alone
        (("--out", "run"), "there are 2 processes: say what they share by --parallel"),  # both
    ],
)
def test_an_error_is_one_line(corpus, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    process = start(corpus, tmp_path, *options)
    output, error = process.communicate(timeout=300)
    assert process.returncode != 0
    assert output.count("reading the text") == ("--parallel" in options)
    (line,) = lines_of(error)
    assert message in line


@pytest.mark.parametrize(
    ("way", "settings", "message"),
    [
        ("ddp", {"batch_size": 3}, "--batch-size 3 is not divisible by the 2 processes"),
        ("fsdp", {"batch_size": 3}, "--batch-size 3 is not divisible by the 2 processes"),
        ("tp", {"dim": 3, "heads": 1}, "4 x --dim 3 is not divisible by the 8 processes"),
    ],
)
def test_what_processes_cannot_share(way, settings, message):
    from llmloss_train.config import TrainConfig
    from llmloss_train.model import GPT
    from llmloss_train.parallel import divide
    from llmloss_train.world import World

    world = World(size=8 if way == "tp" else 2, is_joined=True)
    config = TrainConfig(parallel=way, **settings)
    with pytest.raises(UserError, match=message):
        divide(GPT(9, 4, 3, 1, 1), config, world, torch.device("cpu"))


@pytest.mark.parametrize("way", WAYS)
def test_one_process_shares_with_nobody(tmp_path, capsys, way):
    assert main(["train", "--parallel", way, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"llmloss: error: --parallel {way} needs several processes: torchrun ")
    assert error.count("\n") == 1
