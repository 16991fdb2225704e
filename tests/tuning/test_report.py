"""The tuner's plots."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from tuning_fakes import Kernel, config, inputs, quiet_clock, tuner

from moestro.errors import TuningError
from moestro.tuning import Store
from moestro.tuning.show.families import families
from moestro.tuning.show.report import chosen_plot, crossover_plot, heat_map, section, time_plot

TIMES = {-1: 3e-4, ("<swap>", 64): lambda n: 1e-4 if n <= 100 else 3e-4, 1: 2e-4, 2: ValueError("no")}


@pytest.fixture
def tuned(store: Path) -> Path:
    clock = quiet_clock()
    t = tuner(clock, store)
    with t.autotune(True):
        t.choose_one("moe", [Kernel(clock, TIMES)], config(), inputs(600))
    return store


def svgs(page: str) -> list[ET.Element]:
    return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def words(svg: ET.Element) -> list[list[str]]:
    """What the marks of a plot say, in lines."""
    marks = [e for e in svg.iter() if e.get("class") == "mark"]
    return ["".join(mark.itertext()).split("\n") for mark in marks]


def test_the_section_has_four_plots_and_a_table_of_every_decision(tuned: Path) -> None:
    page = section(tuned)
    assert len(svgs(page)) == 4
    assert page.count("<tr>") == 1 + len(list(tuned.rglob("[0-9]*.json")))
    assert "&lt;swap&gt;" in page
    assert "<swap>" not in page


@pytest.mark.parametrize("plot", [heat_map, crossover_plot, chosen_plot, time_plot])
def test_each_plot_stands_alone_and_says_its_figures_for_every_size(tuned: Path, plot: object) -> None:
    (family,) = families(Store(tuned).entries())
    assert callable(plot)
    (svg,) = svgs(plot(family))
    assert svg.get("aria-label")
    sizes = {str(bucket[0]) for bucket in family.records}
    said = {lines[0].split(":")[0].removeprefix("size ") for lines in words(svg)}
    assert said == sizes
    stops = [e for e in svg.iter() if e.get("tabindex") == "0"]
    assert len(stops) == len(sizes)
    assert all(e.get("aria-label") for e in stops)


def test_a_cell_says_its_tactic_and_ratio_and_whether_it_was_chosen(tuned: Path) -> None:
    (family,) = families(Store(tuned).entries())
    said = words(svgs(heat_map(family))[0])
    cells = [lines for lines in said if lines[0] == "size 64"]
    assert ["chosen" in lines for lines in cells if "('<swap>', 64)" in lines] == [True]
    assert sum("chosen" in lines for lines in cells) == 1
    assert any(line.endswith("of the default's time") for line in cells[0])


def test_a_size_is_said_to_be_served_by_a_decision_and_not_by_a_race_that_has_decided_nothing(
    tuned: Path,
) -> None:
    (family,) = families(Store(tuned).entries())
    (small, _), (large, _) = family.find((33,)), family.find((65,))
    assert (small.bucket, large.bucket > (64,)) == ((64,), True)
    evidence = replace(small.evidence, reason="budget")
    begun = replace(small, tactic=-1, status="default", complete=False, evidence=evidence)
    assert replace(family, records={**family.records, (64,): begun}).find((33,))[0] == large
    assert replace(family, records={(64,): begun}).find((33,))[0] == begun


def test_an_empty_store_says_so(store: Path) -> None:
    assert "holds no decisions" in section(store)


def test_without_matplotlib_it_says_what_to_install(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TuningError, match=r"moestro\[report\]"):
        section(tuned)
