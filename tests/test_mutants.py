"""`make mutants`: what it replaces, and that it tells a weak test from a good one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("rich")
from mutants import cpp_code, equivalent, python_code, python_trial
from mutants.__main__ import ROOT, main, mutants_of
from mutants.edits import mutant
from mutants.sandbox import Sandbox
from mutants.suites import SUITES, Suite, sources

HAS_COMPILER = bool(shutil.which("c++") or shutil.which("g++"))
PYTHON, CPP = "llmloss_ext/larger.py", "csrc/core/larger.h"
FILES = {
    PYTHON: "def larger(a, b):\n    if a > b:\n        return a\n    return b\n",
    "tests/test_larger.py": (
        "from llmloss_ext.larger import larger\n\n"
        "def test_larger():\n    assert larger(2, 1) == 2\n"
    ),
    CPP: "inline int larger(int a, int b) {\n  if (a > b) return a;\n  return b;\n}\n",
    "tests/cpp/test_core.cpp": (
        '#include "core/larger.h"\n'
        "int main() {\n  if (larger(2, 1) != 2) return 1;\n  return 0;\n}\n"
    ),
}
# What a good test has besides.
BETTER = {
    PYTHON: ("tests/test_larger.py", "larger(2, 1) == 2", "larger(2, 1) == larger(1, 2) == 2"),
    CPP: ("tests/cpp/test_core.cpp", "larger(2, 1) != 2", "larger(2, 1) + larger(1, 2) != 4"),
}
SAME = """# Of equal numbers, each is the larger.

llmloss_ext/larger.py
if a > b:
if a >= b:
of equal numbers

csrc/core/larger.h
if (a > b) return a;
if (a >= b) return a;
of equal numbers
"""
SUITE = (
    Suite("llmloss_ext/*.py", ("tests/test_{name}.py",)),
    Suite("csrc/core/*.h", ("tests/cpp/test_core.cpp",)),
)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A repository of two sources and their tests, which notice that `larger` is not `b`."""
    monkeypatch.setattr(python_trial, "IMPORTED", ())
    root = tmp_path / "checkout"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "equivalent.txt").write_text(SAME)
    return root


def run(checkout: Path, *argv: str) -> int:
    return main(argv, checkout, SUITE, checkout / "equivalent.txt")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("source", "survivor"),
    [
        (PYTHON, f"{PYTHON}:2\n    if a > b:\n    if True:\n"),
        pytest.param(
            CPP, f"{CPP}:2\n    if (a > b) return a;\n    if (true) return a;\n",
            marks=pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler"),
        ),
    ],
)  # fmt: skip
def test_a_weak_test_lets_a_mutant_survive_and_a_good_one_does_not(
    checkout, capsys, source, survivor
):
    before = contents(checkout)
    assert run(checkout, "--only", source) == 1
    printed = capsys.readouterr().out
    assert survivor in printed
    assert printed.count(f"{source}:") == 1  # and no other
    made = set(contents(checkout)) - set(before)
    assert {path.parent for path in made} == {checkout / "build" / "mutants"}
    assert {path: text for path, text in contents(checkout).items() if path in before} == before

    test, weak, good = BETTER[source]
    (checkout / test).write_text((checkout / test).read_text().replace(weak, good))
    assert run(checkout, "--only", source) == 0
    assert f"{source}:" not in capsys.readouterr().out


def test_a_run_continues_where_it_was_stopped(checkout, capsys, monkeypatch):
    right = python_trial.PythonTrial.outcome
    ran = []

    def stops(self, one):
        if len(ran) == 1:
            raise KeyboardInterrupt
        ran.append(one)
        return right(self, one)

    monkeypatch.setattr(python_trial.PythonTrial, "outcome", stops)
    with pytest.raises(KeyboardInterrupt):
        run(checkout, "--only", PYTHON)
    assert len(ran) == 1
    monkeypatch.setattr(
        python_trial.PythonTrial, "outcome", lambda *_: ran.append(_[1]) or "caught"
    )
    assert run(checkout, "--only", PYTHON) == 0
    assert [one.mutated for one in ran] == ["if False:", "if True:"]  # each once
    assert run(checkout, "--only", PYTHON) == 0
    assert len(ran) == 2
    (checkout / PYTHON).write_text(FILES[PYTHON] + "\n")
    assert run(checkout, "--only", PYTHON) == 0
    assert len(ran) == 4


def test_survivors_alone_are_run_again(checkout, monkeypatch):
    outcomes = {"if False:": "caught", "if True:": "survived"}
    ran = []

    def told(self, one):
        ran.append(one.mutated)
        return outcomes[one.mutated]

    monkeypatch.setattr(python_trial.PythonTrial, "outcome", told)
    assert run(checkout, "--only", PYTHON) == 1
    (checkout / "tests/test_larger.py").write_text(FILES["tests/test_larger.py"] + "\n")
    outcomes["if True:"] = "caught"
    assert run(checkout, "--only", PYTHON, "--survivors") == 0
    assert ran == ["if False:", "if True:", "if True:"]


def test_tests_that_fail_anyway_are_no_judges(checkout, capsys):
    (checkout / "tests/test_larger.py").write_text("def test_larger():\n    assert False\n")
    assert run(checkout, "--only", PYTHON) == 1
    assert "the tests fail without a mutant" in capsys.readouterr().err


