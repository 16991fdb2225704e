"""benchmarks/gpu_served.py on small layers of the CPU backend: every command measures, judges, and writes as it goes.

Nothing is asserted on how long things take: a target may be missed here (status 3).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.bench.results import BenchResult, Row
from moestro.routing import Uniform, parse

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_served  # noqa: E402
import served_equal  # noqa: E402
import served_layers  # noqa: E402
import served_skew  # noqa: E402


def served(what: str, out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """(exit status, the file) of a command at small sizes."""
    small = ["--device", "cpu", "--tiny", "--rounds", "2", "--oracle", "0", "--each", "1", "--json", str(out)]
    status = gpu_served.main([what, *small, *more])
    return status, json.loads(out.read_text())


def test_verify_steps_are_set_against_the_bytes_of_their_experts(tmp_path: Path) -> None:
    status, found = served("verify", tmp_path / "v.json")
    rows = found["rows"]
    assert status in (0, gpu_served.MISSED)
    assert {(r["model"], r["overlap"], r["tokens"]) for r in rows} == {
        (m, o, n) for m in ("deepseek-v3", "mixtral-8x7b") for o in (0.5, 0.8) for n in (1, 2, 4, 8)
    }
    assert all(r["experts"] == 2 for r in rows if r["tokens"] == 1)  # top_k of them
    assert all(2 <= r["experts"] <= 8 and r["us"] > 0 for r in rows)
    held = [r["time_of_expected"] <= 1.1 for r in rows if r["tokens"] > 1]
    assert found["share"] == sum(held) / len(held)
    assert status == (0 if all(held) else gpu_served.MISSED)


def test_time_of_expected_is_one_where_time_follows_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock on paper, on which a call takes a microsecond for each expert that it hits, and twice that at N = 4."""

    def seconds(tokens: int, call: Any) -> float:
        return len(call.args[1].unique()) * 1e-6 * (2 if tokens == 4 else 1)

    def clock(calls: dict[Any, Any], options: Any) -> dict[Any, Any]:
        return {at: partial(seconds, at[0], call) for at, call in calls.items()}

    monkeypatch.setattr(served_layers, "samplers", clock)
    status, found = served("verify", tmp_path / "v.json")
    assert status == gpu_served.MISSED
    for row in found["rows"]:
        assert row["time_of_expected"] == pytest.approx(2 if row["tokens"] == 4 else 1)
    assert found["share"] == pytest.approx(2 / 3)
    assert found["worst"]["tokens"] == 4


def test_the_cost_of_invariance_is_a_ratio_of_the_same_rounds(tmp_path: Path) -> None:
    _, found = served("cost", tmp_path / "c.json", "--tokens", "1,70")
    assert [(r["model"], r["format"], r["tokens"]) for r in found["rows"]] == [
        (model, fmt, n) for model, fmt in served_layers.COSTS for n in (1, 70)
    ]
    for row in found["rows"]:
        assert row["us"] > 0
        assert row["ratio"] == pytest.approx(row["of_bound"] * (1.05 if row["tokens"] == 1 else 1.10))


def test_random_batches_have_the_bits_of_tokens_alone(tmp_path: Path) -> None:
    status, found = served("equal", tmp_path / "e.json", "--batches", "33")
    assert status == 0
    assert sum(row["batches"] for row in found["rows"]) == 33
    assert all(row["different"] == 0 and row["rows"] > 0 for row in found["rows"])
    assert any("another tactic" in row["calls"] for row in found["rows"])


def test_a_result_that_depends_on_the_batch_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = served_equal.in_chunks

    def crooked(layer: Any, call: Any, tactics: Any, rng: Any) -> Any:
        found, ways = whole(layer, call, tactics, rng)
        found[-1, 0] += len(found) % 2  # of batches of an odd size
        return found, ways

    monkeypatch.setattr(served_equal, "in_chunks", crooked)
    monkeypatch.setattr(served_equal, "KINDS", served_equal.KINDS[:2])
    status, found = served("equal", tmp_path / "e.json", "--batches", "33")
    assert status == gpu_served.MISSED
    assert 0 < sum(row["different"] for row in found["rows"]) < 33
    assert found["worst"]["first"]


def test_winners_are_judged_beside_all_other_tactics(tmp_path: Path) -> None:
    _, found = served("sustained", tmp_path / "s.json", "--tokens", "1,16")
    assert [(r["model"], r["tokens"]) for r in found["rows"]] == [
        (model, n) for model in ("qwen3-30b-a3b", "deepseek-v3") for n in (1, 16)
    ]
    for row in found["rows"]:
        assert row["of_best"] >= 1
        assert row["candidates"] > 1
        assert row["serves"].startswith("cpu ")
        assert row["clocks"] == {}  # a CPU's timer says none
    assert found["share"] == sum(r["of_best"] <= 1.01 for r in found["rows"]) / 4


