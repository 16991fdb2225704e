"""One run of the bench: build the contenders, measure every case, gather the rows.

The order bounds the memory: quantised formats first, expert by expert, with nothing dense about; then the
dense weights, which the bf16 peers and Moestro's bf16 are made of. Without these two no dense layer is ever
made. On a GPU every contender is checked against the float32 reference on the weights of its own format
before it is timed (there the reference costs less than the timing).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moestro.bench import results, roofline
from moestro.bench.adapters import ADAPTERS, AdapterContender, whole_peer
from moestro.bench.contenders import Compiles, Contender, moestro_contenders
from moestro.bench.layers import Case, LayerSource, make_case
from moestro.bench.measure import Measured, Outcome, Plan, Timer, measure_case, quartiles
from moestro.bench.models import MoeShape
from moestro.bench.peers import IMPLEMENTATIONS, transformers_missing, transformers_peers
from moestro.bench.results import BenchResult, Row
from moestro.bench.truth import References
from moestro.errors import BackendError, MoestroError
from moestro.kernels import backends
from moestro.routing import Distribution
from moestro.tuning import AutoTuner
from moestro.tuning.progress import Listener
from moestro.tuning.store.store import default_root

__all__ = ["BenchSpec", "build", "run", "run_each"]


@dataclass(frozen=True)
class BenchSpec:
    """What to measure."""

    shape: MoeShape
    tokens: tuple[int, ...]
    routing: Distribution
    formats: tuple[str, ...] = ("bf16", "nvfp4")
    inputs: tuple[str | None, ...] = (None,)  # of activations, of each format of ours
    backends: tuple[str, ...] = ("auto",)
    peers: tuple[str, ...] = IMPLEMENTATIONS
    device: str = "cpu"
    layers: int = 1
    seed: int = 0
    store: Path | None = None  # of decisions; the user's if None. Nothing is tuned here.
    peer_memory: int = 1 << 29  # bytes of weights that a peer may copy in one call
    plan: Plan = field(default_factory=Plan)


def build(
    spec: BenchSpec, sources: Sequence[LayerSource], listener: Listener
) -> tuple[list[Contender], list[dict[str, Any]]]:
    """The contenders, peers first, and those that cannot take part: {contender, reason}."""
    tuner = AutoTuner(store=spec.store or default_root())
    missing = _broken_backends(spec.backends)
    listener.stage("making weights", len(spec.formats) + len(spec.peers))

    def ours(format: str) -> list[Contender]:
        listener.step(format)
        made = list(
            moestro_contenders(sources, [format], spec.backends, max(spec.tokens), tuner, spec.inputs)
        )
        missing.extend({"contender": who, "reason": why} for who, why in made if isinstance(who, str))
        listener.done()
        return [who for who, _ in made if not isinstance(who, str)]

    by_format = {format: ours(format) for format in spec.formats if format != "bf16"}
    peers: list[Contender] = []
    for name in sorted(spec.peers, key=lambda name: name in ADAPTERS and ADAPTERS[name].format == "bf16"):
        if name in ADAPTERS:
            listener.step(name)
            peers += _adapted(name, sources, missing)
            listener.done()
    if named := [name for name in spec.peers if name not in ADAPTERS]:
        listener.step("dense weights for the peers")
        reason = transformers_missing()
        if reason is None:
            try:
                peers = [*transformers_peers(sources, named, spec.peer_memory), *peers]
            except torch.OutOfMemoryError as error:
                reason = f"dense weights do not fit: {str(error).splitlines()[0]}"
        if reason is not None:
            missing += [{"contender": f"transformers {name}", "reason": reason} for name in named]
        for _ in named:
            listener.done()
    if "bf16" in spec.formats:
        by_format["bf16"] = ours("bf16")
    return [*peers, *(who for format in spec.formats for who in by_format[format])], missing


def _broken_backends(asked: Sequence[str]) -> list[dict[str, Any]]:
    """Backends that "auto" passes over because they cannot be imported: else nobody would notice."""
    found = []
    for name in backends.BACKENDS if "auto" in asked else ():
        try:
            backends.load(name)
        except BackendError as error:
            found.append({"contender": f"moestro's backend {name}", "reason": str(error)})
    return found


def _adapted(name: str, sources: Sequence[LayerSource], missing: list[dict[str, Any]]) -> list[Contender]:
    """The contender of a GPU peer, or none, with the reason in `missing`."""
    adapter = ADAPTERS[name]
    reason = adapter.missing(sources[0].shape)
    if reason is None:
        try:
            layers = [adapter.prepare(source.weights(adapter.format), source.shape) for source in sources]
            return [AdapterContender(adapter, layers)]
        except Exception as error:  # other people's code may raise anything
            reason = f"{type(error).__name__}: {error}"
    missing.append({"contender": adapter.title, "reason": reason})
    return []


def run(
    spec: BenchSpec,
    timer_of: Callable[[Contender], Timer],
    command: str,
    listener: Listener | None = None,
    keep: Callable[[BenchResult], None] | None = None,
) -> BenchResult:
    """Measure everything that `spec` names. KeyboardInterrupt ends it; the result holds what was measured.

    keep: given the result so far after each case, so that a process that is killed has written it.
    """
    first = None if keep is None else (lambda found: keep(found[0]))
    return run_each(spec, (spec.routing,), timer_of, command, listener, first)[0]


def run_each(
    spec: BenchSpec,
    routings: Sequence[Distribution],
    timer_of: Callable[[Contender], Timer],
    command: str,
    listener: Listener | None = None,
    keep: Callable[[list[BenchResult]], None] | None = None,
) -> list[BenchResult]:
    """The same contenders under each routing, one result each. KeyboardInterrupt ends it with what was measured.

    keep: given the results so far after each case.
    """
    listener = listener or Listener()
    listener.stage("measuring this machine's ceilings", 1)
    ceilings = roofline.measure_ceilings(spec.device)
    sources = [
        LayerSource(spec.shape, layer=index, seed=spec.seed, device=spec.device)
        for index in range(spec.layers)
    ]
    contenders, missing = build(spec, sources, listener)
    truth = References(sources[0]) if spec.device.startswith("cuda") else None
    found: list[BenchResult] = []
    for routing in routings:
        one = dataclasses.replace(spec, routing=routing)
        result = _empty(one, command, contenders, missing, ceilings)
        so_far = None if keep is None else functools.partial(_kept, keep, tuple(found))
        found.append(_measure(one, contenders, ceilings, timer_of, truth, result, listener, so_far))
        if found[-1].interrupted:
            break
    return found


def _kept(keep: Callable[[list[BenchResult]], None], before: Sequence[BenchResult], now: BenchResult) -> None:
    keep([*before, now])


def _empty(
    spec: BenchSpec,
    command: str,
    contenders: Sequence[Contender],
    missing: Sequence[dict[str, Any]],
    ceilings: roofline.Ceilings,
) -> BenchResult:
    """A result without rows: who takes part, where, and under which conditions."""
    return BenchResult(
        command=command,
        date=results.now(),
        environment=results.environment(spec.device),
        problem=spec.shape.to_json(),
        conditions={
            "routing": spec.routing.name,
            "layers": spec.layers,
            "seed": spec.seed,
            **asdict(spec.plan),
        },
        ceilings=asdict(ceilings),
        memory=_memory(spec.shape, contenders),
        rows=[],
        skipped=[{"tokens": None, **entry} for entry in missing],
    )


def _measure(
    spec: BenchSpec,
    contenders: Sequence[Contender],
    ceilings: roofline.Ceilings,
    timer_of: Callable[[Contender], Timer],
    truth: References | None,
    result: BenchResult,
    listener: Listener,
    keep: Callable[[BenchResult], None] | None,
) -> BenchResult:
    """The result with its rows. A CPU's ceilings are measured again before each case: its memory is shared with
    others, and its rate at the start was below what a layer reached later (43 and 50 GB/s in one run).
    """
    interrupted = False
    outcomes: list[tuple[Case, Outcome]] = []
    try:
        cases = {
            tokens: make_case(spec.shape, tokens, spec.routing, seed=spec.seed + tokens, device=spec.device)
            for tokens in spec.tokens
        }
        _compile(contenders, list(cases.values()), listener)
        listener.stage("measuring", len(spec.tokens))
        for tokens, case in cases.items():
            say = functools.partial(_say, listener, tokens)
            if outcomes and not spec.device.startswith("cuda"):
                ceilings = ceilings.raised(roofline.measure_ceilings(spec.device))
            try:
                outcome = measure_case(
                    contenders, case, timer_of, spec.plan, say, truth, truth and truth.exact
                )
            except RuntimeError as error:  # in the rounds: a device that is lost, for everybody
                why = f"measuring broke off, whose fault cannot be told: {str(error).splitlines()[0]}"
                entries = [{"tokens": tokens, "contender": who.name, "reason": why} for who in contenders]
                result.failed.extend(entries)
                break
            outcomes.append((case, outcome))
            for reasons, entries in ((outcome.skipped, result.skipped), (outcome.failed, result.failed)):
                entries.extend(
                    {"tokens": tokens, "contender": who, "reason": why} for who, why in reasons.items()
                )
            if outcome.interrupted:
                raise KeyboardInterrupt
            if keep is not None:
                keep(_with_rows(spec, contenders, ceilings, outcomes, result, interrupted=True))
            listener.done()
        ceilings = _high_enough(spec, contenders, ceilings, outcomes)
    except KeyboardInterrupt:
        interrupted = True
    return _with_rows(spec, contenders, ceilings, outcomes, result, interrupted)


def _with_rows(
    spec: BenchSpec,
    contenders: Sequence[Contender],
    ceilings: roofline.Ceilings,
    outcomes: Sequence[tuple[Case, Outcome]],
    result: BenchResult,
    interrupted: bool,
) -> BenchResult:
    """A result of its own with the rows of these outcomes."""
    result = dataclasses.replace(result, rows=[*result.rows], failed=[*result.failed])
    for case, outcome in outcomes:
        rows = _rows(spec.shape, contenders, case, ceilings, outcome)
        wrong = [row for row in rows if row.roofline > roofline.MOST and not spec.device.startswith("cuda")]
        result.rows.extend(row for row in rows if row not in wrong)
        result.failed.extend(
            {"tokens": row.tokens, "contender": row.contender, "reason": _impossible(row)} for row in wrong
        )
    return dataclasses.replace(result, ceilings=asdict(ceilings), interrupted=interrupted)


def _high_enough(
    spec: BenchSpec,
    contenders: Sequence[Contender],
    ceilings: roofline.Ceilings,
    outcomes: Sequence[tuple[Case, Outcome]],
) -> roofline.Ceilings:
    """A CPU's ceilings, measured again a few times where somebody was faster than they allow: a neighbour may have
    had the memory while they were measured."""
    for _ in range(0 if spec.device.startswith("cuda") else 5):
        rows = [row for case, out in outcomes for row in _rows(spec.shape, contenders, case, ceilings, out)]
        if all(row.roofline <= roofline.MOST for row in rows):
            break
        ceilings = ceilings.raised(roofline.measure_ceilings(spec.device))
    return ceilings


def _impossible(row: Row) -> str:
    return (
        f"its share of the roofline came out at {100 * row.roofline:.0f} %, which cannot be: an error of the bench, "
        "or of its clock"
    )


def _compile(contenders: Sequence[Contender], cases: Sequence[Case], listener: Listener) -> None:
    """Kernels that are compiled at first use, all cases' together; what fails is reported when it is run."""
    waiting = [contender for contender in contenders if isinstance(contender, Compiles)]
    listener.stage("compiling", len(waiting))
    for contender in waiting:
        listener.step(contender.name)
        with contextlib.suppress(Exception):
            contender.compile(cases)
        listener.done()


