"""One setting of the Triton kernels, and the limits that every way to multiply shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from moestro.kernels.problem import MoeProblem

SHARED_BYTES = 232_448  # of a program on sm_90
DIRECT_PAIRS = 64  # beyond this, sorting costs less than every program finding its own pairs
MAX_PAIRS = 1 << 22
NARROW = ("", "halves", "quarters")


class Tile(NamedTuple):
    """What one program computes of a product, and how."""

    rows: int  # of weights
    k_blocks: int  # of 64 columns per step; warp_specialized: stages that its producer fills in one turn
    warps: int
    stages: int  # of the pipeline


@dataclass(frozen=True)
class Tactic:
    """One setting. path: the room of paths/ that runs it."""

    path: str  # "fused" | "chain" | "warp_specialized" | "dequantized" | "fp4" | ...
    route: str  # "direct" (every program finds its pairs) | "sorted"
    pairs1: int  # of one expert in a tile of the first product
    gemm1: Tile
    gemm2: Tile
    narrow: str = ""  # a tile that is not full runs narrower: "halves" (warp_specialized only) or "quarters"
    pairs2: int = 0  # of the second product; 0: as in the first
    split_k: int = 1  # programs that share the columns of a tile of the second product
    overlap_steps: bool = True  # False: a step's products wait for each other, in fewer registers
    raster_group: int = 8  # tiles of pairs that walk the rows of weights together
    prefetch_kib: int = 0  # of weights that a tile of a chain asks into L2 while it waits

    @property
    def widths(self) -> tuple[int, int]:
        """Pairs in a tile of the first and of the second product."""
        return self.pairs1, self.pairs2 or self.pairs1

    @property
    def tiles(self) -> tuple[Tile, Tile]:
        return self.gemm1, self.gemm2

    def of_stage(self, stage: int) -> tuple[Tile, int]:
        """(tile, its pairs) of product 1 or 2."""
        return self.tiles[stage - 1], self.widths[stage - 1]


def num_slots(problem: MoeProblem, pairs: int, width: int) -> int:
    """An upper bound of the tiles of `width` sorted pairs."""
    return min(pairs, problem.num_local_experts + pairs // width)


def sizes(problem: MoeProblem, stage: int) -> tuple[int, int]:
    """(rows, columns) of one expert's matrix in product 1 or 2."""
    p = problem
    return (p.gate_up_rows, p.hidden_size) if stage == 1 else (p.hidden_size, p.intermediate_size)


def gated(problem: MoeProblem, stage: int) -> bool:
    """Whether a product's rows are gate and up."""
    return stage == 1 and problem.activation.gated
