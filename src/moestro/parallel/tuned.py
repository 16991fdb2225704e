"""Which way for how many tokens: tuned like any operation, by a group, and then fixed.

Ranks that take different ways wait for each other for ever, so a decision serves only when all ranks have the
same: AgreedWays reads the tuner's records once, compares them over the group, and keeps them whatever a tuner
learns later.
"""

from __future__ import annotations

import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moestro.errors import TuningWarning
from moestro.moe.tuning_config import tuning_config
from moestro.parallel.ways import Way
from moestro.tuning import AutoTuner, DynamicTensorSpec, TunableRunner, TuningConfig
from moestro.tuning.measure.scope import measurement

if TYPE_CHECKING:
    from moestro.parallel.expert_parallel import ExpertParallel

__all__ = [
    "OP",
    "AgreedWays",
    "LockstepTimer",
    "WayRunner",
    "tune_ways",
    "way_config",
    "way_example",
    "way_tuner",
]

OP = "moestro.expert_parallel"
DEFAULT_WAY = "gather"
WARM_UPS = 3


class WayRunner(TunableRunner):
    """Expert parallelism as the tuner sees it: inputs [x, ids, weights, out] of one rank, tactics are ways."""

    def __init__(self, ep: ExpertParallel) -> None:
        problem = ep.layer.runners[0].problem
        self.sizes = (problem.num_experts, problem.top_k, problem.hidden_size, problem.intermediate_size)
        self.ranks, self.payload, self.weight_format = ep.peers.size, ep.payload, problem.weight_format
        self.transport = type(ep.ways["dispatch"]).__name__
        self.slots = tuple(len(ep.placement.slots(rank)) for rank in range(ep.peers.size))
        self._ep = ep

    def kernel_sources(self) -> list[Path]:
        """What the ways' speed depends on."""
        return [
            Path(__file__).with_name(f"{name}.py")
            for name in ("gather", "dispatch", "symmetric", "push", "peers")
        ]

    def get_valid_tactics(self, inputs: Sequence[Any], profile: Any) -> list[str]:
        return [name for name in self._ep.ways if name != DEFAULT_WAY]

    def forward(
        self, inputs: Sequence[Any], tactic: Any = -1, do_preparation: bool = False, **kwargs: Any
    ) -> Any:
        x, ids, weights, out = inputs
        way: Way = self._ep.ways[DEFAULT_WAY if tactic == -1 else tactic]
        return self._ep.run(way, x, ids, weights, out, x.shape[0])


class LockstepTimer:
    """Times calls with collectives inside: the same number of runs on every rank, which start together."""

    def __init__(self, ep: ExpertParallel) -> None:
        self._peers, self._device = ep.peers, ep.layer.weights.device
        self._graph = ep.use_cuda_graph and self._device.type == "cuda"
        self.name = f"lockstep-{'cuda-graph' if self._graph else self._device.type}"

    def prepare(self, call: Callable[[], Any]) -> Callable[[], float]:
        with measurement():
            for _ in range(WARM_UPS):
                call()
        if self._device.type != "cuda":
            return lambda: self._on_host(call)
        torch.cuda.synchronize(self._device)
        if self._graph:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"), measurement():
                call()
            return lambda: self._on_device(graph.replay)
        return lambda: self._on_device(call)

    def _on_host(self, call: Callable[[], Any]) -> float:
        self._peers.numbers(0, self._device)
        with measurement():
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

    def _on_device(self, served: Callable[[], Any]) -> float:
        cuda: Any = torch.cuda  # whose events have no types
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        self._peers.all_gather(torch.zeros(1, device=self._device))  # on the stream: all start together
        with measurement():
            start.record()
            served()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


def way_buckets(most: int) -> list[int]:
    """Powers of 4 up to a size, and the size: ways cross over slowly."""
    return sorted({4**k for k in range(16) if 4**k <= most} | {most})


def _bucket_of(size: int) -> int:
    """The next power of 4."""
    return int(next(4**k for k in range(32) if 4**k >= size))


