"""llmloss train: the curve, resuming bit for bit, and every way that it can end."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

for package in ("matplotlib", "mistral_common", "numpy", "rich"):
    pytest.importorskip(package)

from llmloss_ext.cli import UserError  # noqa: E402
from llmloss_ext.cli.main import main  # noqa: E402
from llmloss_train import checkpoint, files, text, tokens, windows  # noqa: E402
from llmloss_train.config import TrainConfig  # noqa: E402
from llmloss_train.world import World  # noqa: E402

# Small enough for the tests.
SMALL = (
    *("--dim", "8", "--layers", "1", "--heads", "2", "--seq-len", "16", "--batch-size", "2"),
    *("--eval-every", "3", "--log-every", "1", "--save-every", "3", "--max-tokens", "3000"),
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("".join(f"Line {i}: the quick brown fox jumps over it.\n" for i in range(300)))
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _few_words(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """509 tokens instead of 131,072, whose head takes seconds; ``real_vocabulary`` keeps all."""
    if "real_vocabulary" in request.fixturenames:
        return
    right = tokens.load_tokens

    def few(documents, max_tokens):
        text = right(documents, max_tokens)
        return replace(text, ids=text.ids % 509, vocab_size=509, separator=text.separator % 509)

    monkeypatch.setattr(tokens, "load_tokens", few)


@pytest.fixture
def real_vocabulary() -> None:
    """Asks for the vocabulary as it is."""


def train(corpus: Path, out: Path, *options: str) -> int:
    return main(["train", *SMALL, "--text", str(corpus), "--out", str(out), *options])


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple]:
    return [(r["kind"], r["step"], r["loss"]) for r in metrics(out)]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("llmloss: error: ")
    assert error.count("\n") == 1
    return error


def test_a_run(corpus, tmp_path, capsys, real_vocabulary):
    assert train(corpus, tmp_path / "run", "--steps", "6", "--lr", "0.01") == 0
    output = capsys.readouterr().out
    for word in ("steps", "train loss", "validation loss", "tokens/s", "peak memory",
                 "head and loss", "metrics.jsonl", "loss.png", "checkpoint.pt"):  # fmt: skip
        assert word in output
    records = metrics(tmp_path / "run")
    validation = [r for r in records if r["kind"] == "validation"]
    assert [r["step"] for r in validation] == [0, 3, 6]
    assert validation[-1]["loss"] < validation[0]["loss"] - 0.1
    assert validation[0]["loss"] == pytest.approx(11.78, abs=0.2)  # ln 131072
    trained = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in trained] == [1, 2, 3, 4, 5, 6]
    for record in trained:
        assert 0 <= record["accuracy"] <= record["top5_accuracy"] <= 1
        assert record["grad_norm"] > 0
        assert record["loss_seconds"] > 0
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_resume_continues_bit_for_bit(corpus, tmp_path):
    options = ("--accumulate", "2", "--seed", "5")
    assert train(corpus, tmp_path / "whole", "--steps", "6", *options) == 0
    # The schedule depends on the number of steps, so the first half is stopped, not shortened.
    stop_after(3, lambda: train(corpus, tmp_path / "parts", "--steps", "6", *options))
    assert main(["train", "--resume", "--out", str(tmp_path / "parts")]) == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    one, other = (checkpoint.load(tmp_path / name)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def stop_after(step: int, run) -> None:
    """Runs until a checkpoint of ``step`` is written, then interrupts as Ctrl-C does."""
    from llmloss_train.loop import Run

    save = Run.save

    def save_and_interrupt(self):
        path = save(self)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", save_and_interrupt)
        assert run() == 130


def test_torch_and_our_loss_agree(corpus, tmp_path):
    for kind in ("linear", "logits", "torch"):
        out = tmp_path / kind
        options = ("--loss", kind, "--lr", "0.01", "--accumulate", "2")
        assert train(corpus, out, "--steps", "5", *options) == 0
    for kind in ("linear", "logits"):
        for ours, torchs in zip(metrics(tmp_path / kind), metrics(tmp_path / "torch"), strict=True):
            assert ours["loss"] == pytest.approx(torchs["loss"], rel=1e-3)
            assert ours["top5_accuracy"] == pytest.approx(torchs["top5_accuracy"], abs=0.05)


def test_bfloat16(corpus, tmp_path):
    assert train(corpus, tmp_path / "run", "--steps", "2", "--dtype", "bfloat16") == 0
    assert metrics(tmp_path / "run")[-1]["loss"] < 12.5


def test_an_earlier_run_is_not_overwritten(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(corpus, out, "--steps", "1") == 0
    before = (out / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert train(corpus, out, "--steps", "1") == 1
    assert "--resume" in one_line(capsys)
    assert (out / "checkpoint.pt").read_bytes() == before
    assert train(corpus, out, "--steps", "1", "--overwrite") == 0


def test_a_run_beside_another(corpus, tmp_path, capsys):
    one, other = tmp_path / "one", tmp_path / "other"
    assert train(corpus, other, "--compare-to", str(one)) == 1
    assert "cannot read" in one_line(capsys)
    assert not other.exists()
    assert train(corpus, one, "--steps", "6") == 0
    # The other run ends earlier, with a record that is no loss.
    lines = (one / "metrics.jsonl").read_text().splitlines()[:3]
    (one / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3}']) + "\n")
    assert train(corpus, other, "--steps", "6", "--compare-to", str(one)) == 0
    summary = json.loads((other / "summary.json").read_text())
    assert summary["compared_losses"] == 3
    assert summary["largest_difference"] == 0
    assert "at most 0.0e+00 in 3 losses of" in capsys.readouterr().out
    options = ("--steps", "6", "--seed", "1", "--overwrite", "--compare-to", str(one))
    assert train(corpus, other, *options) == 0
    assert json.loads((other / "summary.json").read_text())["largest_difference"] > 1e-3


@pytest.mark.parametrize(
    ("theirs", "difference"),
    [([1.5, 2.0], 0.5), ([float("nan"), 2.0], float("inf")), ([], None)],
)
def test_how_far_losses_are_apart(theirs, difference):
    from llmloss_train.report import Reference

    records = [[{"kind": "train", "step": i, "loss": x} for i, x in enumerate(losses)]
               for losses in (theirs, [1.0, 2.0, 3.0])]  # fmt: skip
    found = Reference(Path("other"), records[0]).difference(records[1])
    assert found["largest_difference"] == difference
    assert found["compared_losses"] == len(theirs)


def test_resume_errors(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--resume", "--out", str(out)]) == 1
    assert "nothing to resume" in one_line(capsys)
    assert train(corpus, out, "--steps", "1") == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--dim", "16", "--out", str(out)]) == 1
    assert "--dim 16 differs" in one_line(capsys)
    (out / "checkpoint.pt").write_bytes(b"broken")
    assert main(["train", "--resume", "--out", str(out)]) == 1
    assert "cannot read the checkpoint" in one_line(capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "not a checkpoint of this version"),
        ({"config": {"text": 3}}, "is damaged: TypeError"),
        ({"model": {}}, "model embedding.weight: expected (509, 8), found nothing"),
        ({"optimiser": {"embedding.weight.step": torch.ones(3)}}, "expected (), found (3,)"),
        ({"totals": {"nothing": 1}}, "is damaged: TypeError"),
        ({"text_key": "another"}, "the text differs"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_kept(corpus, tmp_path, capsys, change, message):
    assert train(corpus, tmp_path, "--steps", "1") == 0
    capsys.readouterr()
    torch.save(checkpoint.load(tmp_path) | change, tmp_path / checkpoint.NAME)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 1
    assert message in one_line(capsys)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_that_is_no_checkpoint(tmp_path, capsys):
    torch.save([1, 2], tmp_path / checkpoint.NAME)
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 1
    assert "not a checkpoint of this version" in one_line(capsys)


@pytest.mark.parametrize("line", [b"\xff\xff", b"[1]", b'{"step": "two"}', b'{"step": 2, "lo'])
def test_metrics_are_resumed_up_to_a_damaged_line(tmp_path, line):
    from llmloss_train.report import METRICS, Metrics

    (tmp_path / METRICS).write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    again = Metrics(tmp_path, resume_at=9)
    again.close()
    assert again.records == [{"step": 1}]
    assert (tmp_path / METRICS).read_bytes() == b'{"step": 1}\n'


BAD_TEXTS = [
    ("missing.txt", None, "cannot read"),
    ("empty.txt", b"  \n", "is empty"),
    ("binary.bin", b"\x00\xff\xfe", "not a text file"),
    ("short.txt", b"too short", "the text is too short"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_TEXTS)
def test_bad_text(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert train(path, tmp_path / "run") == 1
    assert message in one_line(capsys)
    assert not (tmp_path / "run").exists()


BAD_OPTIONS = [
    ("--seq-len 0", "whole number of at least 1"),
    ("--lr -1", "a number above 0"),
    ("--lr nan", "a number above 0"),
    ("--steps two", "whole number"),
    ("--batch-size 2147483648", "below 2^31"),
    ("--seed 4294967296", "from 0 to 2^32 - 1"),
    ("--threads 1025", "from 0 to 1,024"),
    ("--text=", "must not be empty"),
    ("--out=", "must not be empty"),
    ("--dtype int8", "invalid choice"),
    ("--loss liger", "invalid choice"),
    ("--frobnicate", "unrecognized arguments"),
]


@pytest.mark.parametrize(("option", "message"), BAD_OPTIONS)
def test_bad_options(corpus, tmp_path, capsys, option, message):
    with pytest.raises(SystemExit) as stop:
        train(corpus, tmp_path / "run", *option.split())
    assert stop.value.code == 2
    assert message in one_line(capsys)


def test_heads_that_do_not_divide_the_width(corpus, tmp_path, capsys):
    assert train(corpus, tmp_path / "run", "--heads", "3") == 1
    assert "not divisible" in one_line(capsys)


@pytest.mark.parametrize(
    "options",
    [
        ("--dim", "2000000000"),
        ("--layers", "2000000000"),
        ("--batch-size", "2000000000"),
        ("--accumulate", "2000000000"),
    ],
)
def test_more_than_the_memory_is_refused(corpus, tmp_path, capsys, options):
    assert train(corpus, tmp_path / "run", *options) == 1
    assert re.search(r"takes [\d,.]+ GiB or more, and cpu has [\d,.]+ GiB: lower", one_line(capsys))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("shape", [(97, 5, 8, 0), (97, 5, 8, 1), (33, 16, 12, 3)])
@pytest.mark.parametrize("further", [0, 3])
def test_parameters_are_counted_without_the_model(shape, further):
    from llmloss_train.model import GPT, parameter_count

    for is_judged in (False, True):
        model = GPT(*shape, 2, further, is_judged)
        count = sum(p.numel() for p in model.parameters())
        assert parameter_count(*shape, further, is_judged) == count


def test_a_contrastive_loss_needs_two_halves(corpus, tmp_path, capsys):
    assert train(corpus, tmp_path / "run", "--contrastive", "0.1", "--seq-len", "1") == 1
    assert "--seq-len must be >= 2" in one_line(capsys)


def test_full_disk(corpus, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.torch, "save", full)
    out = tmp_path / "run"
    assert train(corpus, out, "--steps", "1") == 1
    error = one_line(capsys)
    assert "cannot write" in error
    assert "No space left" in error
    assert list(out.glob("*.tmp")) == []


def test_a_folder_that_cannot_be_made(corpus, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert train(corpus, tmp_path / "file" / "run") == 1
    assert "cannot write" in one_line(capsys)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_signals_save_and_exit_cleanly(corpus, tmp_path, number):
    command = [sys.executable, "-m", "llmloss_ext", "train", *SMALL, "--steps", "100000"]
    command += ["--save-every", "100000", "--text", str(corpus), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and '"train"' in log.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    output, error = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "continue with: llmloss train --resume" in output
    assert "Traceback" not in error
    assert checkpoint.load(tmp_path / "run")["step"] >= 1


def test_default_text_is_there_and_in_a_fixed_order():
    first = [next(iter(text.documents(()))) for _ in range(2)]
    assert first[0] == first[1]
    assert len(first[0]) > 500


@pytest.mark.slow
def test_a_broken_cache_is_rebuilt(corpus, tmp_path, monkeypatch, real_vocabulary):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    contents = [corpus.read_text()]
    fresh = tokens.load_tokens(contents, 500)
    again = tokens.load_tokens(contents, 500)
    assert (fresh.cached, again.cached) == (False, True)
    assert torch.equal(fresh.ids, again.ids)
    (file,) = (tmp_path / "llmloss").iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    rebuilt = tokens.load_tokens(contents, 500)
    assert not rebuilt.cached
    assert torch.equal(rebuilt.ids, fresh.ids)
    assert fresh.vocab_size == 131_072


def test_windows_cover_every_token_once():
    ids = torch.arange(1, 60, dtype=torch.int32)
    ids[20] = 0  # ends a document
    cut = windows.Windows(ids, 8, separator=0)
    inputs, targets = cut.batch(range(len(cut)))
    valid = targets != windows.IGNORED
    expected = [int(t) for s, t in pairwise(ids) if s != 0]
    assert targets[valid].tolist() == expected
    assert inputs.shape == targets.shape == (len(cut), 8)


def test_order_is_a_permutation_known_from_the_position():
    order = windows.Order(7, seed=1)
    assert sorted(order.take(0, 7)) == list(range(7))
    whole = order.take(0, 21)
    assert windows.Order(7, seed=1).take(9, 5) == whole[9:14]
    assert windows.Order(7, seed=2).take(0, 7) != whole[:7]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails(file):
        file.write(b"new")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        files.replace_file(path, fails)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_every_setting_is_an_option():
    from llmloss_ext.cli.main import _parser

    parser, _ = _parser(["train"])
    options = vars(parser.parse_args(["train", *SMALL]))
    assert {"dim", "seq_len", "save_every"} <= set(options)
    assert set(options) <= {*TrainConfig.__dataclass_fields__, "command", "out", "resume",
                            "overwrite", "compare_to"}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        ("--label-smoothing", "0.1", "--z-loss", "0.001"),
        ("--confidence-penalty", "0.1"),
        ("--focal-gamma", "2"),
        ("--focal-gamma", "0.5", "--label-smoothing", "0.1", "--confidence-penalty", "0.1"),
        ("--contrastive", "0.1", "--mlm", "0.5", "--accumulate", "2"),
        ("--mtp", "2", "--accumulate", "2"),
        ("--adversarial", "0.3", "--accumulate", "2"),
    ],
)
@pytest.mark.slow
def test_objectives_agree_between_the_losses(corpus, tmp_path, options):
    for kind in ("linear", "logits", "torch"):
        assert train(corpus, tmp_path / kind, "--steps", "3", "--loss", kind, *options) == 0
    plain = tmp_path / "plain"
    assert train(corpus, plain, "--steps", "3") == 0
    for kind in ("linear", "logits"):
        for ours, torchs in zip(metrics(tmp_path / kind), metrics(tmp_path / "torch"), strict=True):
            assert ours["loss"] == pytest.approx(torchs["loss"], rel=1e-3)
            for name in ("contrastive", "mlm", "mtp", "adversarial"):
                assert (name in ours) == (ours["kind"] == "train" and f"--{name}" in options)
    assert losses(plain)[1:] != losses(tmp_path / "linear")[1:]


def test_further_targets_stay_in_their_document():
    from llmloss_train.auxiliary import further_targets

    ignored = -100
    targets = torch.tensor([[1, 2, 3, ignored, 5, 6], [1, 2, 3, 4, 5, 6]])
    x = ignored
    assert further_targets(targets, 1).tolist() == [[2, 3, x, x, 6, x], [2, 3, 4, 5, 6, x]]
    assert further_targets(targets, 2).tolist() == [[3, x, x, x, x, x], [3, 4, 5, 6, x, x]]


@pytest.mark.slow
def test_both_players_learn_and_go_on_bit_for_bit(corpus, tmp_path, capsys):
    """The discriminator begins at 2 log 2, and soon tells the samples of a new model apart."""
    options = ("--adversarial", "0.1", "--accumulate", "2", "--steps", "16", "--lr", "0.01")
    assert train(corpus, tmp_path / "run", *options) == 0
    records = [r for r in metrics(tmp_path / "run") if r["kind"] == "train"]
    assert records[0]["discriminator"] == pytest.approx(2 * math.log(2), abs=0.1)
    assert min(r["discriminator"] for r in records) < 1.2
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    stop_after(3, lambda: train(corpus, tmp_path / "parts", *options))
    assert main(["train", "--resume", "--out", str(tmp_path / "parts")]) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "run")
    capsys.readouterr()
    assert main(["train", "--resume", "--adversarial", "0", "--out", str(tmp_path / "run")]) == 1
    assert "--adversarial 0.0 differs" in one_line(capsys)
    with pytest.raises(UserError, match="--adversarial works in one process only"):
        TrainConfig(adversarial=1.0, parallel="ddp")


def test_each_player_moves_its_own_weights():
    from llmloss_train.adversary import Adversary
    from llmloss_train.model import GPT

    torch.manual_seed(0)
    model = GPT(20, 5, 8, 1, 2, is_judged=True).double()
    ids = torch.randint(0, 20, (3, 5))
    targets = ids.roll(-1, 1).masked_fill(ids == 7, -100)
    names = [name for name, _ in model.named_parameters()]
    moved = []
    for loss in (Adversary.of_model, Adversary.of_discriminator):
        adversary = Adversary(model, model.hidden(ids), targets, torch.tensor(15))
        grads = torch.autograd.grad(loss(adversary), model.parameters(), allow_unused=True)
        moved.append({n for n, g in zip(names, grads, strict=True) if g is not None and g.any()})
    judge = {name for name in names if name.startswith("discriminator.")}
    assert moved[1] == judge
    assert not moved[0] & judge
    assert {"embedding.weight", "blocks.0.up.weight"} <= moved[0]


def test_further_tokens_are_learnt(corpus, tmp_path, capsys):
    options = ("--mtp", "2", "--steps", "12", "--lr", "0.01")
    assert train(corpus, tmp_path / "run", *options) == 0
    records = [r["mtp"] for r in metrics(tmp_path / "run") if r["kind"] == "train"]
    assert records[0] == pytest.approx(6.23, abs=0.2)  # ln 509
    assert records[-1] < records[0] - 0.5
    capsys.readouterr()
    assert main(["train", "--resume", "--mtp", "1", "--out", str(tmp_path / "run")]) == 1
    assert "--mtp 1 differs" in one_line(capsys)
    assert train(corpus, tmp_path / "other", "--mtp", "64") == 1
    assert "predicts further" in one_line(capsys)


@pytest.mark.parametrize("reaction", ["mark", "skip", "lower", "off"])
def test_spikes(corpus, tmp_path, monkeypatch, reaction):
    """A loss that jumps at step 12: marked, and the weights or the rate tell of the reaction."""
    from llmloss_train import loop

    right, steps = loop.LossMonitor.check_spike, []

    def spiky(self, loss):
        steps.append(1)
        return right(self, float(loss) + (100.0 if len(steps) == 12 else 0.0))

    monkeypatch.setattr(loop.LossMonitor, "check_spike", spiky)
    applied = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda s: (applied.append(1), step(s))[1])
    options = ("--steps", "14", "--on-spike", reaction, "--spike-threshold", "50")
    assert train(corpus, tmp_path, *options) == 0
    records = [r for r in metrics(tmp_path) if r["kind"] == "train"]
    marked = {r["step"]: r["spike"] for r in records if "spike" in r}
    assert marked == ({} if reaction == "off" else {12: reaction})
    assert len(applied) == (13 if reaction == "skip" else 14)
    ratio = records[12]["lr"] / records[10]["lr"]
    assert (ratio < 0.51) == (reaction == "lower")


@pytest.mark.parametrize("reaction", ["mark", "skip", "lower", "off"])
@pytest.mark.parametrize("where", ["term", "gradient"])
def test_a_step_that_is_not_finite_is_always_skipped(
    corpus, tmp_path, monkeypatch, reaction, where
):
    """An auxiliary term, or the gradient alone, is nan in steps 3 to 14: the weights survive."""
    from llmloss_train import loop

    right, calls = loop.combined_loss, []

    def bad(terms, weights):
        calls.append(1)
        combined = right(terms, weights)
        if not 3 <= len(calls) <= 14:
            return combined
        if where == "term":
            return combined._replace(total=combined.total * float("nan"))
        combined.total.register_hook(lambda grad: grad * float("nan"))
        return combined._replace(total=combined.total * 1)

    monkeypatch.setattr(loop, "combined_loss", bad)
    options = ("--steps", "15", "--on-spike", reaction, "--mlm", "0.1", "--log-every", "100")
    assert train(corpus, tmp_path, *options) == 0
    records = [r for r in metrics(tmp_path) if r["kind"] == "train"]
    assert [r["step"] for r in records if r.get("skipped")] == list(range(3, 15))
    assert ["spike" in r for r in records].count(True) == (0 if reaction == "off" else 12)
    state = checkpoint.load(tmp_path)
    assert all(t.isfinite().all() for t in state["model"].values())
    assert state["rate_factor"] == (1 / 64 if reaction == "lower" else 1)
    assert records[-1]["step"] == 15
    assert not records[-1].get("skipped")


def test_the_curve_shows_a_loss_that_is_no_number(monkeypatch):
    from matplotlib.figure import Figure

    from llmloss_train.report import _mark_spikes

    axes = Figure().subplots()
    steps = ((1, 2.0, {}), (2, 9.0, {"spike": "mark"}), (3, float("nan"), {"skipped": True}))
    _mark_spikes(axes, [{"step": s, "loss": x, **more} for s, x, more in steps])
    crosses, line = axes.get_lines()
    assert list(crosses.get_xdata()) == [2]
    assert list(line.get_xdata()) == [3, 3]


@pytest.mark.parametrize("term", ["mlm", "mtp"])
def test_auxiliary_micro_batches_equal_the_large_batch(monkeypatch, term):
    """Unequal numbers of labels: each micro-batch's sum is divided by that of the step."""
    from llmloss_train import auxiliary
    from llmloss_train.model import GPT
    from llmloss_train.parallel import Layout

    def every_third(ids, mask_token, vocab_size, special_tokens):
        chosen = ids % 3 == 0
        return ids.masked_fill(chosen, mask_token), ids.masked_fill(~chosen, -100)

    monkeypatch.setattr(auxiliary, "mask_tokens", every_third)
    ids = torch.tensor([[3, 6, 9, 12, 3], [1, 2, 4, 5, 9], [1, 2, 1, 2, 1], [3, 1, 1, 3, 1]])
    gradients = []
    for micro_batches in ([ids], [ids[:1], ids[1:2], ids[2:3], ids[3:]]):
        torch.manual_seed(0)
        mtp = 2 if term == "mtp" else 0
        model = GPT(20, 5, 8, 1, 2, mtp).double()
        config = TrainConfig(mlm=float(term == "mlm"), mtp=mtp, accumulate=len(micro_batches))
        terms = auxiliary.Auxiliary(config, model, Layout(model), separator=0)
        # The token 12 begins a document.
        step = [(part, part.roll(-1, 1).masked_fill(part == 12, -100)) for part in micro_batches]
        terms.begin_step(step)
        for number, part in enumerate(micro_batches):
            terms.terms(number, model.hidden(part))[term]().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_monitor_and_the_lowered_rate_are_resumed(corpus, tmp_path):
    stop_after(3, lambda: train(corpus, tmp_path, "--steps", "6"))
    state = checkpoint.load(tmp_path)
    assert len(state["monitor"]["history"]) == 3
    state["rate_factor"] = 0.25
    checkpoint.save(tmp_path, state, {}, World())
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 0
    records = [r for r in metrics(tmp_path) if r["kind"] == "train"]
    assert records[3]["lr"] < 0.3 * records[2]["lr"]
