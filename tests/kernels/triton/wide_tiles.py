"""The tiles of the wide path that tests run, on the CPU's machine and on a GPU: the table's, and other valid ones."""

from __future__ import annotations

from moestro.kernels.triton import tactics
from moestro.kernels.triton.tactics import Tactic, Tile


def _same(tokens: int, tile: Tile, ladder: int) -> Tactic:
    return tactics.wide(tokens, tile, tile, ladder=ladder)


TILES = (
    *(tactic for tactic in tactics.TABLE if tactic.path == "wide"),
    _same(128, (256, 1, 8, 7), 1),  # one stage a turn
    _same(192, (128, 1, 8, 7), 2),
    _same(256, (128, 1, 8, 5), 0),
    _same(128, (128, 1, 4, 4), 2),  # one consumer
    _same(64, (128, 2, 4, 7), 1),
)


def name(tactic: Tactic) -> str:
    """What a test's id calls a tile: tokens, then its own numbers and the ladder."""
    return "-".join(map(str, (tactic.tokens, *tactic.first, tactic.ladder)))
