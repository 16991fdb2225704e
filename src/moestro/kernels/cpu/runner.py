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
from moestro.kernels import activations
from moestro.kernels.cpu import core, layout, layout_int4, machine
from moestro.kernels.problem import Experts, MoeProblem, MoeRunner, Replay
from moestro.tuning.forks import Lock

FP4 = ("nvfp4", "mxfp4")
DECODED = (*FP4, "int4")  # in registers, or in cache first
# What the core's scratch memory and its 32-bit numbers hold; a store may come from anywhere.
MOST = {"token_tile": 4096, "row_tile": 1024, "dequant_from": 1 << 30, "wave": 1 << 30}
DENSE_NEVER = 1 << 30
# Multiply-adds that each thread of a call has: below, waking another costs what it brings. NVFP4 on two Zen 5 cores, µs on
# one thread and on two: 98 thousand 2.5 and 2.9, 197 thousand 5.2 and 4.6, 393 thousand 10.2 and 7.6. Where other processes
# compute, the second thread waits for its turn on a core, and the call with it: 8 ms were seen.
WORK_OF_A_THREAD = 1 << 17
BOUND_KEPT = 64  # calls of `forward`, which measurements make, whose structs are kept
DEQUANT_FROM = {
    **{"amx": 8, "amx_emulated": 8, "avx512": 24, "avx_vnni": 16, "avx2": 5, "generic": 24},
    **{"neon_bf16": 5, "neon_dot": 5, "neon": 5},  # counted, not measured: four tokens share a decoding
}
WAVE_BYTES = 128 << 20  # of the x of a wave's pairs: enough to amortise decoding, a bound for the workspace


@dataclass(frozen=True)
class CpuTactic:
    """How the core cuts the work."""

    token_tile: int  # most tokens of an expert in one work item
    row_tile: int  # tiles of 32 rows in one work item
    dequant_from: int = DENSE_NEVER  # FP4: experts with so many tokens are decoded to bf16 in cache first
    wave: int = 0  # most tokens sorted at once; 0: as many as WAVE_BYTES hold


