"""docs/distributed.md: its example runs under torchrun as written, its manifests parse, its commands are commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "distributed.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_example_runs_on_four_ranks_as_written(tmp_path: Path) -> None:
    (tmp_path / "ep_example.py").write_text(blocks("python")[0])
    command = "torchrun --nproc-per-node 4 ep_example.py"
    assert command in blocks("bash")[0]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MOESTRO_STORE": str(tmp_path / "store"),
        "PYTHONPATH": str(ROOT / "src"),
    }
    started = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *command.split()[1:],
    ]  # torchrun, of this Python
    done = subprocess.run(
        started, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Four processes write to one pipe, where lines may run together.
    said = re.findall(r"rank (\d) of 4: \((\d+), 256\), (gather|dispatch)", done.stdout)
    assert sorted((int(rank), int(rows)) for rank, rows, _ in said) == [(rank, 8 + rank) for rank in range(4)]
    assert len({way for _, _, way in said}) == 1  # one for all


def test_placing_runs_and_says_what_the_document_says(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[1], "docs/distributed.md", "exec"), names)
    assert "256 experts on 8 ranks, 16 replicas, slots [34," in capsys.readouterr().out
    assert len(names["held"]) == 34


def test_the_kubernetes_manifests_parse_and_belong_together() -> None:
    service, claim, job = yaml.safe_load_all(blocks("yaml")[0])
    assert [part["kind"] for part in (service, claim, job)] == ["Service", "PersistentVolumeClaim", "Job"]
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    assert spec["subdomain"] == service["metadata"]["name"]
    port = service["spec"]["ports"][0]["port"]
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{spec['subdomain']}:{port}" in container["command"]
    assert f"--nnodes={job['spec']['completions']}" in container["command"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in container["command"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert volumes["store"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert {"name": "MOESTRO_STORE", "value": mounts["store"]} in container["env"]


def test_rays_program_is_python() -> None:
    (program,) = [block for block in blocks("text") if "ray.remote" in block]
    compile(program, "docs/distributed.md", "exec")


def test_the_commands_are_commands() -> None:
    from typer.testing import CliRunner

    from moestro.cli.app import app

    for command in (["bench", "ep"], ["plan"], ["cache", "import"], ["cache", "export"]):
        assert f"moestro {' '.join(command)} " in TEXT
        assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0
