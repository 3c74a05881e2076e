"""The report: complete, self-contained, legible in a browser and on a phone."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from bench import readme
from llmloss_bench.cases import Case
from llmloss_bench.report.page import HTML, MARKDOWN, write_report
from llmloss_bench.results import FILE, Ceiling, Measurement, Results, Row
from llmloss_bench.suites import suite

COMMITTED = readme.CPU_RESULTS
PLOTS = ("peers", "limit", "memory", "options", "scaling-v", "scaling-n", "scaling-d",
         "scaling-threads")  # fmt: skip


def invented(case: Case) -> Row:
    """A row such as a run leaves, with hostile text in it."""
    rate = 1e11 if case.is_linear else 2e10
    work = case.flops if case.is_linear else case.bytes
    ours = [work / rate * 1.2 * (1 + k / 100) for k in range(5)]
    contenders = {
        "llmloss": Measurement(seconds=ours, peak_bytes=case.logits_bytes, loss_error=1e-8,
                               gradient_error=1e-6),
        "torch": Measurement(seconds=[4 * t for t in ours], peak_bytes=3 * case.logits_bytes,
                             loss_error=1e-7, gradient_error=1e-5),
        "compile": Measurement("failed", "<script>alert('no')</script>"),
    }  # fmt: skip
    if case.has_backward and not case.is_linear:
        contenders["llmloss inplace"] = Measurement(seconds=[t / 2 for t in ours], peak_bytes=1000)
    if case.is_linear:
        ceilings = {"products/256": Ceiling([case.flops / rate] * 5, flops=case.flops)}
    else:
        size = case.logits_bytes
        ceilings = {
            "copy": Ceiling([2 * size / rate] * 5, bytes=2 * size),
            "read": Ceiling([size / rate] * 5, bytes=size),
        }
    return Row(case, contenders, ceilings)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    machine = {"cpu": "A & B <C>", "threads": 2, "isa": "avx512", "torch": "2.13", "date": "today"}
    results = Results(machine, {"suite": "cpu", "rounds": 5}, {"liger": "not measured: none"},
                      [invented(case) for case in suite("cpu", False)], True)  # fmt: skip
    results.save(folder / FILE)
    write_report(folder, folder)
    return folder


def test_every_case_and_plot_is_there(report):
    page = (report / HTML).read_text()
    markdown = (report / MARKDOWN).read_text()
    for row in Results.load(report).rows:
        assert row.case.label.replace("+", "&#43;") in page.replace("+", "&#43;")
        assert row.case.label in markdown
    for name in PLOTS:
        assert f'<figure id="{name}">' in page
        ET.parse(report / f"{name}.svg")
    assert "liger: not measured" in page
    assert "A &amp; B &lt;C&gt;" in page
    assert "<script" not in page


def test_the_page_is_self_contained(report):
    page = (report / HTML).read_text()
    assert "default-src 'none'" in page
    assert re.findall(r"""(?:src|href)=["'](?!#)[^"']*""", page) == []
    named = set(re.findall(r"https?://[\w.]+", page))
    assert named <= {"http://www.w3.org"}, named  # XML name spaces


@pytest.mark.slow
def test_an_interrupted_run_says_so(report, tmp_path):
    results = Results.load(report)
    results.complete = False
    results.save(tmp_path / FILE)
    write_report(tmp_path, tmp_path)
    assert "interrupted" in (tmp_path / HTML).read_text()
    assert "interrupted" in (tmp_path / MARKDOWN).read_text()


def test_a_run_of_one_case_has_a_report(tmp_path):
    case = Case("cross_entropy", "forward", 8, 1000, "float32", warm=True, figure="small")
    row = Row(case, {"llmloss": Measurement(seconds=[1e-3])})
    Results({"cpu": "x"}, {"suite": "quick", "rounds": 1}, {}, [row], True).save(tmp_path / FILE)
    assert [p.name for p in write_report(tmp_path, tmp_path)] == [HTML, MARKDOWN]


def test_the_committed_report_is_of_the_committed_results():
    digest = hashlib.sha256((COMMITTED / FILE).read_bytes()).hexdigest()
    assert f'content="{digest}"' in (COMMITTED / HTML).read_text()
    results = Results.load(COMMITTED)
    assert results.complete
    # How many threads there are is the machine's to say.
    cases = [case for case in suite("cpu", False) if case.figure != "threads"]
    assert [row.case for row in results.rows if row.case.figure != "threads"] == cases
    for row in results.rows:
        for name, m in row.contenders.items():
            assert not name.startswith("llmloss") or m.status == "ok", (row.case.label, name)


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not binary or not driver:
        pytest.skip("no chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "disable-dev-shm-usage"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.add_experimental_option("mobileEmulation", {"deviceMetrics": {"width": 390,
                                    "height": 844, "pixelRatio": 2.0}})  # fmt: skip
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    made = webdriver.Chrome(options=options, service=service)
    yield made
    made.quit()


@pytest.mark.parametrize("which", ["invented", "committed"])
def test_the_page_on_a_phone(browser, report, which):
    folder = report if which == "invented" else COMMITTED
    browser.get((folder / HTML).resolve().as_uri())
    assert browser.get_log("browser") == []
    run = browser.execute_script
    assert run("return window.innerWidth") == 390
    assert run("return document.documentElement.scrollWidth") <= 390
    # Nothing but the page itself was asked for.
    assert run("return performance.getEntriesByType('resource').length") == 0
    plots = run("return [...document.querySelectorAll('figure svg')].map(s => {"
                "const r = s.getBoundingClientRect(); return [r.width, r.height]; })")  # fmt: skip
    assert len(plots) == len(PLOTS)
    assert all(width > 300 and height > 100 for width, height in plots)
    smallest = run(
        "return Math.min(...[...document.querySelectorAll('svg text')].filter(t => t.textContent)"
        ".map(t => t.getBoundingClientRect().height))"
    )
    assert smallest >= 7
    # Folded tables open by a tap, and scroll by themselves.
    last = browser.find_elements("css selector", "details")[-1]
    assert last.get_attribute("open") is None
    last.find_element("css selector", "summary").click()
    assert last.find_element("css selector", "table").is_displayed()
    assert run("return document.documentElement.scrollWidth") <= 390
    if os.environ.get("LLMLOSS_SCREENSHOT"):
        browser.save_screenshot(os.environ["LLMLOSS_SCREENSHOT"])
