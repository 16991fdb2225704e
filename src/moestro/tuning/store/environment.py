"""What makes a decision valid: the device, its software, the code that is tuned, and how it was measured."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moestro import machine
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
            "torch": machine.version("torch") or "none",
            "triton": machine.version("triton") or "none",
            "sources": source_digest(runners),
            "clock": clock,
            "policy": _policy(policy),
        }
    )


def _policy(policy: MeasurementPolicy) -> dict[str, Any]:
    """The settings. One that came later is left out where it is as it was made: decisions made before it stay valid."""
    facts = {name: to_json(value) for name, value in dataclasses.asdict(policy).items()}
    if policy.sustained_s == MeasurementPolicy.sustained_s:
        del facts["sustained_s"]
    return facts


def _machine(device: str) -> dict[str, Any]:
    kind = device.partition(":")[0]
    torch = sys.modules.get("torch")
    if kind == "cuda" and torch is not None and torch.cuda.is_available():
        return _cuda(device)
    return {"device": machine.cpu_name() if kind == "cpu" else kind, "threads": machine.threads()}


@functools.cache
def _cuda(device: str) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(torch.device(device))
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": machine.driver() or "unknown",
        "cuda": torch.version.cuda,
    }
