"""Tactics as files written before Tile had field names spell them: read, and never written.

`moestro.kernels.triton.tactics:Tactic` is the class that such a file names; making one gives a tactic.Tactic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moestro.kernels.triton import tactic
from moestro.kernels.triton.tactic import Tile

PATHS = {"wide": "warp_specialized", "dense": "dequantized", "native": "fp4"}
NARROW = {0: "", 1: "quarters", 2: "halves"}


def read(fields: Mapping[str, Any]) -> tactic.Tactic | None:
    """The tactic of a record's fields, older or today's; None for one that no kernel has any more."""
    try:
        if "combine" in fields:
            return Tactic(**fields)
        tiles = {name: Tile(*fields[name]) for name in ("gemm1", "gemm2")}
        return tactic.Tactic(**{**fields, **tiles})
    except (KeyError, TypeError, ValueError):
        return None


class Tactic:
    """Old field names; `combine` and `persistent` had one value in every decision."""

    def __new__(  # type: ignore[misc]
        cls, path: str, route: str, combine: str, tokens: int, first: Any, second: Any, ladder: int = 0,
        tokens2: int = 0, split: int = 1, together: int = 1, group: int = 8, ahead: int = 0,
        persistent: int = 0,
    ) -> tactic.Tactic:  # fmt: skip
        if combine != "reduce" or persistent:
            raise ValueError(f"no kernel has {combine=} and {persistent=} any more")
        return tactic.Tactic(PATHS.get(path, path), route, tokens, Tile(*first), Tile(*second), NARROW[ladder],
                             tokens2, split, bool(together), group, ahead)  # fmt: skip

    def _asdict(self) -> dict[str, Any]:  # what tuning takes for a class with fields
        return {}
