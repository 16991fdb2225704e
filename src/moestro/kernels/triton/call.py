"""A call as a list of kernel launches: nothing here runs, so that compiling, counting and running share it.

A Call holds what every way to multiply has in common: sorting, quantising, the groups of kernel arguments, the sum at
the end. The products are the paths' (paths/): this file imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from moestro.kernels.activations import form_of
from moestro.kernels.problem import Experts, MoeProblem
from moestro.kernels.scratch import Plan
from moestro.kernels.triton.device import chain, common, decode, fp8, quantize, sort
from moestro.kernels.triton.device.arguments import Both, Product, Routing, Rows, Size, Weights
from moestro.kernels.triton.device.sum_pairs import sum_pairs
from moestro.kernels.triton.layout import Packed
from moestro.kernels.triton.tactic import Tactic, gated, num_slots, sizes

# Columns that a program keeps in registers while it looks for the largest: those of Mixtral's intermediate took 39 µs of a
# layer of 64 tokens in two passes (H200).
AT_ONCE = 16384
FEW_ROWS = 1024  # whose quantising is as long as one program takes
BINS = 256
FLOAT_BYTES = 4 << 20  # below this, the pairs' results are kept in float32 until they are summed


@dataclass(frozen=True)
class Launch:
    """kernel[grid](*args, **meta)."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    def run(self) -> Any:
        """Launch; the compiled kernel, where Triton gives it."""
        return self.kernel[self.grid](*self.args, **self.meta)

    def compile(self) -> Any:
        return self.kernel.warmup(*self.args, grid=self.grid, **self.meta)

    @property
    def key(self) -> tuple[Any, ...]:
        """What Triton specialises on: launches of one key share a compiled kernel."""
        plain = {i for i, p in enumerate(getattr(self.kernel, "params", ())) if p.do_not_specialize}
        kinds = tuple(_kind(value, i in plain) for i, value in enumerate(self.args))
        return (self.kernel.__name__, kinds, tuple(sorted((k, repr(v)) for k, v in self.meta.items())))


def _kind(value: Any, plain: bool) -> Any:
    """What a kernel's argument contributes to its specialisation; what is in a group always does."""
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(_kind(v, False) for v in value)
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor | GluonDescriptor):
        return str(value.base.dtype), tuple(value.block_shape)
    return (value >> 31 != 0, *(() if plain else (value == 1, value % 16 == 0)))


def compute_dtype(problem: MoeProblem) -> torch.dtype:
    """What the tensor cores multiply: dense weights' dtype, bfloat16 for decoded ones."""
    return problem.weight_dtype or torch.bfloat16


def scratch(problem: MoeProblem, num_tokens: int, tactic: Tactic, x_rows: int, half: bool = False) -> Plan:
    """The workspace of a call: name -> (shape, dtype). half: pairs' results never in float32."""
    p, pairs = problem, num_tokens * problem.top_k
    dtype, quantized = compute_dtype(p), p.input_format is not None
    plan: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "act": ((pairs, p.intermediate_size), torch.float32 if quantized else dtype)
    }
    if quantized:
        plan["x_values"] = ((x_rows, p.hidden_size), dtype)
        plan["x_scale"] = ((x_rows,), torch.float32)
        plan["act_values"] = ((pairs, p.intermediate_size), dtype)
        plan["act_scale"] = ((pairs,), torch.float32)
    elif p.dtype != dtype:
        plan["x_values"] = ((num_tokens, p.hidden_size), dtype)
    parts = pairs * tactic.split_k
    half = half or p.batch_invariant
    small = 4 * parts * p.hidden_size < FLOAT_BYTES and not half
    plan["partial"] = ((parts, p.hidden_size), torch.float32 if small else dtype)
    if tactic.route == "sorted":
        chunks, bins = num_chunks(pairs), num_bins(p, pairs)
        plan["counts"] = plan["cursors"] = ((chunks, bins), torch.int32)
        plan["sorted_pairs"] = ((pairs,), torch.int32)
        for stage, width in enumerate(tactic.widths, 1):
            plan[f"table{stage}"] = ((3 * num_slots(p, pairs, width) + 1,), torch.int32)
    return plan


