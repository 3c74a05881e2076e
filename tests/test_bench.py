"""The benchmark can tell: wrong results get no speed, slow kernels are flagged, nothing is lost."""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from bench import compare as comparison
from bench import contenders as table
from bench import inputs, memory, peers, terminal, timing
from bench.__main__ import main
from bench.cases import OPTIONS, Case
from bench.contenders import Contender, Step, contenders, eager, make_inputs
from bench.reference import errors, reference
from bench.report.tables import missing, tables
from bench.results import FILE, Ceiling, Measurement, Results, Row
from bench.run import Runner
from bench.suites import SUITES, suite
from llmloss_ext.cli.errors import UserError

DENSE = Case("cross_entropy", "forward+backward", 48, 2000, "float32")
LINEAR = Case("linear_cross_entropy", "forward+backward", 40, 700, "float32", features=24)


def measured(folder: Path, cases: list[Case], rounds: int = 3, **options) -> Results:
    """Everybody but torch.compile, which takes its time."""
    everybody = set(table.NAMES) - {"compile"}
    runner = Runner("quick", rounds, folder, everybody, with_memory=False, **options)
    return runner.run(cases)


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, loss) -> None:
    """Puts a contender's work in the place of another's, in both tables."""
    for names in (table.DENSE, table.LINEAR):
        if name in names:
            monkeypatch.setitem(names, name, replace(names[name], loss=loss))


# Cases and suites.


def test_what_takes_long_gets_fewer_rounds():
    def rounds_of(seconds: float) -> int:
        slow = timing.Timed(lambda: time.sleep(0.01), repeatable=False)
        timing.measure([slow], 6, False, seconds=seconds)
        return len(slow.seconds)

    assert rounds_of(0.0) == 3
    assert rounds_of(60.0) == 6


def test_the_model_of_bytes_and_flops():
    whole = Case("cross_entropy", "forward", 10, 100, "bfloat16")
    assert (whole.bytes, whole.flops) == (2000, 4000)
    half = replace(whole, passes="forward+backward", ignored=0.5)
    assert half.bytes == 1000 + 2000  # half is read, all of the gradient is written
    assert half.flops == 7 * 500
    linear = Case("linear_cross_entropy", "forward+backward", 10, 100, "float32", features=8)
    assert linear.bytes == 2 * 4 * (10 + 100) * 8
    assert linear.flops == 3 * 2 * 10 * 100 * 8


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_each_case_once(name):
    cases = suite(name, has_gpu=name == "gpu")
    assert len(set(cases)) == len(cases) > 10
    assert {case.device for case in cases} == {"cuda" if name == "gpu" else "cpu"}
    assert {case.option for case in cases} == set(OPTIONS)
    for case in cases:
        assert Case(**case.to_json()) == case


def test_the_gpu_suite_needs_a_gpu():
    with pytest.raises(ValueError, match="CUDA device"):
        suite("gpu", has_gpu=False)


@pytest.mark.parametrize(
    "change",
    [{"operation": "mse"}, {"option": "dropout"}, {"features": 3}, {"ignored": 2.0}, {"rows": 0}],
)
def test_a_case_that_makes_no_sense(change):
    with pytest.raises(ValueError):
        replace(DENSE, **change)


# Inputs.


def test_logits_are_cold_and_whole_again():
    made = make_inputs(DENSE)
    assert len(made._sets) * DENSE.logits_bytes >= 2 * inputs.last_level_cache()
    assert len(make_inputs(replace(DENSE, warm=True))._sets) == 1
    few = make_inputs(replace(DENSE, warm=True))
    for _ in range(3):
        arguments = few.overwritable()
        assert torch.equal(arguments, few.logits)
        with torch.no_grad():
            arguments.detach().fill_(7.0)
    assert torch.equal(few.next(), few.logits)


def test_some_rows_are_confident_and_the_asked_share_is_ignored():
    made = make_inputs(replace(DENSE, ignored=0.25))
    assert int((made.target == -100).sum()) == 12
    whole = make_inputs(DENSE)
    p = torch.softmax(whole.logits.double(), -1)[0, whole.target[0]]
    assert 0.98 < float(p) < 0.995  # 0.99 in the mean over draws


# The reference.


@pytest.mark.parametrize("option", OPTIONS)
def test_the_reference_is_float64_autograd(option):
    case = replace(DENSE, option=option, ignored=0.25)
    made = make_inputs(case)
    truth = reference(case, made)
    leaf = made.logits.double().requires_grad_()
    loss = eager(case)(leaf, made.target)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert truth.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(truth.gradients[0], gradient[truth.samples[0]], rtol=1e-9, atol=0)
    assert truth.samples[0][0] == 0
    assert truth.samples[0][-1] == case.rows - 1


