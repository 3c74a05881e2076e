"""llmloss eval: against float64 from whole logits, stopped and continued, and every way to end."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")

from llmloss_eval import evaluation, partial
from llmloss_eval.pieces import windows
from llmloss_ext.cli.main import main
from llmloss_ext.metrics import expected_calibration_error

ROOT = Path(__file__).parents[2]
MODELS = '''
"""Models with random weights whose tokens are bytes."""
import os
import signal

import torch
from torch import nn


class Plain(nn.Module):
    context = 24
    separator = 10

    def __init__(self, bias=True, cap=0.0, looks_back=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(256, 16)
        self.mix = nn.GRU(16, 16, batch_first=True, bidirectional=looks_back)
        self.head = nn.Linear(16, 256, bias=bias)
        self.cap = cap
        self.rows_of_logits = []

    def forward(self, ids):
        hidden = 6 * self.mix(self.embedding(ids))[0][..., -16:]
        logits = self.head(hidden)
        self.rows_of_logits.append(logits.shape[1])
        assert ids.shape[1] <= 24 or self.context != 24, "too long"
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


def plain():
    return Plain()


def capped():
    return Plain(cap=2.0)


def without_bias():
    return Plain(bias=False)


def both_ways():
    return Plain(looks_back=True)


def by_chance():
    model = Plain()
    model.mix = nn.Sequential(model.mix, First(), Noise())
    return model


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x), None


def words():
    """Four ids a byte, and one that begins a text by itself: none."""
    return Plain(), lambda text: [b // 2 for b in text.encode()]


def too_many_words():
    return Plain(), lambda text: [1000 + b for b in text.encode()]


def silent():
    return Plain(), lambda text: []


def huge_words():
    return Plain(), lambda text: [1 << 70 for b in text]


def not_a_number():
    model = Plain()
    nn.init.constant_(model.head.bias, float("nan"))
    return model


def no_context():
    model = Plain()
    model.context = 0
    return model


class Short(Plain):
    context = None

    def forward(self, ids):
        assert ids.shape[1] < 5, "short"
        return super().forward(ids)


def short():
    return Short()


def bad_tokenizer():
    return Plain(), lambda text: 1 / 0


def no_separator():
    model = Plain()
    model.separator = None
    return model


def odd_context():
    model = Plain()
    model.context = "many"
    return model


def nothing():
    return None


def broken():
    raise RuntimeError("two\\nlines")


def no_logits():
    return nn.Embedding(256, 4), 3


def wrong_shape():
    return nn.Flatten()


def breaks_down():
    model = Plain()
    model.context = None

    def refuse(module, ids):
        if ids[0].shape[1] > 20:
            raise RuntimeError("worn out\\nreally")

    model.register_forward_pre_hook(refuse)
    return model


value = 3
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    (folder / "models_of_test_eval.py").write_text(MODELS)
    text = "".join(f"Line {i}: the quick brown föx jumps {i * i}.\n" for i in range(12))
    (folder / "text.txt").write_text(text)
    (folder / "one.txt").write_text("x")
    (folder / "blank.txt").write_text(" \n")
    (folder / "binary.txt").write_bytes(b"\xff\0")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    return folder


@pytest.fixture(autouse=True)
def _inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delenv("LLMLOSS_TRACEBACK", raising=False)


def evaluate(*argv: str, out: Path) -> dict:
    assert main(["eval", *argv, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def model_of(name: str) -> torch.nn.Module:
    import importlib

    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module("models_of_test_eval"), name)()
    finally:
        sys.path.pop(0)
    return made[0] if isinstance(made, tuple) else made


def by_hand(name: str, ids: list[int], window: int, stride: int, bins: int = 15) -> dict:
    """Hugging Face's loop of windows, with whole logits in float64."""
    model = model_of(name).double()
    log_probs, ranks, confidences = [], [], []
    previous = 1
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        with torch.no_grad():
            log_p = model(torch.tensor([ids[begin : end - 1]]))[0].log_softmax(-1)
        for position in range(previous, end):
            row, target = log_p[position - begin - 1], ids[position]
            log_probs.append(row[target].item())
            ranks.append(int((row > row[target]).sum()))
            confidences.append(row.max().exp().item())
        previous = end
        if end == len(ids):
            break
    confidence, rank = torch.tensor(confidences).double(), torch.tensor(ranks)
    return {
        "tokens": len(ranks),
        "nats": -math.fsum(log_probs),
        "ranks": rank,
        "ece": expected_calibration_error(confidence, rank == 0, bins).item(),
    }


