"""gpu_served.py equal: batch_invariant=True gives a token the same bits in every batch, on any backend.

A pool of tokens (a third routed evenly, a third by Zipf, a third to the same experts) is run token by token; then
random batches of it (size, order, repeats, chunks one after the other, sometimes another tactic that the problem
offers) must have those bits, for every format of weights and of activations and both dtypes of x.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any, NamedTuple

import torch
from gpu_served import Rows, Target, compile_jobs, tuner_of

from moestro import ExpertWeights, FusedMoE
from moestro.errors import BackendError
from moestro.moe.call import as_inputs
from moestro.routing import Uniform, Zipf
from moestro.tuning.measure.compile import jobs_of

SIZES, TINY = (16, 4, 512, 384), (8, 2, 128, 128)  # E, K, H, I; FP8 blocks want multiples of 128
POOL, SMALL_POOL = 1024, 12  # tokens
BF16, FP16 = torch.bfloat16, torch.float16
Kind = tuple[str, str | None, torch.dtype]
KINDS: tuple[Kind, ...] = (
    *((format, None, BF16) for format in ("nvfp4", "mxfp4", "mxfp8", "fp8_block", "int4", "bf16")),
    *((format, "fp8", BF16) for format in ("nvfp4", "mxfp4", "fp8_block")),
    ("nvfp4", None, FP16),
    ("nvfp4", "nvfp4", BF16),
)


class Pool(NamedTuple):
    """The tokens of all batches, and each one's result when it is alone."""

    call: list[torch.Tensor]  # x, ids, weights
    alone: torch.Tensor
    tactics: dict[int, list[Any]]  # by number of tokens, what may be run beside the default


