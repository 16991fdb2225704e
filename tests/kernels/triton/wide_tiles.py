"""The tiles of the wide path that tests run, on the CPU's machine and on a GPU: the table's, and other valid ones."""

from __future__ import annotations

from moestro.kernels.triton.paths.warp_specialized import TABLE, tactic
from moestro.kernels.triton.tactic import Tactic, Tile

TILES = (
    *(t for t in TABLE["packed"] if t.split_k == 1),
    tactic(128, Tile(256, 1, 8, 7)),  # one stage a turn
    tactic(192, Tile(128, 1, 8, 7), "halves"),
    tactic(256, Tile(128, 1, 8, 5), ""),
    tactic(128, Tile(128, 1, 4, 4), "halves"),  # one consumer
    tactic(64, Tile(128, 2, 4, 7)),
)


def name(tactic: Tactic) -> str:
    """What a test's id calls a tile: pairs, then its own numbers, and how it narrows."""
    return "-".join(map(str, (tactic.pairs1, *tactic.gemm1, tactic.narrow or "whole")))