SPEC = "models_of_test_eval:"


@pytest.mark.parametrize("name", ["plain", "capped", "without_bias"])
@pytest.mark.parametrize(
    ("window", "stride"), [(24, 12), (24, 23), (24, 1), (2, 1), (25, 24), (7, 3)]
)
def test_a_text(place, tmp_path, name, window, stride):
    result = evaluate(
        SPEC + name, "text.txt", "--window", str(window), "--stride", str(stride),
        "--top-k", "3", "1", "40", "--batch-size", "5", "--bins", "7", out=tmp_path / "a.json",
    )  # fmt: skip
    content = (place / "text.txt").read_bytes()
    expected = by_hand(name, list(content), window, stride, 7)
    assert result["tokens"] == expected["tokens"] == len(content) - 1
    assert result["bytes"] == len(content)
    assert result["nats"] == pytest.approx(expected["nats"], rel=1e-5)
    loss = expected["nats"] / expected["tokens"]
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    bits = expected["nats"] / math.log(2) / len(content)
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    # Two logits may be as near to each other as float32 can tell.
    assert list(result["top_k_accuracy"]) == ["1", "3", "40"]
    for k, accuracy in result["top_k_accuracy"].items():
        share = (expected["ranks"] < int(k)).double().mean().item()
        assert accuracy == pytest.approx(share, abs=2 / expected["tokens"])
    assert result["expected_calibration_error"] == pytest.approx(expected["ece"], abs=1e-3)
    assert sum(row["tokens"] for row in result["reliability"]) == expected["tokens"]


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 30, 31])
@pytest.mark.parametrize(("window", "stride"), [(6, 3), (6, 5), (6, 1), (2, 1)])
def test_each_token_is_scored_once_with_context(length, window, stride):
    pieces = windows(torch.arange(length), window, stride)
    scored = [token for ids, first in pieces for token in ids[first:].tolist()]
    assert scored == list(range(1, length))
    for number, (ids, first) in enumerate(pieces):
        assert 1 <= len(ids) <= window
        assert first >= (window - stride if number else 1)


def test_more_context_than_the_stride_leaves_none_of_the_rest_unread(place, tmp_path):
    """The strides give different figures, the batch size the same ones."""
    args = (SPEC + "plain", "text.txt", "--window", "12")
    results = [
        evaluate(*args, "--stride", stride, "--batch-size", size, out=tmp_path / f"{i}.json")
        for i, (stride, size) in enumerate([("1", "1"), ("1", "64"), ("11", "3")])
    ]
    assert results[0]["nats"] == pytest.approx(results[1]["nats"], rel=1e-6)
    assert abs(results[0]["nats"] - results[2]["nats"]) > 1e-3


def test_no_logits_of_all_tokens_are_made(monkeypatch, capsys, tmp_path):
    """A plain head is asked for the last token's logits only."""
    import models_of_test_eval

    made = []
    monkeypatch.setattr(models_of_test_eval, "plain", lambda: made.append(model_of_()) or made[0])
    evaluate(SPEC + "plain", "text.txt", out=tmp_path / "a.json")
    assert "scored from hidden states" in capsys.readouterr().out
    probe, *others = made[0].rows_of_logits
    assert (probe, set(others)) == (2, {1})
    main(["eval", SPEC + "capped", "text.txt"])
    assert "scored from the model's logits" in capsys.readouterr().out


def model_of_() -> torch.nn.Module:
    import models_of_test_eval

    return models_of_test_eval.Plain()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtypes(tmp_path, dtype):
    expected = evaluate(SPEC + "plain", "text.txt", out=tmp_path / "a.json")["loss"]
    result = evaluate(SPEC + "plain", "text.txt", "--dtype", dtype, out=tmp_path / "b.json")
    tolerance = 1e-5 if dtype == "float64" else 3e-2
    assert result["loss"] == pytest.approx(expected, rel=tolerance)
    assert result["settings"]["dtype"] == dtype


