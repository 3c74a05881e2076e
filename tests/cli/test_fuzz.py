"""Any words after `llmloss` and `bench.readme`: they run, or one line says why they do not.

The words come from the parsers themselves, so a new option is tried without an edit here.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

for package in ("matplotlib", "mistral_common", "numpy", "rich"):
    pytest.importorskip(package)
from properties import hypothesis, st  # noqa: E402

import bench.demo  # noqa: E402
import bench.readme  # noqa: E402
import llmloss_bench.command  # noqa: E402
import llmloss_bench.trainer  # noqa: E402
from llmloss_bench.run import Runner  # noqa: E402
from llmloss_eval import evaluation  # noqa: E402
from llmloss_ext.cli import main, verify  # noqa: E402
from llmloss_train import checkpoint, loop, text, tokens  # noqa: E402

FILES = {
    "text.txt": b"The quick brown fox jumps over the lazy dog. " * 20,
    "short.txt": b"short",
    "blank.txt": b" \n",
    "binary.bin": b"\0\xff",
    "results.json": b'{"schema": 1}',
    "summary.json": b"[]",
    "empty/.hidden": b"not seen",
    "broken/checkpoint.pt": b"not a checkpoint",
    "broken/results.json": b"{",
    "broken/metrics.jsonl": b"\xff",
    "taken/metrics.jsonl/file": b"a folder where a file is written",
    "folder/checkpoint.pt/file": b"a folder where a file is read",
    "right.jsonl": b'{"context": "a", "choices": ["b", "cc"], "label": 1}\n',
    "wrong.jsonl": b'{"context": "a", "choices": ["b"]}\n',
    "hub/config.json": b'{"model_type": "llama"}',
    "alien_hub/config.json": b"{",
    "fuzzed_models.py": b"""
