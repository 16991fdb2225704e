"""What the tuner sees of an MoE call: one dynamic size (the tokens), and how its routing is synthesised."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from moestro.errors import RoutingError, TuningError
from moestro.kernels.problem import MoeProblem
from moestro.routing import Distribution, Trained, Uniform, Zipf
from moestro.tuning import (
    DynamicTensorSpec,
    OptimizationProfile,
    Probe,
    TuningConfig,
    get_hybrid_num_tokens_buckets,
    map_to_hybrid_bucket_uncapped,
)

OP = "moestro.fused_moe"
SYNTHETIC: tuple[Distribution, ...] = (Uniform(), Zipf(1.0))
# Decisions made on these probes alone count as well: they serve, and are not measured again. The bundles that ship were.
ACCEPTED = (tuple(distribution.name for distribution in SYNTHETIC),)

log = logging.getLogger("moestro")


@functools.cache
def default_routing() -> tuple[Distribution, ...]:
    """What a layer is tuned on: uniform, Zipf(1.0), and the routing of a trained model (moestro.routing.trained)."""
    trained = Trained()
    try:
        return (*SYNTHETIC, trained) if trained.name else SYNTHETIC
    except RoutingError as error:
        log.warning("layers are tuned without a trained model's routing: %s", error)
        return SYNTHETIC


def tuning_config(
    problem: MoeProblem, *, quantized_input: bool = False, probes: Sequence[Probe] | None = None
) -> TuningConfig:
    """The configuration for inputs [x, ids, weights, out] (and x's scales): hybrid buckets over N.

    Probes: `default_routing` if none are given, for real loads are somewhere between; a choice is by its worst ratio.
    """
    linked = (0, 1, 2, 3, 4, 5) if quantized_input else (0, 1, 2, 3)
    spec = DynamicTensorSpec(
        input_idx=linked,
        dim_idx=(0,) * len(linked),
        gen_tuning_buckets=get_hybrid_num_tokens_buckets,
        map_to_tuning_buckets=map_to_hybrid_bucket_uncapped,
    )
    return TuningConfig(
        dynamic_tensor_specs=(spec,),
        use_cuda_graph=problem.cuda_graph,
        probes=tuple(as_probes(problem, default_routing()) if probes is None else probes),
        accepts=ACCEPTED if probes is None else (),
    )


def routing_probe(problem: MoeProblem, distribution: Distribution) -> Probe:
    """Inputs whose tokens go to the experts by `distribution`, with random weights that sum to 1 a token."""

    def make(inputs: Sequence[Any], profile: OptimizationProfile, seed: int) -> list[Any]:
        x, _, weights, *rest = inputs
        num_tokens, top_k = weights.shape
        ids = distribution.sample(num_tokens, problem.num_experts, top_k, seed=seed).to(x.device)
        generator = torch.Generator("cpu").manual_seed(seed)
        raw = torch.rand(weights.shape, generator=generator, dtype=torch.float32, device="cpu") + 0.1
        return [x, ids, (raw / raw.sum(-1, keepdim=True)).to(x.device), *rest]

    return Probe(distribution.name, make)


def as_probes(problem: MoeProblem, probes: Sequence[Probe | Distribution]) -> tuple[Probe, ...]:
    """Probes, of which some may be given as routing distributions. TuningError for anything else."""
    made = []
    if isinstance(probes, str) or not isinstance(probes, Iterable):
        raise TuningError(f"probes must be a list of Probe or routing distributions, got {probes!r}")
    for probe in probes:
        if isinstance(probe, Probe):
            made.append(probe)
        elif isinstance(probe, Distribution):
            made.append(routing_probe(problem, probe))
        else:
            raise TuningError(f"probes must be Probe or routing distributions, got {probe!r}")
    return tuple(made)
