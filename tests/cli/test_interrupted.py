"""Ctrl-C and SIGTERM in a real process: what is measured by then is kept and written, and the status is 130."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_tools import TINY
from safetensors.torch import save_file

from moestro.bench import plots

# Runs the command line, and says on stdout when `what` has been done `after` times; then it waits for the signal there.
CHILD = """
import importlib, signal, sys, time
from moestro.cli.app import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it puts into the background without
module = importlib.import_module("{module}")  # "convert" is a function of its package too
real, count = module.{what}, 0
def watched(*args, **kwargs):
    global count
    result = real(*args, **kwargs)
    count += 1
    if count == {after}:
        print("NOW", flush=True)
        time.sleep(30)
    return result
module.{what} = watched
sys.argv = ["moestro", *sys.argv[1:]]
main()
"""


def interrupted(
    folder: Path, module: str, what: str, arguments: list[str], after: int = 1, number: int = signal.SIGINT
) -> tuple[int, str]:
    """(exit status, everything said) of the command, sent the signal once `what` has been done `after` times."""
    code = CHILD.format(module=module, what=what, after=after)
    environment = {**os.environ, "MOESTRO_STORE": str(folder / "store"), "COLUMNS": "200"}
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    assert child.stdout is not None
    before = []
    for line in child.stdout:
        before.append(line)
        if line.startswith("NOW"):
            child.send_signal(number)
            break
    rest, _ = child.communicate(timeout=120)
    return child.returncode, "".join(before) + rest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_bench_writes_json_and_report_of_what_it_measured(tmp_path: Path, number: int) -> None:
    report = ["--report", "out/r.html"] if plots.why_not() is None else []
    arguments = ["bench", *TINY, "--rounds", "2", "--seconds", "0", "--tokens", "1,2,4", "--peers", "eager"]
    # The ceilings are measured once before, and again before the second case: the first is done then.
    status, said = interrupted(
        tmp_path,
        "moestro.bench.roofline",
        "measure_ceilings",
        [*arguments, "--json", "out/o.json", *report],
        after=2,
        number=number,
    )
    assert status == 130, said
    data = json.loads((tmp_path / "out/o.json").read_text())
    assert {row["tokens"] for row in data["rows"]} == {1}
    assert data["interrupted"] is True
    assert "interrupted" in said
    assert "Traceback" not in said
    if report:
        assert "was interrupted" in (tmp_path / "out/r.html").read_text()


def test_a_killed_bench_has_written_the_cases_before(tmp_path: Path) -> None:
    arguments = ["bench", *TINY, "--rounds", "2", "--seconds", "0", "--tokens", "1,2", "--peers", "none"]
    status, _ = interrupted(
        tmp_path,
        "moestro.bench.roofline",
        "measure_ceilings",
        [*arguments, "--json", "o.json"],
        after=2,
        number=signal.SIGKILL,
    )
    assert status == -signal.SIGKILL
    data = json.loads((tmp_path / "o.json").read_text())
    assert {row["tokens"] for row in data["rows"]} == {1}
    assert data["interrupted"] is True


def test_tune_keeps_what_it_decided(tmp_path: Path) -> None:
    arguments = ["tune", *TINY, "--tokens", "1,2", "--store", "st", "--budget", "60", "--json", "t.json"]
    status, said = interrupted(tmp_path, "moestro.tuning.measure.campaign", "measure", arguments, after=2)
    assert status == 130, said
    assert "Traceback" not in said
    data = json.loads((tmp_path / "t.json").read_text())
    kept = [file for file in (tmp_path / "st").rglob("*.json") if "decision" in file.read_text()]
    assert len(kept) == 1
    assert {row["bucket"] for row in data["rows"]} == {2}  # decided first, and serves both


def checkpoint(folder: Path) -> None:
    folder.mkdir()
    for layer in range(3):
        tensors = {
            f"model.layers.{layer}.mlp.experts.{e}.{name}.weight": torch.ones(32, 32).bfloat16()
            for e in range(2)
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        save_file(tensors, folder / f"model-{layer}.safetensors")
    (folder / "config.json").write_text("{}")


def test_convert_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    checkpoint(tmp_path / "src")
    arguments = ["convert", "src", "dst"]
    status, said = interrupted(tmp_path, "moestro.checkpoints.convert", "_publish", arguments, after=3)
    assert status == 130, said  # the plan, and two shards
    assert "goes on from there" in said
    dst = tmp_path / "dst"
    assert len(list(dst.glob("*.safetensors"))) == 2
    assert list(dst.glob("*.partial")) == []
    done = subprocess.run(
        [sys.executable, "-m", "moestro", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(dst.glob("*.safetensors"))) == 3


def test_a_recording_that_is_broken_off_keeps_whole_calls() -> None:
    from moestro import ExpertWeights, FusedMoE, routing

    w = ExpertWeights.from_dense(torch.ones(4, 64, 32), torch.ones(4, 32, 32), "bf16")
    model = torch.nn.ModuleList([FusedMoE(w, 2), FusedMoE(w, 2)])
    call = torch.ones(3, 32), torch.tensor([[0, 1]] * 3, dtype=torch.int32), torch.ones(3, 2)
    recording = None

    def broken_off() -> None:
        nonlocal recording
        with routing.record(model) as recording:
            for layer in model:
                layer(*call)
            model[0](*call)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert recording is not None
    assert recording.ids.shape == (3, 2, 2)