from torch import nn
def good(): return nn.Sequential(nn.Embedding(256, 4), nn.Linear(4, 256))
def small(): return nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 3))
def bad(): raise RuntimeError
""",
}
PLACES = (
    *FILES, ".", "empty", "broken", "taken", "folder", "list", "alien", "partial", "odd", "loop",
    "missing", "new/out", "text.txt/child", "n" * 300, "sur\udcffrogate", "/proc/nowhere",
    "/dev/null", "hub", "alien_hub", "fuzzed_models:good", "fuzzed_models:small",
    "fuzzed_models:bad", "fuzzed_models:none",
)  # fmt: skip
RIGHT = ("1", "2", "8", "0.5", "cpu", "float32", "bfloat16")
WRONG = (
    "", " ", "0", "-0", "-1", "nan", "inf", "-inf", "1e400", "1e-400", "0x8", "1_6", "٨", "9" * 30,
    "9" * 400, "9" * 5000, str(2**31), str(2**63 - 1), str(2**63), "-", "--", "\ud800",
    "a\nb", "\x1b[31m", "%s", "{0}", "@text.txt", "int8", "cuda", "cuda:7", "cuda:" + "9" * 30,
    "--x", "-h8", "cpu:1", "meta", "mkldnn", "xla:0",
)  # fmt: skip
OFTEN_RIGHT = {"model": ["fuzzed_models:good"], "input": ["text.txt", "right.jsonl"]}
# No slash, so that a drawn name stays in the playground; no zero byte, which no argument can hold.
NOISE = st.text(st.characters(exclude_characters="/\0"), max_size=8)


Command = Callable[[list[str]], int]
ActionsOf = Callable[[str], list[argparse.Action]]


class Outcome(NamedTuple):
    """How a command ended."""

    status: object
    error: str


class Reached(BaseException):
    """The command was right, and its work would begin."""


def reach(*_: object) -> None:
    raise Reached


def words(actions_of: ActionsOf, commands: Sequence[str]) -> st.SearchStrategy[list[str]]:
    """Draws a command with all of its arguments and some of its options; at times, only words.

    Args:
        actions_of: Returns the arguments and options of a command.
        commands: Their names, each as often as it is worth; "bench run" names one below another.
    """
    word = st.one_of(*map(st.sampled_from, (RIGHT, RIGHT, WRONG, PLACES)), NOISE)

    @st.composite
    def command(draw: st.DrawFn) -> list[str]:
        name = draw(st.sampled_from(commands))
        actions = actions_of(name)
        options = [action for action in actions if action.option_strings]
        chosen = [action for action in actions if not action.option_strings]
        chosen += draw(st.lists(st.sampled_from(options), max_size=3))
        given = name.split()
        for action in chosen:
            known = action.choices or OFTEN_RIGHT.get(action.dest)
            choices = st.sampled_from(list(known)) if known else word
            count = {None: 1, "?": 1, "+": 1}.get(action.nargs, action.nargs)
            values = [draw(st.one_of(choices, choices, word)) for _ in range(count)]
            given += [*action.option_strings[-1:], *values]
        if draw(st.integers(0, 9)) == 0:  # a value or an option too many, too few, or elsewhere
            given = draw(st.permutations(given))[draw(st.integers(0, 1)) :]
        return given

    return st.one_of(command(), command(), command(), st.lists(word, max_size=3))


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory: files and folders of every kind, one of which may be read."""
    # Two levels down: "..", too, is inside.
    outer = tmp_path_factory.mktemp("fuzz")
    inner = outer / "inner"
    for name, content in FILES.items():
        (inner / name).parent.mkdir(parents=True, exist_ok=True)
        (inner / name).write_bytes(content)
    for name, state in {
        "list": [1, 2],
        "alien": {"format": 1},
        "partial": {"format": checkpoint._FORMAT},
        "odd": {"format": checkpoint._FORMAT, "config": {"text": 3}, "text_key": "fake"},
    }.items():
        (inner / name).mkdir()
        torch.save(state, inner / name / checkpoint.NAME)
    (inner / "loop").symlink_to("loop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inner)
        patch.setattr(tokens, "load_tokens", few_tokens)
        patch.setattr(text, "_default_documents", lambda: ["the library " * 60])
        patch.setattr(loop.Run, "_validate", reach)
        patch.setattr(loop.Run, "_advance", reach)
        patch.setattr(verify, "checks", reach)
        patch.setattr(evaluation, "_scores", reach)
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setattr(Runner, "run", reach)
        patch.setattr(llmloss_bench.command, "_try_report", str)
        patch.setattr(llmloss_bench.trainer, "_train", reach)
        for module, name in ((bench.readme, "update"), (bench.demo, "keep")):
            patch.setattr(module, name, reach)
        patch.delenv("LLMLOSS_TRACEBACK", raising=False)
        yield outer


def few_tokens(documents: Iterator[str], max_tokens: int) -> tokens.TokenText:
    """As many tokens as characters, of 97: the right vocabulary takes seconds to read."""
    length = min(max_tokens, sum(map(len, documents)))
    return tokens.TokenText(torch.arange(length, dtype=torch.int32) % 97, 97, 0, "fake", True)


def run(command: Command, argv: list[str]) -> Outcome:
    """Runs in this process, with streams as strict as those of a real one."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status: object = command(argv)
        except SystemExit as stop:
            status = stop.code
        except Reached:
            status = 0
        out.flush()
    err.flush()
    return Outcome(status, err.buffer.getvalue().decode())


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every file with its bytes, every folder with None."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def restore(before: dict[Path, bytes | None], after: dict[Path, bytes | None]) -> None:
    """Undoes what a command has written."""
    for path in sorted(set(after) - set(before), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for path, content in before.items():
        if content is not None and after.get(path) != content:
            path.write_bytes(content)


def runs(command: Command, argv: list[str], program: str, folder: Path) -> bool:
    """Whether the command runs. If it does not, one line has to say why, and no file to change."""
    before, threads = contents(folder), torch.get_num_threads()
    outcome = run(command, argv)
    torch.set_num_threads(threads)
    after = contents(folder)
    restore(before, after)
    if outcome.status == 0:
        assert outcome.error == ""
        return True
    assert outcome.status in (1, 2)
    assert outcome.error.startswith(f"{program}: error: ")
    assert outcome.error.count("\n") == 1
    assert "LLMLOSS_TRACEBACK" not in outcome.error, "an error that nobody has foreseen"
    assert after == before
    return False


def options_of(parser: argparse.ArgumentParser, command: str) -> list[argparse.Action]:
    """All but --help, with which every command would run."""
    for name in command.split():
        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = commands.choices[name]
    below = argparse._SubParsersAction
    return [a for a in parser._actions if a.dest != "help" and not isinstance(a, below)]


@functools.cache
def llmloss_options(command: str) -> list[argparse.Action]:
    return options_of(main._parser(command.split())[0], command)


@functools.cache
def readme_options(command: str) -> list[argparse.Action]:
    return options_of(bench.readme._parser(), command)


BENCH = ("bench run", "bench report", "bench compare", "bench trainer", "bench")


@pytest.mark.parametrize(
    ("program", "command", "actions_of", "commands", "examples"),
    [
        ("llmloss", main.main, llmloss_options, ("train", "train", *main.COMMANDS), 250),
        ("llmloss", main.main, llmloss_options, ("eval",), 250),
        pytest.param("llmloss", main.main, llmloss_options, BENCH, 150, marks=pytest.mark.slow),
        ("bench", bench.readme.main, readme_options, ("",), 40),
    ],
    ids=["llmloss", "eval", "bench", "readme"],
)
def test_any_words(playground, program, command, actions_of, commands, examples):
    seen = set()

    @hypothesis.settings(max_examples=examples)
    @hypothesis.given(words(actions_of, commands))
    def property_of(argv):
        below = argv[: len(commands[0].split())]
        seen.add((" ".join(below), runs(command, argv, program, playground)))

    property_of()
    # Both happened: a command that was reached, and one that was refused.
    assert seen >= {(commands[0], True), (commands[0], False)}


def test_the_name_of_no_file(playground):
    """Found by the words above: half a surrogate pair."""
    assert not runs(main.main, ["train", "--text", "\ud800"], "llmloss", playground)
