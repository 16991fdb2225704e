"""gpu_served.py's commands on layers of models: verify steps, what batch invariance costs, winners under load."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_served import (
    NEVER,
    Rows,
    Target,
    alternate,
    chosen,
    compile_all,
    compile_jobs,
    inputs_of,
    layer_of,
    median_us,
    policy_of,
    samplers,
    shape_of,
    tuner_of,
)

from moestro import FusedMoE
from moestro.bench.contenders import tactic_words
from moestro.bench.layers import Case, make_case
from moestro.bench.models import MoeShape
from moestro.bench.regret_real import Case as Question
from moestro.bench.regret_real import Judged, judge
from moestro.moe.tuning_config import OP
from moestro.routing import Correlated, Uniform
from moestro.tuning import MeasurementPolicy
from moestro.tuning.measure.compile import jobs_of
from moestro.tuning.measure.decide import merged
from moestro.tuning.measure.timers import default_timer
from moestro.tuning.progress import Listener

# --- verify steps ------------------------------------------------------------------------------------------
BASE, STEPS, OVERLAPS = 16, (1, 2, 4, 8), (0.5, 0.8)  # tokens; of Correlated
DRAWS = 5  # of routing, at a number of tokens


def verify(rows: Rows) -> int:
    """Time over that of the united experts' bytes at the rate of BASE tokens; NVFP4, DeepSeek-V3 EP8 and Mixtral."""
    o = rows.options
    for model in rows.cells(("deepseek-v3", "mixtral-8x7b")):
        with rows.cell(model):
            shape = shape_of(model, o)
            layer = layer_of(shape, "nvfp4", BASE, tuner_of(o), o)
            for overlap in rows.cells(OVERLAPS, model):
                _overlapped(rows, shape, layer, overlap)
    return rows.judged(Target("time_of_expected", 1.1), lambda row: row["tokens"] > 1)


def _overlapped(rows: Rows, shape: MoeShape, layer: FusedMoE, overlap: float) -> None:
    """All numbers of tokens and draws in turns."""
    o = rows.options
    cases = {
        (n, i): make_case(shape, n, Correlated(overlap), seed=100 * n + i, device=o.device)
        for n in (*STEPS, BASE)
        for i in range(2 if o.tiny else DRAWS)
    }
    compile_all([(layer, inputs_of(case)) for case in cases.values()])
    lanes = samplers({at: partial(layer, c.x, c.ids, c.weights) for at, c in cases.items()}, o)
    us = {at: median_us(taken) for at, taken in alternate(lanes, o.rounds).items()}
    _verified(rows, shape, layer, overlap, cases, us)


def _verified(
    rows: Rows,
    shape: MoeShape,
    layer: FusedMoE,
    overlap: float,
    cases: dict[tuple[int, int], Case],
    us: dict[tuple[int, int], float],
) -> None:
    """A row a number of tokens: medians over its draws."""
    an_expert = layer.weights.nbytes / shape.num_local_experts
    moved = {at: case.ids.unique().numel() * an_expert for at, case in cases.items()}
    rate = statistics.median(moved[at] / us[at] for at in cases if at[0] == BASE)  # bytes a µs
    for n in STEPS:
        draws = [at for at in cases if at[0] == n]
        rows.add(
            model=shape.name,
            overlap=overlap,
            tokens=n,
            experts=statistics.mean(moved[at] / an_expert for at in draws),
            us=statistics.median(us[at] for at in draws),
            tb_per_s=statistics.median(moved[at] / us[at] for at in draws) / 1e6,
            tb_per_s_at_16=rate / 1e6,
            time_of_expected=statistics.median(us[at] * rate / moved[at] for at in draws),
            tactic=chosen(layer, n),
        )


# --- batch invariance --------------------------------------------------------------------------------------
COSTS = (
    ("qwen3-30b-a3b", "nvfp4"),
    ("deepseek-v3", "nvfp4"),
    ("mixtral-8x7b", "nvfp4"),
    ("qwen3-30b-a3b", "bf16"),
)
FEW, FEW_BOUND, BOUND = 64, 1.05, 1.10  # up to so many tokens the first bound, then the second


def cost(rows: Rows) -> int:
    """Time with batch_invariant over that without, at each number of tokens."""
    o = rows.options
    sizes = o.tokens or [1 << i for i in range(11)]
    for model, format in rows.cells(COSTS):
        with rows.cell((model, format)):
            shape, tuner = shape_of(model, o), tuner_of(o)
            layers = {
                flag: layer_of(shape, format, max(sizes), tuner, o, batch_invariant=flag)
                for flag in (False, True)
            }
            cases = {n: make_case(shape, n, Uniform(), seed=n, device=o.device) for n in sizes}
            compile_all([(layer, inputs_of(case)) for layer in layers.values() for case in cases.values()])
            for n in rows.cells(sizes, model, format):
                rows.add(model=model, format=format, tokens=n, **_cost(layers, cases[n], o))
    return rows.judged(Target("of_bound", 1.0))