def test_a_mutant_that_hangs_is_noticed(checkout, tmp_path):
    source = "def larger(a, b):\n    while a < b:\n        a += 1\n    return a\n"
    (checkout / PYTHON).write_text(source)
    (checkout / "tests/test_larger.py").write_text(
        FILES["tests/test_larger.py"] + "    larger(1, 2)\n"
    )
    trial = python_trial.PythonTrial(Sandbox(checkout, tmp_path / "copy"), ["tests/test_larger.py"])
    trial.limit = 2.0
    endless = next(one for one in mutants_of(checkout, PYTHON) if one.mutated == "a -= 1")
    assert trial.outcome(endless) == "hung"
    trial.close()


def test_an_entry_that_is_no_mutant_is_told(checkout, capsys):
    (checkout / "equivalent.txt").write_text(SAME.replace("a >= b:", "a == b:"))
    good = BETTER[PYTHON]
    (checkout / good[0]).write_text(FILES[good[0]].replace(*good[1:]))
    assert run(checkout, "--only", PYTHON) == 1
    assert f"equivalent.txt lists what is no mutant: {PYTHON}" in capsys.readouterr().out


def test_a_draw_is_the_same_for_the_same_seed(checkout, capsys):
    def listed(*options: str) -> str:
        assert run(checkout, "--list", *options) == 0
        return capsys.readouterr().out

    assert listed().count("\n    ") == 2 * 4  # four mutants, two lines each
    assert listed("--limit", "2").count("\n    ") == 2 * 2
    draws = {listed("--limit", "2", "--seed", str(seed)) for seed in range(20)}
    assert len(draws) > 2
    assert listed("--limit", "2", "--seed", "7") == listed("--limit", "2", "--seed", "7")


def mutated(code, source: str) -> list[str]:
    return [mutant("x", source, edit).mutated for edit in code.edits(source)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a + b", ["x = a - b"]),
        ("x = (a) * (  # not a /\n  b)", ["x = (a) / ( # not a /"]),
        ("é = 'é' if a // b else c", ["é = 'é' if False else c", "é = 'é' if True else c",
                                      "é = 'é' if a * b else c"]),
        ("x -= 2", ["x += 2"]),
        ("x = 1 < a <= 2", ["x = 0 < a <= 2", "x = 1 <= a <= 2", "x = 1 < a < 2"]),
        ("x = a is  not None", ["x = a is None"]),
        ("x = a and b and c", ["x = a or b and c", "x = a and b or c"]),
        ("x = [a for a in b if a]", ["x = [a for a in b if True]"]),
        ("x = t.clamp_min(2), min(a), torch.maximum(a, b), minor(a), t.argmax()",
         ["x = t.clamp_max(2), min(a), torch.maximum(a, b), minor(a), t.argmax()",
          "x = t.clamp_min(2), max(a), torch.maximum(a, b), minor(a), t.argmax()",
          "x = t.clamp_min(2), min(a), torch.minimum(a, b), minor(a), t.argmax()",
          "x = t.clamp_min(2), min(a), torch.maximum(a, b), minor(a), t.argmin()"]),
        ("x = -a, -2, 0.0", ["x = a, -2, 0.0", "x = -a, -2, 1.0"]),
        ("def f(a: A[0] = 1) -> B[0]: pass", ["def f(a: A[0] = 0) -> B[0]: pass"]),
        ("raise E(f'{a + 1}', 0)", []),
        ("x = f'{a + 1}', True", []),
        ("if TYPE_CHECKING: import a", []),
    ],
)  # fmt: skip
def test_edits_of_python(source, expected):
    assert mutated(python_code, source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a + b;  // a - b", ["x = a - b; // a - b"]),
        ("x = \"a + b\" + '0';  /* a\n + b */", ["x = \"a + b\" - '0'; /* a"]),
        ("#define X a + b \\\n  + c\nx *= y;", ["x /= y;"]),
        ("template <int a = 0>\nconst T* f(const A<B, 0>& x, T* y = p)",
         ["const T* f(const A<B, 1>& x, T* y = p)"]),
        ("x = a << 2 >> 3;", []),
        ("x = a < b && c;", ["x = a <= b && c;", "x = a < b || c;"]),
        ("if (f(a) &&\n    b) c;", ["if (false) c;", "if (true) c;", "if (f(a) ||"]),
        ("while (*p) ++p;", ["while (false) ++p;"]),
        ("x = 0x10 + 1.0f - 10;", ["x = 0x10 - 1.0f - 10;", "x = 0x10 + 0.0f - 10;",
                                   "x = 0x10 + 1.0f + 10;"]),
        ("return -a;", ["return a;"]),
        ("x = std::min(a, b) + minimum;", ["x = std::max(a, b) + minimum;",
                                           "x = std::min(a, b) - minimum;"]),
        ("static_assert(a == 1);", []),
        ("x = expm1_of(f(a));", ["x = (exp_of(f(a)) - 1);"]),
        ("x = log1p_of(a);", ["x = log_of(1 + (a));"]),
        ("float log1p_of(float x) {", []),
    ],
)  # fmt: skip
def test_edits_of_cpp(source, expected):
    assert mutated(cpp_code, source) == expected


def test_the_table_names_sources_and_tests_that_there_are():
    for suite in SUITES:
        own = sources(ROOT, [suite], [])
        assert own
        for source in own:
            assert suite.tests_of(source, ROOT)
    assert len({source for suite in SUITES for source in sources(ROOT, [suite], [])}) > 30


def test_the_list_of_equivalents_can_be_read():
    for entry in equivalent.read(equivalent.FILE):
        assert (ROOT / entry.path).exists()
        assert entry.original != entry.mutated
        assert len(entry.reason) > 10
