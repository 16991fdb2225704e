"""`moestro cache` and `moestro explain`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from tuning_fakes import WRONG, Kernel, config, inputs, quiet_clock, tuner
from typer.testing import CliRunner

from moestro.cli.cache import app as cache_app
from moestro.cli.explain import explain
from moestro.errors import StoreWarning, TuningError, TuningWarning
from moestro.tuning import Store
from moestro.tuning.store.bundle import export_bundle, import_bundle

app = typer.Typer()
app.add_typer(cache_app, name="cache")
app.command("explain")(explain)

FAST = {-1: 1e-3, "a": 5e-4, "b": WRONG}


def tune(store: Path, size: int = 64, times: Any = None, op: str = "moe") -> Kernel:
    clock = quiet_clock()
    runner = Kernel(clock, times or FAST)
    t = tuner(clock, store)
    with t.autotune(True):
        t.choose_one(op, [runner], config(), inputs(size))
    return runner


def run(*arguments: Any, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160", "TERM": "dumb"})
    if result.exit_code != status:
        raise AssertionError(result.output) from result.exception
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def unwrapped(text: str) -> str:
    """Text without the line breaks that a long temporary path brings."""
    return " ".join(text.split())


def winner(store: Path, size: int = 64, op: str = "moe") -> Any:
    clock = quiet_clock()
    return tuner(clock, store).choose_one(op, [Kernel(clock, {**FAST, "c": 4e-4})], config(), inputs(size))[1]


def test_list_counts_decisions_quarantine_and_misses(store: Path) -> None:
    tune(store)
    clock = quiet_clock()
    with pytest.warns(TuningWarning):
        tuner(clock, store).choose_one("moe", [Kernel(clock, FAST)], config(), inputs(1000))
    text = run("cache", "list", "--store", store)
    assert re.search(r"moe\s+7\s+1\s+1\s+just now", text)


def test_list_and_show_of_nothing(store: Path) -> None:
    assert "holds no decisions" in run("cache", "list", "--store", store)
    said = run("cache", "show", "--store", store, status=1)
    assert "no decisions match" in said
    assert f"{store} is no store of decisions" in said


def test_show_has_a_line_for_each_decision(store: Path) -> None:
    tune(store)
    text = run("cache", "show", "--store", store)
    assert "moe of Kernel" in text
    assert "float32[N, 64]" in text
    for bucket in (1, 2, 4, 8, 16, 32, 64):
        assert re.search(rf"^ *{bucket}\s+Kernel\s+a\s+\d+ µs\s+0\.\d+", text, re.MULTILINE), bucket
    assert "no decisions match" in run("cache", "show", "--store", store, "--op", "other*", status=1)


def test_the_default_store_is_the_environments(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(store)
    monkeypatch.setenv("MOESTRO_STORE", str(store))
    assert "moe" in run("cache", "list")


def test_a_bundle_carries_decisions_and_quarantine_to_another_store(store: Path, tmp_path: Path) -> None:
    tune(store)
    bundle, other = tmp_path / "b" / "bundle.json", tmp_path / "other"
    assert "7 decisions" in run("cache", "export", bundle, "--store", store)
    assert "8 entries taken" in unwrapped(run("cache", "import", bundle, "--store", other))
    assert winner(other) == "a"
    assert "8 left out" in unwrapped(run("cache", "import", bundle, "--store", other))
    assert "0 differ, 7 agree" in run("cache", "diff", store, other)
    assert "0 differ, 7 agree" in run("cache", "diff", store, bundle)
    assert "Kernel" in run("cache", "show", "--store", bundle)
    assert "moe" in run("cache", "list", "--store", bundle)
    clock = quiet_clock()
    runner = Kernel(clock, FAST)
    t = tuner(clock, other)
    with t.autotune(True):
        t.choose_one("moe", [runner], config(), inputs(100))
    assert "b" not in {tactic for _, tactic in runner._runs}


def test_import_keeps_what_is_newer(store: Path, tmp_path: Path) -> None:
    tune(store)
    bundle = tmp_path / "bundle.json"
    run("cache", "export", bundle, "--store", store)
    data = json.loads(bundle.read_text())
    created = 1 + data["columns"]["decision"].index("created")
    for row in data["rows"]:
        if row[0] == "decision":
            row[created] -= 100
    data["tactics"] = [-1] * len(data["tactics"])
    bundle.write_text(json.dumps(data))
    run("cache", "import", bundle, "--store", store)
    assert winner(store) == "a"


def test_diff_shows_what_each_side_chose(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tune(store)
    tune(other, times={-1: 1e-3, "a": 5e-4, "c": 4e-4}, size=32)
    text = run("cache", "diff", store, other)
    assert "7 differ, 0 agree" in text
    assert re.search(r"moe\s+32\s+Kernel a\s+0\.(5|49)\d*\s+Kernel c\s+0\.(4|39)", text)
    assert re.search(r"moe\s+64\s+Kernel a\s+0\.5\d*\s+-", text)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"kind": "bundle", "schema": 99}', '{"kind": "decision", "schema": 1}']
)
def test_what_is_no_bundle_is_an_error(store: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "bundle.json"
    path.write_text(text)
    with pytest.raises(TuningError, match=r"bundle\.json is not a bundle"):
        import_bundle(path, Store(store))


def test_exporting_nothing_and_into_nowhere_are_errors(store: Path, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="no decisions"):
        export_bundle(Store(store), tmp_path / "b.json")
    tune(store)
    (tmp_path / "file").write_text("")
    with pytest.raises(TuningError, match="cannot be written"):
        export_bundle(Store(store), tmp_path / "file" / "b.json")


def test_prune_deletes_what_matches_all_conditions(store: Path) -> None:
    tune(store)
    tune(store, op="other")
    assert "7 files would be deleted" in run(
        "cache", "prune", "--store", store, "--op", "other", "--kind", "decision", "--dry-run"
    )
    assert winner(store, op="other") == "a"
    assert "8 files deleted" in run("cache", "prune", "--store", store, "--op", "other")
    assert winner(store, op="other") == -1
    assert winner(store) == "a"
    assert "0 files deleted" in run("cache", "prune", "--store", store, "--older-than", "1")
    run("cache", "prune", "--store", store, "--kind", "quarantine")
    assert not list(store.rglob("quarantine-*"))
    run("cache", "prune", "--store", store, "--older-than", "0")
    assert list(store.iterdir()) == []


def test_prune_needs_a_condition_and_known_kinds(store: Path) -> None:
    assert "needs a condition" in run("cache", "prune", "--store", store, status=2)
    assert "did you mean 'decision'" in run(
        "cache", "prune", "--store", store, "--kind", "decisions", status=2
    )


def test_prune_leaves_foreign_files_alone(store: Path) -> None:
    tune(store)
    folder = next(store.glob("*/moe-*"))
    (folder / "notes.json").write_text("mine")
    (folder / "readme.txt").write_text("mine")
    with pytest.warns(StoreWarning):
        run("cache", "prune", "--store", store, "--older-than", "0")
    assert sorted(p.name for p in folder.iterdir()) == ["notes.json", "readme.txt"]


def test_hints_of_flashinfer_are_imported(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "fi.json"
    path.write_text(json.dumps({"_metadata": {}, str(("moe", "Kernel", ((1, 2),))): ["Kernel", [1, 2]]}))
    assert "1 hints taken" in run("cache", "import", path, "--flashinfer", "--store", store)


def test_explain_tells_of_a_size_in_the_store(store: Path) -> None:
    tune(store)
    text = run("explain", "--store", store, "--tokens", "40")
    assert "moe at size 40: Kernel, tactic a  [measured]" in text
    assert "decided at bucket 64" in text
    assert "[extrapolated]" in run("explain", "--store", store, "--tokens", "400")
    assert run("explain", "--store", store).count("[measured]") == 7
    assert "no decisions that match" in run("explain", "--store", store, "--match", "nothing", status=1)
    assert "no decisions that match" in run("explain", "--store", store, "--tokens", "4x4", status=1)


@pytest.mark.parametrize("tokens", ["x", "", "-3", "4x"])
def test_a_size_must_be_a_number(store: Path, tokens: str) -> None:
    store.mkdir()
    assert "a size must be a number" in run("explain", "--store", store, f"--tokens={tokens}", status=2)


def test_explain_needs_a_folder(tmp_path: Path) -> None:
    assert "no such folder" in run("explain", "--store", tmp_path / "none", status=2)


def test_bundles_in_the_package_serve_their_environment_and_give_way_to_the_store(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moestro.tuning.store import shipped

    other = tmp_path / "other"
    tune(store)
    tune(other, times={-1: 1e-3, "a": 5e-4, "c": 4e-4})
    (tmp_path / "bundles").mkdir()
    run("cache", "export", tmp_path / "bundles" / "h100.json", "--store", store)
    (tmp_path / "bundles" / "broken.json").write_text("{")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "bundles")
    shipped.forget()
    try:
        clock = quiet_clock()
        runner, t = Kernel(clock, FAST), tuner(clock)
        with pytest.warns(StoreWarning, match=r"broken\.json"):
            assert t.choose_one("moe", [runner], config(), inputs(64)) == (runner, "a")
        decision = t.decision("moe", [runner], config(), inputs(64))
        assert decision is not None
        assert decision.source == "bundle h100"
        assert winner(other) == "c"
    finally:
        shipped.forget()


# --- bundles that ship with the package ------------------------------------------------------------------
@pytest.fixture
def bundle_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Export a store into a folder that stands for the package's own; the file, after edits."""
    from moestro.tuning.store import shipped

    def make(store: Path, edit: Callable[[dict[str, Any]], None] = lambda data: None, **options: Any) -> Path:
        path = tmp_path / "bundles" / "h100.json"
        export_bundle(Store(store), path, **options)
        data = json.loads(path.read_text())
        edit(data)
        path.write_text(json.dumps(data))
        shipped.forget()
        return path

    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "bundles")
    yield make
    shipped.forget()


