"""A call as a list of kernel launches: nothing here runs, so that compiling, counting and running share
it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from moestro.kernels.activations import GeGLUTanh, SwiGLU
from moestro.kernels.problem import Experts, MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton import gluon_plan
from moestro.kernels.triton.device import chain, quantize, sort
from moestro.kernels.triton.device import common as device
from moestro.kernels.triton.device import dequantized as dense
from moestro.kernels.triton.device import fused as gemm
from moestro.kernels.triton.device import sum_pairs as combine
from moestro.kernels.triton.layout import TritonNVFP4
from moestro.kernels.triton.tactics import Tactic, num_slots

FLOAT_BYTES = 4 << 20  # below this, the pairs' results are kept in float32 until they are summed


@dataclass(frozen=True)
class Launch:
    """kernel[grid](*args, **meta)."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    def run(self) -> None:
        self.kernel[self.grid](*self.args, **self.meta)

    def compile(self) -> Any:
        return self.kernel.warmup(*self.args, grid=self.grid, **self.meta)

    @property
    def key(self) -> tuple[Any, ...]:
        """What Triton specialises on: launches of one key share a compiled kernel."""
        plain = {i for i, p in enumerate(getattr(self.kernel, "params", ())) if p.do_not_specialize}
        kinds = tuple(_kind(value, i in plain) for i, value in enumerate(self.args))
        return (self.kernel.__name__, kinds, tuple(sorted((k, repr(v)) for k, v in self.meta.items())))


