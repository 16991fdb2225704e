"""A bound call: one problem on one set of weights, from a caller's tensors to a backend's launch.

fused_moe, FusedMoE and the torch operators all come here. A call is checked (by one compiled guard when all is well),
the tuner's pick is looked up, and the plan for its number of tokens is replayed: what the runner has bound for this
pick, and the bytes of scratch memory that it needs. A plan is made anew where the pick has changed, or where the runner
says that what it bound has (see MoeRunner.bind). Any number of threads may call: each call in flight has its buffer.

Weights know nothing of this: what fused_moe has bound to some is kept here, until they are gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from moestro.errors import BackendError
from moestro.formats import NVFP4
from moestro.kernels import backends
from moestro.kernels.problem import Held, MoeProblem, MoeRunner, Replay, dense_dtype
from moestro.moe import devices
from moestro.moe.checks import check_call, check_id_range, check_out, debugging, overlap, result_dtype
from moestro.moe.guard import KNOWN_SIZES, CallGuard
from moestro.moe.options import Options, limits_of, make_problem
from moestro.moe.tuning_config import OP, tuning_config
from moestro.moe.weights import ExpertWeights
from moestro.moe.workspace import Workspace, shared
from moestro.tuning import AutoTuner, TuningConfig

Choice = tuple[MoeRunner, Any]
Pick = Callable[[Sequence[Any]], Choice]


class Plan(NamedTuple):
    """What a call of so many tokens replays."""

    choice: Choice
    nbytes: int
    replay: Replay


class BoundCall:
    """Runs calls of one problem: with a fixed tactic, or with the one that the tuner has decided on.

    Raises what make_problem raises for options that do not fit the weights. Holds none of `w` but its tensors.
    """

    def __init__(
        self,
        w: ExpertWeights,
        options: Options,
        *,
        top_k: int,
        dtype: torch.dtype,
        max_num_tokens: int | None = None,
        quantized_input: bool = False,
        cuda_graph: bool = False,
        tuner: AutoTuner | None = None,
        workspace: Workspace | None = None,
        cache: dict[Any, Any] | None = None,
    ) -> None:
        self.problem = make_problem(w, options, top_k=top_k, dtype=dtype, cuda_graph=cuda_graph)
        self.device = w.device
        self.limits = limits_of(w, options, self.problem.top_k, max_num_tokens)
        self.tuner = tuner if tuner is not None else AutoTuner.get()
        self.workspace = workspace if workspace is not None else shared(w.device)
        self.tuning_config: TuningConfig = tuning_config(self.problem, quantized_input=quantized_input)
        self._guard, self._guard_with_out = CallGuard(), CallGuard()
        self._elsewhere = devices.elsewhere(w.device)
        self._plans: dict[int, Plan] = {}
        self._fixed: dict[int, Choice] = {}
        self._tactic = options.tactic
        with devices.on(w.device):
            self.runners = _runners(Held.of(w), self.problem, options.backend, {} if cache is None else cache)
        for runner in self.runners:
            runner.lend_workspace(self.workspace.for_trials)
        self._pick: Pick = self.tuner.bind(OP, self.runners, self.tuning_config)
        if options.tactic is not None:
            self._pick = self._fixed_choice

    def __call__(
        self,
        x: torch.Tensor | NVFP4,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor | None = None,
        owned: Callable[[Any], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """[N, H], in `out` where it is given, else in owned(x) where that is; see fused_moe.

        Raises, naming the argument, before any work.
        """
        try:
            num_tokens = x.shape[0]
        except (AttributeError, IndexError, TypeError):
            num_tokens = -1  # no call is known of so many: the checks say what is wrong
        usual = False
        if out is None:
            for same in self._guard.by_size.get(num_tokens, ()):
                if usual := same(x, ids, weights):
                    break
            else:
                check_call(self.limits, x, ids, weights)
                self._guard.learn(x, ids, weights)
            if owned is not None:
                out = owned(x)
                if overlap(out, ids, weights):
                    check_out(x, out, ids=ids, weights=weights)
            elif usual:  # x is a tensor: 1.5 µs less than empty()
                out = torch.empty_like(x)  # type: ignore[arg-type]
            else:
                out = torch.empty(x.shape, dtype=result_dtype(x), device=self.device)
        else:
            for same in self._guard_with_out.by_size.get(num_tokens, ()):
                if usual := same(x, ids, weights, out):
                    break
            if not usual or overlap(out, x, ids, weights):  # type: ignore[arg-type]
                check_call(self.limits, x, ids, weights, out)
                self._guard_with_out.learn(x, ids, weights, out)
        if debugging():
            check_id_range(ids, self.limits.num_experts)
        if num_tokens:
            inputs = [x, ids, weights, out] if usual else as_inputs(x, ids, weights, out)
            if self._elsewhere is not None and self._elsewhere():
                with devices.current(self.device):
                    self._run(num_tokens, inputs)
            else:
                self._run(num_tokens, inputs)
        return out

    def _run(self, num_tokens: int, inputs: Sequence[Any]) -> None:
        choice = self._pick(inputs)
        plan = self._plans.get(num_tokens)
        if plan is None or (plan.choice is not choice and plan.choice != choice):
            plan = self._bind(num_tokens, inputs, choice)
        workspace = self.workspace
        while True:
            buffer = workspace.take(plan.nbytes)
            try:
                if plan.replay(inputs, buffer):
                    return
            finally:
                workspace.give(buffer)
            plan = self._bind(num_tokens, inputs, choice)

    def _bind(self, num_tokens: int, inputs: Sequence[Any], choice: Choice) -> Plan:
        runner, tactic = choice
        with devices.on(self.device):
            replay = runner.bind(inputs, tactic)
            plan = Plan(choice, runner.workspace_bytes(num_tokens, tactic), replay)
        self.release()
        if len(self._plans) >= KNOWN_SIZES:
            self._plans.clear()
        self._plans[num_tokens] = plan
        return plan

    def release(self) -> None:
        """Let go of the memory that candidates were measured in."""
        for runner in self.runners:
            runner.use_workspace(None)

    def reserve(self, inputs: Sequence[Any]) -> None:
        """Have scratch memory for calls like this one, whatever tactic they will have, before a CUDA graph's
        capture.
        """
        with devices.on(self.device):
            needed = [
                runner.workspace_bytes(inputs[0].shape[0], tactic)
                for runner in self.runners
                for tactic in (-1, *runner.get_valid_tactics(inputs, None))
            ]
            self.workspace.reserve(max(needed))

    def _fixed_choice(self, inputs: Sequence[Any]) -> Choice:
        num_tokens = inputs[0].shape[0]
        choice = self._fixed.get(num_tokens)
        if choice is None:
            if len(self._fixed) >= KNOWN_SIZES:
                self._fixed.clear()
            choice = self._fixed[num_tokens] = self._runner_of_tactic(inputs), self._tactic
        return choice

    def _runner_of_tactic(self, inputs: Sequence[Any]) -> MoeRunner:
        reasons = []
        for runner in self.runners:
            try:
                runner.check_tactic(inputs, self._tactic)
            except BackendError as error:
                reasons.append(str(error))
            else:
                return runner
        raise BackendError("; ".join(reasons))


def _runners(experts: Held, problem: MoeProblem, backend: str, cache: dict[Any, Any]) -> list[MoeRunner]:
    """The backends that can, the preferred one first; of a rank without experts one that packs nothing."""
    if problem.num_local_experts == 0:
        backends.resolve(backend, problem)  # a backend that is unknown, or cannot, is an error here, too
        backend = "portable"
    return [_runner(cls, problem, experts, cache) for cls in backends.resolve(backend, problem)]


def _runner(cls: type[MoeRunner], problem: MoeProblem, experts: Held, cache: dict[Any, Any]) -> MoeRunner:
    """A runner on these experts; on a copy in its layout, which stays in the cache, where it needs one."""
    if cls.strided and not cls.needs_prepare(problem):
        return cls(problem, experts)
    key = ("prepared", cls.backend, cls.prepared_layout(problem), problem.activation.gated)
    prepared: Held | None = cache.get(key)
    if prepared is None:
        gate_up, down = cls.prepare(problem, experts)
        prepared = experts._replace(gate_up=gate_up, down=down)
        prepared = cache[key] = prepared if cls.strided else prepared.contiguous()
    weight_dtype = dense_dtype(prepared.gate_up)
    return cls(replace(problem, weight_layout=prepared.gate_up.layout, weight_dtype=weight_dtype), prepared)


def gradients_wanted(x: Any, weights: Any, w: ExpertWeights) -> bool:
    """Whether autograd, if it is on, would expect a derivative in x, in weights, or in what w was made from.

    Raises BackendError for a tangent of forward-mode differentiation, which would be dropped.
    """
    if forward_ad._current_level >= 0:
        _refuse_tangents(x=x, weights=weights)
    if w.origins and w.wanting_gradients():
        return True
    return getattr(x, "requires_grad", False) or getattr(weights, "requires_grad", False)


def _refuse_tangents(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise BackendError(
                f"{name} must have no tangent, and has one: moestro.fused_moe has no forward-mode derivative "
                "(torch.autograd.forward_ad, torch.func.jvp); take its gradient backward"
            )


def as_inputs(
    x: torch.Tensor | NVFP4, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
) -> list[torch.Tensor]:
    """A call's tensors as runners take them; int64 ids become int32."""
    if ids.dtype != torch.int32:
        ids = ids.clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)  # not wrapped around into range
    if not isinstance(x, NVFP4):
        return [x, ids, weights, out]
    num_tokens, global_scale = x.shape[0], x.global_scale
    if global_scale.shape != (num_tokens,):
        global_scale = x.row_global_scale().expand(num_tokens, 1).reshape(num_tokens)
    return [x.packed, ids, weights, out, x.scale, global_scale]


