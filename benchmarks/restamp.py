"""Carry shipped decisions over to kernels that do the same: new digest of the sources, today's names of tactics.

    PYTHONPATH=src python benchmarks/restamp.py [src/moestro/tuning/bundles/*.json]

For a commit that changes the text of device code but not what it computes nor how fast: that the machine code of the
measured kernels is the same, or as fast in one run (benchmarks/gpu_before_after.py), is to be shown first, and said in
the commit. What a decision was measured with stays in its record; the environment's name and `sources` become this
checkout's. Tactics with older field names (kernels/triton/tactics.py) are written with today's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from moestro.kernels.portable.runner import PortableRunner
from moestro.kernels.triton import TritonRunner
from moestro.tuning.spec.plain_json import from_json, to_json
from moestro.tuning.store.environment import Environment
from moestro.tuning.store.sources import source_digest
from moestro.tuning.store.tables import text_of

BUNDLES = Path(__file__).parents[1] / "src" / "moestro" / "tuning" / "bundles"
OLDER = "moestro.kernels.triton.tactics:Tactic"


def renamed(value: Any, names: dict[str, str]) -> Any:
    """The JSON value with older tactics and names of environments replaced."""
    if isinstance(value, dict):
        if value.get("object") == OLDER:
            return to_json(from_json(value))
        return {names.get(key, key): renamed(v, names) for key, v in value.items()}
    if isinstance(value, list):
        return [renamed(v, names) for v in value]
    return names.get(value, value) if isinstance(value, str) else value


def restamp(path: Path, sources: str) -> int:
    """Write a bundle anew; how many environments it has."""
    bundle = json.loads(path.read_text())
    names, facts = {}, {}
    for name, old in bundle["environments"].items():
        environment = Environment({**old, "sources": sources})
        names[name], facts[environment.name] = environment.name, dict(environment.facts)
    bundle = {**renamed(bundle, names), "environments": facts}
    path.write_text(text_of(bundle))
    return len(facts)


def main() -> None:
    sources = source_digest([TritonRunner, PortableRunner])
    for path in map(Path, sys.argv[1:] or sorted(BUNDLES.glob("*.json"))):
        print(f"{path}: {restamp(path, sources)} environments now of sources {sources}")


if __name__ == "__main__":
    main()
