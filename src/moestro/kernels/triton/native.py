"""W4A4 on FP4 tensor cores: tactics and launches of `blackwell.scaled_gemm`.

The weights stay in the checkpoint layout, and every value between the kernels is packed: x is quantised once
per token (or per pair, where the checkpoint gives each expert its own scale), the intermediate once per pair.
Which chips take this path says `runs_on`.
"""

from __future__ import annotations

import torch
import triton

from moestro.kernels.problem import MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton import tactics
from moestro.kernels.triton.device import fp4 as blackwell
from moestro.kernels.triton.plan import Planner, kernel_rows, scratch_plan
from moestro.kernels.triton.tactics import SHARED_BYTES, Tactic, num_slots

FP4_CAPABILITY = (10, 0)


def _native(tokens: int, first: tactics.Tile, second: tactics.Tile, combine: str = "reduce") -> Tactic:
    return Tactic("native", "sorted", combine, tokens, first, second)


# Estimates, not measurements: 128 rows are what the tensor core takes at once, the pairs' width follows the
# pairs that an expert has.
DEEP, WIDE = (128, 4, 4, 4), (128, 4, 8, 3)
TABLE: tuple[Tactic, ...] = (
    _native(16, DEEP, DEEP),
    _native(32, DEEP, DEEP),
    _native(64, DEEP, DEEP),
    _native(128, WIDE, WIDE),
    _native(256, WIDE, WIDE),
)


def runs_on(problem: MoeProblem, capability: tuple[int, int]) -> bool:
    """Whether a problem goes to FP4 tensor cores on a chip of this compute capability."""
    w4a4 = problem.weight_format == "nvfp4" and problem.input_format == "nvfp4"
    return w4a4 and FP4_CAPABILITY <= capability < (12, 0)


def shared_bytes(tactic: Tactic, stage: int) -> int:
    """Shared memory of the pipeline buffers of the first (0) or second (1) product."""
    rows, unroll, _, stages = tactic.tiles[stage]
    return (rows + tactic.widths[stage]) * unroll * 36 * stages


def unfit(problem: MoeProblem, tactic: Tactic, num_tokens: int) -> str | None:
    """Why a tactic cannot run this many tokens of a problem on FP4 tensor cores; None if it can."""
    if tactic.path != "native" or tactic.route != "sorted":
        return f"FP4 tensor cores run tactics of path 'native' with sorted pairs, not {tactic.path!r}"
    if num_tokens * problem.top_k > tactics.MAX_PAIRS:
        return f"more than {tactics.MAX_PAIRS} pairs"
    if problem.deterministic and tactic.combine != "reduce":
        return "atomic sums are not repeatable"
    if any(shared_bytes(tactic, stage) > SHARED_BYTES for stage in (0, 1)):
        return "its tiles exceed shared memory"
    return None


def candidates(problem: MoeProblem, num_tokens: int) -> list[Tactic]:
    """The tactics that can run, the default first."""
    found = [t for t in TABLE if unfit(problem, t, num_tokens) is None]
    chosen = default(problem, num_tokens)
    return sorted(found, key=lambda t: t != chosen)


def default(problem: MoeProblem, num_tokens: int) -> Tactic:
    """The width that holds the pairs of an average expert."""
    each = num_tokens * problem.top_k / problem.num_experts
    return next((t for t in TABLE if t.tokens >= each), TABLE[-1])


def scratch(problem: MoeProblem, num_tokens: int, tactic: Tactic, x_rows: int) -> Plan:
    """The workspace of a call: name -> (shape, dtype)."""
    plan = dict(scratch_plan(problem, num_tokens, tactic, x_rows))
    for name, columns in (("x", problem.hidden_size), ("act", problem.intermediate_size)):
        rows = plan[f"{name}_values"][0][0]
        plan[f"{name}_values"] = ((rows, columns // 2), torch.uint8)
        plan[f"{name}_blocks"] = ((rows, columns // 16), torch.float8_e4m3fn)
    return plan


class NativePlanner(Planner):
    """Builds the launches of a call whose operands stay packed."""

    def _inputs(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.x_quantized:
            return super()._inputs()
        self.s["x_blocks"], global_scale = self.x_quantized
        return self.x, self._per_token(global_scale)

    def _product(self, stage: int, x: torch.Tensor, x_scale: torch.Tensor | None, out: torch.Tensor) -> None:
        weights, bias, meta = self._common(stage, x_scale)
        rows, columns = self._sizes(stage)
        bm, unroll, warps, stages = self.tactic.tiles[stage - 1]
        width, bk = self.tactic.widths[stage - 1], 64 * unroll
        slots = num_slots(self.p, self.pairs, width)
        group = min(self.tactic.group, triton.next_power_of_2(slots))
        slots = triton.cdiv(slots, group) * group
        strips = triton.cdiv(kernel_rows(rows, meta["GATED"]), bm)
        zeros, num_zeros = self._zeros()
        self._add(
            blackwell.scaled_gemm, (slots * strips,), x, self.s["x_blocks" if stage == 1 else "act_blocks"],
            x_scale, self.weights, *self._table(stage), weights.packed, weights.scale, weights.global_scale,
            weights.global_scale[0].numel(), x_scale if bias is None else bias, out, zeros, slots, rows,
            columns, out.shape[1], num_zeros if stage == 1 else 0, self.p.top_k, EVEN=columns % bk == 0,
            BM=bm, BN=width, BK=bk, STAGES=stages, GROUP=group, num_warps=warps, **meta,
        )  # fmt: skip
