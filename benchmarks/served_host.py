"""gpu_served.py host: what a warm eager call of a layer takes the host, beside a trivial torch operation.

CALLS calls one after another, without waiting for the device: it has less to do than fills its queue. The layer is NVFP4
of Qwen3-30B-A3B's sizes with 32 experts; on a CPU, whose calls compute, sizes are tiny.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_served import (
    Rows,
    Target,
    alternate,
    chosen,
    compile_all,
    inputs_of,
    layer_of,
    median_us,
    shape_of,
    tuner_of,
)

from moestro.bench.layers import make_case
from moestro.bench.models import from_sizes
from moestro.routing import Uniform

TOKENS, TINY_TOKENS, CALLS, ROUNDS = (1, 16, 64, 256, 1024), (1, 2), 10, 40
BOUNDS = {"cuda": (35.0, 5.0), "cpu": (20.0, 8.0)}  # µs of a call, and in trivial operations


def host(rows: Rows) -> int:
    """A row a number of tokens."""
    o = rows.options
    on_gpu = o.device.startswith("cuda")
    shape = shape_of("qwen3-30b-a3b", o) if o.tiny else from_sizes("32,8,2048,768")
    sizes = o.tokens or (TOKENS if on_gpu else TINY_TOKENS)
    layer, most = layer_of(shape, "nvfp4", max(sizes), tuner_of(o), o), BOUNDS["cuda" if on_gpu else "cpu"]
    cases = {n: make_case(shape, n, Uniform(), seed=n, device=o.device) for n in sizes}
    compile_all([(layer, inputs_of(case)) for case in cases.values()])
    for n in rows.cells(sizes):
        case = cases[n]
        ways: dict[Any, Callable[[], Any]] = {
            "layer": partial(layer, case.x, case.ids, case.weights),
            "trivial": lambda x=case.x: x + 1,  # type: ignore[misc]
        }
        wait = torch.cuda.synchronize if on_gpu else lambda: None
        taken = alternate({name: partial(_seconds, call, wait) for name, call in ways.items()}, ROUNDS)
        us, trivial = median_us(taken["layer"][3:]), median_us(taken["trivial"][3:])
        rows.add(
            tokens=n,
            us=us,
            trivial_us=trivial,
            in_trivial=us / trivial,
            of_bound=max(us / most[0], us / trivial / most[1]),
            tactic=chosen(layer, n),
        )
    return rows.judged(Target("of_bound", 1.0))


def _seconds(call: Callable[[], Any], wait: Callable[[], Any]) -> float:
    """Of one of CALLS calls, the device idle before."""
    wait()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS
