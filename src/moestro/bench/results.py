"""Bench results as data: rows, the conditions they were measured under, and the JSON file that holds both.

The file is one object, `schema` = "moestro.bench/1". Times are seconds, memory is bytes, a ratio of 2 means
twice as fast as the fastest peer of the same row. `read` checks what it is given, so that a report never
draws from a file of something else.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moestro import machine
from moestro.errors import MoestroError

__all__ = [
    "SCHEMA",
    "BenchResult",
    "Row",
    "command_line",
    "environment",
    "now",
    "parse",
    "read",
    "write",
    "write_json",
]

SCHEMA = "moestro.bench/1"
NOISY = 0.1  # a median spread above this says that others used the machine


@dataclass(frozen=True)
class Row:
    """One contender at one number of tokens."""

    tokens: int
    contender: str
    ours: bool
    format: str
    median_s: float
    low_s: float  # lower quartile
    high_s: float  # upper quartile
    samples: int
    clock: str
    experts_hit: int
    tflops: float
    weight_bytes_per_s: float
    roofline: float  # fraction of the roofline, 1 = as fast as the ceilings allow
    ratio_to_best_peer: float | None  # best peer's median / this median
    difference: float | None = None  # relative error norm against the first bf16 contender
    error: float | None = None  # relative error norm against the float32 reference on its own weights
    exact_error: float | None = (
        None  # against the exact product of its weights, where it quantises activations
    )
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        return (self.high_s - self.low_s) / (2 * self.median_s)


@dataclass(frozen=True)
class BenchResult:
    """One run of `moestro bench`."""

    command: str
    date: str
    environment: dict[str, Any]
    problem: dict[str, Any]
    conditions: dict[str, Any]  # routing, layers, seed, rounds
    ceilings: dict[str, Any]
    memory: list[dict[str, Any]]  # {contender, format, bytes, ratio_to_bf16}
    rows: list[Row]
    skipped: list[dict[str, Any]] = field(default_factory=list)  # {tokens, contender, reason}
    failed: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def tokens(self) -> list[int]:
        """The numbers of tokens with at least one row, ascending."""
        return sorted({row.tokens for row in self.rows})

    @property
    def contenders(self) -> list[str]:
        """Contenders with at least one row, in the order they were measured."""
        return list(dict.fromkeys(row.contender for row in self.rows))

    @property
    def busy(self) -> bool:
        """Whether the spreads say more of the machine than of the contenders."""
        spreads = [row.spread for row in self.rows]
        return bool(spreads) and statistics.median(spreads) > NOISY

    def row(self, contender: str, tokens: int) -> Row | None:
        """The row of a contender at N, or None."""
        return next((row for row in self.rows if (row.contender, row.tokens) == (contender, tokens)), None)


def write(result: BenchResult, path: Path) -> None:
    """Write the JSON file, making its folder. Raises MoestroError if it cannot be written."""
    write_json(path, {"schema": SCHEMA, **asdict(result)})


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write an object as JSON, as a whole or not at all, making the folder. Raises MoestroError if it cannot."""
    try:
        partial = path.with_name(f"{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a device, a pipe: nothing to rename over
            path.write_text(json.dumps(data, indent=1) + "\n")
            return
        partial.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(partial, path)
    except (OSError, ValueError) as error:  # ValueError: a path without a name
        raise MoestroError(
            f"json: cannot write {path}: {getattr(error, 'strerror', None) or error}"
        ) from error


def read(path: Path) -> BenchResult:
    """Read what `write` wrote. Raises MoestroError for a missing, broken or foreign file."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MoestroError(f"bench result: cannot read {path}: {error}") from error
    return parse(data, path)


def parse(data: Any, path: Path) -> BenchResult:
    """The result in an object of that schema, read from `path`. Raises MoestroError for another one."""
    if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, Mapping) else type(data).__name__
        raise MoestroError(f"bench result: expected {path} to hold schema {SCHEMA!r}, got {found!r}")
    fields = {key: value for key, value in data.items() if key != "schema"}
    try:
        rows = [Row(**row) for row in fields.pop("rows")]
        return BenchResult(rows=rows, **fields)
    except (TypeError, KeyError) as error:
        raise MoestroError(f"bench result: {path} does not have the fields of {SCHEMA}: {error}") from error


def now() -> str:
    """The date and time, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command that is running, as one would type it."""
    arguments = sys.argv[1:] if argv is None else argv
    return shlex.join(["moestro", *arguments])


def environment(device: str) -> dict[str, Any]:
    """Device, versions and threads: what the figures of a run depend on."""
    import torch

    found: dict[str, Any] = {
        "device": device,
        "device_name": machine.cpu().name,
        "cpu_features": list(machine.cpu().features),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    for package in ("moestro", "torch", "triton", "transformers"):
        found[package] = machine.version(package)
    if device.startswith("cuda"):
        found["device_name"] = torch.cuda.get_device_name(device)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["cuda"] = torch.version.cuda
        found["driver"] = machine.driver()
    return found
