"""The report as a reader sees it, in headless Chromium at two widths: nothing beyond the edge, nothing overlapping,
text of a readable size, and the figures of what is under the pointer or has the focus.

Skipped, with the reason, where no Chromium is installed (MOESTRO_CHROMIUM names one elsewhere).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_plain import some_result
from browser import Browser, chromium
from tuning_fakes import Kernel, config, inputs, quiet_clock, tuner

from moestro.bench import plots
from moestro.bench.report import page, write_report
from moestro.bench.results import BenchResult
from moestro.machine import bytes_text

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 16384)
WIDTHS = [1280, 390]
LEAST_PX = 9.0  # a letter's height that is read on a phone
# What lies beyond the page's edge, which siblings and which words of a plot overlap, and the smallest text.
LOOK = """(() => {
  const box = e => e.getBoundingClientRect(), found = {sideways: 0, beyond: [], overlapping: [], px: 99, plots: []};
  const turned = m => Math.hypot(m.a, m.b);
  const meet = (p, q) => p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1;
  found.sideways = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  for (const e of document.querySelectorAll(".plots > *, .cards > *, .tuning > *, h1, h2, h3, p"))
    if (box(e).right > innerWidth + 1) found.beyond.push(e.tagName + "." + e.className.toString());
  const lists = [...document.querySelectorAll(".plots, .cards, .tuning")].map(e => [...e.children]);
  for (const svg of document.querySelectorAll("svg")) {
    const words = [...svg.querySelectorAll("text")], frame = box(svg);
    for (const e of words) {
      found.px = Math.min(found.px, parseFloat(getComputedStyle(e).fontSize) * turned(e.getScreenCTM()));
      const b = box(e), inside = b.left > frame.left - 2 && b.right < frame.right + 2 && b.top > frame.top - 2;
      if (!inside) found.beyond.push(e.textContent);
    }
    lists.push(words);
    found.plots.push([svg.getAttribute("aria-label"), frame.width, svg.querySelectorAll(".mark").length]);
  }
  for (const all of lists) for (const a of all) for (const b of all)
    if (a !== b && meet(box(a), box(b))) found.overlapping.push([a.textContent, b.textContent]);
  return found;
})()"""
TIP = """(() => {
  const tip = document.querySelector(".tip"), b = tip.getBoundingClientRect();
  const inside = b.left >= 0 && b.top >= 0 && b.right <= innerWidth && b.bottom <= innerHeight;
  return tip.hidden ? null : {text: tip.textContent, inside};
})()"""
MARK = """((plot, i) => {
  const mark = [...document.querySelectorAll("svg")][plot].querySelectorAll(".mark")[i];
  mark.scrollIntoView({block: "center", inline: "center"});
  const b = mark.getBoundingClientRect();
  return [b.left + b.width / 2, b.top + b.height / 2, mark.dataset.tip];
})(%d, %d)"""


def crowded() -> BenchResult:
    """Two contenders of ours and four peers at many sizes, layers of some KiB."""
    result = some_result()
    ours, peer = result.rows[1], result.rows[0]
    rows = []
    for i, n in enumerate(TOKENS):
        time = 2e-5 * n**0.8
        for k, name in enumerate(("eager", "batched_mm", "grouped_mm", "another_peer with a long name")):
            slow = time * (2 + k / 3)
            changes: dict[str, Any] = {
                "tokens": n,
                "median_s": slow,
                "low_s": slow * 0.9,
                "high_s": slow * 1.2,
            }
            rows.append(dataclasses.replace(peer, contender=f"transformers {name}", **changes))
        for k, name in enumerate(("moestro nvfp4", "moestro bf16")):
            ratio = 9.0 / (1 + i) + k * 0.6
            changes = {"tokens": n, "median_s": time, "low_s": time * 0.9, "high_s": time * 1.1}
            rows.append(dataclasses.replace(ours, contender=name, ratio_to_best_peer=ratio, **changes))
    return dataclasses.replace(result, rows=rows)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two results and a store."""
    chromium()
    if (reason := plots.why_not()) is not None:
        pytest.skip(f"no plots here: {reason}")
    root = tmp_path_factory.mktemp("report")
    clock = quiet_clock()
    times = {-1: 3e-4, ("a tactic", 64): lambda n: 1e-4 if n <= 100 else 3.2e-4, 1: 2e-4}
    tuned = tuner(clock, root / "store")
    with tuned.autotune(True):
        tuned.choose_one("moe", [Kernel(clock, times)], config(), inputs(3000))
    write_report(root / "report.html", [some_result(), crowded()], root / "store")
    return root / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off_nothing_overlaps_and_text_is_readable(
    report: Path, browser: Browser, width: int
) -> None:
    browser.open(report, width)
    seen = browser.run(LOOK)
    assert seen["sideways"] == 0
    assert seen["beyond"] == []
    assert seen["overlapping"] == []
    assert seen["px"] >= LEAST_PX
    assert len(seen["plots"]) == 4 + 4 + 4
    for name, pixels, marks in seen["plots"]:
        assert pixels > 300, name
        assert marks >= 2, name


