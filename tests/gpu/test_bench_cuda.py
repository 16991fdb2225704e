"""`moestro bench`, `tune` and `doctor` on a GPU, on a small layer: graphs, checks, peers, the shipped path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moestro.bench import tune
from moestro.bench.adapters import ADAPTERS
from moestro.bench.contenders import make_layer
from moestro.bench.layers import LayerSource
from moestro.bench.models import from_sizes
from moestro.cli.app import app
from moestro.tuning import AutoTuner, Store
from moestro.tuning.store import shipped
from moestro.tuning.store.bundle import export_bundle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = ["--sizes", "16,4,512,256", "--device", "cuda"]


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160", "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("format", ["nvfp4", "bf16"])
def test_bench_replays_graphs_of_checked_contenders(format: str, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    peers = ",".join(["grouped_mm", *ADAPTERS])
    run("bench", *SIZES, "-f", format, "-n", "1,17,300", "--peers", peers, "--seconds", "0", "--rounds", "3",
        "--json", str(path))  # fmt: skip
    data = json.loads(path.read_text())
    ours = [row for row in data["rows"] if row["ours"]]
    assert [row["tokens"] for row in ours] == [1, 17, 300]
    assert {row["clock"] for row in ours} == {"cuda-graph-cold"}
    assert all(
        row["error"] < 1e-2 for row in ours
    )  # those of peers, the bench has checked against their own bounds
    assert {row["facts"]["backend"] for row in ours} == {"triton"}
    named = {entry["contender"] for entry in data["skipped"] + data["failed"] + data["rows"]}
    assert {adapter.title for adapter in ADAPTERS.values()} <= named  # each was run, or says why not


def test_repeated_samples_of_a_peer_give_the_checked_result(tmp_path: Path) -> None:
    """Graphs are replayed on the inputs that were checked: freed ones gave other times and an illegal access."""
    path = tmp_path / "b.json"
    run("bench", "--model", "olmoe-1b-7b", "-d", "cuda", "-f", "bf16", "-n", "1,1024", "--peers", "grouped_mm",
        "--seconds", "0", "--rounds", "9", "--json", str(path))  # fmt: skip
    rows = {(row["contender"], row["tokens"]): row for row in json.loads(path.read_text())["rows"]}
    moved = rows["transformers grouped_mm", 1024]["weight_bytes_per_s"]
    ceiling = json.loads(path.read_text())["ceilings"]["bytes_per_s"]
    assert moved < 1.1 * ceiling  # faster than memory: it did not read the experts that were drawn


def test_a_tuned_layers_bundle_serves_a_fresh_tuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, store = from_sizes("16,4,512,256"), tmp_path / "store"
    spec = tune.TuneSpec(shape, (1, 64), device="cuda", store=store, budget_s=30.0)
    result = tune.run(spec, "moestro tune")
    assert {row.tokens for row in result.rows} == {1, 64}
    assert all(row.gain is None or row.gain > 0.98 for row in result.rows)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "bundles")
    export_bundle(Store(store), tmp_path / "bundles" / "gpu.json", slim=True, loose=["mode", "cuda_graph"])
    shipped.forget()
    try:
        source = LayerSource(shape, device="cuda")
        layer = make_layer(source, "nvfp4", "auto", 64, AutoTuner())
        exact: Any = layer.decision(64)
        assert exact.source == "bundle gpu"
        found = run("doctor")
        assert "serves layers that have not been tuned here" in found
    finally:
        shipped.forget()