def test_the_reference_of_a_projection():
    case = replace(LINEAR, ignored=0.25)
    made = make_inputs(case)
    truth = reference(case, made)
    leaves = [t.detach().double().requires_grad_() for t in (made.hidden, made.weight)]
    loss = F.cross_entropy(F.linear(*leaves), made.target)
    assert truth.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    for samples, ours, all_of_them in zip(
        truth.samples, truth.gradients, torch.autograd.grad(loss, leaves), strict=True
    ):
        torch.testing.assert_close(ours, all_of_them[samples], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("case", [DENSE, LINEAR, replace(DENSE, passes="forward")])
def test_everybody_on_this_machine_is_right(case):
    made = make_inputs(case)
    truth = reference(case, made)
    absent = set(peers.PACKAGES)
    for contender in contenders(case, {"torch", "torch chunked"}, absent):
        found = errors(case, Step(case, contender, made), truth, contender.is_ours)
        assert found.are_tolerable, (contender.name, found)


# A deliberately wrong kernel gets no speed.


def scaled(value: float, gradient: float):
    """This library's loss, with the loss and its gradient off by a factor."""

    def make(case: Case):
        right = table.ours(case)

        def loss(*tensors):
            exact = right(*tensors)
            return exact.detach() * value + (exact - exact.detach()) * gradient

        return loss

    return make


@pytest.mark.parametrize("case", [DENSE, LINEAR])
@pytest.mark.parametrize(("value", "gradient"), [(1.001, 1.0), (1.0, 1.001), (1.0, float("nan"))])
def test_a_wrong_kernel_gets_no_speed(tmp_path, monkeypatch, case, value, gradient):
    replaced(monkeypatch, "llmloss", scaled(value, gradient))
    results = measured(tmp_path, [case])
    ours = results.rows[0].contenders["llmloss"]
    assert ours.status == "wrong"
    assert ours.seconds == []
    assert results.rows[0].contenders["torch"].seconds
    assert results.rows[0].times_faster("torch") is None
    assert results.rows[0].share_of_ceiling() is None
    times = tables(results)[0]
    assert times.rows[0][times.columns.index("llmloss")] == "wrong"
    assert any("llmloss: wrong" in line for line in missing(results))


def test_a_wrong_row_is_seen_among_right_ones(tmp_path, monkeypatch):
    """As a bfloat16 softmax less 1 is wrong: where the target is almost certain."""

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.view_as(logits)

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[0] *= 1.3
            return grad

    def make(case: Case):
        return lambda logits, target: table.ours(case)(Spoilt.apply(logits), target)

    replaced(monkeypatch, "llmloss", make)
    assert measured(tmp_path, [DENSE]).rows[0].contenders["llmloss"].status == "wrong"


def test_the_command_fails_where_this_library_is_wrong(tmp_path, monkeypatch, capsys):
    replaced(monkeypatch, "llmloss", scaled(1.01, 1.0))
    command = ["run", "--only", "forward, 8 x 1000", "--rounds", "1", "--no-memory"]
    assert main([*command, "--out", str(tmp_path)]) == 1
    assert "llmloss is wrong" in capsys.readouterr().err


# A peer that is missing or fails is told, and keeps nobody from being measured.


def test_a_peer_that_fails_is_reported(tmp_path, monkeypatch):
    def broken(case: Case):
        def loss(*tensors):
            raise RuntimeError("no kernel image\nand more")

        return loss

    monkeypatch.setitem(table.DENSE, "liger", Contender("liger", broken))
    monkeypatch.setattr(peers, "PACKAGES", {})
    results = measured(tmp_path, [DENSE])
    liger = results.rows[0].contenders["liger"]
    assert (liger.status, liger.reason) == ("failed", "RuntimeError: no kernel image")
    assert results.rows[0].contenders["llmloss"].seconds
    assert "liger: failed" in "\n".join(missing(results))


def test_a_missing_peer_is_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "PACKAGES", {"liger": ("liger-kernel", "no_such_module")})
    results = measured(tmp_path, [replace(DENSE, passes="forward")])
    assert "liger" not in results.rows[0].contenders
    assert results.peers["liger"].startswith("not measured: ModuleNotFoundError")
    assert "liger: not measured" in "\n".join(missing(results))


def test_a_peer_without_the_option_is_unsupported(tmp_path, monkeypatch):
    monkeypatch.setitem(table.DENSE, "quack", Contender("quack", table._peer(_needs_no_option)))
    monkeypatch.setattr(peers, "PACKAGES", {})
    monkeypatch.setattr(table, "_NOT_COMPARED", set())
    results = measured(tmp_path, [replace(DENSE, option="softcap")])
    quack = results.rows[0].contenders["quack"]
    assert (quack.status, quack.reason) == ("unsupported", "no softcap")


