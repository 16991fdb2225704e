"""The launches of `warp_specialized.py`: what its programs need of a processor."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton

from moestro.kernels.triton.device import common as device
from moestro.kernels.triton.device.weighted import sum_weighted

if TYPE_CHECKING:
    from moestro.kernels.triton.plan import Planner

THREADS = 128  # of a consumer, and of the producer
REGISTER_FILE = 65536
SUMS = {
    4: 128,
    8: 144,
}  # registers of a thread for sums, at most, by the warps that multiply: more, and C7512


@lru_cache
def runs_here() -> bool:
    """Whether the device has wgmma, which Gluon's kernels spell out; without a device, whether they compile."""
    if device.INTERPRETED:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] == 9


def parts(width: int) -> tuple[int, int]:
    """A tile's pairs as a power of two, and what is over: each has a ring of its own."""
    most = 1 << width.bit_length() - 1
    return most, width - most


def programs(warps: int) -> int:
    """Programs that share a processor: one of two consumers, or two of one."""
    return 1 if warps == 8 else 2


def registers(warps: int, turn: int) -> tuple[int, int]:
    """Of each thread of (a consumer, the producer). Where ptxas finds too few: C7512, see warp_specialized.py."""
    if warps == 4:
        return 200, 56
    return (224, 56) if turn > 1 else (216, 72)


def product(plan: Planner, stage: int, x: torch.Tensor, out: torch.Tensor) -> None:
    """Add one product to the plan."""
    from moestro.kernels.triton.device.warp_specialized import wide_gemm

    weights, bias, meta = plan._common(stage, None)
    for name in ("COMBINE", "X_SCALE", "X_BY_PAIR"):
        del meta[name]
    rows, columns = plan._sizes(stage)
    bm, turn, warps, stages = plan.tactic.tiles[stage - 1]
    groups, each = warps // 4, programs(warps)
    consumer, producer = registers(warps, turn)
    width, extra = parts(plan.tactic.widths[stage - 1])
    plan._add(
        wide_gemm, (plan.processors * each,), x, *plan._table(stage), weights.words, weights.scales,
        weights.row_scale, x if bias is None else bias, out, rows, columns, out.shape[1], plan.p.top_k,
        EVEN=columns % 64 == 0, ODD=triton.cdiv(columns, 64) % 2 == 1, BM=bm,
        BN=width, EXTRA=extra, GROUPS=groups, TURN=turn, STAGES=stages, GROUP=plan.tactic.group,
        LADDER=plan.tactic.ladder, REGISTERS=consumer, PRODUCER_REGISTERS=producer, num_warps=4,
        maxnreg=REGISTER_FILE // (THREADS * (groups + 1) * each) // 8 * 8, **meta,
    )  # fmt: skip


def combine(plan: Planner) -> None:
    """Add the sum of the pairs to the plan."""
    size = plan.p.hidden_size
    width = min(1024, triton.next_power_of_2(size))
    grid = (plan.num_tokens, triton.cdiv(size, width))
    args = (plan.s["partial"], plan.ids, plan.weights, plan.out, size)
    plan._add(sum_weighted, grid, *args, K=plan.p.top_k, BH=width, **plan._locality)
