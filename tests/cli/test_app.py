"""The app as a whole: help that teaches, how errors look, doctor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_tools import QUICK, TINY, Run

from moestro.errors import TuningError


@pytest.mark.parametrize("command", [[], ["tune"], ["bench"], ["bench", "parity"], ["doctor"], ["report"]])
def test_every_command_has_help(run: Run, command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.exit_code == 0
    assert "Usage" in done.output


@pytest.mark.parametrize("command", [["tune"], ["bench"], ["bench", "parity"], ["report"]])
def test_help_teaches_by_example(run: Run, command: list[str]) -> None:
    output = run(*command, "--help").output
    assert "Example" in output
    assert f"moestro {' '.join(command)}" in output


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['moestro', 'bench', '--help'];"
        "from moestro.cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout


def test_version(run: Run) -> None:
    assert run("--version").output.startswith("moestro 0.")


def fail(*_: object, **__: object) -> None:
    raise TuningError("the store is a teapot: give another --store")


def test_an_error_of_ours_is_one_message_and_status_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.bench.run.run_each", fail)
    done = run("bench", *TINY, *QUICK)
    assert done.exit_code == 1
    assert "TuningError" in done.output
    assert "the store is a teapot: give another --store" in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_where_it_happened(run: Run, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr("moestro.bench.run.run_each", fail)
    arguments = ["bench", *TINY, *QUICK]
    done = run(*(["--debug", *arguments] if place == "before" else [*arguments, "--debug"]))
    assert isinstance(done.exception, TuningError)


def test_an_unknown_command_is_wrong_usage(run: Run) -> None:
    done = run("benhc")
    assert done.exit_code == 2
    assert "bench" in done.output


def test_doctor_says_what_runs_and_why_not(run: Run) -> None:
    done = run("doctor", "--json", "d.json")
    assert done.exit_code == 0, done.output
    found = json.loads(Path("d.json").read_text())
    by_key = {(e["backend"], e["device"], e["format"]): e for e in found["backends"]}
    assert by_key["portable", "cpu", "nvfp4"]["runs"] is True
    for entry in found["backends"]:
        assert entry["runs"] is (entry["why_not"] is None)
        assert entry["runs"] or len(entry["why_not"]) > 5
    chosen = [(e["device"], e["format"]) for e in found["backends"] if e["first_choice"]]
    assert len(chosen) == len(set(chosen))
    assert ("cpu", "bf16") in chosen
    assert found["first_choices"]["cpu"]["mxfp8"]["int8"] == "portable"
    assert "auto, cpu" in done.output
    if isinstance(found["gpus"], str):
        assert found["gpus"] in " ".join(done.output.split())
    assert found["cpu"]["cores"] >= 1
    assert found["software"] == json.loads(run("doctor", "--json", "-").stdout)["software"]


def test_findings_that_cannot_be_written_are_one_message(run: Run) -> None:
    done = run("doctor", "--json", ".")
    assert done.exit_code == 2
    assert "cannot write .: it is a folder" in done.output
    assert "Traceback" not in done.output


def test_memory_that_runs_out_is_one_message(run: Run) -> None:
    done = run("bench", *TINY, *QUICK, "--peers", "none", "--tokens", str(10**12))
    assert done.exit_code == 1
    assert "can't allocate memory" in " ".join(done.output.split())  # lines end where the terminal does
    assert "Traceback" not in done.output


def test_doctor_json_to_the_terminal_is_only_json(run: Run) -> None:
    assert json.loads(run("doctor", "--json", "-").stdout)["software"]["torch"]


def test_doctor_fails_where_nothing_runs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.kernels.backends.why_not", lambda name, problem: "it is Monday")
    done = run("doctor")
    assert done.exit_code == 1
    assert "it is Monday" in done.output
