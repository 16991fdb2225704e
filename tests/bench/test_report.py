"""report.html: one self-contained page with what was measured in it."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bench_plain import some_result

from moestro.bench import plots, results
from moestro.bench.report import page, write_report
from moestro.errors import MoestroError


class Checker(HTMLParser):
    """Collects text, and complains about tags that are not closed."""

    VOID = ("meta", "br", "img", "link", "path", "use", "rect", "line")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    write_report(tmp_path / "deep" / "report.html", [some_result()])
    text = (tmp_path / "deep" / "report.html").read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert text.count("<svg") == 4
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>|<cc:.*?>|<dc:.*?>', "", text)
    assert not re.search(r'(src|href)="https?:', without_namespaces)


def test_the_page_says_the_figures_and_their_conditions(tmp_path: Path) -> None:
    text = page([some_result()])
    for word in ("moestro nvfp4", "2.00", "0.281", "moestro bench --sizes", "uniform", "Figure &amp; co"):
        assert word in text, word


def test_what_was_left_out_is_said_with_its_reason() -> None:
    skipped = [{"tokens": 4, "contender": "transformers batched_mm", "reason": "would copy <too much>"}]
    text = page([dataclasses.replace(some_result(), skipped=skipped)])
    assert "transformers batched_mm not run at N = 4: would copy &lt;too much&gt;" in text


def test_results_without_a_peer_have_no_ratio_plot() -> None:
    result = some_result()
    rows = [dataclasses.replace(r, ratio_to_best_peer=None) for r in result.rows if r.ours]
    assert page([dataclasses.replace(result, rows=rows)]).count("<svg") == 3


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    with pytest.raises(MoestroError, match=r"pip install 'moestro\[report\]'"):
        write_report(tmp_path / "r.html", [some_result()])


def test_nothing_to_show_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MoestroError, match="nothing to show"):
        write_report(tmp_path / "r.html", [])


def test_results_survive_the_file(tmp_path: Path) -> None:
    results.write(some_result(), tmp_path / "sub" / "o.json")
    assert results.read(tmp_path / "sub" / "o.json") == some_result()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot read"),
        ("[]", "got 'list'"),
        ('{"schema": "other/1"}', "got 'other/1'"),
        (json.dumps({"schema": results.SCHEMA, "rows": []}), "does not have the fields"),
        (json.dumps({"schema": results.SCHEMA}), "does not have the fields"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "o.json").write_text(content)
    with pytest.raises(MoestroError, match=said):
        results.read(tmp_path / "o.json")


def test_a_result_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoestroError, match="cannot write"):
        results.write(some_result(), tmp_path / "file" / "o.json")
