"""The static facts of an MoE call, and what a backend gives for it.

MoeProblem is all that a kernel choice may depend on but the number of tokens: it is part of every tuning key.
Experts is the weights as a backend sees them (moestro.ExpertWeights is one). MoeRunner is a backend: one
TunableRunner per backend and problem, running any of its tactics in a workspace that somebody else owns.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from moestro.errors import BackendError
from moestro.formats.base import CHECKPOINT, FormatTensor
from moestro.kernels.activations import Activation, SwiGLU
from moestro.tuning.spec.runner import TunableRunner


class Experts(Protocol):
    """Weights of L local experts."""

    @property
    def gate_up(self) -> FormatTensor: ...  # [L, 2I, H], or [L, I, H] without a gate

    @property
    def down(self) -> FormatTensor: ...  # [L, H, I]

    @property
    def gate_up_bias(self) -> torch.Tensor | None: ...  # [L, 2I] or [L, I]

    @property
    def down_bias(self) -> torch.Tensor | None: ...  # [L, H]

    @property
    def gate_up_input_scale(self) -> torch.Tensor | None: ...  # [] or [L], W4A4: calibrated global scale of x

    @property
    def down_input_scale(self) -> torch.Tensor | None: ...  # [] or [L], W4A4: of the intermediate


@dataclass(frozen=True)
class MoeProblem:
    """The static facts of an MoE call."""

    num_experts: int  # E, all ranks'; ids are in [0, E)
    num_local_experts: int  # L, this rank's: [expert_offset, expert_offset + L)
    expert_offset: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    weight_format: str  # "bf16" | "nvfp4" | "mxfp4" | "fp8_block"
    activation: Activation = SwiGLU()  # noqa: RUF009
    input_format: str | None = None  # None | "nvfp4"
    dtype: torch.dtype = torch.bfloat16  # of x and of the result
    device: str = "cpu"  # device type
    deterministic: bool = False
    weight_layout: str = CHECKPOINT  # of both weights: CHECKPOINT, or what a backend's prepare() made
    weight_dtype: torch.dtype | None = None  # of dense ("bf16" format) weights; None: quantised
    biased: bool = False  # whether there is a gate_up_bias or a down_bias
    cuda_graph: bool = False  # every tactic must be capturable: no host synchronisation

    @property
    def gate_up_rows(self) -> int:
        """2I with a gate, I without."""
        return self.intermediate_size * (2 if self.activation.gated else 1)


class MoeRunner(TunableRunner):
    """A backend for one problem and its weights.

    Inputs of forward: [x, ids, weights, out] with x [N, H] in problem.dtype, ids int32 [N, K] (global; any
    value outside this rank's experts contributes nothing), weights float32 [N, K], out [N, H], all
    contiguous; or, for activations that come quantised, [packed, ids, weights, out, scale, global_scale].
    N may be 0.
    Forward writes out (which may hold anything before, NaN included) and returns it.

    With input_format="nvfp4" the intermediate is quantised from its float32 value, not from one rounded to
    problem.dtype first, which would move values near a boundary to the neighbouring e2m1 step.
    """

    backend: ClassVar[str]

    def __init__(self, problem: MoeProblem, experts: Experts) -> None:
        self.problem = problem
        self._experts = experts
        self._workspace: torch.Tensor | None = None
        self._workspace_owner: Callable[[int], torch.Tensor] | None = None

    @classmethod
    @abstractmethod
    def why_not(cls, problem: MoeProblem) -> str | None:
        """Why this backend cannot run the problem on this machine; None if it can."""

    @classmethod
    def kernel_sources(cls) -> Sequence[Path]:
        """The files of device code that this backend's speed depends on: changing one makes another environment.
        The file of its class where a backend does not say.
        """
        return (Path(inspect.getfile(cls)),)

    @classmethod
    def prepare(
        cls, problem: MoeProblem, experts: Experts, *, donate: bool = False
    ) -> tuple[FormatTensor, FormatTensor]:
        """(gate_up, down) in this backend's kernel layout; the checkpoint layout by default.

        donate: the memory of `experts` may be used for the result, nobody looks at them afterwards.

        `experts` are in the checkpoint layout. Both results share one layout name, which begins with the
        backend's name ("cpu_...", "triton_..."): that is how `runs_layout` knows its own.
        """
        return experts.gate_up, experts.down

    @classmethod
    def prepare_each(
        cls, problem: MoeProblem, experts: Iterable[tuple[FormatTensor, FormatTensor]]
    ) -> tuple[FormatTensor, FormatTensor] | None:
        """What prepare() gives, from one expert's (gate_up [R, H], down [H, I]) after the other.

        For weights that are never whole in memory in the checkpoint layout. None, before any is taken, where
        this backend wants them whole.
        """
        return None

    @classmethod
    def needs_prepare(cls, problem: MoeProblem) -> bool:
        """Whether the weights, as problem.weight_layout has them, must go through prepare() first."""
        return False

    @classmethod
    def runs_layout(cls, layout: str) -> bool:
        """Whether weights in this layout (see MoeProblem.weight_layout) can be run as they are."""
        return layout == CHECKPOINT or layout.startswith(cls.backend)

    def workspace_bytes(self, num_tokens: int, tactic: Any) -> int:
        """Bytes of scratch memory that `tactic` needs for `num_tokens` tokens."""
        return 0

    def use_workspace(self, workspace: torch.Tensor | None) -> None:
        """Work in this uint8 buffer (256-byte aligned, at least workspace_bytes); None: allocate."""
        self._workspace = workspace

    def lend_workspace(self, owner: Callable[[int], torch.Tensor]) -> None:
        """Let `reserve` ask owner(nbytes) for a workspace of that many bytes."""
        self._workspace_owner = owner

    def reserve(self, inputs: Sequence[Any], tactics: Sequence[Any]) -> None:
        """The tuner's hook: a workspace for the largest of the tactics, before any of them is timed."""
        if self._workspace_owner is not None and tactics:
            num_tokens = inputs[0].shape[0]
            largest = max(self.workspace_bytes(num_tokens, tactic) for tactic in tactics)
            self.use_workspace(self._workspace_owner(largest))

    def check_tactic(self, inputs: Sequence[Any], tactic: Any) -> None:
        """Raise BackendError unless `tactic` can run these inputs."""
        valid = self.get_valid_tactics(inputs, None)
        if tactic != -1 and tactic not in valid:
            raise BackendError(
                f"tactic {tactic!r} is not one of backend {self.backend!r} for {inputs[0].shape[0]} tokens; "
                f"valid are -1, {', '.join(map(repr, valid[:12]))}{', ...' if len(valid) > 12 else ''}"
            )

    @abstractmethod
    def get_valid_tactics(self, inputs: Sequence[Any], profile: Any) -> list[Any]:
        """Every tactic that can run these inputs."""

    @abstractmethod
    def forward(
        self, inputs: Sequence[Any], tactic: Any = -1, do_preparation: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        """Run a tactic; see the class for the inputs."""
