"""FusedMoE: an MoE layer that owns its workspace, its runners and their tuning.

Eagerly a call is: checks, a look-up of the decision by the number of tokens, one runner's forward. Under
torch.compile it is the operator moestro::fused_moe, which finds this layer again by its weights' tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from moestro.errors import BackendError, DTypeError, ShapeError
from moestro.formats import NVFP4
from moestro.kernels.activations import Activation
from moestro.kernels.problem import MoeRunner
from moestro.moe import flat
from moestro.moe.checks import Limits, check_call, check_id_range, check_out, result_dtype
from moestro.moe.op import call_operator, layer_text, records_gradients
from moestro.moe.operation import Operation, as_inputs
from moestro.moe.options import Options, known_num_experts, make_problem
from moestro.moe.tuning_config import OP, as_probes
from moestro.moe.weights import ExpertWeights
from moestro.moe.workspace import Workspace
from moestro.routing import Distribution
from moestro.tuning import AutoTuner, Decision, Probe, TuningConfig

Kind = torch.dtype | str  # of x: its dtype, or "nvfp4"
KNOWN_SIZES = 1024  # token counts whose scratch bytes are remembered


class FusedMoE(torch.nn.Module):
    """The experts of an MoE layer: y = layer(x, ids, weights).

    w: the experts' weights. They are repacked for the preferred backend (`layer.weights`); drop `w` to keep
    one copy. They are no parameters: the layer stays where they are, and module.to() does not move it.
    top_k, max_num_tokens: K, and the largest N.
    use_cuda_graph: the layer will be captured. It then returns a view of an output that it owns, valid until
    its next call (pass out= for your own), all scratch memory is there from the start, and only tactics that
    never wait for the device take part.
    activation, input_format, expert_offset, deterministic, backend, tactic, num_experts: as in fused_moe.
    dtype: of x when it is not known yet (tuning); by default that of dense weights, else bf16.
    workspace: one to share with other layers of a model that run one after the other.
    tuner: the default one if None. donate: w may be repacked in its own memory, and must not be used again.

    Past the first call nothing of size is allocated but the result, except by the portable backend's tactics
    "grouped" (torch._grouped_mm has no out=), "pairs" and "masked".
    One call at a time: give each thread or stream its own layer, weights are shared.
    Raises ShapeError, DTypeError, RoutingError, FormatError or BackendError for what does not fit.
    """

    def __init__(
        self,
        w: ExpertWeights,
        top_k: int,
        max_num_tokens: int = 8192,
        use_cuda_graph: bool = False,
        *,
        activation: str | Activation = "silu",
        input_format: str | None = None,
        expert_offset: int = 0,
        deterministic: bool = False,
        backend: str = "auto",
        tactic: Any = None,
        num_experts: int | None = None,
        dtype: torch.dtype | None = None,
        workspace: Workspace | None = None,
        tuner: AutoTuner | None = None,
        donate: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(w, ExpertWeights):
            raise DTypeError(f"w must be a moestro.ExpertWeights, got {type(w).__name__}")
        if isinstance(max_num_tokens, bool) or not isinstance(max_num_tokens, int) or max_num_tokens < 1:
            raise ShapeError(f"max_num_tokens must be a positive integer, got {max_num_tokens!r}")
        self.top_k, self.max_num_tokens, self.use_cuda_graph = top_k, max_num_tokens, bool(use_cuda_graph)
        self.options = Options(
            activation, input_format, expert_offset, deterministic, backend, tactic, num_experts
        )
        self.dtype = dtype or w.dense_dtype or torch.bfloat16
        make_problem(w, self.options, top_k=top_k, dtype=self.dtype)  # checks before the work of repacking
        self.weights = w.prepare(
            backend,
            activation=activation,
            input_format=input_format,
            top_k=top_k,
            dtype=self.dtype,
            donate=donate,
        )
        self.tuner = tuner if tuner is not None else AutoTuner.get()
        self.workspace = workspace if workspace is not None else Workspace(w.device)
        self._limits = Limits(
            w.hidden_size, self.weights.device, known_num_experts(self.options, w), top_k, max_num_tokens
        )
        self._operations: dict[Kind, Operation] = {}
        self._outputs: dict[torch.dtype, torch.Tensor] = {}
        self._scratch: dict[int, tuple[MoeRunner, Any, int]] = {}
        self._text = layer_text(self.options, top_k, max_num_tokens, self.use_cuda_graph)
        flat.remember(self.weights.tensors, self._text, self)
        if self.use_cuda_graph:
            self._reserve(self._operation(self.dtype))

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedMoE:
        """Another layer with its own weights and workspace, and the same tuner."""
        layer = FusedMoE(
            copy.deepcopy(self.weights, memo),
            self.top_k,
            self.max_num_tokens,
            self.use_cuda_graph,
            **vars(self.options),
            dtype=self.dtype,
            tuner=self.tuner,
        )
        return layer.train(self.training)

    # --- calls ---------------------------------------------------------------------------------------
    def forward(
        self,
        x: torch.Tensor | NVFP4,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [N, H], ids int32 or int64 [N, K], weights float32 [N, K] -> [N, H]; see fused_moe.

        Raises ShapeError, DTypeError, DeviceError or RoutingError, naming the argument, before any work.
        """
        if torch.compiler.is_compiling() or records_gradients(x, weights):
            return call_operator(x, ids, weights, self.weights, self._text, out)
        return self.run(x, ids, weights, out)

    def run(
        self,
        x: torch.Tensor | NVFP4,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor | None = None,
        *,
        owned: bool = True,
    ) -> torch.Tensor:
        """forward, never as an operator. owned=False: the result is a new tensor in any case."""
        check_call(self._limits, x, ids, weights, out)
        check_id_range(ids, self._limits.num_experts)
        num_tokens = x.shape[0]
        if out is None:
            out = self._output(x) if owned and self.use_cuda_graph else self._new(x)
        if num_tokens == 0:
            return out
        inputs = as_inputs(x, ids, weights, out)
        runner, tactic = self._operation("nvfp4" if isinstance(x, NVFP4) else x.dtype).pick(inputs)
        runner.use_workspace(self.workspace.at_least(self._scratch_bytes(num_tokens, runner, tactic)))
        runner.forward(inputs, tactic)
        return out

    def _scratch_bytes(self, num_tokens: int, runner: MoeRunner, tactic: Any) -> int:
        """runner.workspace_bytes(num_tokens, tactic), which takes longer than everything else here."""
        known = self._scratch.get(num_tokens)
        if known is not None and known[0] is runner and known[1] is tactic:
            return known[2]
        if len(self._scratch) >= KNOWN_SIZES:
            self._scratch.clear()
        nbytes = runner.workspace_bytes(num_tokens, tactic)
        self._scratch[num_tokens] = runner, tactic, nbytes
        return nbytes

    def _new(self, x: torch.Tensor | NVFP4) -> torch.Tensor:
        return torch.empty(x.shape, dtype=result_dtype(x), device=self._limits.device)

    def _output(self, x: torch.Tensor | NVFP4) -> torch.Tensor:
        """The owned output's first rows."""
        out = self._owned(result_dtype(x))[: x.shape[0]]
        try:
            check_out(x, out)
        except ShapeError:
            raise ShapeError(
                "x must not be the output that this layer owns (use_cuda_graph=True), got its last result; "
                "clone it, or pass out="
            ) from None
        return out

    def _owned(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in self._outputs:
            shape = (self.max_num_tokens, self._limits.hidden_size)
            with torch.inference_mode(False):  # a tensor that may be written in any mode
                self._outputs[dtype] = torch.empty(shape, dtype=dtype, device=self._limits.device)
        return self._outputs[dtype]

    def _operation(self, kind: Kind) -> Operation:
        """The operation for inputs of this kind, made when first needed."""
        operation = self._operations.get(kind)
        if operation is None:
            operation = self._operations[kind] = self._make_operation(kind)
        return operation

    def _make_operation(self, kind: Kind) -> Operation:
        options, dtype = self.options, kind
        if isinstance(kind, str):
            options, dtype = self._quantized_options(), torch.bfloat16
        assert isinstance(dtype, torch.dtype)
        problem = make_problem(
            self.weights, options, top_k=self.top_k, dtype=dtype, cuda_graph=self.use_cuda_graph
        )
        operation = Operation(
            self.weights,
            problem,
            self._limits,
            backend=options.backend,
            tactic=options.tactic,
            quantized_input=isinstance(kind, str),
            tuner=self.tuner,
        )
        for runner in operation.runners:
            runner.lend_workspace(self.workspace.at_least)
        return operation

    def _quantized_options(self) -> Options:
        fields = {**vars(self.options), "input_format": "nvfp4"}
        return Options(**fields)

    def _reserve(self, operation: Operation) -> None:
        """Scratch memory and an output for the largest call that any tactic may make."""
        inputs = self._example(self.max_num_tokens, device="meta")
        for runner in operation.runners:
            runner.reserve(inputs, [-1, *runner.get_valid_tactics(inputs, None)])
        self._owned(operation.problem.dtype)

    # --- tuning --------------------------------------------------------------------------------------
    @property
    def runners(self) -> list[MoeRunner]:
        """The backends that can run this layer, the preferred one first."""
        return self._operation(self.dtype).runners

    @property
    def tuning_config(self) -> TuningConfig:
        """The dynamic sizes, buckets and probes that the tuner uses for this layer."""
        return self._operation(self.dtype).tuning_config

    def decision(self, num_tokens: int) -> Decision | None:
        """What has been decided for this many tokens; None if nothing has."""
        inputs = self._example(num_tokens)
        return self.tuner.decision(OP, self.runners, self.tuning_config, inputs)

    def tune(
        self,
        max_num_tokens: int | None = None,
        budget_s: float | None = None,
        probes: Sequence[Probe | Distribution] | None = None,
        progress: bool = True,
        *,
        group: Any = None,
        strategy: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Decide runner and tactic for every bucket up to `max_num_tokens` (the layer's by default).

        budget_s: seconds to spend; what is decided by then holds. probes: how inputs are synthesised, as
        routing distributions or tuning.Probe; by default i.i.d. uniform and Zipf(1.0). Decisions go to the
        tuner's store. group: the ranks that tune their layers together, all of them by this call; strategy,
        timeout_s: as in autotune(). Raises BackendError for a layer with a fixed tactic, ShapeError for more tokens than
        the layer takes.
        """
        size = self.max_num_tokens if max_num_tokens is None else max_num_tokens
        if not 0 < size <= self.max_num_tokens:
            raise ShapeError(
                f"max_num_tokens must be in 1..{self.max_num_tokens} of this layer, got {size!r}"
            )
        if self.options.tactic is not None:
            raise BackendError(f"tactic must be None for a layer to be tuned, got {self.options.tactic!r}")
        operation = self._operation(self.dtype)
        chosen = None if probes is None else as_probes(operation.problem, probes)
        with self.tuner.autotune(
            True,
            budget_s=budget_s,
            probes=chosen,
            progress=progress,
            group=group,
            strategy=strategy,
            timeout_s=timeout_s,
        ):
            self.tuner.choose_one(OP, operation.runners, operation.tuning_config, self._example(size))

    def _example(self, num_tokens: int, device: torch.device | str | None = None) -> list[torch.Tensor]:
        """Inputs of a call with this many tokens: shapes and dtypes, no values."""
        device = device or self._limits.device
        x = torch.empty((num_tokens, self._limits.hidden_size), dtype=self.dtype, device=device)
        ids = torch.zeros((num_tokens, self.top_k), dtype=torch.int32, device=device)
        weights = torch.zeros((num_tokens, self.top_k), dtype=torch.float32, device=device)
        return as_inputs(x, ids, weights, torch.empty_like(x))

    def extra_repr(self) -> str:
        """What print(layer) shows."""
        return f"{self.weights!r}, top_k={self.top_k}, max_num_tokens={self.max_num_tokens}, {self.options}"