def _say(listener: Listener, tokens: int, text: str) -> None:
    listener.step(f"N = {tokens}: {text}")


def _rows(
    shape: MoeShape,
    contenders: Iterable[Contender],
    case: Case,
    ceilings: roofline.Ceilings,
    outcome: Outcome,
) -> list[Row]:
    by_name = {contender.name: contender for contender in contenders}
    peers = [m.median for m in outcome.measured if whole_peer(by_name[m.contender])]
    best = min(peers, default=None)
    return [_row(shape, by_name[m.contender], case, ceilings, m, best) for m in outcome.measured]


def _row(
    shape: MoeShape,
    contender: Contender,
    case: Case,
    ceilings: roofline.Ceilings,
    measured: Measured,
    best_peer: float | None,
) -> Row:
    work = roofline.count_work(shape, case, contender.nbytes)
    low, high = quartiles(measured.seconds)
    facts = contender.facts(case)
    return Row(
        tokens=case.num_tokens,
        contender=contender.name,
        ours=contender.ours,
        format=contender.format,
        median_s=measured.median,
        low_s=low,
        high_s=high,
        samples=len(measured.seconds),
        clock=measured.clock,
        experts_hit=work.experts_hit,
        tflops=work.flops / measured.median / 1e12,
        weight_bytes_per_s=work.weight_bytes / measured.median,
        roofline=ceilings.seconds(work, facts.get("arithmetic")) / measured.median,
        ratio_to_best_peer=None if best_peer is None else best_peer / measured.median,
        difference=measured.difference,
        error=measured.error,
        exact_error=measured.exact_error,
        facts=facts,
    )


def _memory(shape: MoeShape, contenders: Iterable[Contender]) -> list[dict[str, Any]]:
    biases = shape.num_local_experts * (shape.gate_up_rows + shape.hidden_size) if shape.biases else 0
    bf16 = 2 * (shape.num_weights + biases)
    return [
        {
            "contender": contender.name,
            "format": contender.format,
            "bytes": contender.nbytes,
            "ratio_to_bf16": contender.nbytes / bf16,
        }
        for contender in contenders
    ]


def check_measured(result: BenchResult) -> None:
    """Raises MoestroError if a contender of ours failed, naming each, or if nothing could be measured."""
    ours = [entry for entry in result.failed if entry["contender"].startswith("moestro")]
    if ours:
        lines = [f"{entry['contender']} at N = {entry['tokens']}: {entry['reason']}" for entry in ours]
        raise MoestroError("\n".join(["moestro failed where it should have run:", *lines]))
    if not result.rows:
        raise MoestroError("nothing could be measured; the reasons are above")