def test_documents_do_not_see_each_other(tmp_path):
    """Each line by itself, as if it were the only one; blank lines are none."""
    texts = ["first document", "the second, föx", "x", "a\u2028b"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n\n".join(lines) + "\n")
    result = evaluate(SPEC + "plain", str(path), out=tmp_path / "a.json")
    several = [list(text.encode()) for text in texts if len(text) > 1]
    parts = [by_hand("plain", ids, 24, 12) for ids in several]
    assert result["nats"] == pytest.approx(sum(part["nats"] for part in parts), rel=1e-5)
    assert result["tokens"] == sum(part["tokens"] for part in parts)
    assert result["bytes"] == sum(len(text.encode()) for text in texts)


QUESTIONS = [
    {"context": "the quick", "choices": [" brown", " red", " b"], "label": 1},
    {"context": "ends with blanks  ", "choices": ["x", "yyyyyyyy"]},
    {"context": "", "choices": ["one", "three"], "label": 0},
    {"context": "a context that is longer than the window is", "choices": ["!", "??"], "label": 0},
]


def write_questions(folder: Path, questions: list = QUESTIONS) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return path


@pytest.mark.parametrize("name", ["plain", "capped"])
def test_a_ranking(tmp_path, name):
    alpha, window = 0.3, 24
    result = evaluate(
        SPEC + name, str(write_questions(tmp_path)), "--alpha", str(alpha), "--batch-size", "3",
        out=tmp_path / "a.json",
    )  # fmt: skip
    model = model_of(name).double()
    right = {"sum": 0, "mean": 0, "normalized": 0}
    for question, item in zip(QUESTIONS, result["items"], strict=True):
        sums, lengths = [], []
        for choice in question["choices"]:
            before = list(question["context"].rstrip().encode()) or [10]
            blanks = question["context"][len(question["context"].rstrip()) :]
            own = list((blanks + choice).encode())
            ids = (before + own)[-window:]
            with torch.no_grad():
                log_p = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
            at = range(len(ids) - len(own), len(ids))
            sums.append(math.fsum(log_p[i - 1, ids[i]].item() for i in at))
            lengths.append(len(own))
        assert item["tokens"] == lengths
        for kind, exponent in (("sum", 0), ("mean", 1), ("normalized", alpha)):
            scores = [s / n**exponent for s, n in zip(sums, lengths, strict=True)]
            assert item[kind] == pytest.approx(scores, rel=1e-5)
            assert item["chosen"][kind] == scores.index(max(scores))
            right[kind] += item["chosen"][kind] == question.get("label")
    assert result["labelled"] == 3
    assert result["accuracy"] == pytest.approx({kind: n / 3 for kind, n in right.items()})


def test_scores_that_are_not_numbers_choose_nothing(tmp_path):
    path = write_questions(tmp_path)
    result = evaluate(SPEC + "not_a_number", str(path), out=tmp_path / "nan.json")
    assert result["accuracy"] == {"sum": 0.0, "mean": 0.0, "normalized": 0.0}
    assert all(set(item["chosen"].values()) == {None} for item in result["items"])


def test_names_that_look_like_markup(tmp_path, capsys):
    path = tmp_path / "[red]lines[" / "x].txt"
    path.parent.mkdir()
    path.write_text("to be or not to be " * 9)
    evaluate(SPEC + "plain", str(path), out=tmp_path / "out.json")
    assert "[red]lines[/x].txt" in capsys.readouterr().out.replace("\n", "")


def test_a_ranking_without_labels(tmp_path, capsys):
    result = evaluate(
        SPEC + "plain", str(write_questions(tmp_path, QUESTIONS[1:2])), out=tmp_path / "a.json"
    )
    assert "accuracy" not in result
    assert re.search(r"questions +│ 1 with 2 choices", capsys.readouterr().out)


def test_what_is_printed(capsys, tmp_path):
    plot = tmp_path / "plot.png"
    assert main(["eval", SPEC + "plain", "text.txt", "--plot", str(plot)]) == 0
    output = capsys.readouterr().out
    for word in ("tokens scored", "perplexity", "bits per byte", "top-1 accuracy",
                 "top-10 accuracy", "expected calibration error"):  # fmt: skip
        assert word in output
    assert plot.read_bytes().startswith(b"\x89PNG")
    for suffix, begin in ((".svg", b"<?xml"), (".PDF", b"%PDF"), ("", b"\x89PNG")):
        plot = tmp_path / f"plot{suffix}"
        assert main(["eval", SPEC + "plain", "text.txt", "--plot", str(plot)]) == 0
        assert plot.read_bytes().startswith(begin)


def stop_after(batches: int, argv: list[str]) -> None:
    """Ctrl-C while a batch is scored."""
    scores, seen = evaluation._scores, []

    def score(*args):
        seen.append(args)
        if len(seen) == batches:
            os.kill(os.getpid(), signal.SIGINT)
        return scores(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_scores", score)
        assert main(["eval", *argv]) == 130
    assert len(seen) == batches


@pytest.mark.parametrize("kind", ["text", "ranking"])
@pytest.mark.parametrize("stops", [(1,), (2, 1)])
def test_what_was_stopped_continues_to_the_same_bits(tmp_path, capsys, kind, stops):
    path = Path("text.txt") if kind == "text" else write_questions(tmp_path)
    argv = [SPEC + "plain", str(path), "--batch-size", "2"]
    evaluate(*argv, out=tmp_path / "whole.json")
    out = tmp_path / "parts.json"
    for batches in stops:
        stop_after(batches, [*argv, "--out", str(out)])
        assert not out.exists()
        assert "the same command continues" in capsys.readouterr().out
    evaluate(*argv, out=out)
    done = 2 * sum(stops)
    assert f"continues after {done} of" in capsys.readouterr().out
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert [p.name for p in tmp_path.glob("parts*")] == ["parts.json"]


def test_sums_are_kept_from_time_to_time(tmp_path, monkeypatch):
    """A process that is killed loses what came after the last save only."""
    monkeypatch.setattr(evaluation, "_SECONDS_BETWEEN_SAVES", -1.0)
    saved = []
    save = partial.Partial.save
    monkeypatch.setattr(
        partial.Partial,
        "save",
        lambda self, state: (saved.append(state["done"]), save(self, state)),
    )
    evaluate(SPEC + "plain", "text.txt", "--batch-size", "16", out=tmp_path / "a.json")
    assert saved[:2] == [16, 32]


def test_without_out_nothing_can_continue(capsys):
    stop_after(1, [SPEC + "plain", "text.txt", "--batch-size", "2"])
    assert capsys.readouterr().err == "llmloss: interrupted\n"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("llmloss: error: ")
    assert error.count("\n") == 1
    assert "LLMLOSS_TRACEBACK" not in error
    return error


@pytest.mark.parametrize(
    "other",
    [("--window", "12"), ("--top-k", "2"), ("--bins", "9"), ("--dtype", "float64")],
)
def test_sums_of_other_settings_are_not_continued(tmp_path, capsys, other):
    out = tmp_path / "a.json"
    argv = [SPEC + "plain", "text.txt", "--batch-size", "2", "--out", str(out)]
    stop_after(1, argv)
    assert main(["eval", *argv, *other]) == 1
    assert "a.json.partial is of another model, input or setting" in one_line(capsys)
    assert main(["eval", *argv, *other, "--overwrite"]) == 0
    assert "continues" not in capsys.readouterr().out
    assert not out.with_name("a.json.partial").exists()


def test_sums_of_another_model_or_text_are_not_continued(tmp_path, capsys):
    out = tmp_path / "a.json"
    stop_after(1, [SPEC + "plain", "text.txt", "--batch-size", "2", "--out", str(out)])
    (tmp_path / "other.txt").write_text(Path("text.txt").read_text()[:-1] + "x")
    for model, text in (("capped", "text.txt"), ("plain", str(tmp_path / "other.txt"))):
        argv = [SPEC + model, text, "--batch-size", "2", "--out", str(out)]
        assert main(["eval", *argv]) == 1
        assert "is of another model" in one_line(capsys)


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"{", b"[]", b"\xff", b'{"format": 1}', "done", "hits", "bins", "many",
    ],
)  # fmt: skip
def test_damaged_sums(tmp_path, capsys, damage):
    out, sums = tmp_path / "a.json", tmp_path / "a.json.partial"
    argv = [SPEC + "plain", "text.txt", "--batch-size", "2", "--out", str(out)]
    stop_after(1, argv)
    content = json.loads(sums.read_bytes())
    state = content["state"]
    if damage == "done":
        state["done"] = 10**9
    elif damage == "hits":
        state["task"]["hits"] = [1]
    elif damage == "bins":
        state["task"]["bins"] = {"tokens": []}
    elif damage == "many":
        del state["task"]
    sums.write_bytes(damage if isinstance(damage, bytes) else json.dumps(content).encode())
    assert main(["eval", *argv]) == 1
    assert "a.json.partial is" in one_line(capsys)
    assert not out.exists()


