"""The findings behind `moestro doctor`, as JSON values.

Every backend is asked, for every device type and weight format, whether it can run one Qwen3-30B-A3B layer
here; its own `why_not` gives the reason where it can't.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from moestro import formats
from moestro.bench import machine
from moestro.bench.models import find
from moestro.kernels import backends
from moestro.kernels.problem import MoeProblem
from moestro.tuning.store import default_root

__all__ = ["examine"]

PACKAGES = ("moestro", "torch", "triton", "transformers", "matplotlib")


def examine() -> dict[str, Any]:
    """Processor, memory, GPUs, software, store, and each backend's verdicts."""
    memory, gpus = machine.memory(), machine.gpus()
    software = {
        "driver": machine.driver(),
        "compiler": machine.compiler(),
        **{package: machine.version(package) for package in PACKAGES},
    }
    return {
        "cpu": asdict(machine.cpu()),
        "memory": asdict(memory) if memory else None,
        "gpus": gpus if isinstance(gpus, str) else [asdict(gpu) for gpu in gpus],
        "software": software,
        "store": _store(),
        "backends": [entry for device in ("cpu", "cuda") for entry in _verdicts(device, gpus)],
    }


def _verdicts(device: str, gpus: object) -> list[dict[str, Any]]:
    """Per backend and format on one device type, in the order in which backend="auto" chooses."""
    entries: list[dict[str, Any]] = []
    taken: set[str] = set()
    for backend in backends.BACKENDS:
        for format in formats.FORMATS:
            if device == "cuda" and isinstance(gpus, str):
                reason: str | None = gpus
            else:
                reason = backends.why_not(backend, _problem(device, format))
            entries.append(
                {
                    "backend": backend,
                    "device": device,
                    "format": format,
                    "runs": reason is None,
                    "why_not": reason,
                    "first_choice": reason is None and format not in taken,
                }
            )
            if reason is None:
                taken.add(format)
    return entries


def _problem(device: str, format: str) -> MoeProblem:
    shape = find("qwen3-30b-a3b")
    return MoeProblem(
        num_experts=shape.num_experts,
        num_local_experts=shape.num_experts,
        expert_offset=0,
        top_k=shape.top_k,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        weight_format=format,
        device=device,
    )


def _store() -> dict[str, Any]:
    path = Path(default_root())
    return {"path": str(path), "decisions": sum(1 for _ in path.rglob("*.json")) if path.is_dir() else 0}
