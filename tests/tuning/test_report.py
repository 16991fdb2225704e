"""The tuner's plots."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET
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


def svgs(page: str) -> list[str]:
    return [base64.b64decode(code).decode() for code in re.findall(r"svg\+xml;base64,([^\"]+)", page)]


def test_the_section_has_four_plots_and_a_table_of_every_decision(tuned: Path) -> None:
    page = section(tuned)
    assert len(svgs(page)) == 4
    for svg in svgs(page):
        assert ET.fromstring(svg).tag.endswith("svg")
    assert page.count("<tr>") == 1 + len(list(tuned.rglob("[0-9]*.json")))
    assert "&lt;swap&gt;" in page
    assert "<swap>" not in page


@pytest.mark.parametrize("plot", [heat_map, crossover_plot, chosen_plot, time_plot])
def test_each_plot_stands_alone(tuned: Path, plot: object) -> None:
    (family,) = families(Store(tuned).entries())
    assert callable(plot)
    assert len(svgs(plot(family))) == 1


def test_an_empty_store_says_so(store: Path) -> None:
    assert "holds no decisions" in section(store)


def test_without_matplotlib_it_says_what_to_install(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TuningError, match=r"moestro\[report\]"):
        section(tuned)
