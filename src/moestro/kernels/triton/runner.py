"""TritonRunner: the MoE operator in Triton kernels, for quantised and dense weights.

A tactic is a tactic.Tactic, chosen by choose.py; its path (paths/) turns a call into launches. Quantised weights are
run in the layouts of layout.py, dense ones as they are; products with scales of blocks (sm_100) take the checkpoint's
layout.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch
import triton

from moestro.errors import BackendError
from moestro.formats.base import CHECKPOINT, FormatTensor
from moestro.kernels import activations
from moestro.kernels.problem import Experts, Held, MoeProblem, MoeRunner, Replay
from moestro.kernels.scratch import carve, plan_bytes
from moestro.kernels.triton import choose, replay
from moestro.kernels.triton.call import Call, Launch
from moestro.kernels.triton.chip import has_block_scales, is_hopper, processors
from moestro.kernels.triton.counters import Counters
from moestro.kernels.triton.device.common import ACTIVATIONS
from moestro.kernels.triton.fp8_layout import PACKED_FP8, packed_type
from moestro.kernels.triton.layout import PACKED
from moestro.kernels.triton.paths import PATHS
from moestro.kernels.triton.tactic import Tactic

log = logging.getLogger("moestro")
# x in float16 becomes bfloat16 where weights are decoded to that: an error of up to 2^-9 of each value. Float32 would
# lose sixteen bits, so it stays with the portable backend.
X_DTYPES = (torch.bfloat16, torch.float16)
BLOCK_SCALED_CODE = {"fp8_mx.py"}  # of device/


class TritonRunner(MoeRunner):
    """MoE on NVIDIA GPUs of compute capability 9.0 and newer, bf16 or fp16 activations."""

    backend: ClassVar[str] = "triton"
    strided: ClassVar[bool] = False

    @classmethod
    def why_not(cls, problem: MoeProblem) -> str | None:
        if problem.device != "cuda" or not torch.cuda.is_available():
            return f"it needs a CUDA device, the weights are on {problem.device!r}"
        if torch.cuda.get_device_capability() < (9, 0):
            return "it needs compute capability 9.0 or newer"
        return cls._unsupported(problem)

    @staticmethod
    def _unsupported(problem: MoeProblem) -> str | None:
        if problem.weight_format != "bf16" and problem.weight_format not in PACKED:
            return f"it runs bf16, {', '.join(PACKED)} weights, not {problem.weight_format!r}"
        if problem.dtype not in X_DTYPES:
            return f"it takes x in {_names(X_DTYPES)}, which {_name(problem.dtype)} would not fit; x is {problem.dtype}"
        if problem.weight_dtype not in (None, torch.bfloat16, problem.dtype):
            return f"it computes in the weights' dtype, {problem.weight_dtype}, which x in {problem.dtype} does not fit"
        if problem.weight_dtype is torch.float16 and problem.input_format is not None:
            return "it quantises activations for bfloat16 products, dense weights are float16"
        if reason := choose.unsupported(problem):
            return reason
        if reason := activations.why_not(problem.activation, ACTIVATIONS):
            return reason
        wanted = TritonRunner.prepared_layout(problem)
        if problem.weight_layout not in (CHECKPOINT, wanted):
            return f"it needs weights in the layout {wanted!r} here, they were prepared as {problem.weight_layout!r}"
        if problem.intermediate_size % 8 or problem.hidden_size % 8:
            return "hidden and intermediate size must be multiples of 8"
        if problem.top_k > 64:
            return f"it sums at most 64 experts of a token, top_k is {problem.top_k}"
        return None

    @classmethod
    def runs_layout(cls, layout: str) -> bool:
        return layout == CHECKPOINT or layout in {
            packed.layout for table in (PACKED, PACKED_FP8) for packed in table.values()
        }

    @classmethod
    def prepared_layout(cls, problem: MoeProblem) -> str:
        packs = packed_type(problem)
        return CHECKPOINT if packs is None else packs.layout

    @classmethod
    def needs_prepare(cls, problem: MoeProblem) -> bool:
        return packed_type(problem) is not None and problem.weight_layout == CHECKPOINT

    @classmethod
    def prepare(
        cls, problem: MoeProblem, experts: Experts, *, donate: bool = False
    ) -> tuple[FormatTensor, FormatTensor]:
        if not cls.needs_prepare(problem):
            return experts.gate_up, experts.down
        kind = packed_type(problem)
        assert kind is not None
        return kind.pack(experts.gate_up, problem.activation.gated), kind.pack(experts.down, False)

    def __init__(self, problem: MoeProblem, experts: Experts) -> None:
        super().__init__(problem, experts)
        held = Held.of(experts)
        if any(part is not whole for part, whole in zip(held, held.contiguous(), strict=True)):
            raise BackendError(
                "backend 'triton' runs contiguous weights and biases, got some with other strides"
            )
        packs = packed_type(problem)
        if packs is not None and not isinstance(experts.gate_up, packs):
            raise BackendError(
                f"backend 'triton' runs {problem.weight_format} weights that TritonRunner.prepare() has repacked"
            )
        self._counters = Counters(experts.gate_up.device)

    def workspace_bytes(self, num_tokens: int, tactic: Any) -> int:
        if num_tokens == 0:
            return 0
        return plan_bytes(self._scratch(num_tokens, self._resolve(tactic, num_tokens)))

    def _scratch(self, num_tokens: int, tactic: Tactic) -> Any:
        given = self._experts.gate_up_input_scale
        by_pair = given is not None and given.ndim > 0
        x_rows = num_tokens * (self.problem.top_k if by_pair else 1)
        return PATHS[tactic.path].scratch(self.problem, num_tokens, tactic, x_rows)

    def _resolve(self, tactic: Any, num_tokens: int) -> Tactic:
        if isinstance(tactic, Tactic):
            reason = choose.why_not(self.problem, tactic, num_tokens)
            if reason is not None:
                raise BackendError(f"tactic {tactic} cannot run {num_tokens} tokens: {reason}")
            return tactic
        if tactic == -1:
            return choose.default(self.problem, num_tokens)
        raise BackendError(f"tactic must be -1 or a moestro.kernels.triton.Tactic, got {tactic!r}")

    def get_valid_tactics(self, inputs: Sequence[Any], profile: Any) -> list[Tactic]:
        return choose.worth_measuring(self.problem, inputs[1].shape[0])

    def default_tactic(self, inputs: Sequence[Any]) -> Tactic:
        """The tactic behind -1."""
        return self._resolve(-1, inputs[1].shape[0])

    def check_tactic(self, inputs: Sequence[Any], tactic: Any) -> None:
        self._resolve(tactic, inputs[1].shape[0])

    def plan(
        self, inputs: Sequence[Any], tactic: Any = -1, workspace: torch.Tensor | None = None
    ) -> list[Launch]:
        """The launches of a call."""
        num_tokens = inputs[1].shape[0]
        if num_tokens == 0:
            return []
        resolved = self._resolve(tactic, num_tokens)
        given = self._workspace if workspace is None else workspace
        scratch = carve(self._scratch(num_tokens, resolved), given, inputs[0].device)
        scratch["done"] = self._counters.here()
        call = Call(self.problem, self._experts, inputs, resolved, scratch, processors(inputs[0].device))
        PATHS[resolved.path].launch(call)
        return call.launches

    def compile(self, inputs: Sequence[Any], tactic: Any) -> None:
        """Compile what a tactic needs for inputs like these, without running anything; its kernels side by
        side, for a warp-specialised product takes 5 to 7 s (9 of 10 outside Python's lock).
        """
        jobs = self.compile_jobs(inputs, tactic)
        with ThreadPoolExecutor(max(1, len(jobs))) as pool:
            list(pool.map(lambda job: job(), jobs.values()))

    def compile_jobs(self, inputs: Sequence[Any], tactic: Any) -> dict[Any, Callable[[], Any]]:
        """What `compile` does, kernel by kernel: those of several tactics and sizes together are compiled once
        each.
        """
        return {launch.key: launch.compile for launch in self.plan(inputs, tactic)}

    @classmethod
    def kernel_sources(cls) -> list[Path]:
        """The device code of these kernels: what another chip alone compiles does not count."""
        folder = Path(__file__).parent / "device"
        triton_code = [
            p for p in sorted(folder.glob("*.py")) if p.name not in BLOCK_SCALED_CODE or has_block_scales()
        ]
        return [*triton_code, *(sorted(folder.glob("*.cu*")) if is_hopper() else ())]

    def tolerance(self, inputs: Sequence[Any]) -> float:
        """Of the difference to the default tactic, as a ratio of norms: two roundings of bf16 sums."""
        return 2e-2 if self.problem.input_format is not None else 1e-2

    @torch.no_grad()
    def forward(
        self,
        inputs: Sequence[Any],
        tactic: Any = -1,
        do_preparation: bool = False,
        *,
        workspace: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        out: torch.Tensor = inputs[3]
        if not do_preparation:
            self._launched(self.plan(inputs, tactic, workspace))
        return out

    def _launched(self, launches: Sequence[Launch]) -> list[Any]:
        """Run launches; the kernels that they were compiled to."""
        try:
            return [launch.run() for launch in launches]
        except BaseException:
            self._counters.clear()
            raise

    def bind(self, inputs: Sequence[Any], tactic: Any) -> Replay:
        """A call that is launched as ever once, and replayed from then on (replay.py), where it can be."""
        if replay.why_plain() is not None or not inputs[1].shape[0]:
            return super().bind(inputs, tactic)
        bound: replay.Replay | str | None = None

        def run(inputs: Sequence[Any], workspace: torch.Tensor) -> bool:
            nonlocal bound
            if isinstance(bound, replay.Replay) and (ready := bound.ready(inputs, workspace)) is not None:
                counters = self._counters.of(ready.stream) if bound.counts else None
                try:
                    bound.run(ready, 0 if counters is None else counters.data_ptr())
                except BaseException:
                    self._counters.clear()
                    raise
                return True
            with torch.no_grad():
                launches = self.plan(inputs, tactic, workspace)
                kernels = self._launched(launches)
            if bound is None:
                nbytes = self.workspace_bytes(inputs[1].shape[0], tactic)
                bound = self._replay(inputs, workspace, nbytes, launches, kernels)
            return True

        return run

    def _replay(
        self,
        inputs: Sequence[Any],
        workspace: torch.Tensor,
        nbytes: int,
        launches: Sequence[Launch],
        kernels: Sequence[Any],
    ) -> replay.Replay | str | None:
        """The replay of launches that just ran; why there is none; None where the next call may have one."""
        if replay.hooked(triton.knobs.runtime) or any(
            tensor.data_ptr() % replay.ALIGNMENT for tensor in (*inputs, workspace)
        ):
            return None
        held = replay.tensors_of(Held.of(self._experts))
        origin = replay.Origin(inputs, workspace, self._counters.here(), held, nbytes)
        made = replay.bind(launches, kernels, origin)
        if isinstance(made, str):
            log.debug("a call of %d tokens is launched as ever: %s", inputs[1].shape[0], made)
        return made


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(map(_name, dtypes))
