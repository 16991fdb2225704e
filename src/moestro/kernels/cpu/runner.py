"""The CPU backend: weights in panels, one call into the compiled core per layer call.

A tactic says how the work is cut (see CpuTactic); every tactic gives a result that is bitwise independent of
the number of threads. The default comes from a table that was measured; the tuner may find better.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from moestro.errors import BackendError, DTypeError, ShapeError
from moestro.formats import FormatTensor
from moestro.kernels.activations import GeGLUTanh, ReLU2, SwiGLU
from moestro.kernels.cpu import core, layout
from moestro.kernels.problem import Experts, MoeProblem, MoeRunner

ACTIVATIONS = {SwiGLU: 0, GeGLUTanh: 1, ReLU2: 2}
X_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as one, two and three numbers of bfloat16
DENSE_NEVER = 1 << 30
WAVE_BYTES = 128 << 20  # of the x of a wave's pairs: enough to amortise decoding, a bound for the workspace


@dataclass(frozen=True)
class CpuTactic:
    """How the core cuts the work."""

    token_tile: int  # most tokens of an expert in one work item
    row_tile: int  # tiles of 32 rows in one work item
    dequant_from: int = DENSE_NEVER  # FP4: experts with so many tokens are decoded to bf16 in cache first
    wave: int = 0  # most tokens sorted at once; 0: as many as WAVE_BYTES hold


class CpuRunner(MoeRunner):
    """Runs bf16, NVFP4 and MXFP4 experts on a CPU, for activations in bf16, and in fp16 and fp32 exactly.

    Raises BackendError where why_not() gives a reason, DTypeError or ShapeError for biases that do not fit.
    """

    backend: ClassVar[str] = "cpu"

    def __init__(self, problem: MoeProblem, experts: Experts) -> None:
        super().__init__(problem, experts)
        if reason := self.why_not(problem):
            raise BackendError(reason)
        self._core_cache = core.load()
        self.isa = core.choose_isa()
        self._cuts_cache: dict[tuple[Any, int], core.TacticStruct] = {}
        self._pack()

    def _pack(self) -> None:
        """Bring weights and biases into the core's layouts; what prepare() made is used as it is."""
        experts, gated = self._experts, self.problem.activation.gated
        biases = [
            b for b in (experts.gate_up_bias, experts.down_bias) if b is not None and not b.is_inference()
        ]
        sources = [*layout.counted(experts.gate_up), *layout.counted(experts.down), *biases]
        self._sources = [(source, source._version) for source in sources]
        self._weights = (layout.shared(experts.gate_up, gated), layout.shared(experts.down, False))
        self._biases = (
            _bias("gate_up_bias", experts.gate_up_bias, self._weights[0], gated),
            _bias("down_bias", experts.down_bias, self._weights[1], False),
        )
        self._layer = _layer(self.problem, self.isa, self._weights, self._biases)
        self._layer_at = ctypes.byref(self._layer)

    @classmethod
    def kernel_sources(cls) -> list[Path]:
        """The compiled core's sources."""
        return sorted(
            path for path in (Path(__file__).parent / "csrc").iterdir() if path.suffix in {".cpp", ".h"}
        )

    @classmethod
    def why_not(cls, problem: MoeProblem) -> str | None:
        if problem.device != "cpu":
            return f"the cpu backend runs on the CPU, not on {problem.device}"
        if reason := core.why_no_core():
            return reason
        if problem.weight_format not in core.FORMATS:
            return f"the cpu backend runs {', '.join(core.FORMATS)} weights, not {problem.weight_format}"
        if problem.weight_dtype not in (None, torch.bfloat16):
            return f"the cpu backend runs dense weights of bfloat16, not {_name(problem.weight_dtype)}"
        if problem.dtype not in X_TYPES:
            return f"the cpu backend takes x in {', '.join(map(_name, X_TYPES))}, not {_name(problem.dtype)}"
        if problem.input_format is not None:
            return "the cpu backend does not quantise activations (input_format)"
        if type(problem.activation) not in ACTIVATIONS:
            return f"the cpu backend has no {type(problem.activation).__name__} activation"
        if problem.hidden_size % layout.PANEL or problem.intermediate_size % layout.PANEL:
            return (
                f"the cpu backend needs hidden and intermediate sizes divisible by {layout.PANEL}, "
                f"got {problem.hidden_size} and {problem.intermediate_size}"
            )
        return None

    @classmethod
    def prepare(
        cls, problem: MoeProblem, experts: Experts, *, donate: bool = False
    ) -> tuple[FormatTensor, FormatTensor]:
        """(gate_up, down) in panels.

        With `donate`, the memory of contiguous weights is given back to the system as they are packed, one
        expert at a time: the checkpoint tensors must not be used afterwards.
        """
        gated = problem.activation.gated
        return layout.pack(experts.gate_up, gated, donate), layout.pack(experts.down, False, donate)

    @classmethod
    def prepare_each(
        cls, problem: MoeProblem, experts: Iterable[tuple[FormatTensor, FormatTensor]]
    ) -> tuple[FormatTensor, FormatTensor] | None:
        """(gate_up, down) in panels: one copy, and whatever the iterator holds of one expert."""
        packers = (
            layout.Packer(problem.num_local_experts, problem.activation.gated),
            layout.Packer(problem.num_local_experts, False),
        )
        for e, matrices in enumerate(experts):
            for packer, matrix in zip(packers, matrices, strict=True):
                packer.put(e, matrix)
        return packers[0].done(), packers[1].done()

    def get_cache_key_extras(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        return ("threads", torch.get_num_threads())

    def get_valid_tactics(self, inputs: Sequence[Any], profile: Any) -> list[Any]:
        num_tokens = inputs[0].shape[0]
        token_tiles = (64, 128, 256) if num_tokens > 64 else (64,)
        dequant_from: tuple[int, ...] = (DENSE_NEVER,)
        if self.problem.weight_format != "bf16" and num_tokens >= 8:
            dequant_from = (DENSE_NEVER, 16, 24, 64) if num_tokens >= 32 else (DENSE_NEVER, 8)
        return [CpuTactic(t, r, d) for t in token_tiles for r in (1, 2, 4) for d in dequant_from]

    def default_tactic(self) -> CpuTactic:
        """The tactic behind -1, as measured on two Zen 5 cores.

        Long streams of weights read fastest (one Qwen3-30B-A3B token: row_tile 1 0.63 ms, 4 0.59 ms), as long
        as each thread finds work for the down product, which has the fewest items. Decoding first pays from
        about 24 tokens on (Qwen3-30B-A3B with 512 tokens: 52 ms from 32 on, 50 ms from 24 on); with tiles, whose
        products cost less, from 8 on (published rates, not measured).
        """
        tiles = self.problem.hidden_size // 32
        row_tile = max(1, min(4, tiles // (4 * torch.get_num_threads())))
        return CpuTactic(256, row_tile, 8 if self.isa.startswith("amx") else 24)

    def workspace_bytes(self, num_tokens: int, tactic: Any) -> int:
        cut = self._cut(tactic)
        return int(self._core_cache.moestro_cpu_workspace(self._layer_at, ctypes.byref(cut), num_tokens))

    def forward(
        self, inputs: Sequence[Any], tactic: Any = -1, do_preparation: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        """Run a tactic; see MoeRunner for the inputs, which must be contiguous."""
        x, ids, weights, out = inputs
        if do_preparation or not len(x):
            return out  # type: ignore[no-any-return]
        for source, version in self._sources:
            if source._version != version:  # weights were changed in place
                self._pack()
                break
        cut, workspace = self._cut(tactic), self._workspace
        if workspace is None:
            workspace = torch.empty(self.workspace_bytes(len(x), tactic), dtype=torch.uint8)
        at = [t.data_ptr() for t in (x, ids, weights, out, workspace)]
        call = core.Call(len(x), *at, workspace.nbytes)
        if status := self._core_cache.moestro_cpu_moe(self._layer_at, ctypes.byref(cut), ctypes.byref(call)):
            need = self.workspace_bytes(len(x), tactic)
            raise BackendError(
                f"the CPU core returned {status}: workspace has {workspace.nbytes} bytes, {need} are needed"
            )
        return out  # type: ignore[no-any-return]

    def _cut(self, tactic: Any) -> core.TacticStruct:
        """The core's struct for a tactic and torch's threads, made once: a call's Python runs on cold caches."""
        if tactic != -1 and not isinstance(tactic, CpuTactic):
            raise BackendError(f"tactic must be -1 or a CpuTactic, got {tactic!r}")
        key = tactic, torch.get_num_threads()
        cut = self._cuts_cache.get(key)
        if cut is None:
            cut = self._cuts_cache[key] = self._make_cut(*key)
        return cut

    def _make_cut(self, tactic: Any, threads: int) -> core.TacticStruct:
        chosen = self.default_tactic() if tactic == -1 else tactic
        if min(chosen.token_tile, chosen.row_tile, chosen.dequant_from, chosen.wave + 1) < 1:
            raise BackendError(f"tactic must have positive fields, got {tactic!r}")
        wave = chosen.wave or max(256, WAVE_BYTES // (2 * self.problem.hidden_size * self.problem.top_k))
        return core.TacticStruct(chosen.token_tile, chosen.row_tile, chosen.dequant_from, wave, threads)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _bias(name: str, bias: torch.Tensor | None, weights: FormatTensor, gated: bool) -> torch.Tensor | None:
    """A bias [E, R] as float32 in the panels' order."""
    if bias is None:
        return None
    if tuple(bias.shape) != weights.shape[:2]:
        raise ShapeError(f"{name} must have shape {list(weights.shape[:2])}, got {list(bias.shape)}")
    if not bias.is_floating_point():
        raise DTypeError(f"{name} must be floating point, got {bias.dtype}")
    return layout.in_panel_order(bias.float(), gated)


def _matrix(weights: FormatTensor, bias: torch.Tensor | None) -> core.Matrix:
    at = bias.data_ptr() if bias is not None else None
    if isinstance(weights, layout.PanelBF16):
        return core.Matrix(weights.data.data_ptr(), None, None, at)
    if isinstance(weights, layout.PanelMXFP4):
        return core.Matrix(weights.codes.data_ptr(), weights.scale.data_ptr(), None, at)
    assert isinstance(weights, layout.PanelNVFP4)
    pieces = (weights.codes, weights.scale, weights.row_scale)
    return core.Matrix(*(piece.data_ptr() for piece in pieces), at)


def _layer(
    problem: MoeProblem,
    isa: str,
    weights: tuple[FormatTensor, FormatTensor],
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
) -> core.Layer:
    act = problem.activation
    alpha, limit, shift = (
        (act.alpha, math.inf if act.limit is None else act.limit, act.up_shift)
        if isinstance(act, SwiGLU)
        else (1.0, math.inf, 0.0)
    )
    return core.Layer(
        core.ISAS.index(isa),
        core.FORMATS[problem.weight_format],
        problem.num_local_experts,
        problem.expert_offset,
        problem.top_k,
        problem.hidden_size,
        problem.intermediate_size,
        ACTIVATIONS[type(act)],
        X_TYPES[problem.dtype],
        alpha,
        limit,
        shift,
        _matrix(weights[0], biases[0]),
        _matrix(weights[1], biases[1]),
    )
