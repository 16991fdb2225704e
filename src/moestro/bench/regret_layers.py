"""Regret of MoE layers on a device: cases for moestro.bench.regret_real from a model's sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from moestro.bench.contenders import make_layer
from moestro.bench.layers import LayerSource, make_case
from moestro.bench.models import MoeShape
from moestro.bench.regret_real import Case, RealOutcome, measure_regret
from moestro.moe.call import as_inputs
from moestro.moe.tuning_config import OP, as_probes
from moestro.routing import Distribution
from moestro.tuning import AutoTuner, MeasurementPolicy
from moestro.tuning.measure.timers import default_timer

__all__ = ["LayerOutcome", "LayersSpec", "run"]


@dataclass(frozen=True)
class LayersSpec:
    shape: MoeShape
    tokens: tuple[int, ...]
    routing: Distribution
    formats: tuple[str, ...] = ("nvfp4",)
    backends: tuple[str, ...] = ("auto",)
    device: str = "cpu"
    seed: int = 0
    repeats: int = 6
    oracle_seconds: float = 10.0
    sustained_s: float | None = None  # of load before a race and before the oracle; None: the policy's own


@dataclass(frozen=True)
class LayerOutcome:
    format: str
    backend: str
    tokens: int
    found: RealOutcome


def run(spec: LayersSpec, step: Callable[[str], None] = lambda what: None) -> Iterator[LayerOutcome]:
    """Every format, backend and number of tokens, one after the other."""
    policy = MeasurementPolicy(seed=spec.seed)
    if spec.sustained_s is not None:
        policy = replace(policy, sustained_s=spec.sustained_s)
    for format in spec.formats:
        for backend in spec.backends:
            source = LayerSource(spec.shape, seed=spec.seed, device=spec.device)
            layer = make_layer(source, format, backend, max(spec.tokens), AutoTuner(store=None))
            config = layer.tuning_config
            probes = as_probes(layer.runners[0].problem, [spec.routing])
            config = dataclasses.replace(config, probes=probes, accepts=())
            timer = default_timer(spec.device, policy, graph=config.use_cuda_graph)
            for tokens in spec.tokens:
                case = make_case(spec.shape, tokens, spec.routing, seed=spec.seed, device=spec.device)
                inputs = as_inputs(case.x, case.ids, case.weights, torch.empty_like(case.x))
                found = measure_regret(
                    Case(OP, layer.runners, config, inputs),
                    timer,
                    policy,
                    repeats=spec.repeats,
                    oracle_seconds=spec.oracle_seconds,
                    step=lambda what, at=f"{format} N={tokens}": step(f"{at}: {what}"),  # type: ignore[misc]
                )
                yield LayerOutcome(format, backend, tokens, found)
