"""What skewed routing costs a layer on a CPU, beside Transformers' experts, all routings alternating in one run.

    python benchmarks/cpu_skew.py --sizes 128,8,2048,768 --name qwen3-30b-a3b --json FILE

For each number of tokens every (contender, routing) is one lane of the same rounds, from cold caches; then Moestro's
lanes go on alone. A row says how long a call takes under a routing, its ratio to the same contender's under uniform
routing (the same number of pairs) by medians of rounds and by the shortest of all, which neighbours disturb least, and how
uneven the routing was. Weights are NVFP4 here and bf16 with Transformers ("grouped_mm").
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from moestro.bench import results
from moestro.bench.contenders import Contender, MoestroLayers
from moestro.bench.layers import LayerSource, make_case
from moestro.bench.models import from_sizes
from moestro.bench.peers import transformers_peers
from moestro.routing import parse
from moestro.tuning import AutoTuner, MeasurementPolicy
from moestro.tuning.measure.timers import default_timer

ROUTINGS = ("uniform", "zipf:1.0", "dirichlet:0.3", "trained")


def measure(
    contenders: list[Contender], shape: Any, tokens: int, routings: list[Any], seconds: float
) -> list[dict[str, Any]]:
    """Rows of one number of tokens."""
    timer = default_timer("cpu", MeasurementPolicy())
    lanes, samples = {}, {}
    cases = {r.name: make_case(shape, tokens, r, seed=tokens) for r in routings}
    with torch.inference_mode():
        for who in contenders:
            for name, case in cases.items():
                lanes[who.name, name] = timer.prepare(who.calls(case)[0])
                samples[who.name, name] = []
        for order in (list(lanes), [at for at in lanes if at[0] == contenders[0].name]):
            _rounds({at: lanes[at] for at in order}, samples, seconds)
    return [_row(tokens, at, samples, cases[at[1]], shape) for at in lanes]


def _rounds(lanes: dict[Any, Any], samples: dict[Any, list[float]], seconds: float) -> None:
    """Three at least, then until the time is over."""
    start, number, order = time.monotonic(), 0, list(lanes)
    while number < 3 or (number < 41 and time.monotonic() - start < seconds):
        shift = number % len(order)
        for at in order[shift:] + order[:shift]:
            samples[at].append(lanes[at]())
        number += 1


def _row(tokens: int, at: tuple[str, str], samples: Any, case: Any, shape: Any) -> dict[str, Any]:
    loads = torch.bincount(case.ids.flatten(), minlength=shape.num_experts)
    median = statistics.median(samples[at])
    uniform = samples[at[0], "uniform"]
    ratios = [mine / theirs for mine, theirs in zip(samples[at], uniform, strict=True)]
    return {
        "tokens": tokens,
        "contender": at[0],
        "routing": at[1],
        "median_s": median,
        "rounds": len(ratios),
        "to_uniform": statistics.median(ratios),
        "least_s": min(samples[at]),
        "least_to_uniform": min(samples[at]) / min(uniform),
        "experts_hit": int((loads > 0).sum()),
        "most_over_mean": round(float(loads.max() / loads.double().mean()), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", required=True)
    parser.add_argument("--name", default="custom")
    parser.add_argument("--tokens", default="4,16,64,256,1024")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="at one number of tokens, all lanes together"
    )
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    shape, routings = from_sizes(given.sizes), [parse(text) for text in ROUTINGS]
    sizes = [int(n) for n in given.tokens.split(",")]
    source = LayerSource(shape)
    contenders: list[Contender] = [
        MoestroLayers([source], given.format, "cpu", max(sizes), "moestro", AutoTuner(store=None))
    ]
    if not given.no_peer:
        contenders += transformers_peers([source], ["grouped_mm"], 1 << 29)
    rows: list[dict[str, Any]] = []
    for tokens in sizes:
        new = measure(contenders, shape, tokens, routings, given.seconds)
        rows += new
        for row in new:
            print("{tokens:5} {contender:24} {routing:32} {median_s:.6f} s {to_uniform:.3f} of uniform, least "
                  "{least_s:.6f} s {least_to_uniform:.3f}, {experts_hit} "
                  "experts hit, most/mean {most_over_mean} ({rounds})".format(**row), flush=True)  # fmt: skip
        if given.json is not None:
            about = {"name": given.name, "sizes": given.sizes, "format": given.format}
            head = {"schema": "moestro.cpu_skew/1", "date": results.now(), "problem": about}
            results.write_json(given.json, {**head, "environment": results.environment("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