@pytest.mark.parametrize("width", WIDTHS)
def test_every_plot_says_what_is_under_the_pointer(report: Path, browser: Browser, width: int) -> None:
    browser.open(report, width)
    for plot, (_, _, marks) in enumerate(browser.run(LOOK)["plots"]):
        for i in (0, marks - 1):
            x, y, words = browser.run(MARK % (plot, i))
            browser.point(x, y)
            assert browser.run(TIP) == {"text": words, "inside": True}
            assert len(words.splitlines()) >= 2
    browser.run("scrollTo(0, 0)")
    browser.point(5, 5)
    assert browser.run(TIP) is None


def test_the_pointer_reads_a_size_with_all_its_contenders(report: Path, browser: Browser) -> None:
    browser.open(report, 1280)
    x, y, _ = browser.run(MARK % (0, 1))
    browser.point(x, y)
    assert browser.run(TIP)["text"].splitlines() == [
        "N = 4",
        "moestro nvfp4: 4 ms (3.6 to 4.4)",
        "transformers eager: 8 ms (7.2 to 8.8)",
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_keyboard_reaches_the_same_figures(report: Path, browser: Browser, width: int) -> None:
    browser.open(report, width)
    browser.point(1, 1)
    said = []
    for _ in range(8):
        browser.key("Tab", 9)
        tip = browser.run(TIP)
        assert tip is not None
        assert tip["inside"]
        said.append(tip["text"].splitlines()[0])
    assert said == [
        "N = 1",
        "N = 4",
        "N = 1",
        "N = 4",
        "N = 1",
        "N = 4",
        "transformers bf16",
        "moestro nvfp4",
    ]
    browser.key("Escape", 27)
    assert browser.run(TIP) is None


def test_without_a_script_the_words_are_the_marks_titles() -> None:
    text = page([some_result()])
    assert "<title>N = 4\nmoestro nvfp4: 4 ms (3.6 to 4.4)" in text
    assert text.count("<title>") == 1 + 3 * 2 + 2  # the page's, three plots of two sizes, two bars


def test_columns_of_plots_are_never_wider_than_the_page() -> None:
    """The rule that cut all plots off at 390 px: a least width without a bound."""
    text = page([some_result()])
    assert "minmax(480px, 1fr)" not in text
    assert text.count("minmax(min(480px, 100%), 1fr)") == 2


def test_small_layers_have_a_size(tmp_path: Path) -> None:
    text = page([some_result()])
    assert "27 KiB" in text
    assert "0 MiB" not in text
    assert [bytes_text(n) for n in (12, 27648, 342_000_000, 1.2e9)] == [
        "12 B",
        "27 KiB",
        "326 MiB",
        "1.12 GiB",
    ]