def test_nothing_is_overwritten(tmp_path, capsys):
    out = tmp_path / "a.json"
    out.write_text("mine")
    argv = ["eval", SPEC + "plain", "text.txt"]
    for option in ("--out", "--plot"):
        assert main([*argv, option, str(out)]) == 1
        assert "exists: name another file, or replace it with --overwrite" in one_line(capsys)
        assert out.read_text() == "mine"
    assert main([*argv, "--out", str(out), "--overwrite"]) == 0
    assert json.loads(out.read_text())["kind"] == "text"


LINES = {
    "not JSON": "{",
    "not JSON:": "[" * 100_000,
    "expected an object": "3",
    '"text" must be a string that is not empty': '{"text": ""}',
    "at least two": '{"context": "a", "choices": ["b"]}',
    "at least two ": "{}",
    '"choices" must be strings': '{"context": "a", "choices": ["b", ""]}',
    '"label" must be an index from 0 to 1, got 2': '{"context":"a","choices":["b","c"],"label":2}',
    '"label" must be an index from 0 to 1, got True':
        '{"context":"a","choices":["b","c"],"label":true}',
    '"context" must be a string, got None': '{"choices": ["b", "c"]}',
    "not UTF-8": '{"text": "\\ud800"}',
    "not UTF-8: ": '{"context": "", "choices": ["\\ud800", "b"]}',
    "begins with choices": '{"context": "a", "choices": ["b", "c"]}\n{"text": "a"}',
    "begins with texts": '{"text": "a"}\n{"context": "a", "choices": ["b", "c"]}',
}  # fmt: skip