def quantising_warps(width: int, rows: int) -> int:
    """Warps of a program that quantises a row of `width` columns at once: eight columns a thread where rows are few."""
    if rows <= FEW_ROWS:
        return min(16, max(4, width // 256))
    return 4 if width <= 2048 else 8 if width <= 8192 else 16


def num_chunks(pairs: int) -> int:
    return -(-pairs // sort.CHUNK)


def num_bins(problem: MoeProblem, pairs: int) -> int:
    """Of a chunk's histogram: an expert each, one for all that are not local, and more that stay empty where there are
    several chunks. With 64 bins `count` took 45 µs of 131072 pairs, with 256 5.8 (H200).
    """
    least = BINS if num_chunks(pairs) > 1 else 1
    return int(triton.next_power_of_2(max(problem.num_local_experts + 1, least)))


class Call:
    """The launches of one call, as they are added.

    Attributes a path reads: p (the problem), tactic, s (its scratch by name), experts, num_tokens, pairs, ids,
    weights (of the routing), out, processors; and sets before it adds products: weighted, by_size.
    """

    def __init__(self, problem: MoeProblem, experts: Experts, inputs: Sequence[Any], tactic: Tactic,
                 scratch: dict[str, torch.Tensor], processors: int) -> None:  # fmt: skip
        self.p, self.experts, self.tactic, self.s = problem, experts, tactic, scratch
        self.x, self.ids, self.weights, self.out, *self.x_quantized = inputs
        self.num_tokens = self.ids.shape[0]
        self.pairs = self.num_tokens * problem.top_k
        self.processors = processors
        self.weighted = (
            not problem.batch_invariant
        )  # whether the second product multiplies by routing weights
        self.by_size = False  # whether the tables of tiles end with the smallest: for persistent programs
        self.launches: list[Launch] = []

    def add(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        """Add a launch; every kernel takes PDL, whether it may start before the one ahead of it is over."""
        pdl = not common.INTERPRETED
        if pdl:
            meta["launch_pdl"] = True
        self.launches.append(Launch(kernel, grid, args, {**meta, "PDL": pdl}))

    def two_products(self, product: Callable[[Call, int, Rows, torch.Tensor], None]) -> None:
        """Sort, the first product, what lies between, the second, the sum: product(call, stage, rows, out)."""
        self.sort()
        product(self, 1, self.inputs(), self.s["act"])
        product(self, 2, self.intermediate(), self.s["partial"])
        self.sum_pairs()

    # what comes before the products ------------------------------------------------------------------------

    def sort(self) -> None:
        """Pairs by expert, and a table of tiles for each product; nothing where programs find their own pairs."""
        if self.tactic.route == "direct":
            return
        s, chunks = self.s, num_chunks(self.pairs)
        size = min(sort.CHUNK, max(32, triton.next_power_of_2(self.pairs)))
        local = sort.Local(self.p.expert_offset, self.p.num_local_experts, num_bins(self.p, self.pairs))
        meta = {"LOCAL": local, "CHUNK": size, "num_warps": 8 if size > 512 else 4}
        if chunks > 1:
            self.add(sort.count, (chunks,), self.ids, s["counts"], self.pairs, **meta)
        (first, stride1), (second, stride2) = self._table(1), self._table(2)
        args = (self.ids, s["counts"], s["cursors"], s["sorted_pairs"], Both(first, second), stride1, stride2)
        self.add(
            sort.place,
            (chunks,),
            *args,
            self.pairs,
            chunks,
            *self.tactic.widths,
            BY_SIZE=self.by_size,
            **meta,
        )

    def inputs(self) -> Rows:
        """x as the first product reads it."""
        if self.p.input_format is None:
            return Rows(self._rounded(), None)
        if self.p.input_format == "fp8":
            return self.to_e4m3(self.x, "x")
        given = self.experts.gate_up_input_scale
        if not self.x_quantized:
            return self.quantize(self.x, "x", given, by_pair=self.x_by_pair)
        scale, global_scale = self.x_quantized
        values = self.s["x_values"]
        self.add(quantize.unpack_rows, (self.num_tokens,), self.x, scale, values, self.p.hidden_size, B=1024)
        return Rows(values, self.per_token(global_scale))

    def _rounded(self) -> torch.Tensor:
        """x in the dtype of the products."""
        if "x_values" not in self.s:
            x: torch.Tensor = self.x
            return x
        size, values = self.x.numel(), self.s["x_values"]
        self.add(quantize.round_values, (triton.cdiv(size, 2048),), self.x, values, size, B=2048)
        return values

    def intermediate(self) -> Rows:
        """The first product's result as the second reads it."""
        if self.p.input_format is None:
            return Rows(self.s["act"], None)
        if self.p.input_format == "fp8":
            return self.to_e4m3(self.s["act"], "act")
        return self.quantize(self.s["act"], "act", self.experts.down_input_scale, by_pair=False)

    @property
    def x_by_pair(self) -> bool:
        """Whether x is quantised for each pair: where each expert has a scale of its own."""
        given = self.experts.gate_up_input_scale
        return bool(self.p.input_format and not self.x_quantized and given is not None and given.ndim)

    @property
    def has_foreign(self) -> bool:
        """Whether there are experts of other ranks."""
        return self.p.num_local_experts < self.p.num_experts

    def _is_by_place(self, name: str) -> bool:
        """Whether rows of "x" or "act" are of pairs as the sort has put them."""
        return name == "act" and self.tactic.route == "sorted"

    def per_token(self, global_scale: torch.Tensor) -> torch.Tensor:
        """float32 [N] of a global scale [], [G] or [N]."""
        flat = global_scale.reshape(-1)
        repeats = self.num_tokens // flat.numel()
        return flat if flat.numel() == self.num_tokens else flat.repeat_interleave(repeats)

    def to_e4m3(
        self, rows: torch.Tensor, name: str, gather: bool = False, blocks: bool = False, turned: bool = False,
        beside: bool = False, early: bool = False,
    ) -> Rows:  # fmt: skip
        """Rows rounded to e4m3, a scale a row, in the dtype of the workspace's `name`_values.

        gather: of x, by place; blocks, turned, beside, early: see device/fp8.Recipe.
        """
        data, scale = self.s[f"{name}_values"], self.s[f"{name}_scale"]
        width = max(128, triton.next_power_of_2(data.shape[1]))
        whole = width <= AT_ONCE and not blocks
        p = self.p
        foreign = name == "act" and self.has_foreign
        by_place = gather or self._is_by_place(name)
        how = fp8.Recipe(blocks, gather, p.top_k, p.expert_offset, p.num_local_experts,
                         width if whole else min(2048, width), turned, whole, beside, early, foreign, by_place)  # fmt: skip
        pairs = self.s["sorted_pairs"] if by_place else self.ids
        args = (rows, self.ids, pairs, data, scale, rows.shape[1])
        warps = quantising_warps(width, data.shape[0]) if whole else 4
        self.add(fp8.quantize_fp8, (data.shape[0],), *args, HOW=how, num_warps=warps)
        return Rows(data, scale)

    def quantize(self, rows: torch.Tensor, name: str, given: torch.Tensor | None, by_pair: bool) -> Rows:
        """Rows through NVFP4; packed where the workspace has `name`_blocks."""
        values, scale, blocks = (
            self.s[f"{name}_values"],
            self.s[f"{name}_scale"],
            self.s.get(f"{name}_blocks"),
        )
        kind = quantize.DYNAMIC if given is None else quantize.PER_EXPERT if given.ndim else quantize.ONE
        by_place = self._is_by_place(name)
        pairs_of = self.s["sorted_pairs"] if by_place else self.ids
        how = quantize.Recipe(self.p.top_k, self.p.expert_offset, self.p.num_local_experts, kind.value, by_pair,
                              by_place, blocks is not None, 1024,
                              self.has_foreign and (name == "act" or by_pair))  # fmt: skip
        self.add(quantize.quantize_rows, (values.shape[0],), rows, pairs_of, self.ids, given, values, blocks,
                 scale, values.shape[0], rows.shape[1], HOW=how)  # fmt: skip
        return Rows(values, scale)

    # the groups of a product's arguments ---------------------------------------------------------------------

    def packed(self, stage: int) -> Packed | None:
        """A product's quantised weights; None where they are dense, or as the checkpoint has them."""
        weights = self.experts.gate_up if stage == 1 else self.experts.down
        return weights if isinstance(weights, Packed) else None

    def bias(self, stage: int) -> torch.Tensor | None:
        return self.experts.gate_up_bias if stage == 1 else self.experts.down_bias

    def weights_of(self, stage: int) -> Weights:
        """Of a product: in the kernels' layout, or dense."""
        packed = self.packed(stage)
        if packed is not None:
            return Weights(packed.words, packed.scales, packed.row_scale, self.bias(stage))
        weights: Any = self.experts.gate_up if stage == 1 else self.experts.down
        return Weights(weights.data, None, None, self.bias(stage))

    def size(self, stage: int) -> Size:
        p = self.p
        out_stride = p.intermediate_size if stage == 1 else p.hidden_size
        return Size(*sizes(p, stage), out_stride, p.expert_offset, p.num_local_experts, p.top_k)

    def product(self, stage: int) -> Product:
        """The constants that say what a product computes."""
        packed = self.packed(stage)
        return Product(
            stage=stage,
            format=decode.BF16.value if packed is None else packed.CODE,
            scale_rows=1 if packed is None else packed.SCALE_ROWS,
            word_bits=16 if packed is None else 8 * packed.WORD.itemsize,
            even=sizes(self.p, stage)[1] % 64 == 0,
            gated=gated(self.p, stage),
            **_activation(self.p),
            by_pair=self.x_by_pair and stage == 1,
            weighted=self.weighted,
            split_k=self.tactic.split_k if stage == 2 else 1,
        )

    def _table(self, stage: int) -> tuple[torch.Tensor, int]:
        widths = self.tactic.widths
        table = self.s["table1" if widths[0] == widths[1] else f"table{stage}"]
        return table, num_slots(self.p, self.pairs, widths[stage - 1])

    def routing(self, stage: int) -> tuple[Routing, int]:
        """(ids, weights, sorted pairs and the table of a product's tiles; the table's stride)."""
        if self.tactic.route == "direct":
            return Routing(self.ids, self.weights, None, None), 0
        table, stride = self._table(stage)
        return Routing(self.ids, self.weights, self.s["sorted_pairs"], table), stride

    # what comes after them -----------------------------------------------------------------------------------

    def sum_pairs(self, done: torch.Tensor | None = None, num_done: int = 0) -> None:
        """Each token's pairs to out; clears the counters of a chain."""
        hidden = self.p.hidden_size
        width = min(1024, triton.next_power_of_2(hidden))
        weights = None if self.weighted else self.weights
        args = (self.s["partial"], self.ids, weights, self.out, done, num_done, hidden)
        self.add(sum_pairs, (self.num_tokens, triton.cdiv(hidden, width)), *args, K=self.p.top_k,
                 SPLIT=self.tactic.split_k, LINE=chain.LINE, BH=width, OFFSET=self.p.expert_offset,
                 L=self.p.num_local_experts)  # fmt: skip


def _activation(problem: MoeProblem) -> dict[str, Any]:
    form = form_of(problem.activation)
    assert form is not None  # see TritonRunner.why_not
    return {"act": int(form.code), "alpha": form.alpha, "limit": form.limit, "shift": form.up_shift}
