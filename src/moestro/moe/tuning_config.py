"""What the tuner sees of an MoE call: one dynamic size (the tokens), and how its routing is synthesised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moestro.errors import TuningError
from moestro.kernels.problem import MoeProblem
from moestro.routing import Distribution, Uniform, Zipf
from moestro.tuning import (
    DynamicTensorSpec,
    OptimizationProfile,
    Probe,
    TuningConfig,
    get_hybrid_num_tokens_buckets,
    map_to_hybrid_bucket_uncapped,
)

OP = "moestro.fused_moe"
DEFAULT_ROUTING: tuple[Distribution, ...] = (Uniform(), Zipf(1.0))


def tuning_config(
    problem: MoeProblem, *, quantized_input: bool = False, probes: Sequence[Probe] | None = None
) -> TuningConfig:
    """The configuration for inputs [x, ids, weights, out] (and x's scales): hybrid buckets over N.

    Probes: i.i.d. uniform and Zipf(1.0) routing by default, for real loads are somewhere between.
    """
    linked = (0, 1, 2, 3, 4, 5) if quantized_input else (0, 1, 2, 3)
    spec = DynamicTensorSpec(
        input_idx=linked,
        dim_idx=(0,) * len(linked),
        gen_tuning_buckets=get_hybrid_num_tokens_buckets,
        map_to_tuning_buckets=map_to_hybrid_bucket_uncapped,
    )
    if probes is None:
        probes = [routing_probe(problem, distribution) for distribution in DEFAULT_ROUTING]
    return TuningConfig(dynamic_tensor_specs=(spec,), use_cuda_graph=problem.cuda_graph, probes=tuple(probes))


def routing_probe(problem: MoeProblem, distribution: Distribution) -> Probe:
    """Inputs whose tokens go to the experts by `distribution`, with random weights that sum to 1 a token."""

    def make(inputs: Sequence[Any], profile: OptimizationProfile, seed: int) -> list[Any]:
        x, _, weights, *rest = inputs
        num_tokens, top_k = weights.shape
        ids = distribution.sample(num_tokens, problem.num_experts, top_k, seed=seed).to(x.device)
        raw = torch.rand(weights.shape, generator=torch.Generator().manual_seed(seed)) + 0.1
        return [x, ids, (raw / raw.sum(-1, keepdim=True)).to(x.device), *rest]

    return Probe(distribution.name, make)


def as_probes(problem: MoeProblem, probes: Sequence[Probe | Distribution]) -> tuple[Probe, ...]:
    """Probes, of which some may be given as routing distributions. TuningError for anything else."""
    made = []
    for probe in probes:
        if isinstance(probe, Probe):
            made.append(probe)
        elif isinstance(probe, Distribution):
            made.append(routing_probe(problem, probe))
        else:
            raise TuningError(f"probes must be Probe or routing distributions, got {probe!r}")
    return tuple(made)
