"""The static facts of an MoE call, and what a backend gives for it.

MoeProblem is all that a kernel choice may depend on but the number of tokens: it is part of every tuning key.
Experts is the weights as a backend sees them (moestro.ExpertWeights is one). MoeRunner is a backend: one
TunableRunner per backend and problem, running any of its tactics in a workspace that somebody else owns.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, Protocol, Self

import torch

from moestro.errors import BackendError
from moestro.formats.base import CHECKPOINT, FormatTensor
from moestro.kernels.activations import Activation, SwiGLU
from moestro.tuning.spec.runner import TunableRunner

# What activations may be quantised to (docs/numerics.md), and what hidden and intermediate size must be multiples of.
INPUT_FORMATS: Final[dict[str, int]] = {"nvfp4": 16, "fp8": 1, "int8": 1}


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


class Held(NamedTuple):
    """Experts and nothing else: what a runner keeps of weights, so that it does not keep their owner alive."""

    gate_up: FormatTensor
    down: FormatTensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    gate_up_input_scale: torch.Tensor | None = None
    down_input_scale: torch.Tensor | None = None

    @classmethod
    def of(cls, experts: Experts) -> Self:
        return cls(*(getattr(experts, name) for name in cls._fields))

    def contiguous(self) -> Self:
        """The same with contiguous tensors; kernel layouts, whose tensors are, stay as they are."""
        held: tuple[Any, ...] = self
        parts = [p.contiguous() if hasattr(p, "contiguous") else p for p in held]
        return type(self)(*parts)


# A bound call: replay(inputs, workspace) runs it and gives True; or gives False, before anything ran, where what it was
# bound to has changed (torch's number of threads, weights written in place): then `bind` must be asked again.
Replay = Callable[[Sequence[Any], torch.Tensor], bool]


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
    input_format: str | None = None  # None, or one of INPUT_FORMATS
    dtype: torch.dtype = torch.bfloat16  # of x and of the result
    device: str = "cpu"  # device type
    deterministic: bool = False
    weight_layout: str = CHECKPOINT  # of both weights: CHECKPOINT, or what a backend's prepare() made
    weight_dtype: torch.dtype | None = None  # of dense ("bf16" format) weights; None: quantised
    biased: bool = False  # whether there is a gate_up_bias or a down_bias
    cuda_graph: bool = False  # every tactic must be capturable: no host synchronisation
    # A row's bits depend on its token, its experts and their weights alone: not on N, its place, its neighbours or
    # their routing. All tactics that a runner offers for such a problem must give the same bits.
    batch_invariant: bool = field(default=False, metadata={"omit_default": True})

    @classmethod
    def of(
        cls, experts: Experts, *, num_experts: int | None = None, expert_offset: int = 0, **rest: Any
    ) -> Self:
        """The problem of these weights; num_experts: E, by default those up to this rank's last. rest: further
        fields, `top_k` among them.
        """
        held = experts.gate_up.shape[0]
        return cls(
            num_experts=expert_offset + held if num_experts is None else num_experts,
            num_local_experts=held,
            expert_offset=expert_offset,
            hidden_size=experts.gate_up.shape[-1],
            intermediate_size=experts.down.shape[-1],
            weight_format=experts.gate_up.format,
            device=experts.gate_up.device.type,
            weight_layout=experts.gate_up.layout,
            weight_dtype=dense_dtype(experts.gate_up),
            biased=experts.gate_up_bias is not None or experts.down_bias is not None,
            **rest,
        )

    @property
    def gate_up_rows(self) -> int:
        """2I with a gate, I without."""
        return self.intermediate_size * (2 if self.activation.gated else 1)


def dense_dtype(tensor: FormatTensor) -> torch.dtype | None:
    """The dtype of dense weights ("bf16" format: bf16, fp16 or fp32); None for quantised ones."""
    data = getattr(tensor, "data", None) if tensor.format == "bf16" else None
    return data.dtype if isinstance(data, torch.Tensor) else None


class MoeRunner(TunableRunner):
    """A backend for one problem and its weights.

    Inputs of forward: [x, ids, weights, out] with x [N, H] in problem.dtype, ids int32 [N, K] (global; any
    value outside this rank's experts contributes nothing), weights float32 [N, K], out [N, H], all
    contiguous; or, for activations that come quantised, [packed, ids, weights, out, scale, global_scale].
    N may be 0.
    Forward writes out (which may hold anything before, NaN included) and returns it.

    With an input_format the intermediate is quantised from its float32 value, not from one rounded to
    problem.dtype first, which would move values near a boundary to the neighbouring step.
    """

    backend: ClassVar[str]
    strided: ClassVar[bool] = (
        True  # whether weights and biases may have any strides; else they come contiguous
    )

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
    def prepared_layout(cls, problem: MoeProblem) -> str:
        """What prepare() makes of a problem's weights: problems of one such name share a packed copy."""
        return cls.backend

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
        """The uint8 buffer of calls that bring none (at least workspace_bytes); None: they allocate. For
        measurements, which are one at a time; other calls bring their own.
        """
        self._workspace = workspace

    def lend_workspace(self, owner: Callable[[int], torch.Tensor]) -> None:
        """Let `reserve` ask owner(nbytes) for a workspace of that many bytes."""
        self._workspace_owner = owner

    def bind(self, inputs: Sequence[Any], tactic: Any) -> Replay:
        """A call of `tactic` for inputs of these sizes and dtypes, with all that can be worked out beforehand.

        Replayed from any number of threads and streams, each time with other tensors and a workspace of its own, of
        at least workspace_bytes(N, tactic): nothing that a call writes may be kept here.
        """

        def replay(inputs: Sequence[Any], workspace: torch.Tensor) -> bool:
            self.forward(inputs, tactic, workspace=workspace)
            return True

        return replay

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

    valid_between: ClassVar[bool] = True  # what is valid for two numbers of tokens is so for those between

    def validate_tactic(self, inputs: Sequence[Any], tactic: Any) -> bool:
        """The tuner's hook: whether `tactic` can run these inputs, worth offering there or not."""
        try:
            self.check_tactic(inputs, tactic)
        except BackendError:
            return False
        return True

    @abstractmethod
    def get_valid_tactics(self, inputs: Sequence[Any], profile: Any) -> list[Any]:
        """Every tactic that can run these inputs and is worth measuring there."""

    @abstractmethod
    def forward(
        self,
        inputs: Sequence[Any],
        tactic: Any = -1,
        do_preparation: bool = False,
        *,
        workspace: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run a tactic; see the class for the inputs. workspace: uint8, at least workspace_bytes; by default the
        one of use_workspace.
        """
