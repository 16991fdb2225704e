"""Tuning a layer ahead of serving: behind `moestro tune`.

One layer per format is made and tuned bucket by bucket, so that progress can be shown and an interruption
loses no finished bucket; the crossover search between buckets comes last. Decisions depend on shapes, not
on weights: all layers of a model find those of the one that was tuned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moestro.bench import results
from moestro.bench.contenders import make_layer, tactic_words
from moestro.bench.layers import LayerSource
from moestro.bench.models import MoeShape
from moestro.bench.progress import Listener
from moestro.errors import BackendError
from moestro.moe.call import as_inputs
from moestro.moe.layer import FusedMoE
from moestro.moe.tuning_config import OP, as_probes
from moestro.routing import Distribution
from moestro.tuning import AutoTuner, Decision, Store
from moestro.tuning.measure.campaign import spread
from moestro.tuning.measure.compile import precompile
from moestro.tuning.spec.keys import static_key
from moestro.tuning.store.store import Entry, default_root, folder_of

__all__ = ["SCHEMA", "TuneResult", "TuneRow", "TuneSpec", "run"]

SCHEMA = "moestro.tune/1"


@dataclass(frozen=True)
class TuneSpec:
    """What to tune."""

    shape: MoeShape
    tokens: tuple[int, ...]
    routings: tuple[Distribution, ...] = ()  # the layer's own probes if empty: uniform and Zipf(1.0)
    formats: tuple[str, ...] = ("nvfp4",)
    backends: tuple[str, ...] = ("auto",)
    device: str = "cpu"
    seed: int = 0
    store: Path | None = None
    budget_s: float | None = None  # of all tuning together
    from_misses: bool = False

    @property
    def store_root(self) -> Path:
        return self.store or default_root()


@dataclass(frozen=True)
class TuneRow:
    """One decision."""

    format: str
    backend: str  # as asked for
    tokens: int
    bucket: int
    runner: str  # backend that was chosen
    tactic: str
    status: str
    gain: float | None  # default's time / chosen time: 1.2 is 20 % faster than without tuning
    noise_floor: float
    candidates: int
    samples: int
    seconds: float


@dataclass(frozen=True)
class TuneResult:
    """One run of `moestro tune`."""

    command: str
    date: str
    environment: dict[str, Any]
    problem: dict[str, Any]
    conditions: dict[str, Any]
    store: str
    rows: list[TuneRow]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    open: list[dict[str, Any]] = field(default_factory=list)  # what the budget or Ctrl-C left undecided
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)  # seconds of each part
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


class _Budget:
    """Seconds of tuning, compiling included, shared out evenly over the steps that are left; making layers is
    not counted.

    Compiling may take two thirds: of 60 s, half was not enough for 107 kernels in a process that had compiled
    nothing before (H100, 16 processors), and what was left took longer size by size than together. Where it used
    them up, a step may have half of what is left: it has its own candidates to compile, and even shares of 20 s
    decided nothing at any of 15 sizes of a layer.
    """

    def __init__(self, seconds: float | None, steps: int) -> None:
        self._left, self._steps, self._least = seconds, steps, 0.0

    @contextlib.contextmanager
    def share(self) -> Iterator[float | None]:
        """The seconds that the next step may take; what it does not use is for the others."""
        start = time.monotonic()
        part = max(self._least, 1 / max(1, self._steps))
        yield None if self._left is None else max(0.0, self._left * part)
        self._steps -= 1
        if self._left is not None:
            self._left -= time.monotonic() - start

    @contextlib.contextmanager
    def before(self) -> Iterator[Callable[[], bool]]:
        """What precedes all steps, in two thirds of the seconds at most: whether they are over."""
        start, most = time.monotonic(), math.inf if self._left is None else self._left * 2 / 3
        yield lambda: time.monotonic() - start >= most
        took = time.monotonic() - start
        if took >= most:
            self._least = 0.5
        if self._left is not None:
            self._left -= took


def run(spec: TuneSpec, command: str, listener: Listener | None = None) -> TuneResult:
    """Tune everything that `spec` names.

    KeyboardInterrupt ends it; the result and the store hold what is decided by then.
    """
    listener = listener or Listener()
    start = time.monotonic()
    result = TuneResult(
        command=command,
        date=results.now(),
        environment=results.environment(spec.device),
        problem=spec.shape.to_json(),
        conditions={"routings": [routing.name for routing in spec.routings], "budget_s": spec.budget_s},
        store=str(spec.store_root),
        rows=[],
    )
    tuner = AutoTuner(store=Store(spec.store_root))
    pairs = [(format, backend) for format in spec.formats for backend in spec.backends]
    budget = _Budget(spec.budget_s, len(pairs) * (len(spec.tokens) + 1))
    interrupted = False
    try:
        for format, backend in pairs:
            listener.stage(f"making the {format} layer", 1)
            source = LayerSource(spec.shape, seed=spec.seed, device=spec.device)
            try:
                with _timed(result, f"{format}: making the layer"):
                    layer = make_layer(source, format, backend, _most(spec), tuner)
            except BackendError as error:
                result.skipped.append({"format": format, "backend": backend, "reason": str(error)})
                continue
            _tune_format(spec, layer, format, backend, budget, result, listener)
    except KeyboardInterrupt:
        interrupted = True
    return dataclasses.replace(result, interrupted=interrupted, seconds=time.monotonic() - start)


def _tune_format(
    spec: TuneSpec,
    layer: FusedMoE,
    format: str,
    backend: str,
    budget: _Budget,
    result: TuneResult,
    listener: Listener,
) -> None:
    misses = _misses(spec, layer) if spec.from_misses else {}
    tokens = sorted(misses) if spec.from_misses else list(spec.tokens)
    if not tokens:
        reason = f"the store {spec.store_root} has no misses of this layer"
        result.skipped.append({"format": format, "backend": backend, "reason": reason})
        return
    try:
        _tune_layer(spec, layer, tokens, budget, result, listener, format)
    finally:  # whatever happens, what is decided is in the result
        for size in tokens:
            decision = layer.decision(size)
            if decision is None or decision.status == "extrapolated":
                result.open.append({"format": format, "backend": backend, "tokens": size})
            else:
                result.rows.append(_row(format, backend, size, decision))
                for entry in misses.get(size, ()):
                    entry.path.unlink(missing_ok=True)


def _most(spec: TuneSpec) -> int:
    """max_num_tokens of the layer: everything that may be tuned."""
    if not spec.from_misses:
        return max(spec.tokens)
    sizes = [
        size for entry in Store(spec.store_root).entries(("miss",)) for size in entry.data.get("sizes", [])
    ]
    return max([1, *map(int, sizes)])


def _tune_layer(
    spec: TuneSpec,
    layer: FusedMoE,
    tokens: Sequence[int],
    budget: _Budget,
    result: TuneResult,
    listener: Listener,
    format: str,
) -> None:
    """Bucket by bucket, the largest first (it covers the smaller ones), then the middles of ever smaller gaps, so
    that a size which the budget leaves open is served by a near one; then the crossovers between them.
    """
    probes = as_probes(layer.runners[0].problem, spec.routings) if spec.routings else None

    def tune(size: int, buckets: Sequence[int], crossover: bool) -> None:
        with (
            budget.share() as seconds,
            layer.tuner.autotune(
                True,
                budget_s=seconds,
                tuning_buckets=buckets,
                round_up=True,
                probes=probes,
                crossover=crossover,
            ) as tuner,
        ):
            tuner.choose_one(OP, layer.runners, layer.tuning_config, _inputs(spec, size))
        listener.done()

    order = spread(tokens, tokens[-1])
    listener.stage(f"compiling {format}", 1)
    with _timed(result, f"{format}: compiling"), budget.before() as late:
        _compile(spec, layer, order, late)
    listener.stage(f"tuning {format}", len(tokens) + 1)
    for size in order:
        listener.step(f"N = {size}")
        with _timed(result, f"{format}: N = {size}"):
            tune(size, (size,), crossover=False)
    listener.step("where winners change")
    with _timed(result, f"{format}: where winners change"):
        tune(tokens[-1], tokens, crossover=True)


def _compile(spec: TuneSpec, layer: FusedMoE, tokens: Sequence[int], late: Callable[[], bool]) -> None:
    """All sizes' candidates together, each kernel once: a size alone would leave most processors idle at its
    end. What fails is found, and noted, when its size is tuned.
    """
    jobs: dict[Any, Callable[[], object]] = {}
    for size in tokens:
        inputs = _inputs(spec, size)
        for runner in layer.runners:
            for tactic in (-1, *runner.get_valid_tactics(inputs, None)):
                if callable(split := getattr(runner, "compile_jobs", None)):
                    for kernel, job in split(inputs, tactic).items():
                        jobs.setdefault(kernel, job)
                elif callable(hook := getattr(runner, "compile", None)):
                    jobs[runner.backend, size, tactic] = functools.partial(hook, inputs, tactic)
    precompile(jobs, late)


@contextlib.contextmanager
def _timed(result: TuneResult, phase: str) -> Iterator[None]:
    """Add the seconds of a part to the result."""
    start = time.monotonic()
    try:
        yield
    finally:
        result.phases[phase] = result.phases.get(phase, 0.0) + time.monotonic() - start


def _inputs(spec: TuneSpec, num_tokens: int) -> list[torch.Tensor]:
    """Shapes and dtypes of a call; the tuner makes the values."""
    shape, device = spec.shape, spec.device
    x = torch.zeros(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=device)
    ids = torch.zeros(num_tokens, shape.top_k, dtype=torch.int32, device=device)
    weights = torch.zeros(num_tokens, shape.top_k, device=device)
    return as_inputs(x, ids, weights, torch.empty_like(x))


def _row(format: str, backend: str, tokens: int, decision: Decision) -> TuneRow:
    evidence = decision.evidence
    chosen = evidence.of(decision.record.runner, decision.tactic)
    gain = 1 / chosen.ratio if chosen is not None and chosen.ratio else None
    return TuneRow(
        format=format,
        backend=backend,
        tokens=tokens,
        bucket=decision.bucket if isinstance(decision.bucket, int) else decision.bucket[0],
        runner=decision.runner.backend,
        tactic=tactic_words(decision.tactic),
        status=decision.status,
        gain=gain,
        noise_floor=evidence.noise_floor,
        candidates=len(evidence.candidates),
        samples=evidence.samples,
        seconds=evidence.seconds,
    )


def _misses(spec: TuneSpec, layer: FusedMoE) -> dict[int, list[Entry]]:
    """Sizes of this layer's miss log, with their files."""
    key = static_key(OP, layer.runners, layer.tuning_config, _inputs(spec, 1), {})
    folder = folder_of(key)
    found: dict[int, list[Entry]] = {}
    for entry in Store(spec.store_root).entries(("miss",)):
        if entry.path.parent.name == folder:
            found.setdefault(int(entry.data["sizes"][0]), []).append(entry)
    return found