class CpuRunner(MoeRunner):
    """Runs bf16, NVFP4, MXFP4 and FP8-block experts on a CPU, for activations in bf16, and in fp16 and fp32 exactly.

    With input_format="int8", which is never chosen by itself, 4-bit weights are multiplied by activations of 8
    bits. `arithmetic` is what products are made of: one of core.ARITHMETICS.

    Raises BackendError where why_not() gives a reason, DTypeError or ShapeError for biases that do not fit.
    """

    backend: ClassVar[str] = "cpu"

    def __init__(self, problem: MoeProblem, experts: Experts) -> None:
        super().__init__(problem, experts)
        if reason := self.why_not(problem):
            raise BackendError(reason)
        self._core_cache = core.load()
        self.isa = core.choose_isa()
        self._packing_cache = Lock()
        self._bound_cache: dict[tuple[int, Any], Replay] = {}
        self.arithmetic = _arithmetic(problem, self.isa)
        self._cuts_cache: dict[tuple[Any, int], core.TacticStruct] = {}
        self._pack()

    def _pack(self) -> None:
        """Bring weights and biases into the core's layouts; what prepare() made is used as it is."""
        experts, gated = self._experts, self.problem.activation.gated
        biases = [
            b for b in (experts.gate_up_bias, experts.down_bias) if b is not None and not b.is_inference()
        ]
        matrices = [
            m for m in (experts.gate_up, experts.down) if not isinstance(m, layout.Panels)
        ]  # run as they are
        sources = [*(t for m in matrices for t in layout.counted(m)), *biases]
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
        if _name(problem.dtype) not in core.X_TYPES:
            return f"the cpu backend takes x in {', '.join(core.X_TYPES)}, not {_name(problem.dtype)}"
        if problem.input_format not in core.INPUT_FORMATS:
            return f"the cpu backend quantises activations to int8 alone, not to input_format={problem.input_format!r}"
        if problem.input_format == "int8" and problem.weight_format not in FP4:
            return f"the cpu backend multiplies int8 activations by {' and '.join(FP4)} weights, not {problem.weight_format}"
        if reason := activations.why_not(problem.activation, core.ACTIVATIONS):
            return reason
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
        return ("threads", machine.threads())

    def get_valid_tactics(self, inputs: Sequence[Any], profile: Any) -> list[Any]:
        num_tokens = inputs[0].shape[0]
        token_tiles = (64, 128, 256) if num_tokens > 64 else (64,)
        dequant_from: tuple[int, ...] = (DENSE_NEVER,)
        if self.problem.weight_format in DECODED and num_tokens >= 8:
            dequant_from = (DENSE_NEVER, 16, 24, 64) if num_tokens >= 32 else (DENSE_NEVER, 8)
            if self.isa in ("avx2", "avx_vnni") or self.isa.startswith("neon"):
                dequant_from = (5, 9, DENSE_NEVER)
        return [CpuTactic(t, r, d) for t in token_tiles for r in (1, 2, 4) for d in dequant_from]

    def check_tactic(self, inputs: Sequence[Any], tactic: Any) -> None:
        """Every tactic runs every number of tokens: get_valid_tactics only leaves out what cannot pay."""
        self._cut(tactic, inputs[0].shape[0])

    def default_tactic(self, inputs: Sequence[Any] = ()) -> CpuTactic:
        """The tactic behind -1, as measured on two Zen 5 cores.

        Long streams of weights read fastest (one Qwen3-30B-A3B token: row_tile 1 0.63 ms, 4 0.59 ms), as long
        as each thread finds work for the down product, which has the fewest items. Decoding first pays from
        about 24 tokens on (Qwen3-30B-A3B with 512 tokens: 52 ms from 32 on, 50 ms from 24 on); with tiles, whose
        products cost less, from 8 on (published rates, not measured). AVX2 decodes four tokens at a time.
        """
        tiles = self.problem.hidden_size // 32
        row_tile = max(1, min(4, tiles // (4 * machine.threads())))
        return CpuTactic(256, row_tile, DEQUANT_FROM[self.isa])

    def workspace_bytes(self, num_tokens: int, tactic: Any) -> int:
        cut = self._cut(tactic, num_tokens)
        return int(self._core_cache.moestro_cpu_workspace(self._layer_at, ctypes.byref(cut), num_tokens))

    def forward(
        self,
        inputs: Sequence[Any],
        tactic: Any = -1,
        do_preparation: bool = False,
        *,
        workspace: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run a tactic; see MoeRunner for the inputs, which must be contiguous."""
        out: torch.Tensor = inputs[3]
        if do_preparation or not len(out):
            return out
        given = self._workspace if workspace is None else workspace
        if given is None:
            nbytes = self.workspace_bytes(len(out), tactic)
            given = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        key = len(out), tactic
        replay = self._bound_cache.get(key)
        while replay is None or not replay(inputs, given):
            if len(self._bound_cache) >= BOUND_KEPT:
                self._bound_cache.clear()
            replay = self._bound_cache[key] = self.bind(inputs, tactic)
        return out

    def bind(self, inputs: Sequence[Any], tactic: Any) -> Replay:
        """The call into the core with its structs made: what is left is the tensors' addresses.

        To be bound anew where torch's number of threads or the weights have changed since; a call that another
        thread is in keeps what it was bound to.
        """
        tokens, threads = inputs[0].shape[0], torch.get_num_threads()
        cut_at = ctypes.byref(self._cut(tactic, tokens))
        with self._packing_cache:
            layer_at, sources, kept = self._layer_at, self._sources, (self._weights, self._biases)
        run, threads_now = self._core_cache.moestro_cpu_moe, torch.get_num_threads
        pack = core.CALL.pack

        def replay(inputs: Sequence[Any], workspace: torch.Tensor) -> bool:
            for source, version in sources:
                if source._version != version:  # weights were changed in place
                    self._pack_again(kept)
                    return False
            if threads_now() != threads:
                return False
            x, ids, weights, out = inputs
            call = pack(
                tokens, x.data_ptr(), ids.data_ptr(), weights.data_ptr(), out.data_ptr(), workspace.data_ptr(),
                workspace.numel(),
            )  # fmt: skip
            if status := run(layer_at, cut_at, call):
                raise self._refusal(status, tokens, tactic, workspace)
            return True

        return replay

    def _pack_again(self, seen: Any) -> None:
        with self._packing_cache:
            if seen[0] is self._weights and seen[1] is self._biases:  # nobody else has meanwhile
                self._pack()

    def _refusal(self, status: int, tokens: int, tactic: Any, workspace: torch.Tensor) -> BackendError:
        need = self.workspace_bytes(tokens, tactic)
        return BackendError(
            f"the CPU core returned {status}: workspace has {workspace.nbytes} bytes, {need} are needed"
        )

    def _cut(self, tactic: Any, num_tokens: int) -> core.TacticStruct:
        """The core's struct for a tactic and the threads of a call, made once: a call's Python runs on cold caches."""
        if tactic != -1 and not isinstance(tactic, CpuTactic):
            raise BackendError(f"tactic must be -1 or a CpuTactic, got {tactic!r}")
        key = tactic, self._threads(num_tokens)
        cut = self._cuts_cache.get(key)
        if cut is None:
            cut = self._cuts_cache[key] = self._make_cut(*key)
        return cut

    def _threads(self, num_tokens: int) -> int:
        """torch's threads, or as many as find work."""
        of_a_pair = (self.problem.gate_up_rows + self.problem.intermediate_size) * self.problem.hidden_size
        work = num_tokens * self.problem.top_k * of_a_pair
        return max(1, min(machine.threads(), work // WORK_OF_A_THREAD))

    def _make_cut(self, tactic: Any, threads: int) -> core.TacticStruct:
        chosen = self.default_tactic() if tactic == -1 else tactic
        if min(chosen.token_tile, chosen.row_tile, chosen.dequant_from, chosen.wave + 1) < 1:
            raise BackendError(f"tactic must have positive fields, got {tactic!r}")
        if any(getattr(chosen, name) > most for name, most in MOST.items()):
            raise BackendError(f"tactic must have fields of at most {MOST}, got {tactic!r}")
        wave = chosen.wave or max(256, WAVE_BYTES // (2 * self.problem.hidden_size * self.problem.top_k))
        return core.TacticStruct(chosen.token_tile, chosen.row_tile, chosen.dequant_from, wave, threads)


def _arithmetic(problem: MoeProblem, isa: str) -> str:
    """What a problem's products are made of on an instruction set: see csrc/kernels_*.cpp."""
    if problem.input_format == "int8":
        return "int8"
    if isa in ("avx512", "amx", "amx_emulated"):
        return "bf16"
    if isa in ("generic", "neon") or problem.dtype != torch.bfloat16:
        return "float32"
    if problem.weight_format in FP4:
        return "int16"
    return "bf16" if isa == "neon_bf16" else "float32"


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
    if isinstance(weights, layout.PanelFP8):
        return core.Matrix(weights.data.data_ptr(), weights.panel_scale.data_ptr(), None, at)
    if isinstance(weights, layout_int4.PanelINT4):
        scale_type = core.X_TYPES.index(_name(weights.scale.dtype))
        zeros = weights.zero.data_ptr() if weights.zero.numel() else None
        codes, scale = weights.codes.data_ptr(), weights.scale.data_ptr()
        return core.Matrix(codes, scale, None, at, zeros, weights.group, scale_type)
    assert isinstance(weights, layout.PanelNVFP4)
    pieces = (weights.codes, weights.scale, weights.row_scale)
    return core.Matrix(*(piece.data_ptr() for piece in pieces), at)


def _layer(
    problem: MoeProblem,
    isa: str,
    weights: tuple[FormatTensor, FormatTensor],
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
) -> core.Layer:
    form = activations.form_of(problem.activation)
    assert form is not None  # see why_not
    return core.Layer(
        isa=core.ISAS.index(isa),
        format=core.FORMATS[problem.weight_format],
        experts=problem.num_local_experts,
        expert_offset=problem.expert_offset,
        top_k=problem.top_k,
        hidden=problem.hidden_size,
        intermediate=problem.intermediate_size,
        activation=form.code,
        gated=form.gated,
        x_type=core.X_TYPES.index(_name(problem.dtype)),
        input_format=core.INPUT_FORMATS[problem.input_format],
        batch_invariant=problem.batch_invariant,
        scale_columns=weights[0].block_columns if isinstance(weights[0], layout.PanelFP8) else 0,
        alpha=form.alpha,
        limit=math.inf if form.limit is None else form.limit,
        up_shift=form.up_shift,
        gate_up=_matrix(weights[0], biases[0]),
        down=_matrix(weights[1], biases[1]),
    )
