"""What makes a decision valid: the device, its software, the code that is tuned, and how it was measured."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moestro.tuning.spec.plain_json import digest, to_json
from moestro.tuning.spec.policy import MeasurementPolicy
from moestro.tuning.store.sources import source_digest

__all__ = ["Environment", "environment_for"]


@dataclass(frozen=True)
class Environment:
    """Facts under which a decision was measured. Its name, also a folder's, is the device and a digest of
    them.
    """

    facts: Mapping[str, Any]
    given: str = ""

    @functools.cached_property
    def name(self) -> str:
        if self.given:
            return self.given
        device = re.sub(r"[^a-z0-9]+", "-", str(self.facts.get("device", "device")).lower()).strip("-")
        return f"{device[:40]}-{digest(dict(self.facts))}"


def environment_for(
    device: str, runners: Sequence[Any], policy: MeasurementPolicy, clock: str
) -> Environment:
    """The environment of these runners on a device such as "cuda:0", measured by a clock of that name."""
    return Environment(
        {
            **_machine(device),
            "torch": _version("torch"),
            "triton": _version("triton"),
            "sources": source_digest(runners),
            "clock": clock,
            "policy": {name: to_json(value) for name, value in dataclasses.asdict(policy).items()},
        }
    )


def _machine(device: str) -> dict[str, Any]:
    kind = device.partition(":")[0]
    torch = sys.modules.get("torch")
    if kind == "cuda" and torch is not None and torch.cuda.is_available():
        return _cuda(device)
    threads = torch.get_num_threads() if torch is not None and kind == "cpu" else os.cpu_count()
    return {"device": _cpu_name() if kind == "cpu" else kind, "threads": threads}


@functools.cache
def _cuda(device: str) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(torch.device(device))
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str:
    try:
        with open("/proc/driver/nvidia/version") as file:
            found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", file.readline())
    except OSError:
        return "unknown"
    return found.group(1) if found else "unknown"


@functools.cache
def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "cpu"


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
