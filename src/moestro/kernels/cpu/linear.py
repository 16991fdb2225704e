"""A Linear layer on the CPU core: out[N, R] = x[N, C] W^T + b, with the experts' panels, decoders and products.

Sizes that panels of 16 rows and columns do not divide are padded with zeros, here and in x. The structs of a call are
made once for a dtype of x and once for a number of tokens: at one token the rest of a call is a tenth of a small
Linear's time.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch

from moestro.errors import BackendError
from moestro.formats import BF16, MXFP4, NVFP4, FormatTensor, FP8Block
from moestro.kernels.cpu import core, layout, machine
from moestro.kernels.cpu.runner import DEQUANT_FROM, FP4, _matrix

TOKEN_TILE = 192  # 512 tokens, 4096 x 2048: 93 % of the rate of products, with 64, 128 or 256 91 %; 512 x 2048 88 and 80 %
# Tiles of 32 rows that are read in one go. One token, 4096 x 2048 of NVFP4 on two Zen 5 cores: 1 0.127 ms, 2 0.103,
# 4 0.094, 8 0.097.
ROW_TILE = 4
PLANS_KEPT = 64


class Plan(NamedTuple):
    """A call with so many tokens."""

    threads: int
    nbytes: int  # of its workspace
    tactic: core.TacticStruct
    tactic_at: Any


def why_not(format: str, dtype: torch.dtype | None, input_format: str | None = None) -> str | None:
    """Why the core cannot run a Linear of this format, None if it can. dtype: of dense weights."""
    if reason := core.why_no_core():
        return reason
    if format not in core.FORMATS:
        return f"the cpu backend runs {', '.join(core.FORMATS)} weights, not {format}"
    if dtype not in (None, torch.bfloat16):
        return f"the cpu backend runs dense weights of bfloat16, not {str(dtype).removeprefix('torch.')}"
    if input_format == "int8" and format not in FP4:
        return f"the cpu backend multiplies int8 activations by {' and '.join(FP4)} weights, not {format}"
    return None


def pack(weight: FormatTensor) -> layout.Panels:
    """A weight [R, C] in panels [1, R', C'], padded with zeros to multiples of 16.

    Raises FormatError for values that the core does not hold (NaN, negative block scales).
    """
    if isinstance(weight, layout.Panels):
        return weight
    packer = layout.Packer(1, False)
    packer.put(0, _padded(weight.to_checkpoint()))
    return packer.done()


def unpack(panels: layout.Panels, rows: int, columns: int) -> FormatTensor:
    """What `pack` was given."""
    one = panels.to_checkpoint().expert(0)
    if isinstance(one, NVFP4):
        return NVFP4(one.packed[:rows], one.scale[:rows], one.global_scale)
    if isinstance(one, MXFP4):
        return MXFP4(one.packed[:rows], one.scale[:rows])
    if isinstance(one, FP8Block):
        return FP8Block(one.data[:rows, :columns].contiguous(), one.scale_inv)
    assert isinstance(one, BF16)
    return BF16(one.data[:rows, :columns].contiguous())


def _padded(weight: FormatTensor) -> FormatTensor:
    rows, columns = (-size % layout.PANEL for size in weight.shape)
    if not rows and not columns:
        return weight
    if isinstance(weight, NVFP4):
        if weight.row_groups > 1:
            raise BackendError(
                f"a Linear of {weight.shape[0]} rows must have one global scale, got {weight.row_groups}"
            )
        return NVFP4(_more(weight.packed, rows, 0), _more(weight.scale, rows, 0), weight.global_scale)
    if isinstance(weight, MXFP4):
        return MXFP4(_more(weight.packed, rows, 0), _more(weight.scale, rows, 0))
    if isinstance(weight, FP8Block):
        return FP8Block(_more(weight.data, rows, columns), weight.scale_inv)
    assert isinstance(weight, BF16)
    return BF16(_more(weight.data, rows, columns))


def _more(piece: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    plain = piece.view(torch.uint8) if piece.dtype.itemsize == 1 else piece
    return torch.nn.functional.pad(plain, (0, columns, 0, rows)).view(piece.dtype)


class CpuLinear:
    """Runs one Linear layer for x of one dtype.

    panels: of `pack`. rows, columns: R and C. biased: whether calls come with a bias. input_format: None or "int8".
    Raises BackendError for an x dtype that the core does not take.
    """

    def __init__(
        self,
        panels: layout.Panels,
        rows: int,
        columns: int,
        biased: bool,
        dtype: torch.dtype,
        input_format: str | None = None,
    ) -> None:
        name = str(dtype).removeprefix("torch.")
        if name not in core.X_TYPES:
            raise BackendError(f"the cpu backend takes x in {', '.join(core.X_TYPES)}, not {name}")
        self._core, self._isa = core.load(), core.choose_isa()
        self._panels, self.rows, self.columns, self.dtype = panels, rows, columns, dtype
        _, self._padded_rows, self._padded_columns = panels.shape
        with torch.inference_mode(False):  # to be written in any mode
            self._bias = torch.zeros(self._padded_rows, dtype=torch.float32) if biased else None
        self._layer = core.Layer(
            isa=core.ISAS.index(self._isa),
            format=core.FORMATS[panels.format],
            experts=1,
            top_k=1,
            hidden=self._padded_columns,
            intermediate=self._padded_rows,
            x_type=core.X_TYPES.index(name),
            input_format=core.INPUT_FORMATS[input_format],
            scale_columns=panels.block_columns if isinstance(panels, layout.PanelFP8) else 0,
            limit=math.inf,
            gate_up=_matrix(panels, self._bias),
        )
        self._layer_at = ctypes.byref(self._layer)
        self._run = self._core.moestro_cpu_linear
        self._plans: dict[int, Plan] = {}

    def __call__(self, x: torch.Tensor, workspace: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., R] of a contiguous x [..., C]; workspace: has `take` and `give`.

        bias: [R] in any floating dtype. It is read anew in each call: whoever wrote it need not tell.
        """
        if bias is not None and self._bias is not None:
            self._bias[: self.rows].copy_(bias.detach())
        tokens = x.numel() // self.columns
        if self._padded_columns != self.columns:
            x = torch.nn.functional.pad(x, (0, self._padded_columns - self.columns))
        out = x.new_empty((*x.shape[:-1], self._padded_rows))
        plan = self._plans.get(tokens)
        if plan is None or plan.threads != torch.get_num_threads():
            plan = self._plan(tokens)
        buffer = workspace.take(plan.nbytes)
        try:
            status = self._run(
                self._layer_at, plan.tactic_at, tokens, x.data_ptr(), out.data_ptr(), buffer.data_ptr(), buffer.numel()
            )  # fmt: skip
        finally:
            workspace.give(buffer)
        if status:
            raise BackendError(f"the CPU core returned {status} for {tokens} tokens: {plan}")
        return out if self._padded_rows == self.rows else out[..., : self.rows].contiguous()

    def _plan(self, tokens: int) -> Plan:
        threads = machine.threads()
        tiles = -(-self._padded_rows // 32)
        row_tile = max(1, min(ROW_TILE, tiles // (4 * threads)))
        cut = core.TacticStruct(TOKEN_TILE, row_tile, DEQUANT_FROM[self._isa], TOKEN_TILE, threads)
        at = ctypes.byref(cut)
        nbytes = int(self._core.moestro_cpu_linear_workspace(self._layer_at, at, tokens))
        if len(self._plans) >= PLANS_KEPT:
            self._plans.clear()
        plan = self._plans[tokens] = Plan(torch.get_num_threads(), nbytes, cut, at)
        return plan