@pytest.mark.parametrize("message", LINES)
def test_bad_lines(tmp_path, capsys, message):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n" + LINES[message])
    assert main(["eval", SPEC + "plain", str(path)]) == 1
    error = one_line(capsys)
    assert message.strip(": ") in error
    assert re.search(r"bad\.jsonl, line [23]: ", error)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plain", "missing"], "cannot read missing: No such file"),
        (["plain", "folder"], "folder is not a file"),
        (["plain", "loop"], "cannot read loop: Too many levels of symbolic links"),
        (["plain", "blank.txt"], "blank.txt is empty"),
        (["plain", "binary.txt"], "binary.txt is not a text file"),
        (["plain", "one.txt"], "too short"),
        (["silent", "text.txt"], "too short"),
        (["missing", "text.txt"], "models_of_test_eval has no missing"),
        (["value", "text.txt"], "is not a function"),
        (["nothing", "text.txt"], "must return a torch.nn.Module"),
        (["no_logits", "text.txt"], "must return a torch.nn.Module"),
        (["broken", "text.txt"], "failed: RuntimeError: two"),
        (["wrong_shape", "text.txt"], "cannot be evaluated: TypeError: expected logits (B, S, V)"),
        (["odd_context", "text.txt"], "context must be an integer of at least 1, got 'many'"),
        (["bad_tokenizer", "text.txt"], "its tokenizer failed: ZeroDivisionError"),
        (["too_many_words", "text.txt"], "makes the id 1076, outside of the model's vocabulary"),
        (["both_ways", "text.txt"], "is no causal language model"),
        (["by_chance", "text.txt"], "is no causal language model"),
        (["breaks_down", "text.txt", "--window", "30"], "fails on 8 x 30 tokens: RuntimeError: w"),
        (["plain", "text.txt", "--window", "26"], "longer than the model's context of 24"),
        (["plain", "text.txt", "--stride", "24"], "--stride 24 must be below --window 24"),
        (["plain", "text.txt", "--device", "meta"], "--device must be cpu or cuda"),
        (["plain", "text.txt", "--out", "folder"], "--out folder is not a file"),
        (["plain", "text.txt", "--out", "/dev/null", "--overwrite"], "/dev/null is not a file"),
        (["plain", "text.txt", "--out", "no/where"], "there is no folder no"),
        (["plain", "text.txt", "--out", "text.txt", "--overwrite"], "is the input"),
        (["plain", "text.txt", "--out", "a", "--plot", "a"], "--plot a is --out a"),
        (["plain", "text.txt", "--out", "a", "--plot", "folder/../a"], "is --out a"),
        (["plain", "text.txt", "--out", "a", "--plot", "a.partial"], "keeps the sums for --out"),
        (["plain", "in.partial", "--out", "in"], "which keeps the sums for --out, is the input"),
        (["no_context", "text.txt"], "context must be an integer of at least 1, got 0"),
        (["huge_words", "text.txt"], "makes the id 1180591620717411303424, outside of the"),
        (["short", "text.txt", "--window", "30"], "fails on 1 x 16 tokens: AssertionError: short"),
        (["plain", "text.txt", "--format", "jsonl"], "text.txt, line 1: not JSON"),
    ],
)  # fmt: skip
def test_errors_end_in_one_line(capsys, argv, message):
    name, *others = argv
    before = sorted(Path().rglob("*"))
    assert main(["eval", SPEC + name, *others]) == 1
    assert message in one_line(capsys)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("folder", "a folder must hold a config.json"),
        ("text.txt", "text.txt is no model"),
        ("missing", "there is no model missing"),
        ("1:2", "there is no model 1:2"),
        ("no_such_module_here:x", "cannot import no_such_module_here: ModuleNotFoundError"),
    ],
)
def test_what_is_no_model(capsys, model, message):
    assert main(["eval", model, "text.txt"]) == 1
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["a", "b" * 24], "line 1: choice 1 has 24 tokens; it must have from 1 to 23"),
        (["a" * 30, "b"], "line 1: choice 0 has 30 tokens"),
    ],
)
def test_choices_that_do_not_fit(tmp_path, capsys, choices, message):
    path = write_questions(tmp_path, [{"context": "c", "choices": choices}])
    assert main(["eval", SPEC + "plain", str(path)]) == 1
    assert message in one_line(capsys)


