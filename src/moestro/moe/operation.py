"""An operation: one problem on one set of weights, with the runners that can and who picks one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from moestro.errors import BackendError
from moestro.formats import NVFP4
from moestro.kernels import backends
from moestro.kernels.problem import MoeProblem, MoeRunner
from moestro.moe.checks import Limits
from moestro.moe.tuning_config import OP, tuning_config
from moestro.moe.weights import ExpertWeights
from moestro.tuning import AutoTuner, TuningConfig

Pick = Callable[[Sequence[Any]], tuple[Any, Any]]
CHECKED_SIZES = 256  # token counts for which a fixed tactic's validity is remembered


class Operation:
    """Runs calls of one problem. With a fixed tactic, or with the one that the tuner has decided on."""

    def __init__(
        self,
        w: ExpertWeights,
        problem: MoeProblem,
        limits: Limits,
        *,
        backend: str = backends.AUTO,
        tactic: Any = None,
        quantized_input: bool = False,
        tuner: AutoTuner | None = None,
    ) -> None:
        self.problem = problem
        self.limits = limits
        self.runners = [_make_runner(cls, problem, w) for cls in backends.resolve(backend, problem)]
        self.tactic = tactic
        self.tuning_config: TuningConfig = tuning_config(problem, quantized_input=quantized_input)
        self.tuner = tuner if tuner is not None else AutoTuner.get()
        self._fixed: dict[int, MoeRunner] = {}
        self._pick: Pick = self.tuner.bind(OP, self.runners, self.tuning_config)

    def pick(self, inputs: Sequence[Any]) -> tuple[MoeRunner, Any]:
        """The runner and tactic for these inputs (see `as_inputs`)."""
        if self.tactic is None:
            return self._pick(inputs)
        num_tokens = inputs[0].shape[0]
        runner = self._fixed.get(num_tokens)
        if runner is None:
            if len(self._fixed) >= CHECKED_SIZES:
                self._fixed.clear()
            runner = self._fixed[num_tokens] = self._runner_of_tactic(inputs)
        return runner, self.tactic

    def _runner_of_tactic(self, inputs: Sequence[Any]) -> MoeRunner:
        reasons = []
        for runner in self.runners:
            try:
                runner.check_tactic(inputs, self.tactic)
            except BackendError as error:
                reasons.append(str(error))
            else:
                return runner
        raise BackendError("; ".join(reasons))


def _make_runner(cls: type[MoeRunner], problem: MoeProblem, w: ExpertWeights) -> MoeRunner:
    """A runner on these weights; on a copy in its layout, which stays with them, where it needs one."""
    if not cls.needs_prepare(problem):
        return cls(problem, w)
    key = ("prepared", cls.backend, problem.activation.gated)
    prepared: ExpertWeights | None = w.operations.get(key)
    if prepared is None:
        prepared = w.operations[key] = w.with_tensors(*cls.prepare(problem, w))
    return cls(replace(problem, weight_layout=prepared.layout, weight_dtype=prepared.dense_dtype), prepared)


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
