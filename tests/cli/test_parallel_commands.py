"""`moestro plan` and `moestro bench ep`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from moestro.cli.app import app

SRC = Path(__file__).parents[2] / "src"


def test_plan_shows_every_number_of_ranks_and_writes_them(tmp_path: Path) -> None:
    line = [
        "plan",
        "--model",
        "qwen3-30b-a3b",
        "--gpus",
        "6",
        "--gpu",
        "h200",
        "--tokens",
        "256",
        "--routing",
        "zipf",
    ]
    done = CliRunner().invoke(app, [*line, "--replicas", "0,4", "--json", str(tmp_path / "p.json")])
    assert done.exit_code == 0, done.output
    assert "most tokens a GPU" in done.output
    assert "on paper" in done.output
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert {(row["ranks"], row["replicas"]) for row in rows} == {
        (1, 0),
        *((n, c) for n in (2, 4, 6) for c in (0, 4)),
    }


def test_plan_says_which_copies_have_no_room() -> None:
    done = CliRunner().invoke(app, ["plan", "--model", "mixtral-8x7b", "--gpus", "2", "--replicas", "0,8,9"])
    assert done.exit_code == 0, done.output
    assert "left out, more than a copy on every rank: 9 on 2 ranks" in " ".join(done.output.split())


def test_plan_names_a_gpu_without_figures() -> None:
    done = CliRunner().invoke(app, ["plan", "--model", "qwen3-30b-a3b", "--gpu", "b200"])
    assert done.exit_code == 2
    assert "unknown gpu 'b200'" in done.output


def test_bench_ep_says_how_to_start_it() -> None:
    done = CliRunner().invoke(app, ["bench", "ep", "--model", "qwen3-30b-a3b"], env={"RANK": None})
    assert done.exit_code == 2
    assert "torchrun" in done.output


def test_bench_ep_measures_ways_beside_one_rank_and_plain_pytorch(tmp_path: Path) -> None:
    line = "--nproc-per-node 2 -m moestro bench ep --sizes 8,2,64,32 --device cpu --tokens 3,16 --rounds 3 --replicas 2"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *line.split(),
        "--json",
        str(tmp_path / "ep.json"),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(SRC),
        "MOESTRO_STORE": str(tmp_path),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "ep.json").read_text())["rows"]
    assert [row["contender"] for row in rows if row["tokens"] == 16] == [
        "gather",
        "dispatch",
        "dispatch fp8",
        "plain",
        "one rank",
    ]
    for row in rows:
        assert row["seconds"] > 0
        if row["contender"] in ("gather", "dispatch", "plain"):
            assert row["difference"] < 0.02
            assert sum(row["pairs"]) == 2 * row["tokens"] * 2
        if row["contender"] == "dispatch":
            assert set(row["stages"]) == {"send", "compute", "back"}