def test_an_empty_context_without_a_token_for_it(tmp_path, capsys):
    path = write_questions(tmp_path, QUESTIONS[2:3])
    assert main(["eval", SPEC + "no_separator", str(path)]) == 1
    assert "line 1: the context is empty" in one_line(capsys)


@pytest.mark.parametrize(
    ("option", "of_text"),
    [
        (("--plot", "x.png"), True), (("--top-k", "1"), True), (("--bins", "15"), True),
        (("--stride", "4"), True), (("--alpha", "0"), False),
    ],
)  # fmt: skip
def test_options_that_say_nothing_about_an_input(tmp_path, capsys, option, of_text):
    path = write_questions(tmp_path) if of_text else "text.txt"
    assert main(["eval", SPEC + "plain", str(path), *option]) == 1
    what = "is for a text, and the input holds choices" if of_text else "is for choices"
    assert f"{option[0]} {what}" in one_line(capsys)


@pytest.mark.parametrize(
    "option",
    [
        ("--window", "1"), ("--stride", "0"), ("--bins", "0"), ("--bins", "9" * 400),
        ("--top-k", "0"), ("--alpha", "nan"), ("--batch-size", "x"), ("--dtype", "int8"),
        ("--format", "xml"), ("--out", ""),
    ],
)  # fmt: skip
def test_wrong_options(capsys, option):
    with pytest.raises(SystemExit) as stop:
        main(["eval", SPEC + "plain", "text.txt", *option])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llmloss_eval.report.replace_file", full)
    assert main(["eval", SPEC + "plain", "text.txt", "--out", str(tmp_path / "a.json")]) == 1
    assert "a.json: No space left on device" in one_line(capsys)


def test_sums_that_are_not_finite_become_null(tmp_path, monkeypatch):
    from llmloss_eval.report import save_json

    path = tmp_path / "a.json"
    save_json(path, {"a": [math.nan, math.inf, 1.5], "b": {"c": -math.inf}})
    assert json.loads(path.read_text()) == {"a": [None, None, 1.5], "b": {"c": None}}