def with_facts(**facts: Any) -> Callable[[dict[str, Any]], None]:
    """An edit: the bundle comes from an environment that differs in these facts."""

    def edit(data: dict[str, Any]) -> None:
        for row in data["rows"]:
            if row[0] != "candidate":
                row[1] = "elsewhere"
        (known,) = data["environments"].values()
        data["environments"] = {"elsewhere": {**known, **facts}}

    return edit


def shipped_decision(times: Any = FAST, cfg: Any = None, size: int = 64) -> Any:
    clock = quiet_clock()
    runner = Kernel(clock, times)
    return tuner(clock).decision("moe", [runner], cfg or config(), inputs(size))


def test_a_shipped_decision_serves_the_same_kernels_under_another_driver(
    store: Path, bundle_of: Callable[..., Path]
) -> None:
    tune(store)
    assert shipped_decision() is None
    bundle_of(store, with_facts(driver="1.2", torch="9.9"))
    decision = shipped_decision()
    assert decision.tactic == "a"
    assert decision.source == "bundle h100, of driver 1.2, torch 9.9"


def test_a_tuning_measures_again_what_only_another_driver_has_decided(
    store: Path, bundle_of: Callable[..., Path]
) -> None:
    tune(store)
    bundle_of(store, with_facts(driver="1.2"))
    clock = quiet_clock()
    runner, t = Kernel(clock, {-1: 1e-3, "a": 2e-3, "c": 4e-4}), tuner(clock)
    with t.autotune(True, crossover=False):
        assert t.choose_one("moe", [runner], config(), inputs(64)) == (runner, "c")


