"""FusedMoE: an MoE layer that owns its workspace, its runners and their tuning.

Eagerly a call is: checks, a look-up of the decision by the number of tokens, one runner's forward. Under
torch.compile it is the operator moestro::fused_moe, which finds this layer again by its weights' tensors.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling

from moestro.errors import (
    BackendError,
    DTypeError,
    FormatError,
    MoestroError,
    RoutingError,
    ShapeError,
    as_count,
    as_flag,
    as_optional,
)
from moestro.formats import NVFP4
from moestro.kernels.activations import Activation
from moestro.kernels.problem import MoeRunner
from moestro.moe import devices, flat
from moestro.moe.call import BoundCall, as_inputs, cache_of, gradients_wanted
from moestro.moe.checks import check_call, overlap, result_dtype
from moestro.moe.options import Options, limits_of, make_problem
from moestro.moe.sources import Sources
from moestro.moe.torch_op import call_operator, layer_text, recorded
from moestro.moe.tuning_config import OP, as_probes
from moestro.moe.weights import ExpertWeights
from moestro.moe.workspace import Workspace, shared
from moestro.routing import Distribution
from moestro.tuning import AutoTuner, Decision, Probe, TuningConfig
from moestro.tuning.progress import Progress
from moestro.tuning.spec.buckets import checked_buckets

Kind = torch.dtype | str  # of x: its dtype, or "nvfp4"
# what no copy and no pickle has
OF_PROCESS = {"tuner", "workspace", "_calls", "_outputs", "_text", "_sources", "_marks", "_refreshing"}


class Facts(NamedTuple):
    """An input as a tuning key sees it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Outputs(threading.local):
    """The outputs that a layer owns, of each thread."""

    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, torch.Tensor] = {}