def _kind(value: Any, plain: bool) -> Any:
    """What a kernel's argument contributes to its specialisation."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return str(value.base.dtype), tuple(value.block_shape)
    return (value >> 31 != 0, *(() if plain else (value == 1, value % 16 == 0)))


def scratch_plan(problem: MoeProblem, num_tokens: int, tactic: Tactic, x_rows: int) -> Plan:
    """The workspace of a call: name -> (shape, dtype)."""
    p, pairs = problem, num_tokens * problem.top_k
    half, quantized = torch.bfloat16, p.input_format is not None
    plan: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "act": ((pairs, p.intermediate_size), torch.float32 if quantized else half)
    }
    if quantized:
        plan["x_values"] = ((x_rows, p.hidden_size), half)
        plan["x_scale"] = ((x_rows,), torch.float32)
        plan["act_values"] = ((pairs, p.intermediate_size), half)
        plan["act_scale"] = ((pairs,), torch.float32)
    if tactic.combine == "atomic":
        plan["sums"] = ((num_tokens, p.hidden_size), torch.float32)
    else:
        parts = pairs * tactic.split
        whole = 4 * parts * p.hidden_size < FLOAT_BYTES and tactic.path != "wide"
        plan["partial"] = ((parts, p.hidden_size), torch.float32 if whole else half)
    if tactic.route == "sorted":
        chunks, bins = num_chunks(pairs), num_bins(p)
        plan["counts"] = plan["cursors"] = ((chunks, bins), torch.int32)
        plan["sorted_pairs"] = ((pairs,), torch.int32)
        for stage, width in enumerate(tactic.widths, 1):
            plan[f"table{stage}"] = ((3 * num_slots(p, pairs, width) + 1,), torch.int32)
    if tactic.path == "dense" and p.weight_format == "nvfp4":
        padded = (kernel_rows(p.gate_up_rows, p.activation.gated), kernel_rows(p.hidden_size, False))
        size = max(padded[0] * p.hidden_size, padded[1] * p.intermediate_size)
        plan["dense"] = ((p.num_local_experts * size,), half)
    return plan


def kernel_rows(rows: int, gated: bool) -> int:
    """Rows of one expert in the packed layout."""
    return -(-(rows // 2) // 32) * 64 if gated else -(-rows // 64) * 64


def num_chunks(pairs: int) -> int:
    return -(-pairs // sort.CHUNK)


def num_bins(problem: MoeProblem) -> int:
    return int(triton.next_power_of_2(problem.num_local_experts + 1))


class Planner:
    """Builds the launches of one call."""

    def __init__(self, problem: MoeProblem, experts: Experts, inputs: Sequence[Any], tactic: Tactic,
                 scratch: dict[str, torch.Tensor], pdl: bool, processors: int) -> None:  # fmt: skip
        self.p, self.experts, self.tactic, self.s = problem, experts, tactic, scratch
        self.x, self.ids, self.weights, self.out, *self.x_quantized = inputs
        self.num_tokens = self.ids.shape[0]
        self.pairs = self.num_tokens * problem.top_k
        self.pdl, self.processors = pdl, processors
        self.launches: list[Launch] = []

    def build(self) -> list[Launch]:
        if self.tactic.route == "sorted":
            self._sort()
        if self.tactic.path == "chain":
            self._chain()
            self._combine()
            return self.launches
        x, x_scale = self._inputs()
        act = self.s["act"]
        self._product(1, x, x_scale, act)
        act_scale = None
        if self.p.input_format is not None:
            act, act_scale = self._quantize(act, "act", self.experts.down_input_scale, by_pair=False)
        self._product(2, act, act_scale, self.s["sums" if self.tactic.combine == "atomic" else "partial"])
        self._combine()
        return self.launches

    def _product(self, stage: int, x: torch.Tensor, x_scale: torch.Tensor | None, out: torch.Tensor) -> None:
        if self.tactic.path == "wide":
            gluon_plan.product(self, stage, x, out)
            return
        product = self._fused if self.tactic.path == "fused" else self._dense
        product(stage, x, x_scale, out)

    def _add(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        if self.pdl:
            meta["launch_pdl"] = True
        self.launches.append(Launch(kernel, grid, args, {**meta, "PDL": self.pdl}))

    @property
    def _locality(self) -> dict[str, Any]:
        return {"OFFSET": self.p.expert_offset, "L": self.p.num_local_experts}

    def _sort(self) -> None:
        s, chunks = self.s, num_chunks(self.pairs)
        size = min(sort.CHUNK, max(32, triton.next_power_of_2(self.pairs)))
        meta = {**self._locality, "LB": num_bins(self.p), "CHUNK": size, "num_warps": 8 if size > 512 else 4}
        if chunks > 1:
            self._add(sort.count, (chunks,), self.ids, s["counts"], self.pairs, **meta)
        first, second = self.tactic.widths
        tables = (*self._table(1)[1:], *self._table(2)[1:])
        args = (self.ids, s["counts"], s["cursors"], s["sorted_pairs"], *tables, self.pairs, chunks)
        self._add(sort.place, (chunks,), *args, first, second, **meta)

    def _inputs(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x as GEMM 1 reads it, and its scale per row."""
        if self.p.input_format is None:
            return self.x, None
        given = self.experts.gate_up_input_scale
        if not self.x_quantized:
            return self._quantize(self.x, "x", given, by_pair=given is not None and given.ndim > 0)
        scale, global_scale = self.x_quantized
        values = self.s["x_values"]
        self._add(quantize.unpack_rows, (self.num_tokens,), self.x, scale, values, self.p.hidden_size, B=1024)
        return values, self._per_token(global_scale)

    def _per_token(self, global_scale: torch.Tensor) -> torch.Tensor:
        """float32 [N] of a global scale [], [G] or [N]."""
        flat = global_scale.reshape(-1)
        return (
            flat
            if flat.numel() == self.num_tokens
            else flat.repeat_interleave(self.num_tokens // flat.numel())
        )

    def _quantize(self, rows: torch.Tensor, name: str, given: torch.Tensor | None,
                  by_pair: bool) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """(values, float32 [rows]) of rows through NVFP4; packed where the workspace has `name`_blocks."""
        values, scale, blocks = (
            self.s[f"{name}_values"],
            self.s[f"{name}_scale"],
            self.s.get(f"{name}_blocks"),
        )
        kind = quantize.DYNAMIC if given is None else quantize.PER_EXPERT if given.ndim else quantize.ONE
        by_place = name == "act" and self.tactic.route == "sorted"
        pairs_of = self.s["sorted_pairs"] if by_place else self.ids
        self._add(
            quantize.quantize_rows, (values.shape[0],), rows, pairs_of, self.ids,
            scale if given is None else given, values, scale if blocks is None else blocks, scale,
            values.shape[0], rows.shape[1], K=self.p.top_k, SCALE=kind.value, BY_PAIR=by_pair, SORTED=by_place,
            PACKED=blocks is not None, B=1024, **self._locality,
        )  # fmt: skip
        return values, scale

    def _common(self, stage: int, x_scale: torch.Tensor | None) -> tuple[Any, Any, dict[str, Any]]:
        """(weights, bias, constants) of a product."""
        weights = self.experts.gate_up if stage == 1 else self.experts.down
        bias = self.experts.gate_up_bias if stage == 1 else self.experts.down_bias
        given = self.experts.gate_up_input_scale
        by_pair = bool(self.p.input_format and not self.x_quantized and given is not None and given.ndim)
        atomic = self.tactic.combine == "atomic"
        meta = {
            "STAGE": stage,
            "COMBINE": (gemm.ATOMIC if atomic else gemm.PARTIAL).value,
            "GATED": stage == 1 and self.p.activation.gated,
            **_activation(self.p),
            "BIAS": bias is not None,
            "X_SCALE": x_scale is not None,
            "X_BY_PAIR": by_pair and stage == 1,
        }
        return weights, bias, meta

    def _table(self, stage: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(sorted pairs, table of tiles, its stride) of a product; anything where pairs are not sorted."""
        if self.tactic.route == "direct":
            return self.ids, self.ids, 0
        widths = self.tactic.widths
        table = self.s["table1" if widths[0] == widths[1] else f"table{stage}"]
        return self.s["sorted_pairs"], table, num_slots(self.p, self.pairs, widths[stage - 1])

    def _sizes(self, stage: int) -> tuple[int, int]:
        """(rows, columns) of one expert's matrix."""
        p = self.p
        return (p.gate_up_rows, p.hidden_size) if stage == 1 else (p.hidden_size, p.intermediate_size)

    def _zeros(self) -> tuple[torch.Tensor, int]:
        sums = self.s.get("sums")
        return (self.ids, 0) if sums is None else (sums, sums.numel())

    def _slots(self, stage: int) -> tuple[int, dict[str, Any]]:
        """(slots of pairs, rounded up to whole groups; what a fused product must know of them)."""
        direct, width = self.tactic.route == "direct", self.tactic.widths[stage - 1]
        route = gemm.SORTED if not direct else gemm.SINGLE if self.num_tokens == 1 else gemm.DIRECT
        slots = self.pairs if direct else num_slots(self.p, self.pairs, width)
        group = min(self.tactic.group, triton.next_power_of_2(slots))
        meta = {
            "ROUTE": route.value,
            "LADDER": self.tactic.ladder,
            "TOGETHER": self.tactic.together,
            "GROUP": group,
            "PB": max(16, triton.next_power_of_2(self.pairs)) if direct else 16,
            "BN": width,
        }
        return triton.cdiv(slots, group) * group, meta

    def _strips(self, stage: int) -> int:
        """Tiles of a slot in a fused product."""
        rows, _ = self._sizes(stage)
        padded = kernel_rows(rows, stage == 1 and self.p.activation.gated)
        strips = triton.cdiv(padded, self.tactic.tiles[stage - 1][0])
        return int(strips * (self.tactic.split if stage == 2 else 1))

    def _fused(self, stage: int, x: torch.Tensor, x_scale: torch.Tensor | None, out: torch.Tensor) -> None:
        weights, bias, meta = self._common(stage, x_scale)
        rows, columns = self._sizes(stage)
        bm, unroll, warps, stages = self.tactic.tiles[stage - 1]
        w, kind = _tensors(weights)
        slots, slots_meta = self._slots(stage)
        zeros, num_zeros = self._zeros()
        self._add(
            gemm.moe_gemm, (slots * self._strips(stage),), x, x if x_scale is None else x_scale, self.ids,
            self.weights, *self._table(stage), *w, x if bias is None else bias, out, zeros, self.pairs,
            slots, rows, columns, out.shape[1], num_zeros, self.p.expert_offset,
            self.p.num_local_experts, self.p.top_k, SPLIT=self.tactic.split if stage == 2 else 1,
            FORMAT=kind, EVEN=columns % 64 == 0, BM=bm, UNROLL=unroll, STAGES=stages, num_warps=warps,
            **slots_meta, **meta,
        )  # fmt: skip

    def _chain(self) -> None:
        """Both products in one launch."""
        p, t = self.p, self.tactic
        bias1, bias2 = self.experts.gate_up_bias, self.experts.down_bias
        w1, kind = _tensors(self.experts.gate_up)
        w2, _ = _tensors(self.experts.down)
        slots, meta = self._slots(1)
        strips = self._strips(1), self._strips(2)
        tiles = {
            f"{name}{stage}": value
            for stage, (bm, unroll, _, stages) in enumerate(t.tiles, 1)
            for name, value in (("BM", bm), ("UNROLL", unroll), ("STAGES", stages))
        }
        self._add(
            chain.moe_chain, (slots * sum(strips),), self.x, self.ids, self.weights, *self._table(1),
            self.s["done"], *w1, self.x if bias1 is None else bias1, self.s["act"], *w2,
            self.x if bias2 is None else bias2, self.s["partial"], self.pairs, slots, p.gate_up_rows,
            p.hidden_size, p.intermediate_size, p.expert_offset, p.num_local_experts, p.top_k, FORMAT=kind,
            GATED=p.activation.gated, **_activation(p), BIAS1=bias1 is not None, BIAS2=bias2 is not None,
            EVEN1=p.hidden_size % 64 == 0, EVEN2=p.intermediate_size % 64 == 0, SPLIT=t.split,
            STRIPS1=strips[0], STRIPS2=strips[1], AHEAD=t.ahead << 10, LINE=chain.LINE,
            num_warps=t.first[2], **tiles, **meta,
        )  # fmt: skip

    def _dense(self, stage: int, x: torch.Tensor, x_scale: torch.Tensor | None, out: torch.Tensor) -> None:
        weights, bias, meta = self._common(stage, x_scale)
        rows, columns = self._sizes(stage)
        br, unroll, warps, stages = self.tactic.tiles[stage - 1]
        bt, bk = self.tactic.widths[stage - 1], 64 * unroll
        packed = isinstance(weights, TritonNVFP4)
        padded = kernel_rows(rows, meta["GATED"]) if packed else rows
        flat = self._expanded(weights, padded, columns) if packed else weights.data.view(-1, columns)
        split = meta["GATED"] and not packed
        gather = stage == 1
        x_block = [bt, bk]
        w_desc = TensorDescriptor.from_tensor(flat, [br // 2 if split else br, bk])
        x_desc = w_desc if gather else TensorDescriptor.from_tensor(x, x_block)
        group = self.tactic.group
        tiles = triton.cdiv(num_slots(self.p, self.pairs, bt), group) * group * triton.cdiv(rows, br)
        grid = min(tiles, self.processors * self.tactic.persistent) if self.tactic.persistent else tiles
        zeros, num_zeros = self._zeros()
        self._add(
            dense.dense_gemm, (grid,), x, x_desc, w_desc, x if x_scale is None else x_scale, self.weights,
            *self._table(stage), weights.row_scale if packed else x, x if bias is None else bias, out, zeros,
            rows, padded, columns, out.shape[1], num_zeros, ROW_SCALE=packed, INTERLEAVED=packed,
            GATHER=gather, BT=bt, BR=br, BK=bk, STAGES=stages, GROUP=group,
            PERSISTENT=self.tactic.persistent > 0, num_warps=warps, K=self.p.top_k, **meta,
        )  # fmt: skip

    def _expanded(self, weights: TritonNVFP4, padded: int, columns: int) -> torch.Tensor:
        """Weights to bfloat16 [L * padded, columns]; both products use the same memory in turn."""
        strips, blocks = self.p.num_local_experts * padded // 64, triton.cdiv(columns, 64)
        flat = self.s["dense"][: strips * 64 * columns].view(-1, columns)
        args = (weights.words, weights.scales, flat, blocks, columns)
        self._add(dense.expand, (strips, triton.cdiv(blocks, 4)), *args, EVEN=columns % 64 == 0, COLS=4)
        return flat

    def _combine(self) -> None:
        if self.tactic.path == "wide":
            gluon_plan.combine(self)
            return
        if self.tactic.combine == "atomic":
            size = self.out.numel()
            rounds = (triton.cdiv(size, 1024),)
            self._add(combine.round_sums, rounds, self.s["sums"], self.out, size, B=1024)
            return
        width = min(1024, triton.next_power_of_2(self.p.hidden_size))
        grid = (self.num_tokens, triton.cdiv(self.p.hidden_size, width))
        chained = self.tactic.path == "chain"
        done, num_done = (self.s["done"], self._slots(1)[0]) if chained else (self.ids, 0)
        args = (self.s["partial"], self.ids, self.out, done, num_done, self.p.hidden_size)
        self._add(
            combine.reduce_pairs,
            grid,
            *args,
            K=self.p.top_k,
            SPLIT=self.tactic.split,
            LINE=chain.LINE,
            BH=width,
            **self._locality,
        )


def _tensors(weights: Any) -> tuple[tuple[torch.Tensor, ...], int]:
    """(values, their scales, scales of rows; the format) of weights, for a fused product."""
    if isinstance(weights, TritonNVFP4):
        return (weights.words, weights.scales, weights.row_scale), device.NVFP4.value
    return (weights.data,) * 3, device.BF16.value


def _activation(problem: MoeProblem) -> dict[str, Any]:
    act = problem.activation
    if isinstance(act, SwiGLU):
        return {"ACT": device.SWIGLU.value, "ALPHA": act.alpha, "LIMIT": act.limit, "SHIFT": act.up_shift}
    kind = device.GEGLU_TANH if isinstance(act, GeGLUTanh) else device.RELU2
    return {"ACT": kind.value, "ALPHA": 1.0, "LIMIT": None, "SHIFT": 0.0}
