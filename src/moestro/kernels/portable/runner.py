"""The portable backend: PyTorch only, on any device, every format, activation and mode.

A tactic is (name, knob), e.g. ("grouped", 16): see run.py for what they are, and invariant.py for ("blocks", 16).
`unfit` is the single statement of which tactic runs where.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from moestro.errors import BackendError, unknown_name
from moestro.formats import CHECKPOINT, NVFP4
from moestro.kernels.activations import form_of
from moestro.kernels.portable import invariant
from moestro.kernels.portable import run as tactics
from moestro.kernels.portable.stages import Call, compute_dtype, is_indexable
from moestro.kernels.problem import MoeProblem, MoeRunner
from moestro.kernels.scratch import plan_bytes

Tactic = tuple[str, int]

DEFAULT_KNOB = {"pairs": 8, "loop": 1, "grouped": 16, "masked": 4, "blocks": invariant.ROWS}
LISTED: tuple[Tactic, ...] = (
    ("loop", 1),
    ("pairs", 2),
    ("pairs", 8),
    ("grouped", 4),
    ("grouped", 16),
    ("grouped", 64),
    ("grouped", 0),  # all experts at once
    ("masked", 4),
)
INVARIANT: Tactic = ("blocks", invariant.ROWS)  # the only one of a batch-invariant problem
MAX_PAIRS = 256  # of the tactic `pairs`, which reads an expert once per pair
MASKED_WASTE = 16  # products for one needed up to which `masked` is listed in a CUDA graph
GROUPED_ALIGNMENT = 16  # bytes, of every row, in torch._grouped_mm
GROUPED_ROWS = 2048  # pairs in a chunk of the default on CPUs: its buffers stay in the last-level cache
LOOP_PAIRS = 16  # up to here `loop`, whose cost beside the products is 0.1 ms less at 8 pairs
COPY_BYTES = 512 << 20  # of dense weights that a tactic may make at once, if that is more than one expert


class PortableRunner(MoeRunner):
    """Every MoE problem, in PyTorch."""

    backend: ClassVar[str] = "portable"

    @classmethod
    def why_not(cls, problem: MoeProblem) -> str | None:
        if problem.batch_invariant and problem.cuda_graph:
            return "its batch-invariant tactic waits for the device, which a CUDA graph cannot hold"
        if problem.batch_invariant and form_of(problem.activation) is None:
            return f"batch_invariant needs an activation of moestro, got {problem.activation!r}"
        return None

    @classmethod
    def runs_layout(cls, layout: str) -> bool:
        return True  # a kernel layout dequantises itself

    @classmethod
    def kernel_sources(cls) -> list[Path]:
        """None: its device code is PyTorch's, whose version is in the environment."""
        return []

    def get_valid_tactics(self, inputs: Sequence[Any], profile: Any) -> list[Tactic]:
        """The listed tactics that fit these inputs and are worth trying.

        None on another backend's kernel layout: there this one only stands in, unpacking at every call, 10
        to 200 times slower than the layout's owner; measuring such tactics took all of a minute's tuning.
        """
        if self.problem.batch_invariant:
            return [INVARIANT]
        if self.problem.weight_layout != CHECKPOINT:
            return []
        num_tokens = inputs[0].shape[0]
        return [t for t in LISTED if self.unfit(t, num_tokens) is None and not self._wastes(t, num_tokens)]

    def last_resort(self, inputs: Sequence[Any]) -> bool:
        """The tuner's hook: not raced against the owner of a kernel layout (see get_valid_tactics)."""
        return self.problem.weight_layout != CHECKPOINT

    def unfit(self, tactic: Tactic, num_tokens: int) -> str | None:
        """Why a tactic cannot run this many tokens; None if it can."""
        name, knob = tactic
        if self.problem.batch_invariant and tactic != INVARIANT:
            return f"its rows depend on the batch; {INVARIANT} alone is batch-invariant"
        if name == "blocks" and knob != invariant.ROWS:
            return f"its blocks have {invariant.ROWS} rows"
        if self.problem.cuda_graph and self._waits(tactic):
            return "it waits for the device, which a CUDA graph cannot hold"
        copies = name in {"pairs", "masked"} or not self._used_as_they_are
        if copies and knob > self._most_copied:
            return f"dense copies of {knob} experts at once would be more than {COPY_BYTES >> 20} MiB"
        if name == "pairs":
            if num_tokens * self.problem.top_k > MAX_PAIRS:
                return f"it takes at most {MAX_PAIRS} pairs"
            if not (is_indexable(self._experts.gate_up) and is_indexable(self._experts.down)):
                return f"it needs weights in the checkpoint layout, got {self.problem.weight_layout!r}"
        if name == "grouped":
            return self._no_grouped_mm(knob)
        return None

    def check_tactic(self, inputs: Sequence[Any], tactic: Any) -> None:
        """Raise BackendError unless `tactic` can run; any knob will do, not only those listed."""
        num_tokens = inputs[0].shape[0]
        resolved = self._resolve(tactic, num_tokens)
        reason = self.unfit(resolved, num_tokens)
        if reason is not None:
            raise BackendError(f"tactic {resolved} cannot run {num_tokens} tokens: {reason}")

    def workspace_bytes(self, num_tokens: int, tactic: Any) -> int:
        name, _ = self._resolve(tactic, num_tokens)
        if name == "pairs":
            return 0
        plans = {"loop": tactics.loop_plan, "blocks": invariant.blocks_plan}
        plan = plans.get(name, tactics.accumulator_plan)
        return plan_bytes(plan(self.problem, num_tokens))

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
        """Run a tactic: (name, knob), a name (with its usual knob), or -1. BackendError for any other.

        Raises BackendError also for a tactic that cannot run this many tokens.
        """
        call = self._call(inputs)
        if do_preparation or not len(call.x):
            return call.out
        if not self.problem.num_local_experts:
            return call.out.zero_()
        workspace = self._workspace if workspace is None else workspace
        self.check_tactic(inputs, tactic)
        name, knob = self._resolve(tactic, len(call.x))
        if name == "pairs":
            return tactics.run_pairs(call, knob)
        if name == "loop":
            return tactics.run_loop(call, workspace)
        if name == "blocks":
            return invariant.run_blocks(call, workspace)
        run = tactics.run_grouped if name == "grouped" else tactics.run_masked
        return run(call, workspace, knob or self.problem.num_local_experts)

    def _call(self, inputs: Sequence[Any]) -> Call:
        x, ids, weights, out, *scales = inputs
        if scales:
            x = NVFP4(x, *scales).dequantize(torch.float32)
        return Call(self.problem, self._experts, x, ids, weights, out, x_is_quantized=bool(scales))

    def _resolve(self, tactic: Any, num_tokens: int) -> Tactic:
        if tactic == -1:
            return self._default(num_tokens)
        if isinstance(tactic, str):
            if tactic not in DEFAULT_KNOB:
                raise BackendError(unknown_name("tactic", tactic, DEFAULT_KNOB))
            return tactic, DEFAULT_KNOB[tactic]
        match tactic:
            case (str(name), int(knob)) if name in DEFAULT_KNOB and knob >= (name == "pairs"):
                return name, knob
        raise BackendError(
            f"tactic must be -1, a name or (name, knob) with a name of {', '.join(DEFAULT_KNOB)} "
            f"and a knob that is a count of experts, got {tactic!r}"
        )

    def default_tactic(self, inputs: Sequence[Any]) -> Tactic:
        """The tactic behind -1."""
        return self._default(inputs[1].shape[0])

    def _default(self, num_tokens: int) -> Tactic:
        """`grouped` for dense weights; else `loop`; else, in a CUDA graph, what never waits."""
        p, pairs = self.problem, num_tokens * self.problem.top_k
        if p.batch_invariant:
            return INVARIANT
        few_on_cpu = p.device != "cuda" and pairs <= LOOP_PAIRS
        if self._used_as_they_are and self._no_grouped_mm(0) is None and not few_on_cpu:
            chunks = 1 if p.device == "cuda" else -(-pairs // GROUPED_ROWS)
            return "grouped", -(-p.num_local_experts // chunks)
        if p.device != "cuda" or not (p.cuda_graph or torch.cuda.is_current_stream_capturing()):
            return "loop", 1
        few = ("pairs", min(8, self._most_copied))
        if pairs <= p.num_local_experts and self.unfit(few, num_tokens) is None:
            return few
        return "masked", min(4, self._most_copied)

    @property
    def _used_as_they_are(self) -> bool:
        """Whether the products take the weights without a dense copy."""
        return self.problem.weight_dtype == compute_dtype(self.problem)

    @property
    def _most_copied(self) -> int:
        """How many experts' larger matrices fit COPY_BYTES; at least 1."""
        p = self.problem
        return max(1, COPY_BYTES // (p.gate_up_rows * p.hidden_size * compute_dtype(p).itemsize))

    def _waits(self, tactic: Tactic) -> bool:
        """Whether the tactic waits for the device."""
        name, knob = tactic
        chunked = 0 < knob < self.problem.num_local_experts
        return name in {"loop", "blocks"} or (name == "grouped" and chunked)

    def _wastes(self, tactic: Tactic, num_tokens: int) -> bool:
        """Whether a tactic that could run cannot win, and would only make tuning slow."""
        p, pairs = self.problem, num_tokens * self.problem.top_k
        if tactic[0] == "pairs":  # reads experts again and again
            return pairs > 4 * p.num_local_experts
        if tactic[0] == "grouped":  # dequantises experts that are not hit
            return not self._used_as_they_are and 4 * pairs < p.num_local_experts
        if tactic[0] == "masked":
            return p.num_local_experts > (MASKED_WASTE if p.cuda_graph else 1) * p.top_k
        return False

    def _no_grouped_mm(self, chunk: int) -> str | None:
        dtype = compute_dtype(self.problem)
        if self.problem.device == "cuda" and dtype != torch.bfloat16:
            return f"torch._grouped_mm on CUDA takes bfloat16, and this computes in {dtype}"
        for name in ("hidden_size", "intermediate_size"):
            size: int = getattr(self.problem, name)
            if size * dtype.itemsize % GROUPED_ALIGNMENT:
                return f"torch._grouped_mm needs rows of a multiple of 16 bytes, {name} is {size} in {dtype}"
        if not self._used_as_they_are and not 0 < chunk < self.problem.num_local_experts:
            return "all experts at once would be a dense copy of all"
        return None
