"""TritonRunner: the MoE operator in Triton kernels, for NVFP4 and bf16 weights.

A tactic is a tactics.Tactic; plan.Planner turns it into launches. NVFP4 weights are run in the layout of
layout.TritonNVFP4, dense bf16 weights as they are; W4A4 on a chip with FP4 tensor cores (native.py) takes the
checkpoint's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from moestro.errors import BackendError
from moestro.formats import NVFP4
from moestro.formats.base import CHECKPOINT, FormatTensor
from moestro.kernels.activations import GeGLUTanh, ReLU2, SwiGLU
from moestro.kernels.problem import Experts, MoeProblem, MoeRunner
from moestro.kernels.scratch import carve, plan_bytes
from moestro.kernels.triton import native, prune, tactics
from moestro.kernels.triton.device import chain
from moestro.kernels.triton.device import common as device
from moestro.kernels.triton.layout import LAYOUT, TritonNVFP4
from moestro.kernels.triton.plan import Launch, Planner, scratch_plan
from moestro.kernels.triton.tactics import Tactic


class TritonRunner(MoeRunner):
    """MoE on NVIDIA GPUs of compute capability 9.0 and newer, bf16 activations."""

    backend: ClassVar[str] = "triton"

    @classmethod
    def why_not(cls, problem: MoeProblem) -> str | None:
        if problem.device != "cuda" or not torch.cuda.is_available():
            return f"it needs a CUDA device, the weights are on {problem.device!r}"
        if torch.cuda.get_device_capability() < (9, 0):
            return "it needs compute capability 9.0 or newer"
        return cls._unsupported(problem)

    @staticmethod
    def _unsupported(problem: MoeProblem) -> str | None:
        if problem.weight_format not in ("nvfp4", "bf16"):
            return f"it runs nvfp4 and bf16 weights, not {problem.weight_format!r}"
        if problem.weight_dtype not in (None, torch.bfloat16) or problem.dtype != torch.bfloat16:
            return f"it computes in bfloat16; x is {problem.dtype}, dense weights {problem.weight_dtype}"
        if not isinstance(problem.activation, SwiGLU | GeGLUTanh | ReLU2):
            return f"it has no kernel for the activation {problem.activation!r}"
        if problem.intermediate_size % 8 or problem.hidden_size % 8:
            return "hidden and intermediate size must be multiples of 8"
        if problem.top_k > 64:
            return f"it sums at most 64 experts of a token, top_k is {problem.top_k}"
        return None

    @classmethod
    def runs_layout(cls, layout: str) -> bool:
        return layout in (CHECKPOINT, LAYOUT)

    @classmethod
    def needs_prepare(cls, problem: MoeProblem) -> bool:
        packs = problem.weight_format == "nvfp4" and not native.runs_on(problem, _capability())
        return packs and problem.weight_layout == CHECKPOINT

    @classmethod
    def prepare(
        cls, problem: MoeProblem, experts: Experts, *, donate: bool = False
    ) -> tuple[FormatTensor, FormatTensor]:
        if not cls.needs_prepare(problem):
            return experts.gate_up, experts.down
        gate_up, down = experts.gate_up, experts.down
        assert isinstance(gate_up, NVFP4)
        assert isinstance(down, NVFP4)
        return TritonNVFP4.pack(gate_up, problem.activation.gated), TritonNVFP4.pack(down, False)

    def __init__(self, problem: MoeProblem, experts: Experts) -> None:
        super().__init__(problem, experts)
        self._native = isinstance(experts.gate_up, NVFP4) and native.runs_on(problem, _capability())
        packed = isinstance(experts.gate_up, TritonNVFP4)
        if problem.weight_format == "nvfp4" and not (packed or self._native):
            raise BackendError("backend 'triton' runs NVFP4 weights that TritonRunner.prepare() has repacked")
        # zero between calls, which a shared workspace is not
        self._done = torch.zeros(
            tactics.CHAIN_SLOTS * chain.LINE, dtype=torch.int32, device=experts.gate_up.device
        )

    def workspace_bytes(self, num_tokens: int, tactic: Any) -> int:
        if num_tokens == 0:
            return 0
        return plan_bytes(self._scratch(num_tokens, self._resolve(tactic, num_tokens)))

    def _scratch(self, num_tokens: int, tactic: Tactic) -> Any:
        given = self._experts.gate_up_input_scale
        by_pair = given is not None and given.ndim > 0
        x_rows = num_tokens * (self.problem.top_k if by_pair else 1)
        plan = native.scratch if self._native else scratch_plan
        return plan(self.problem, num_tokens, tactic, x_rows)

    @property
    def _rules(self) -> Any:
        """The module that says which tactics there are, and which are valid."""
        return native if self._native else tactics

    def _resolve(self, tactic: Any, num_tokens: int) -> Tactic:
        if isinstance(tactic, Tactic):
            reason: str | None = self._rules.unfit(self.problem, tactic, num_tokens)
            if reason is not None:
                raise BackendError(f"tactic {tactic} cannot run {num_tokens} tokens: {reason}")
            return tactic
        if tactic == -1:
            chosen: Tactic = self._rules.default(self.problem, num_tokens)
            return chosen
        raise BackendError(f"tactic must be -1 or a moestro.kernels.triton.Tactic, got {tactic!r}")

    def get_valid_tactics(self, inputs: Sequence[Any], profile: Any) -> list[Tactic]:
        num_tokens = inputs[1].shape[0]
        if self._rules is tactics:
            return prune.worth_measuring(self.problem, num_tokens)
        found: list[Tactic] = self._rules.candidates(self.problem, num_tokens)
        return found

    def check_tactic(self, inputs: Sequence[Any], tactic: Any) -> None:
        self._resolve(tactic, inputs[1].shape[0])

    def plan(self, inputs: Sequence[Any], tactic: Any = -1) -> list[Launch]:
        """The launches of a call."""
        num_tokens = inputs[1].shape[0]
        if num_tokens == 0:
            return []
        resolved = self._resolve(tactic, num_tokens)
        scratch = carve(self._scratch(num_tokens, resolved), self._workspace, inputs[0].device)
        scratch["done"] = self._done
        pdl = not device.INTERPRETED
        planner = native.NativePlanner if self._native else Planner
        return planner(
            self.problem, self._experts, inputs, resolved, scratch, pdl, _processors(inputs[0].device)
        ).build()

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
        """The device code of these kernels."""
        return sorted((Path(__file__).parent / "device").glob("*.py"))

    def tolerance(self, inputs: Sequence[Any]) -> float:
        """Of the difference to the default tactic, as a ratio of norms: two roundings of bf16 sums."""
        return 2e-2 if self.problem.input_format is not None else 1e-2

    @torch.no_grad()
    def forward(
        self, inputs: Sequence[Any], tactic: Any = -1, do_preparation: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        out: torch.Tensor = inputs[3]
        if not do_preparation:
            launches = self.plan(inputs, tactic)
            try:
                for launch in launches:
                    launch.run()
            except BaseException:
                self._done.zero_()  # the launch that clears the counters of a chain may not have run
                raise
        return out


@lru_cache
def _capability() -> tuple[int, int]:
    """The compute capability of the chip; that of Hopper where there is none, for interpreting and compiling."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