def _needs_no_option(settings):
    peers._named(settings)
    return F.cross_entropy


def test_peers_get_the_options_by_their_own_names():
    assert peers._named({"z_loss": 0.5}, z_loss="lse_square_scale") == {"lse_square_scale": 0.5}
    with pytest.raises(peers.UnknownOptionError):
        peers._named({"entropy": 0.5}, z_loss="lse_square_scale")


# Results.


def test_results_are_written_and_read(tmp_path):
    results = measured(tmp_path, [DENSE, LINEAR])
    again = Results.load(tmp_path)
    assert again.complete
    assert [row.case for row in again.rows] == [DENSE, LINEAR]
    for row, other in zip(results.rows, again.rows, strict=True):
        ours, theirs = row.contenders["llmloss"], other.contenders["llmloss"]
        assert theirs.median == pytest.approx(ours.median, rel=1e-3)
        assert theirs.gradient_error == pytest.approx(ours.gradient_error, rel=1e-2)
        assert set(row.ceilings) == set(other.ceilings)
        assert 0 < other.share_of_ceiling() < 3
    assert set(again.rows[0].ceilings) == {"copy", "read"}


def test_what_was_measured_before_an_interruption_is_there(tmp_path, monkeypatch):
    runner = Runner("quick", 1, tmp_path, set(), with_memory=False)
    one = runner._measure(DENSE, lambda line, share: None)

    def interrupted(case, progress):
        if case is LINEAR:
            raise KeyboardInterrupt
        return one

    monkeypatch.setattr(runner, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run([DENSE, LINEAR])
    found = Results.load(tmp_path)
    assert [row.case for row in found.rows] == [DENSE]
    assert not found.complete


def test_earlier_results_are_not_overwritten(tmp_path):
    (tmp_path / FILE).write_text("precious")
    with pytest.raises(UserError, match="--overwrite"):
        Runner("quick", 1, tmp_path)
    assert (tmp_path / FILE).read_text() == "precious"
    Runner("quick", 1, tmp_path, overwrite=True)
    assert Results.load(tmp_path).rows == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a result"),
        ('{"schema": 1}', "is not a result"),
        ('{"schema": 2, "rows": [{"case": {}}]}', "is damaged"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content, message):
    path = tmp_path / FILE
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        Results.load(tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        Results.load(tmp_path / "none.json")


def test_an_unknown_contender_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown contenders: megatron"):
        Runner("quick", 1, tmp_path, wanted={"megatron"})
    assert not (tmp_path / FILE).exists()


def test_an_interrupted_run_leaves_results_and_report(tmp_path, monkeypatch, capsys):
    def interrupted(self, case, progress):
        if case.has_backward:
            raise KeyboardInterrupt
        return Row(case, {"llmloss": Measurement(seconds=[1e-3])})

    monkeypatch.setattr(Runner, "_measure", interrupted)
    assert main(["run", "--only", "8 x 1000", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(Results.load(tmp_path).rows) == 1
    assert "interrupted" in (tmp_path / "report.html").read_text()


# Comparing.


def made_up(scale: float = 1.0, noise: float = 0.01, seed: int = 0, **changes) -> Results:
    """A run in which this library takes ``scale`` milliseconds, and a copy one."""
    generator = random.Random(seed)

    def times(middle: float) -> list[float]:
        return [middle * generator.gauss(1.0, noise) for _ in range(9)]

    ours = Measurement(seconds=times(1e-3 * scale), peak_bytes=50 << 20, loss_error=1e-6,
                       gradient_error=1e-6)  # fmt: skip
    for name, value in changes.items():
        setattr(ours, name, value)
    ceilings = {"copy": Ceiling(times(1e-3), bytes=1000), "read": Ceiling(times(5e-4), bytes=500)}
    row = Row(DENSE, {"llmloss": ours, "torch": Measurement(seconds=times(4e-3))}, ceilings)
    return Results({"cpu": "x", "threads": 2}, {}, {}, [row], True)


def verdicts(before: Results, after: Results, **options) -> list[str]:
    return [change.verdict for change in comparison.compare(before, after, **options)]


def test_noise_is_not_a_change():
    for seed in range(1, 20):
        assert verdicts(made_up(noise=0.05), made_up(noise=0.05, seed=seed)) == ["same"]


def test_slower_and_faster_are_seen_through_noise():
    assert verdicts(made_up(), made_up(1.3, seed=1)) == ["slower"]
    assert verdicts(made_up(), made_up(0.7, seed=1)) == ["faster"]
    assert verdicts(made_up(), made_up(1.3, seed=1), tolerance=0.5) == ["same"]
    assert verdicts(made_up(noise=0.5), made_up(1.1, noise=0.5, seed=3)) == ["same"]


def test_a_slow_hour_is_not_a_slow_kernel():
    """Everything takes twice as long, the copy too."""
    slow = made_up(2.0, seed=1)
    slow.rows[0].ceilings["copy"].seconds = [2e-3 + 1e-6 * k for k in range(9)]
    assert verdicts(made_up(), slow) == ["same"]


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"peak_bytes": 60 << 20}, "more memory"),
        ({"peak_bytes": 40 << 20}, "less memory"),
        ({"gradient_error": 1e-5}, "less exact"),
        ({"loss_error": 1e-5}, "less exact"),
    ],
)
def test_memory_and_errors_are_compared(change, verdict):
    assert verdicts(made_up(), made_up(seed=1, **change)) == ["same", verdict]