@pytest.mark.parametrize("facts", [{"sources": "older"}, {"device": "another GPU"}, {"capability": "10.0"}])
def test_a_bundle_of_other_kernels_or_another_gpu_never_serves(
    store: Path, bundle_of: Callable[..., Path], facts: dict[str, str]
) -> None:
    tune(store)
    bundle_of(store, with_facts(**facts))
    assert shipped_decision() is None


def test_loose_facts_of_a_key_may_differ(store: Path, bundle_of: Callable[..., Path]) -> None:
    tune(store)
    graph = dataclasses.replace(config(), use_cuda_graph=True)
    bundle_of(store)
    assert shipped_decision(cfg=graph) is None
    bundle_of(store, loose=["mode"])
    decision = shipped_decision(cfg=graph)
    assert decision.tactic == "a"
    assert decision.source == "bundle h100, of another mode"
    assert shipped_decision().source == "bundle h100"  # the key as it was measured


def test_tactics_that_this_version_does_not_have_are_left_out(
    store: Path, bundle_of: Callable[..., Path]
) -> None:
    def edit(data: dict[str, Any]) -> None:
        data["tactics"] = [{"object": "moestro.gone:Tactic", "fields": {}}] * len(data["tactics"])

    tune(store)
    bundle_of(store, edit)
    assert shipped_decision() is None


def test_a_slim_bundle_keeps_winners_and_defaults(store: Path, tmp_path: Path) -> None:
    tune(store)
    sizes = {}
    for slim in (False, True):
        path = tmp_path / f"{slim}.json"
        export_bundle(Store(store), path, slim=slim)
        sizes[slim] = path.stat().st_size
        other = Store(tmp_path / f"other-{slim}")
        import_bundle(path, other)
        for entry in other.entries():
            kept = entry.record.evidence.candidates
            assert "winner" in {c.fate for c in kept}
            assert not slim or all(c.fate == "winner" or c.tactic == -1 for c in kept)
    assert sizes[True] < sizes[False]