# --- what fused_moe has bound to weights ------------------------------------------------------------------

_bound: dict[int, tuple[weakref.ref[ExpertWeights], dict[Any, Any]]] = {}  # by id(w), while w lives


def cache_of(w: ExpertWeights) -> dict[Any, Any]:
    """What is kept of some weights, by what it was made for; it goes with them."""
    found = _bound.get(id(w))
    if found is None:
        key = id(w)
        found = _bound[key] = weakref.ref(w, lambda _: _bound.pop(key, None)), {}
    return found[1]


def run(
    x: torch.Tensor | NVFP4,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w: ExpertWeights,
    options: tuple[Any, ...],
    out: torch.Tensor | None,
) -> torch.Tensor:
    """A call with these options (Options' fields in order), bound to the weights when it first comes."""
    cache = cache_of(w)
    try:
        bound = cache.get((options, ids.shape[1], x.dtype if isinstance(x, torch.Tensor) else NVFP4))
    except (AttributeError, IndexError, TypeError):
        bound = None  # arguments so wrong that there is no key: the checks say what is wrong
    if bound is None:
        bound = _first(x, ids, weights, w, options, cache)
    result: torch.Tensor = bound(x, ids, weights, out)
    return result


def _first(
    x: Any, ids: Any, weights: Any, w: ExpertWeights, options: tuple[Any, ...], cache: dict[Any, Any]
) -> BoundCall:
    """The bound call for these arguments, once they and the options are found to fit."""
    fields, quantized = Options(*options), isinstance(x, NVFP4)
    check_call(limits_of(w, fields), x, ids, weights)
    made = BoundCall(
        w, fields, top_k=ids.shape[1], dtype=result_dtype(x), quantized_input=quantized, cache=cache
    )
    bound: BoundCall = cache.setdefault((options, ids.shape[1], NVFP4 if quantized else x.dtype), made)
    return bound