def test_as_a_program(tmp_path, place):
    """Off a terminal: no bar, nothing on stderr; modules of the current folder are found."""
    done = subprocess.run(
        [sys.executable, "-m", "llmloss_ext", "eval", SPEC + "plain", "text.txt"],
        capture_output=True, text=True, check=False, cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "perplexity" in done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of llmloss train, with its real vocabulary."""
    for package in ("matplotlib", "mistral_common", "numpy"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("trained")
    text = "".join(f"Line {i}: the quick brown fox jumps over it.\n" for i in range(80))
    (folder / "corpus.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        small = ("--dim", "8", "--layers", "1", "--heads", "2", "--seq-len", "16")
        argv = ["train", *small, "--text", str(folder / "corpus.txt"), "--steps", "2"]
        assert main([*argv, "--batch-size", "2", "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_a_checkpoint(trained, tmp_path):
    """In windows of its own length, and from whole logits in float64."""
    from llmloss_train import tokens
    from llmloss_train.checkpoint import load
    from llmloss_train.model import GPT

    text = "def f(x):\n    return x + 1\n\nLine 3: the quick brown fox.\n" * 2
    (tmp_path / "text.txt").write_text(text)
    argv = (str(tmp_path / "text.txt"), "--window", "17", "--stride", "16")
    result = evaluate(str(trained), *argv, out=tmp_path / "a.json")
    ids = tokens.encode(text)
    state = load(trained)
    model = GPT(131072, 16, 8, 1, 2)
    model.load_state_dict(state["model"], strict=False)
    model.double()
    nats = []
    for begin in range(0, len(ids) - 1, 16):
        window = torch.tensor(ids[begin : begin + 17])
        with torch.no_grad():
            logits = model.hidden(window[None, :-1])[0] @ model.head.weight.T
        log_p = logits.log_softmax(-1)
        nats += (-log_p.gather(1, window[1:, None])).flatten().tolist()
    assert result["tokens"] == len(nats) == len(ids) - 1
    assert result["nats"] == pytest.approx(math.fsum(nats), rel=1e-5)
    named = evaluate(str(trained / "checkpoint.pt"), *argv, out=tmp_path / "b.json")
    assert named["nats"] == result["nats"]


def test_a_ranking_of_a_checkpoint(trained, tmp_path):
    path = write_questions(tmp_path, [*QUESTIONS[:1], *QUESTIONS[2:3]])
    result = evaluate(str(trained), str(path), out=tmp_path / "a.json")
    assert all(score < 0 for item in result["items"] for score in item["sum"])


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", {"format": 1}, {"format": 3}])
def test_a_damaged_checkpoint(tmp_path, capsys, damage):
    pytest.importorskip("mistral_common")
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(damage) if isinstance(damage, bytes) else torch.save(damage, path)
    assert main(["eval", str(tmp_path), "text.txt"]) == 1
    assert "checkpoint" in one_line(capsys)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_several_processes(trained, tmp_path):
    """Whose tensors are in a folder beside the file."""
    import torch.distributed.checkpoint as dcp

    from llmloss_train.checkpoint import load

    state = load(trained)
    tensors = {name: state.pop(name) for name in ("model", "optimiser")}
    dcp.save(tensors, checkpoint_id=tmp_path / "checkpoint-parts-1", no_dist=True)
    torch.save(state | {"parts": "checkpoint-parts-1"}, tmp_path / "checkpoint.pt")
    one = evaluate(str(trained), "text.txt", out=tmp_path / "a.json")
    other = evaluate(str(tmp_path), "text.txt", out=tmp_path / "b.json")
    assert one["nats"] == other["nats"]


def test_parts_that_are_lost(trained, tmp_path, capsys):
    from llmloss_train.checkpoint import load

    state = load(trained)
    del state["model"], state["optimiser"]
    torch.save(state | {"parts": "checkpoint-parts-1"}, tmp_path / "checkpoint.pt")
    assert main(["eval", str(tmp_path), "text.txt"]) == 1
    assert "cannot read the checkpoint" in one_line(capsys)
