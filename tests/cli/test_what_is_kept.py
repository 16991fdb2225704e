"""Files and stores that cannot be written, or that hold nothing: said before any work, or else with what was measured."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import QUICK, TINY, Run
from rich.console import Console

from moestro.bench import accuracy, plots, regret_layers, roofline
from moestro.bench.contenders import make_layer
from moestro.bench.layers import LayerSource, make_case
from moestro.bench.models import from_sizes
from moestro.bench.regret import Summary
from moestro.cli import regret
from moestro.cli.deliver import every
from moestro.errors import MoestroError, StoreWarning, TuningError, TuningWarning
from moestro.routing import Uniform
from moestro.tuning import AutoTuner, Store
from moestro.tuning.store import bundle, store

BENCH = ["bench", *TINY, *QUICK, "--peers", "none", "--format", "nvfp4"]
FULL = OSError(errno.ENOSPC, "No space left on device")
warned = pytest.mark.filterwarnings("always::moestro.errors.StoreWarning")


def words(text: str) -> str:
    return " ".join(text.split())


# --- tune --------------------------------------------------------------------------------------------------
@warned
def test_decisions_that_a_store_cannot_take_are_shown_and_an_error(run: Run) -> None:
    Path("file").write_text("not a folder")
    with pytest.warns(StoreWarning, match="cannot be written"):
        done = run("tune", *TINY, "--tokens", "1,2", "--store", "file/store", "--json", "t.json")
    assert done.exit_code == 1
    table, _, said = done.output.partition("error: TuningError")
    assert "2 decisions in" in table
    assert "cpu default" in table
    assert "not kept: the store file/store could not be written ([Errno 20] Not a directory" in words(said)
    assert "by --store or MOESTRO_STORE, and tune again" in words(said)
    data = json.loads(Path("t.json").read_text())
    assert [row["tokens"] for row in data["rows"]] == [1, 2]
    assert data["kept"] is False
    assert "Not a directory" in data["why_not_kept"]


@warned
def test_a_store_without_room_keeps_the_misses_that_it_could_not_answer(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("tune", *TINY, "--store", "s", "--tokens", "1").exit_code == 0
    shape = from_sizes("8,2,64,32")
    layer = make_layer(LayerSource(shape), "nvfp4", "auto", 64, AutoTuner(store="s"))
    case = make_case(shape, 11, Uniform())
    with pytest.warns(TuningWarning), torch.inference_mode():
        layer(case.x, case.ids, case.weights)

    def full(path: Path, data: Any) -> None:
        raise FULL

    monkeypatch.setattr(store, "write_atomically", full)
    with pytest.warns(StoreWarning, match="No space left"):
        done = run("tune", *TINY, "--store", "s", "--from-misses")
    assert done.exit_code == 1
    assert "No space left" in done.output
    assert len(Store("s").entries(("miss",))) == 1


@warned
def test_a_miss_that_cannot_be_deleted_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("tune", *TINY, "--store", "s", "--tokens", "1").exit_code == 0
    kept = Store("s")

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.warns(StoreWarning, match="Permission denied"):
        kept.forget(kept.entries()[0])
    assert "Permission denied" in str(kept.unwritable)
    with pytest.raises(TuningError, match=r"cannot be pruned: .*Permission denied"):
        bundle.prune(kept, op="moestro.*")


# --- files that are asked for --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "why"), [("file/x", "file is no folder"), (".", "it is a folder"), ("file/a/x", "is no folder")]
)
@pytest.mark.parametrize(
    "command",
    [
        [*BENCH, "--json"],
        [*BENCH, "--report"],
        [*BENCH, "--accuracy", "--json"],
        ["bench", "regret", *TINY, "--json"],
        ["tune", *TINY, "--json"],
        ["plan", *TINY[:2], "--json"],
        ["report", "--store", ".", "--out"],
        ["record", "model", "--text", "file", "--out"],
    ],
)
def test_a_file_that_cannot_be_written_is_wrong_usage_before_any_work(
    run: Run, command: list[str], path: str, why: str
) -> None:
    Path("file").write_text("not a folder")
    done = run(*command, path)
    assert done.exit_code == 2, done.output
    assert f"cannot write {path}: " in done.output
    assert why in done.output
    assert command[-1] in done.output


def test_devices_and_folders_that_are_to_be_made_can_be_written(run: Run) -> None:
    for path in ("/dev/null", "new/folder/p.json"):
        assert run("plan", *TINY[:2], "--json", path).exit_code == 0
    assert Path("new/folder/p.json").is_file()


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, data: Any) -> None:
        raise MoestroError(f"json: cannot write {path}: No space left on device")

    monkeypatch.setattr("moestro.bench.results.write_json", refuse)


@pytest.mark.usefixtures("no_room")
def test_bench_measures_on_and_shows_what_cannot_be_written(run: Run) -> None:
    report = ["--report", "r.html"] if plots.why_not() is None else []
    done = run(*BENCH, "--tokens", "1,2", "--json", "o.json", *report)
    assert done.exit_code == 1
    assert done.output.count("measuring goes on") == 1
    table, _, said = done.output.partition("error: MoestroError")
    assert [line.split()[0] for line in table.splitlines() if "±" in line][:2] == ["1", "2"]
    assert "No space left" in said
    assert not report or "moestro nvfp4" in Path("r.html").read_text()


@pytest.mark.usefixtures("no_room")
def test_accuracy_shows_what_cannot_be_written(run: Run) -> None:
    done = run(*BENCH, "--accuracy", "--input-format", "none", "--tokens", "2", "--json", "o.json")
    assert done.exit_code == 1
    assert "own: to the reference" in done.output
    assert "No space left" in done.output


def test_accuracy_that_breaks_off_keeps_the_rows_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = accuracy.layer_rows

    def broken(*args: Any, **options: Any) -> Any:
        yield next(iter(real(*args, **options)))
        raise MoestroError("it is Monday")

    monkeypatch.setattr(accuracy, "layer_rows", broken)
    done = run(*BENCH, "--accuracy", "--tokens", "2", "--json", "o.json")
    assert done.exit_code == 1
    assert "it is Monday" in done.output
    assert len(json.loads(Path("o.json").read_text())["layer"]) == 1


def test_regret_keeps_the_sizes_before_ctrl_c(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real, done = regret_layers.measure_regret, []

    def once(*args: Any, **options: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args, **options)

    monkeypatch.setattr(regret_layers, "measure_regret", once)
    small = ["--repeats", "2", "--oracle-seconds", "0", "--tokens", "1,2"]
    ended = run("bench", "regret", *TINY, *small, "--json", "o.json")
    assert ended.exit_code == 130, ended.output
    assert "nvfp4 auto, 1 tokens" in ended.output
    assert [row["tokens"] for row in json.loads(Path("o.json").read_text())["rows"]] == [1]


def test_nothing_is_measured_for_a_file_that_is_in_the_way(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure_ceilings", lambda device: pytest.fail("measured"))
    assert run(*BENCH, "--json", ".").exit_code == 2


def test_a_recording_needs_a_suffix_before_the_model_runs(run: Run) -> None:
    done = run("record", "no-such-model", "--text", "t", "--out", "routing.bin")
    assert done.exit_code == 2
    assert "must end in .npy, .pt, .safetensors, got routing.bin" in done.output


# --- parity: runs are processes of their own -------------------------------------------------------------------
PARITY = ["bench", "parity", *TINY, *QUICK, "--tokens", "1", "--peers", "eager"]


def runs(run: Run, monkeypatch: pytest.MonkeyPatch, fail_at: int = 99) -> list[int]:
    """Each run in this process; the number of those that were begun."""
    begun: list[int] = []

    def one(arguments: list[str]) -> None:
        begun.append(1)
        if len(begun) == fail_at:
            raise MoestroError("a bench run failed:\nit is Monday")
        assert run("bench", *arguments).exit_code == 0

    monkeypatch.setattr("moestro.bench.parity._bench", one)
    return begun


def test_a_run_that_fails_takes_nothing_from_those_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    runs(run, monkeypatch, fail_at=3)
    done = run(*PARITY, "--runs", "3", "--json", "p.json")
    assert done.exit_code == 1
    assert "it is Monday" in done.output
    assert "Δ mean" in done.output
    assert json.loads(Path("p.json").read_text())["runs"] == 2


def test_a_peer_that_is_not_there_is_said_after_the_first_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = runs(run, monkeypatch)
    done = run(*PARITY, "--runs", "3", "--against", "nobody")
    assert done.exit_code == 1
    assert "no peer 'nobody' was measured" in done.output
    assert len(begun) == 1


# --- stores that do not serve -----------------------------------------------------------------------------------
def test_a_store_that_is_named_and_serves_nothing_is_said(run: Run) -> None:
    said = words(run(*BENCH, "--tokens", "1", "--store", "slip").output)
    assert (
        "slip is no folder: default tactics were measured; moestro tune --store slip chooses others" in said
    )
    assert run("tune", *TINY, "--tokens", "1", "--store", "s").exit_code == 0
    assert "default tactics were measured" not in run(*BENCH, "--tokens", "1", "--store", "s").output
    other = ["bench", "--sizes", "8,2,96,32", *QUICK, "--peers", "none", "--tokens", "1", "--store", "s"]
    assert "s has no decisions for this layer: default" in words(run(*other).output)


def test_a_report_of_nothing_is_an_error(run: Run) -> None:
    pytest.importorskip("matplotlib")
    Path("empty").mkdir()
    done = run("report", "--store", "empty")
    assert done.exit_code == 1
    assert "no decisions for several sizes in empty" in words(done.output)
    assert not Path("report.html").exists()


def test_a_warning_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "s" / "env" / "key"
    folder.mkdir(parents=True)
    (folder / "1.json").write_text("{")
    command = [sys.executable, "-m", "moestro", "cache", "list", "--store", str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"warning: {folder}/1.json cannot be read (")


@pytest.mark.parametrize(
    "command", [["tune", *TINY, "--tokens", "1", "--budget", "1"], [*BENCH, "--tokens", "1"]]
)
def test_results_are_written_though_nobody_reads_the_terminal(tmp_path: Path, command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "MOESTRO_STORE": str(tmp_path / "store")}
    whole = [sys.executable, "-m", "moestro", *command, "--json", "o.json"]
    with open(writer, "w") as gone:
        done = subprocess.run(
            whole, stdout=gone, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment, check=False
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "rows" in json.loads((tmp_path / "o.json").read_text())


def test_a_file_called_minus_is_not_made(run: Run) -> None:
    done = run(*BENCH, "--json", "-")
    assert done.exit_code == 2
    assert "give a file" in words(done.output)


def test_every_step_is_taken_and_every_failure_told(capsys: pytest.CaptureFixture[str]) -> None:
    taken: list[int] = []

    def fail(error: BaseException) -> None:
        taken.append(1)
        raise error

    with pytest.raises(TuningError, match=r"^one$"):
        every(lambda: fail(TuningError("one")), lambda: taken.append(1))
    with pytest.raises(MoestroError, match=r"^one\ntwo$"):
        every(lambda: fail(TuningError("one")), lambda: fail(MoestroError("two")))
    with pytest.raises(SystemExit):
        every(lambda: fail(SystemExit(1)), lambda: fail(MoestroError("two")))
    assert len(taken) == 6
    assert "error: two" in capsys.readouterr().err


def test_figures_of_regret_are_whole_in_80_columns() -> None:
    worst = Summary("moestro", 10, 1.0, 1.0, 1.0, 1.0, 0.1234, 0.2345, 0.6899, 1.0, 374.0, 5.26)
    text = io.StringIO()
    Console(width=80, file=text).print(regret._table([worst]))
    assert "…" not in text.getvalue()
    assert "68.99%" in text.getvalue()