def test_what_is_gone_or_broken():
    wrong = made_up()
    wrong.rows[0].contenders["llmloss"] = Measurement("wrong", "error of the loss")
    assert verdicts(made_up(), wrong) == ["broken"]
    empty = made_up()
    empty.rows = []
    with pytest.raises(UserError, match="no case in common"):
        comparison.compare(made_up(), empty)


def test_another_machine_is_refused_unless_asked_for():
    other = made_up()
    other.machine["cpu"] = "y"
    with pytest.raises(UserError, match="cpu: x and y"):
        comparison.compare(made_up(), other)
    assert verdicts(made_up(), other, other_machine=True) == ["same"]


def test_a_slowed_kernel_is_flagged(tmp_path, monkeypatch, capsys):
    """Measured, not made up: the loss is computed ten times."""
    case = replace(DENSE, rows=64, columns=8000)
    measured(tmp_path / "before", [case], rounds=21)

    def slow(case: Case):
        right = table.ours(case)

        def loss(*tensors):
            for _ in range(9):
                right(*tensors).backward()
            tensors[0].grad = None
            return right(*tensors)

        return loss

    replaced(monkeypatch, "llmloss", slow)
    after = measured(tmp_path / "after", [case], rounds=21)
    assert after.rows[0].contenders["llmloss"].status == "ok"
    before_and_after = [str(tmp_path / "before"), str(tmp_path / "after")]
    assert main(["compare", *before_and_after]) == 1
    assert "slower" in capsys.readouterr().out
    assert main(["compare", before_and_after[0], before_and_after[0]]) == 0


# Memory.


def test_peak_memory_of_a_process_of_its_own():
    case = replace(DENSE, rows=512, columns=16000)  # 31 MiB of logits
    peaks = {name: memory.peak_bytes(case, name) for name in ("llmloss", "llmloss inplace")}
    assert peaks["llmloss"] == pytest.approx(case.logits_bytes, rel=0.15)
    assert peaks["llmloss inplace"] < case.logits_bytes / 8


def test_a_child_that_dies_is_no_figure(monkeypatch):
    def broken(case: Case, name: str) -> int:
        raise memory.BrokenProcessPool

    class Pool:
        def __init__(self, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, *_):
            raise memory.BrokenProcessPool

    monkeypatch.setattr(memory, "ProcessPoolExecutor", Pool)
    assert memory.peak_bytes(DENSE, "llmloss") is None


# The command.


def test_without_rich_and_matplotlib_there_are_results_all_the_same(tmp_path, monkeypatch, capsys):
    """As on a machine that has torch and little else."""
    monkeypatch.setattr(terminal, "_HAS_RICH", False)
    for name in ("rich", "matplotlib", "matplotlib.pyplot", "bench.report.page",
                 "bench.report.plots"):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, None)
    command = ["run", "--only", "forward, 8 x 1000", "--rounds", "1", "--no-memory"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "[1/1] forward, 8 x 1000, float32, warm" in printed
    assert "| forward, 8 x 1000, float32, warm |" in printed
    assert "report   not made: " in printed
    assert Results.load(tmp_path).complete


def test_the_whole_command(tmp_path, capsys):
    command = ["run", "--only", "forward+backward, 8 x 1000", "--rounds", "2", "--no-memory",
               "--out", str(tmp_path)]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "forward+backward, 8 x 1000, float32, warm" in printed
    for name in (FILE, "report.html", "report.md"):
        assert (tmp_path / name).stat().st_size > 100
    assert json.loads((tmp_path / FILE).read_text())["settings"]["rounds"] == 2
    assert main(command) == 1  # the results are there
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--only", "no such case"], "no case of the suite"),
        (["run", "--peers", "megatron"], "unknown contenders"),
        (["report", "nowhere"], "cannot read"),
        (["compare", "nowhere", "nowhere"], "cannot read"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_list_of_cases(capsys):
    assert main(["run", "--suite", "cpu", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "linear, forward+backward, 2048 x 768 x 50257, bfloat16, 75% ignored" in printed