def way_config(ep: ExpertParallel) -> TuningConfig:
    """One dynamic size, a rank's tokens, at way_buckets; routing over all ranks' experts."""
    problem = ep.layer.runners[0].problem
    config = tuning_config(replace(problem, num_experts=ep.placement.num_experts))
    (spec,) = config.dynamic_tensor_specs
    sparse = DynamicTensorSpec(spec.input_idx, spec.dim_idx, way_buckets, _bucket_of)
    return replace(config, dynamic_tensor_specs=(sparse,))


def way_tuner(ep: ExpertParallel) -> AutoTuner:
    """The layer's store with a clock that keeps ranks in step."""
    tuner = ep.layer.tuner
    # Races of two with collectives: no output check (ways round differently), no isolation, a second a bucket: some
    # 400 rounds of decoding on two GPUs, where 40 left a gain of 8 % undecided (docs/distributed.md).
    most = {
        "max_rounds": min(400, tuner.policy.max_rounds),
        "max_seconds": min(1.0, tuner.policy.max_seconds or 1.0),
    }
    policy = replace(tuner.policy, verify=False, isolate=False, **most)  # type: ignore[arg-type]
    return AutoTuner(tuner.store, LockstepTimer(ep), policy)


def way_example(ep: ExpertParallel, num_tokens: int) -> list[torch.Tensor]:
    """Inputs of one rank with so many tokens: shapes and dtypes, no values."""
    layer = ep.layer
    one = torch.zeros((1, 1), dtype=layer.dtype, device=layer.weights.device)
    x = one.expand(num_tokens, layer.weights.hidden_size)  # shapes and dtypes count, not values
    ids = one.to(torch.int32).expand(num_tokens, layer.top_k)
    return [x, ids, one.float().expand(ids.shape), x]


def tune_ways(
    ep: ExpertParallel,
    max_num_tokens: int,
    timeout_s: float | None = None,
    buckets: Sequence[int] | None = None,
) -> None:
    """Race the ways at every bucket up to so many tokens a rank (or at these), all ranks in step."""
    runner, config = WayRunner(ep), way_config(ep)
    tuner = way_tuner(ep)
    with tuner.autotune(
        True, group=ep.peers.group, timeout_s=timeout_s, crossover=False, tuning_buckets=buckets
    ):
        tuner.choose_one(OP, [runner], config, way_example(ep, max_num_tokens))


class AgreedWays:
    """The way for a number of tokens, as all ranks have it; the default where they have nothing in common."""

    def __init__(self, ep: ExpertParallel) -> None:
        self.bounds: list[int] = []
        self.ways: list[str] = []
        if ep.way != "auto":
            return
        mine = _decided(ep)
        said = ep.peers.link.exchange("ways", mine)
        if any(one != said[0] for one in said):
            warnings.warn(
                f"{OP}: the ranks' stores have different decisions about ways, {DEFAULT_WAY!r} is used; tune() "
                "makes one for all",
                TuningWarning,
                stacklevel=3,
            )
            return
        self.bounds = [bound for bound, _ in said[0]]
        self.ways = [way for _, way in said[0]]

    def find(self, num_tokens: int) -> str:
        """The way of the next measured size, of the largest beyond."""
        if not self.bounds:
            return DEFAULT_WAY
        return self.ways[min(bisect_left(self.bounds, num_tokens), len(self.bounds) - 1)]


def _decided(ep: ExpertParallel) -> list[list[Any]]:
    """[bucket, way] of the decisions in the tuner's store, ascending."""
    tuner, runner, config = way_tuner(ep), WayRunner(ep), way_config(ep)
    found: dict[int, str] = {}
    for size in way_buckets(ep.max_num_tokens):
        decision = tuner.decision(OP, [runner], config, way_example(ep, size))
        if decision is not None and decision.status != "extrapolated" and isinstance(decision.bucket, int):
            found[decision.bucket] = DEFAULT_WAY if decision.tactic == -1 else str(decision.tactic)
    return [[bucket, found[bucket]] for bucket in sorted(found)]