class FusedMoE(torch.nn.Module):
    """The experts of an MoE layer: y = layer(x, ids, weights).

    w: the experts' weights. They are repacked for the preferred backend (`layer.weights`); drop `w` to keep
    one copy. They are no parameters: the layer stays where they are, and module.to() does not move it. While the
    tensors of `w` live, a write to them that torch counts is followed (see refresh); `donate` ends that.
    top_k, max_num_tokens: K, and the largest N.
    use_cuda_graph: the layer will be captured. It then returns a view of an output that it owns, valid until
    its next call in the same thread (pass out= for your own), all scratch memory is there from the start, and only
    tactics that never wait for the device take part. own_output=False: it owns none, a call without out= makes a new
    tensor (one that always gets out= would hold max_num_tokens rows for nothing).
    activation, input_format, expert_offset, deterministic, batch_invariant, backend, tactic, num_experts: as in
    fused_moe.
    dtype: of x when it is not known yet (tuning); by default that of dense weights, else bf16.
    workspace: scratch memory of its own or of some layers; by default that of all layers on the device.
    tuner: the default one if None. donate: w may be repacked in its own memory, and must not be used again.

    Past the first call nothing of size is allocated but the result, except by the portable backend's tactics
    "grouped" (torch._grouped_mm has no out=), "pairs" and "masked".
    Safe to call from several threads and on several streams. Copies and pickles (torch.save) have weights of their own;
    a pickle does not have the tuner, and is read with the default one.
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
        batch_invariant: bool = False,
        backend: str = "auto",
        tactic: Any = None,
        num_experts: int | None = None,
        dtype: torch.dtype | None = None,
        workspace: Workspace | None = None,
        tuner: AutoTuner | None = None,
        donate: bool = False,
        own_output: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(w, ExpertWeights):
            raise DTypeError(f"w must be a moestro.ExpertWeights, got {type(w).__name__}")
        self.top_k = as_count("top_k", top_k, RoutingError)
        self.max_num_tokens = as_count("max_num_tokens", max_num_tokens, ShapeError)
        self.use_cuda_graph = as_flag("use_cuda_graph", use_cuda_graph, BackendError)
        self.own_output = as_flag("own_output", own_output, BackendError) and self.use_cuda_graph
        donate = as_flag("donate", donate, BackendError)
        tuner = as_optional("tuner", tuner, AutoTuner, BackendError)
        workspace = as_optional("workspace", workspace, Workspace, BackendError)
        self.options = Options(
            activation,
            input_format,
            expert_offset,
            deterministic,
            batch_invariant,
            backend,
            tactic,
            num_experts,
        )
        self.dtype = dtype or w.dense_dtype or torch.bfloat16
        make_problem(w, self.options, top_k=self.top_k, dtype=self.dtype)  # before the work of repacking
        self.weights = self._packed(w, donate)
        self._sources = None if donate else Sources.of(w, self.weights)
        self._marks = () if self._sources is None else self._sources.marks
        self._copied = self.weights is not w
        self.tuner = tuner if tuner is not None else AutoTuner.get()
        self.workspace = workspace if workspace is not None else shared(w.device)
        self._bind()

    def _packed(self, w: ExpertWeights, donate: bool = False) -> ExpertWeights:
        options = self.options
        return w.prepare(
            options.backend,
            activation=options.activation,
            input_format=options.input_format,
            top_k=self.top_k,
            dtype=self.dtype,
            batch_invariant=options.batch_invariant,
            donate=donate,
        )

    def refresh(self) -> None:
        """Pack the weights again from the tensors that this layer was made from, into the memory that it has.

        A call does it by itself where torch has counted a write to one of them (copy_, mul_, an optimiser's step);
        call it after writes that are not counted (through `.data`, under inference_mode) and before replaying a
        captured CUDA graph. A layer that runs its weights as they are has nothing to do. Raises MoestroError where
        the tensors are gone, or were donated.
        """
        if self._sources is None:
            if self._copied:
                raise MoestroError(
                    "the layer's source tensors are not known: they were donated, or it is a copy"
                )
            return
        with self._refreshing:
            fresh = self._packed(self._sources.again())
            for mine, new in zip(self.weights.tensors, fresh.tensors, strict=True):
                if mine is not new and mine.data_ptr() != new.data_ptr():
                    mine.copy_(new)
            self._marks = self._sources.marks

    def _follow(self) -> None:
        """What refresh() does, for a thread that finds the weights written."""
        with self._refreshing:
            if self._sources is not None and self._sources.changed():
                self.refresh()

    def _bind(self) -> None:
        """What is made of the rest, also of a layer that was pickled."""
        self._calls: dict[Kind, BoundCall] = {}
        self._refreshing = threading.RLock()
        self._outputs = _Outputs()
        self._text = layer_text(self.options, self.top_k, self.max_num_tokens, self.use_cuda_graph)
        flat.remember(self.weights.tensors, self._text, self)
        if self.use_cuda_graph:
            bound = self._call(self.dtype)
            bound.reserve(self._example(self.max_num_tokens, device="meta"))
            if self.own_output:
                self._owned(bound.problem.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedMoE:
        """Another layer with its own weights, and the same tuner."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = copy.deepcopy(self.__getstate__(), memo)
        twin.__setstate__({**state, "tuner": self.tuner})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """The state without what belongs to this process: bound calls, scratch memory, the tuner."""
        return {name: value for name, value in self.__dict__.items() if name not in OF_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._sources, self._marks, self._copied = None, (), True  # its weights are its own
        self.tuner = state.get("tuner") or AutoTuner.get()
        self.workspace = shared(self.weights.device)
        self._bind()

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
        w = self.weights
        if w.gate_up_pre_scale is not None:
            x = w.scaled_input(x)
        if is_compiling():
            return call_operator(x, ids, weights, w, self._text, out)
        if not torch.is_grad_enabled() or not gradients_wanted(x, weights, w):
            return self.run(x, ids, weights, out)
        return recorded(x, ids, weights, w, out, self._text)

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
        for reference, version in self._marks:  # here, for its time: 0.07 us a tensor
            tensor = reference()
            if tensor is not None and tensor._version != version:
                self._follow()
                break
        try:
            bound = self._calls[x.dtype]  # type: ignore[union-attr]
        except (AttributeError, KeyError):
            bound = None  # left before _first, whose errors must not seem to come of this one
        if bound is None:
            bound = self._first(x, ids, weights)
        if out is None and owned and self.own_output:
            return bound(x, ids, weights, None, self._output)
        return bound(x, ids, weights, out)

    def _first(self, x: Any, ids: Any, weights: Any) -> BoundCall:
        """The bound call for such an x, once the arguments are found to fit; also where x is NVFP4."""
        check_call(limits_of(self.weights, self.options, self.top_k, self.max_num_tokens), x, ids, weights)
        return self._call(NVFP4.format if isinstance(x, NVFP4) else x.dtype)

    def _output(self, x: torch.Tensor | NVFP4) -> torch.Tensor:
        """The owned output's first rows."""
        out = self._owned(result_dtype(x))[: x.shape[0]]
        if overlap(out, x.packed if isinstance(x, NVFP4) else x):
            raise ShapeError(
                "x must not be the output that this layer owns (use_cuda_graph=True), got its last result; "
                "clone it, or pass out="
            )
        return out

    def _owned(self, dtype: torch.dtype) -> torch.Tensor:
        held = self._outputs.by_dtype
        if dtype not in held:
            shape = (self.max_num_tokens, self.weights.hidden_size)
            with torch.inference_mode(False):  # a tensor that may be written in any mode
                held[dtype] = torch.empty(shape, dtype=dtype, device=self.weights.device)
        return held[dtype]

    def _call(self, kind: Kind) -> BoundCall:
        """The bound call for inputs of this kind, made when first needed."""
        bound = self._calls.get(kind)
        if bound is not None:
            return bound
        options, dtype = self.options, kind
        if isinstance(kind, str):
            if options.input_format not in (None, kind):
                raise FormatError(
                    f"x must be a tensor for a layer of input_format={options.input_format!r}, got {kind}"
                )
            options, dtype = replace(options, input_format=kind), torch.bfloat16
        assert isinstance(dtype, torch.dtype)
        made = BoundCall(
            self.weights,
            options,
            top_k=self.top_k,
            dtype=dtype,
            max_num_tokens=self.max_num_tokens,
            quantized_input=isinstance(kind, str),
            cuda_graph=self.use_cuda_graph,
            tuner=self.tuner,
            workspace=self.workspace,
            cache=cache_of(self.weights),
        )
        return self._calls.setdefault(kind, made)

    # --- tuning --------------------------------------------------------------------------------------
    @property
    def runners(self) -> list[MoeRunner]:
        """The backends that can run this layer, the preferred one first."""
        return self._call(self.dtype).runners

    @property
    def tuning_config(self) -> TuningConfig:
        """The dynamic sizes, buckets and probes that the tuner uses for this layer."""
        return self._call(self.dtype).tuning_config

    def decision(self, num_tokens: int) -> Decision | None:
        """What has been decided for this many tokens; None if nothing has."""
        count = as_count("num_tokens", num_tokens, ShapeError, least=0)
        meta = self._example(count, device="meta")
        inputs = [Facts(tuple(t.shape), t.dtype, self.weights.device) for t in meta]
        return self.tuner.decision(OP, self.runners, self.tuning_config, inputs)

    def tune(
        self,
        max_num_tokens: int | None = None,
        budget_s: float | None = None,
        probes: Sequence[Probe | Distribution] | None = None,
        progress: Progress = True,
        *,
        buckets: Sequence[int] | None = None,
        group: Any = None,
        strategy: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Decide runner and tactic for every bucket up to `max_num_tokens` (the layer's by default).

        budget_s: seconds to spend; what is decided by then holds. probes: how inputs are synthesised, as
        routing distributions or tuning.Probe; by default those of `tuning_config`. progress: True draws a line, a
        function gets lines, a tuning.progress.Listener stages and steps. buckets: these numbers of tokens instead
        of the scheme's, each serving up to itself. group, strategy, timeout_s: the ranks that tune
        their layers together, all by this call, as in autotune(). Decisions go to the store. Raises BackendError for a
        layer with a fixed tactic, ShapeError for more tokens than the layer takes.
        """
        if buckets is not None:
            buckets = checked_buckets(buckets, "buckets")
        size = self._tuned_up_to(max_num_tokens, buckets)
        if self.options.tactic is not None:
            raise BackendError(f"tactic must be None for a layer to be tuned, got {self.options.tactic!r}")
        bound = self._call(self.dtype)
        chosen = None if probes is None else as_probes(bound.problem, probes)
        if not self.weights.num_experts:
            return  # a rank without experts has nothing to choose
        with (
            devices.current(self.weights.device),
            self.tuner.autotune(
                True,
                budget_s=budget_s,
                probes=chosen,
                progress=progress,
                tuning_buckets=buckets,
                round_up=None if buckets is None else True,
                ahead=True,
                group=group,
                strategy=strategy,
                timeout_s=timeout_s,
            ),
        ):
            self.tuner.choose_one(OP, bound.runners, bound.tuning_config, self._example(size))
        bound.release()

    def _tuned_up_to(self, max_num_tokens: int | None, buckets: Sequence[int] | None) -> int:
        size = self.max_num_tokens
        if max_num_tokens is not None:
            size = as_count("max_num_tokens", max_num_tokens, ShapeError, least=None)
        if not 0 < size <= self.max_num_tokens:
            raise ShapeError(
                f"max_num_tokens must be in 1..{self.max_num_tokens} of this layer, got {size!r}"
            )
        if buckets is not None and buckets[-1] > self.max_num_tokens:
            raise ShapeError(
                f"buckets must be at most this layer's max_num_tokens={self.max_num_tokens}, got {buckets[-1]}"
            )
        return size

    def _example(self, num_tokens: int, device: torch.device | str | None = None) -> list[torch.Tensor]:
        """Inputs of a call with this many tokens: shapes and dtypes, no values."""
        device = device or self.weights.device
        x = torch.empty((num_tokens, self.weights.hidden_size), dtype=self.dtype, device=device)
        ids = torch.zeros((num_tokens, self.top_k), dtype=torch.int32, device=device)
        weights = torch.zeros((num_tokens, self.top_k), dtype=torch.float32, device=device)
        return as_inputs(x, ids, weights, torch.empty_like(x))

    def extra_repr(self) -> str:
        """What print(layer) shows."""
        return f"{self.weights!r}, top_k={self.top_k}, max_num_tokens={self.max_num_tokens}, {self.options}"
