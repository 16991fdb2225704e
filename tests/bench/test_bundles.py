"""What ships in the package: bundles that can be read, what doctor says of them, and that an installation has
them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro import FusedMoE
from moestro.bench import checkup, tune
from moestro.bench.layers import LayerSource
from moestro.bench.models import MoeShape
from moestro.kernels import backends
from moestro.kernels.triton import choose
from moestro.moe.tuning_config import ACCEPTED, default_routing
from moestro.routing import Trained
from moestro.tuning import AutoTuner, Store
from moestro.tuning.spec.plain_json import to_json
from moestro.tuning.store import shipped
from moestro.tuning.store.bundle import export_bundle, import_bundle, read_bundle
from moestro.tuning.store.sources import source_digest

REPOSITORY = Path(__file__).parents[2]
CLASSES = ("triton", "portable")
H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0"}


def names() -> list[str]:
    found = [backends.load(name) for name in CLASSES]
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in found]


def sources() -> str:
    found = [backends.load(name) for name in CLASSES]
    return source_digest(found)


def bundle_file(path: Path, tactic: Any = -1, **facts: Any) -> Path:
    """A bundle of one decision for one layer on an H100."""
    key = {
        "op": "moestro.fused_moe", "runners": [{"class": name, "config": {}} for name in names()], "inputs": [],
        "device": "cuda", "mode": "graph", "extras": [], "kwargs": {},
    }  # fmt: skip
    record = {
        "bucket": [64], "runner": names()[0], "tactic": tactic, "status": "measured", "probes": [], "tuned_for": [64],
        "learned": False, "complete": True, "created": 1.0, "environment": "h100-x", "evidence": {"candidates": []},
    }  # fmt: skip
    known = {"device": H100["name"], "capability": "9.0", "sources": sources(), "driver": "1", **facts}
    data = {
        "schema": 1, "kind": "bundle", "created": 1.0, "loose": [], "environments": {"h100-x": known}, "keys": [key],
        "entries": [{"environment": "h100-x", "kind": "decision", "op": key["op"], "key": 0, "record": record}],
    }  # fmt: skip
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("facts", "gpus", "serves", "said"),
    [
        ({}, [H100], True, "serves layers that have not been tuned here"),
        ({"driver": "2"}, [H100], True, "serves"),
        ({}, [], False, "for these kernels on NVIDIA H100 80GB HBM3, which is not here"),
        ({}, [{**H100, "capability": "9.1"}], False, "not here"),
        ({"sources": "older"}, [H100], False, "measured with other kernels"),
    ],
)
def test_doctor_says_what_a_bundle_is_worth_here(
    tmp_path: Path, facts: dict[str, str], gpus: list[dict[str, str]], serves: bool, said: str
) -> None:
    (found,) = checkup._bundle(read_bundle(bundle_file(tmp_path / "b.json", **facts)), gpus)
    assert (found["serves"], found["layers"], found["decisions"]) == (serves, 1, 1)
    assert said in found["verdict"]


def test_the_packages_bundles_can_be_read_and_their_tactics_made() -> None:
    backends.load("triton")
    for bundle in shipped.bundles():
        decisions = [entry for entry in bundle.entries if entry.kind == "decision"]
        assert decisions
        if all(f["sources"] == sources() for f in bundle.environments.values()):
            for entry in decisions:
                assert dataclasses.is_dataclass(entry.record.tactic) or entry.record.tactic == -1


def test_an_installation_has_the_bundles_and_the_recording(tmp_path: Path) -> None:
    environment = {**os.environ, "MOESTRO_CPU_BUILD": "0"}
    source = tmp_path / "source"
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(
        REPOSITORY / "src", source / "src", ignore=shutil.ignore_patterns("*.so", "*.pyc", "*.egg-info")
    )
    (source / "src/moestro/tuning/bundles").mkdir(exist_ok=True)
    bundle_file(source / "src/moestro/tuning/bundles/probe.json")
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run(
        [sys.executable, "-c", build], cwd=source, check=True, env=environment, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        assert f"moestro/routing/recordings/{Path(Trained()._recorded.path).name}" in archive.namelist()
    code = "from moestro.tuning.store import shipped; print(shipped.__file__, [b.path.name for b in shipped.bundles()])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    where, _, found = done.stdout.partition(" ")
    assert where.startswith(str(tmp_path / "installed"))
    assert found.strip() == str(
        sorted(["probe.json", *(path.name for path in shipped.FOLDER.glob("*.json"))])
    )


@pytest.mark.usefixtures("short_races")
def test_a_tuned_layers_bundle_serves_the_other_ranks_of_a_fresh_install(
    tiny: MoeShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As benchmarks/gpu_record.py makes it: tune, export, ship; another rank's layer finds it untuned."""
    shape, store = tiny.on_ranks(2), tmp_path / "store"
    spec = tune.TuneSpec(shape, (1, 8), formats=("bf16",), backends=("portable",), store=store)
    tune.run(spec, "moestro tune")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "bundles")
    loose = ["mode", "cuda_graph", "expert_offset"]
    export_bundle(Store(store), tmp_path / "bundles" / "here.json", slim=True, loose=loose)
    shipped.forget()
    try:
        rank1 = FusedMoE(
            LayerSource(shape).weights("bf16"),
            top_k=shape.top_k,
            max_num_tokens=64,
            num_experts=shape.num_experts,
            expert_offset=shape.num_local_experts,
            backend="portable",
            tuner=AutoTuner(),
        )
        decision = rank1.decision(8)
        assert decision is not None
        assert decision.source == "bundle here, of another mode"
        assert decision.runner is rank1.runners[0]
        x = torch.ones(8, shape.hidden_size, dtype=torch.bfloat16)
        ids = torch.arange(16, dtype=torch.int32).view(8, 2) % shape.num_experts
        assert rank1(x, ids, torch.full((8, 2), 0.5)).shape == x.shape
        (found,) = checkup.examine()["bundles"]
        assert (found["layers"], found["decisions"]) == (1, 2)
    finally:
        shipped.forget()


@pytest.mark.parametrize("command", ["show", "diff"])
def test_the_command_line_reads_tactics_whose_classes_it_has_not_loaded(tmp_path: Path, command: str) -> None:
    """In a process of its own: here a test may have loaded the backends."""
    bundle = bundle_file(tmp_path / "b.json", to_json(choose.FULL))
    import_bundle(bundle, Store(tmp_path / "store"))
    arguments = ["show", "--store", "store"] if command == "show" else ["diff", "store", "b.json"]
    done = subprocess.run(
        [sys.executable, "-m", "moestro.cli", "cache", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("path=fused" if command == "show" else "0 differ, 1 agree") in done.stdout.replace("\n", "")


@pytest.mark.parametrize("bundle", ["h100.json", "h200.json"])
def test_decisions_that_ship_were_made_on_probes_that_a_layer_accepts(bundle: str) -> None:
    found = read_bundle(Path(shipped.__file__).parents[1] / "bundles" / bundle)
    made_on = {entry.record.probes for entry in found.entries if entry.kind == "decision"}
    assert made_on
    assert made_on <= {*ACCEPTED, tuple(distribution.name for distribution in default_routing())}