def _cost(layers: dict[bool, FusedMoE], case: Case, o: Any) -> dict[str, Any]:
    """A row's figures."""
    calls = {flag: partial(layer, case.x, case.ids, case.weights) for flag, layer in layers.items()}
    taken = alternate(samplers(calls, o), o.rounds)
    ratio = statistics.median(b / a for a, b in zip(taken[False], taken[True], strict=True))
    return {
        "us": median_us(taken[False]),
        "invariant_us": median_us(taken[True]),
        "ratio": ratio,
        "of_bound": ratio / (FEW_BOUND if case.num_tokens <= FEW else BOUND),
        "tactic": chosen(layers[False], case.num_tokens),
        "invariant_tactic": chosen(layers[True], case.num_tokens),
    }


# --- under load --------------------------------------------------------------------------------------------
SUSTAINED = (1, 4, 16, 64, 256, 1024, 4096, 16384)  # those of docs/peers.md


def sustained(rows: Rows) -> int:
    """Time of what serves over the best tactic's, both after --load seconds of load, over the tuning's probes; NVFP4."""
    o = rows.options
    sizes, policy = o.tokens or list(SUSTAINED), policy_of(o, sustained_s=o.load)
    for model in rows.cells(("qwen3-30b-a3b", "deepseek-v3")):
        with rows.cell(model):
            shape = shape_of(model, o)
            layer = layer_of(shape, "nvfp4", max(sizes), tuner_of(o), o)
            _decided(layer, sizes, o.each)
            _compiled(layer, shape, sizes, o.device)
            for n in rows.cells(sizes, model):
                with rows.cell((model, n)):
                    rows.add(model=model, tokens=n, **_judged(layer, shape, n, policy, o))
    return rows.judged(Target("of_best", 1.01, 0.95))


def _decided(layer: FusedMoE, sizes: Sequence[int], seconds: float) -> None:
    """Tune what no bundle or store has decided for good."""
    known = [layer.decision(n) for n in sizes]
    if not all(d is not None and d.status == "measured" and d.record.complete for d in known):
        layer.tune(max(sizes), seconds, None, Listener(), buckets=sizes)


def _compiled(layer: FusedMoE, shape: MoeShape, sizes: Sequence[int], device: str) -> None:
    """All that the oracle will run, side by side; what cannot be compiled it leaves out."""
    jobs: dict[Any, Any] = {}
    for n in sizes:
        inputs = inputs_of(make_case(shape, n, Uniform(), device=device))
        for tactic in (-1, *layer.runners[0].get_valid_tactics(inputs, None)):
            jobs |= jobs_of(layer.runners[0], inputs, tactic, (n, str(tactic)))
    compile_jobs(jobs)


def _judged(layer: FusedMoE, shape: MoeShape, n: int, policy: MeasurementPolicy, o: Any) -> dict[str, Any]:
    """A row's figures: what serves, the best tactic of the preferred backend, and the clock meanwhile.

    As the tuner chooses: by a tactic's worst ratio to the default over the probes that it was tuned on.
    """
    decision = layer.decision(n)
    serves = (0, -1 if decision is None else decision.tactic)
    if decision and decision.runner.backend != layer.runners[0].backend:
        return {"of_best": NEVER, "serves": chosen(layer, n), "why": "another backend serves"}
    inputs = inputs_of(make_case(shape, n, Uniform(), device=o.device))
    found = [_by_probe(layer, inputs, probe, policy, o) for probe in layer.tuning_config.probes]
    tables = [dict(zip(one.oracle.candidates, one.oracle.ratios, strict=True)) for one in found]
    worst = {
        candidate: max(t[candidate] for t in tables)
        for candidate in tables[0]
        if all(candidate in t for t in tables)
    }
    if serves not in worst:
        return {"of_best": NEVER, "serves": chosen(layer, n), "why": "what serves is no candidate"}
    best = min(worst, key=lambda candidate: worst[candidate])
    return {
        "of_best": worst[serves] / worst[best],
        "error": max(one.oracle.error for one in found),
        "serves": chosen(layer, n),
        "best": tactic_words(best[1]),
        "default_us": found[0].oracle.default_seconds * 1e6,
        "by_probe": [t[serves] / min(t.values()) for t in tables],
        "candidates": len(worst),
        "rounds": min(one.oracle.rounds for one in found),
        "clocks": merged([reading for one in found for reading in one.readings]),
    }


def _by_probe(layer: FusedMoE, inputs: Any, probe: Any, policy: MeasurementPolicy, o: Any) -> Judged:
    """All tactics of the preferred backend under one probe."""
    config = replace(layer.tuning_config, probes=(probe,), accepts=())
    timer = default_timer(o.device, policy, graph=config.use_cuda_graph)
    with torch.inference_mode():
        seconds = o.oracle / len(layer.tuning_config.probes)
        return judge(Question(OP, layer.runners[:1], config, inputs), timer, policy, seconds)