def test_a_warm_call_is_set_against_a_trivial_operation(tmp_path: Path) -> None:
    _, found = served("host", tmp_path / "h.json", "--tokens", "1,3")
    assert [row["tokens"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        assert row["in_trivial"] == pytest.approx(row["us"] / row["trivial_us"])
        assert row["of_bound"] == pytest.approx(max(row["us"] / 20, row["in_trivial"] / 8))


def test_a_decode_steps_gain_is_set_against_that_of_the_experts_alone(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    _, found = served("decode", tmp_path / "d.json", "--tokens", "2")
    peer, *ours = found["rows"]
    assert [r["contender"] for r in (peer, *ours)] == ["grouped_mm", "moestro bf16", "moestro nvfp4"]
    for row, most in zip(ours, (2e-2, 1.0), strict=True):
        assert row["step_gain_us"] == pytest.approx(peer["step_us"] - row["step_us"])
        assert row["experts_gain_us"] == pytest.approx(peer["experts_us"] - row["experts_us"])
        assert row["logits_difference"] < most
        gains = row["step_gain_us"], row["experts_gain_us"]
        wanted = gains[1] / 2 / gains[0] if min(gains) > 0 else gpu_served.NEVER
        assert row["of_bound"] == pytest.approx(wanted)


def test_what_was_measured_before_the_end_is_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = served_layers.alternate, []

    def broken(lanes: Any, rounds: int) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(lanes, rounds)

    monkeypatch.setattr(served_layers, "alternate", broken)
    with pytest.raises(KeyboardInterrupt):
        served("verify", tmp_path / "v.json")
    assert [row["tokens"] for row in json.loads((tmp_path / "v.json").read_text())["rows"]] == [1, 2, 4, 8]


def test_cells_that_are_not_begun_in_time_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = served("verify", tmp_path / "v.json", "--seconds", "0")
    assert (status, found["not_reached"]) == (gpu_served.MISSED, ["deepseek-v3", "mixtral-8x7b"])
    assert "NOT REACHED: deepseek-v3, mixtral-8x7b" in capsys.readouterr().out


# --- the Triton kernels, in the interpreter -----------------------------------------------------------------
def interpreted(program: str, *arguments: str) -> str:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "benchmarks" / program), *arguments]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_batches_of_the_triton_kernels_have_the_bits_of_tokens_alone(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    small = ["--device", "cpu", "--tiny", "--batches", "3", "--json", str(path)]
    interpreted("gpu_served.py", "equal", "--formats", "int4", "--interpret", *small)
    [row] = json.loads(path.read_text())["rows"]
    assert (row["backend"], row["batches"], row["different"]) == ("triton", 3, 0)


@pytest.mark.slow
def test_what_the_sanitizer_runs_is_right() -> None:
    said = interpreted("gpu_formats.py", "quick", "bf16", "--tokens", "3")
    paths = {line.split()[3] for line in said.splitlines() if line.startswith("quick bf16")}
    assert paths == {"chain", "fused", "dequantized"}
    assert "quick: ok 0 of 7" in said


# --- skewed routing, from a record -------------------------------------------------------------------------
PROBLEM = {
    "name": "x", "hidden_size": 4096, "intermediate_size": 14336, "num_experts": 8, "num_local_experts": 8,
    "top_k": 2, "local_pairs": False,
}  # fmt: skip


def result(routing: str, ours: float, peer: float, tokens: int) -> dict[str, Any]:
    rows = [
        Row(tokens, name, mine, "nvfp4", s, s, s, 7, "cuda-graph-cold", 8, 1.0, 1.0, 0.5, None)
        for name, mine, s in (("moestro nvfp4", True, ours), ("humming nvfp4", False, peer))
    ]
    conditions = {"routing": routing, "seed": 0}
    made = BenchResult("x", "today", {}, PROBLEM, conditions, {}, [], rows)
    return {"schema": "moestro.bench/1", **asdict(made)}


def test_skewed_cells_are_held_against_the_peer_and_the_floor(tmp_path: Path, capsys: Any) -> None:
    record, n = tmp_path / "record.json", 256
    skewed = {"zipf(1.0)": (1.1, 1.5), "dirichlet(0.3)": (2.0, 3.0), parse("trained").name: (1.05, 1.0)}
    times = {"uniform": (1.0, 1.2), **skewed}
    found = {f"mixtral-skewed {name}": result(name, ours, peer, n) for name, (ours, peer) in times.items()}
    record.write_text(json.dumps({"schema": "moestro.record/1", "results": found}))
    status = gpu_served.main(["skew", str(record), "--device", "cpu", "--json", str(tmp_path / "skew.json")])
    rows = {row["routing"]: row for row in json.loads((tmp_path / "skew.json").read_text())["rows"]}
    assert status == gpu_served.MISSED
    assert set(rows) == set(skewed)
    held, slow, behind = rows.values()
    assert held["of_bound"] <= 1
    assert slow["of_bound"] == pytest.approx(2.0 / max(1.12, slow["floor_of_uniform"]))
    assert slow["of_bound"] > 1
    assert behind["of_bound"] == pytest.approx(1.05)  # of humming's time
    assert "| mixtral-skewed zipf(1.0) | 1.36, 1.10 (" in capsys.readouterr().out


def test_the_floor_is_the_sum_over_experts_of_bytes_or_products(tmp_path: Path) -> None:
    n = 100
    one = served_skew.results.parse(result("uniform", 1.0, 1.0, n), tmp_path)
    ids = Uniform().sample(n, 8, 2, seed=n)
    weights = 3 * 4096 * 14336
    seconds = 0.0
    for expert in range(8):
        pairs = int((ids == expert).sum())
        seconds += max(2 * weights * pairs / 790e12, weights * 0.5625 / 4.2e12) if pairs else 0.0
    assert served_skew.floor(one, n) == pytest.approx(seconds)
    assert torch.bincount(ids.flatten()).max() > 25