def equal(rows: Rows) -> int:
    """A row a kind: batches, rows of them, and batches with a row of other bits."""
    o = rows.options
    made = {}
    for kind in chosen(o.formats):
        with rows.cell(kind):
            layer = layer_of(kind, o)
            made[kind] = layer, tokens_of(layer, kind[2], SMALL_POOL if o.tiny else POOL)
    compile_kinds(list(made.values()))
    for i, kind in rows.cells(list(enumerate(made))):
        with rows.cell(kind), torch.inference_mode():
            _kind(rows, kind, (o.batches + i) // len(made), *made[kind])
    done = sum(row["batches"] for row in rows.rows)
    print(f"{done} batches, {sum(row['different'] for row in rows.rows)} with other bits")
    return rows.judged(Target("different", 0))


def chosen(formats: list[str] | None) -> list[Kind]:
    """The kinds of these names, or all. SystemExit for a name that is none."""
    names = {kind: "+".join(filter(None, kind[:2])) for kind in KINDS}
    if unknown := sorted(set(formats or ()) - set(names.values())):
        raise SystemExit(
            f"--formats: no {', '.join(unknown)}; there are {', '.join(dict.fromkeys(names.values()))}"
        )
    return [kind for kind, name in names.items() if formats is None or name in formats]


def _kind(rows: Rows, kind: Kind, count: int, layer: FusedMoE, call: list[torch.Tensor]) -> None:
    """A kind's share of the batches."""
    alone = torch.cat([layer(*(t[n : n + 1] for t in call)) for n in range(len(call[0]))])
    pool = Pool(call, alone, offers(layer, call))
    began = time.monotonic()
    found = batches(layer, pool, count, random.Random(str(kind)))
    rows.add(
        format=kind[0],
        input_format=kind[1],
        dtype=str(kind[2]).removeprefix("torch."),
        backend=layer.runners[0].backend,
        **found,
        seconds=round(time.monotonic() - began, 1),
    )


def layer_of(kind: Kind, o: Any) -> FusedMoE:
    experts, top_k, hidden, inter = TINY if o.tiny else SIZES
    format, taken, dtype = kind
    gen = torch.Generator(o.device).manual_seed(0)
    gate_up, down = (
        torch.randn(experts, r, c, device=o.device, generator=gen).div(c**0.5).to(dtype)
        for r, c in ((2 * inter, hidden), (hidden, inter))
    )
    weights = ExpertWeights.from_dense(gate_up, down, format)
    more: Any = {"input_format": taken, "dtype": dtype, "tuner": tuner_of(o)}
    return FusedMoE(weights, top_k, POOL, batch_invariant=True, **more)


def tokens_of(layer: FusedMoE, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    """x, ids and weights of the pool."""
    w, k = layer.weights, layer.top_k
    ids = torch.cat([d.sample(count // 3, w.num_experts, k, seed=1) for d in (Uniform(), Zipf(1.0))])
    ids = torch.cat([ids, torch.arange(k, dtype=torch.int32).repeat(count - len(ids), 1)]).to(w.device)
    gen = torch.Generator(w.device).manual_seed(1)
    x = torch.randn(count, w.hidden_size, device=w.device, generator=gen).to(dtype)
    return [x, ids, torch.rand(count, k, device=w.device, generator=gen)]


def sizes_of(count: int) -> list[int]:
    """Numbers of tokens whose kernels are compiled ahead: a batch's are those of one of them (Triton compiles for a size
    of one, for multiples of 16 and for others)."""
    found = {n for i in range(11) for n in (1 << i, 1 << i | 1, 3 << i >> 1 | 1)}
    return sorted(n for n in found if n <= count)


def offers(layer: FusedMoE, call: list[torch.Tensor]) -> dict[int, list[Any]]:
    """By number of tokens: what a batch may be run with beside the default, two that the problem offers."""
    [runner] = layer.runners
    return {n: list(runner.get_valid_tactics(first(call, n), None))[:2] for n in sizes_of(len(call[0]))}


def first(call: list[torch.Tensor], n: int) -> list[torch.Tensor]:
    """A runner's inputs of the first n tokens; the result is poisoned."""
    x, ids, weights = (t[:n] for t in call)
    return as_inputs(x, ids, weights, torch.full_like(x, float("nan")))


def compile_kinds(made: list[tuple[FusedMoE, list[torch.Tensor]]]) -> None:
    """Kernels of all kinds side by side."""
    jobs: dict[Any, Any] = {}
    for layer, call in made:
        [runner], tactics = layer.runners, offers(layer, call)
        for n in sizes_of(len(call[0])):
            inputs = first(call, n)
            for tactic in (-1, *tactics[n]):
                jobs |= jobs_of(runner, inputs, tactic, (id(layer), n, str(tactic)))
    compile_jobs(jobs)


def batches(layer: FusedMoE, pool: Pool, count: int, rng: random.Random) -> dict[str, Any]:
    """What so many random batches gave."""
    total, rows, ways = len(pool.alone), 0, Counter[str]()
    bad: list[str] = []
    for _ in range(count):
        most = round(total ** rng.random())  # as many small ones as large ones
        order = torch.tensor(rng.choices(range(total), k=max(1, most)), device=pool.alone.device)
        found, how = in_chunks(layer, [t[order].contiguous() for t in pool.call], pool.tactics, rng)
        ways.update(how)
        rows += len(order)
        differ = (found.view(torch.int16) != pool.alone[order].view(torch.int16)).any(-1)
        if differ.any():
            bad.append(f"N={len(order)} {how}: {int(differ.sum())} rows differ")
    return {"batches": count, "rows": rows, "different": len(bad), "calls": dict(ways), "first": bad[:3]}


def in_chunks(
    layer: FusedMoE, call: list[torch.Tensor], tactics: dict[int, list[Any]], rng: random.Random
) -> tuple[torch.Tensor, list[str]]:
    """The result of a batch cut at random places, and how each part was run."""
    parts: list[torch.Tensor] = []
    ways, at = [], 0
    while at < len(call[0]):
        to = at + rng.randint(1, len(call[0]) - at)
        part = [t[at:to].contiguous() for t in call]
        found = another(layer, part, tactics, rng) if rng.random() < 0.25 else None
        parts.append(layer(*part) if found is None else found)
        ways.append("default" if found is None else "another tactic")
        at = to
    return torch.cat(parts), ways


def another(
    layer: FusedMoE, part: list[torch.Tensor], tactics: dict[int, list[Any]], rng: random.Random
) -> torch.Tensor | None:
    """The part run by a tactic that is offered at a size near its own; None where that one takes no such size."""
    size = max(n for n in tactics if n <= len(part[0]))
    if not tactics[size]:
        return None
    inputs, tactic, [runner] = first(part, len(part[0])), rng.choice(tactics[size]), layer.runners
    try:
        runner.check_tactic(inputs, tactic)
    except BackendError:
        return None
    return runner.forward(inputs, tactic)
