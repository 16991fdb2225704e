"""The findings behind `moestro doctor`, as JSON values.

Every backend is asked, for every device type and weight format, whether it can run one Qwen3-30B-A3B layer
here; its own `why_not` gives the reason where it can't. A table says which one backend="auto" begins with for each dtype
of x and each format of activations. Every bundle that ships with the package is held
against this GPU and these kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moestro import formats, machine
from moestro.bench.models import find
from moestro.errors import BackendError
from moestro.kernels import backends
from moestro.kernels.cpu import core
from moestro.kernels.cpu.placement import placement
from moestro.kernels.problem import INPUT_FORMATS, MoeProblem, MoeRunner
from moestro.tuning.store import shipped
from moestro.tuning.store.bundle import Bundle
from moestro.tuning.store.sources import source_digest
from moestro.tuning.store.store import default_root

__all__ = ["examine"]

# What x may be: as it is in a dtype, or in bf16 and quantised.
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "x bf16": {},
    "x fp16": {"dtype": torch.float16},
    "x fp32": {"dtype": torch.float32},
    **{name: {"input_format": name} for name in INPUT_FORMATS},
}
PACKAGES = ("moestro", "torch", "triton", "transformers", "matplotlib")


def examine() -> dict[str, Any]:
    """Processor, memory, GPUs, software, store, and each backend's verdicts."""
    memory, gpus = machine.memory(), machine.gpus()
    here = [] if isinstance(gpus, str) else [asdict(gpu) for gpu in gpus]
    software = {
        "driver": machine.driver(),
        "compiler": machine.compiler(),
        **{package: machine.version(package) for package in PACKAGES},
    }
    if any(gpu["capability"].startswith("9.") for gpu in here):
        software["nvrtc"] = _nvrtc()
    return {
        "cpu": asdict(machine.cpu()) | asdict(placement()) | {"isas": _isas()},
        "memory": asdict(memory) if memory else None,
        "gpus": gpus if isinstance(gpus, str) else here,
        "software": software,
        "store": _store(),
        "bundles": [entry for bundle in shipped.bundles() for entry in _bundle(bundle, here)],
        "backends": [entry for device in ("cpu", "cuda") for entry in _verdicts(device, gpus)],
        "first_choices": {
            device: _first_choices(device) for device in (("cpu", "cuda") if here else ("cpu",))
        },
    }


def _nvrtc() -> str:
    """Whether kernels in CUDA C++ can be compiled here, or why not."""
    try:
        from moestro.kernels.triton import nvrtc
    except ImportError as error:
        return f"not looked for: {error}"
    return nvrtc.why_missing() or "compiles CUDA C++ (FP8 products)"


def _isas() -> list[str]:
    """The instruction sets of the compiled core here, the one in use first; none without a core."""
    if core.why_no_core() is not None:
        return []
    chosen = core.choose_isa()
    return [chosen, *(isa for isa in core.available_isas() if isa not in (chosen, "amx_emulated"))]


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


def _first_choices(device: str) -> dict[str, dict[str, str | None]]:
    """format -> what x is -> the backend that backend="auto" begins with, None where none runs it."""
    return {
        format: {
            what: next(iter(backends.able(_problem(device, format, **rest))), None)
            for what, rest in ACTIVATIONS.items()
        }
        for format in formats.FORMATS
    }


def _problem(device: str, format: str, **rest: Any) -> MoeProblem:
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
        weight_dtype=torch.bfloat16 if format == "bf16" else None,
        **rest,
    )


def _store() -> dict[str, Any]:
    path = Path(default_root())
    return {"path": str(path), "decisions": sum(1 for _ in path.rglob("*.json")) if path.is_dir() else 0}


def _bundle(bundle: Bundle, gpus: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a shipped bundle is worth here, for each environment in it."""
    found = []
    for name, facts in bundle.environments.items():
        decisions = [e for e in bundle.entries if e.environment == name and e.kind == "decision"]
        runners = {runner["class"] for entry in decisions for runner in entry.key["runners"]}
        layers = {id(entry.key) for entry in decisions}
        serves, verdict = _worth(facts, runners, gpus)
        found.append(
            {
                "bundle": bundle.path.stem,
                "created": bundle.created,
                "facts": dict(facts),
                "layers": len(layers),
                "decisions": len(decisions),
                "serves": serves,
                "verdict": verdict,
            }
        )
    return found


def _worth(facts: Mapping[str, Any], runners: set[str], gpus: Sequence[dict[str, Any]]) -> tuple[bool, str]:
    """(whether it serves here, what is to be said of it)."""
    classes, missing = _classes_here()
    if lost := sorted(runners - set(classes)):
        why = "; ".join(missing) or "this moestro has no such backend"
        return False, f"for {facts['device']}: its runner {lost[0].rpartition('.')[2]} is not here ({why})"
    if facts.get("sources") != source_digest([classes[name] for name in sorted(runners)]):
        return False, (
            "measured with other kernels than these: its winners are only tried first. "
            "`moestro tune` decides anew"
        )
    if not any((gpu["name"], gpu["capability"]) == (facts["device"], facts["capability"]) for gpu in gpus):
        return False, f"for these kernels on {facts['device']}, which is not here"
    return True, "serves layers that have not been tuned here"


def _classes_here() -> tuple[dict[str, type[MoeRunner]], list[str]]:
    """(our backends' runner classes by name, why the others cannot be loaded)."""
    classes: dict[str, type[MoeRunner]] = {}
    missing = []
    for backend in backends.BACKENDS:
        try:
            cls = backends.load(backend)
        except BackendError as error:
            missing.append(str(error))
        else:
            classes[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return classes, missing
