"""The table of decisions behind `moestro tune`, which is layer.tune() for each format and backend.

One layer per format is made; decisions depend on shapes, not on weights, so all layers of a model find those of
the one that was tuned. The tuner's campaign says how it goes (progress.Listener); what its steps take is kept.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moestro.bench import results
from moestro.bench.contenders import make_layer, tactic_words
from moestro.bench.layers import LayerSource
from moestro.bench.models import MoeShape
from moestro.errors import BackendError, TuningError
from moestro.moe.call import as_inputs
from moestro.moe.layer import FusedMoE
from moestro.moe.tuning_config import OP
from moestro.routing import Distribution
from moestro.tuning import AutoTuner, Decision, Store
from moestro.tuning.progress import Listener
from moestro.tuning.spec.keys import static_key
from moestro.tuning.store.store import Entry, default_root, folder_of

__all__ = ["SCHEMA", "TuneResult", "TuneRow", "TuneSpec", "check_kept", "run"]

SCHEMA = "moestro.tune/1"


@dataclass(frozen=True)
class TuneSpec:
    """What to tune."""

    shape: MoeShape
    tokens: tuple[int, ...]
    routings: tuple[
        Distribution, ...
    ] = ()  # the layer's own probes if empty: moe.tuning_config.default_routing()
    formats: tuple[str, ...] = ("nvfp4",)
    inputs: tuple[str | None, ...] = (None,)  # of activations, of each format
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
    complete: bool = True  # False: the budget or Ctrl-C ended the race; tuning again goes on with it

    @property
    def own(self) -> bool:
        """Whether it was measured at this number of tokens, and not at another one that serves it so far."""
        return self.bucket == self.tokens


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
    kept: bool = True  # whether the store took everything
    why_not_kept: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


class _Phases(Listener):
    """Passes on what it hears, and keeps the seconds of each part in the result."""

    def __init__(self, result: TuneResult, listener: Listener) -> None:
        self._result, self._listener = result, listener
        self._format, self._phase, self._since = "", "", 0.0

    def begin(self, format: str) -> None:
        """What follows is about a format's layer."""
        self._format = format

    def stage(self, text: str, total: int) -> None:
        what = text.split(" ")[0]
        self._listener.stage(f"{what} {self._format}", total)
        self.end()
        if what in ("compiling", "making"):
            self._start("compiling" if what == "compiling" else "making the layer")

    def step(self, text: str) -> None:
        if text.startswith("bucket ") and ":" not in text:
            text = f"N = {text.removeprefix('bucket ')}"
        self._listener.step(text)
        if text.startswith(("N = ", "where ")):
            self.end()
            self._start(text)

    def done(self) -> None:
        self._listener.done()
        self.end()

    def end(self) -> None:
        """The part that was going on is over."""
        if self._phase:
            phases, name = self._result.phases, f"{self._format}: {self._phase}"
            phases[name] = phases.get(name, 0.0) + time.monotonic() - self._since
        self._phase = ""

    def _start(self, phase: str) -> None:
        self._phase, self._since = phase, time.monotonic()


def run(spec: TuneSpec, command: str, listener: Listener | None = None) -> TuneResult:
    """Tune everything that `spec` names.

    KeyboardInterrupt ends it; the result and the store hold what is decided by then.
    """
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
    phases = _Phases(result, listener or Listener())
    store = Store(spec.store_root)
    tuner = AutoTuner(store=store)
    each = list(itertools.product(spec.formats, spec.inputs, spec.backends))
    left, interrupted = spec.budget_s, False
    try:
        for done, (format, taken, backend) in enumerate(each):
            name = " ".join(filter(None, [format, taken]))  # as tables show it: "mxfp4 fp8"
            phases.begin(name)
            phases.stage("making", 1)
            source = LayerSource(spec.shape, seed=spec.seed, device=spec.device)
            try:
                layer = make_layer(source, format, backend, _most(spec), tuner, taken)
            except BackendError as error:
                result.skipped.append({"format": name, "backend": backend, "reason": str(error)})
                continue
            finally:
                phases.end()
            began = time.monotonic()
            budget = None if left is None else max(0.0, left / (len(each) - done))
            _tune_layer(spec, layer, name, backend, budget, result, phases, store)
            left = None if left is None else left - (time.monotonic() - began)
    except KeyboardInterrupt:
        interrupted = True
    return dataclasses.replace(
        result,
        interrupted=interrupted,
        seconds=time.monotonic() - start,
        kept=store.unwritable is None,
        why_not_kept=store.unwritable,
    )


def check_kept(result: TuneResult) -> None:
    """Raises TuningError if the store did not take everything: what serves later will not find it."""
    if result.why_not_kept is not None:
        raise TuningError(
            f"not kept: the store {result.store} could not be written ({result.why_not_kept}). The decisions above are "
            "lost to later processes, but for those that it took before; give a folder that can be written, with room, "
            "by --store or MOESTRO_STORE, and tune again"
        )


def _tune_layer(
    spec: TuneSpec,
    layer: FusedMoE,
    format: str,
    backend: str,
    budget: float | None,
    result: TuneResult,
    phases: _Phases,
    store: Store,
) -> None:
    misses = _misses(spec, layer) if spec.from_misses else {}
    tokens = sorted(misses) if spec.from_misses else sorted(spec.tokens)
    if not tokens:
        reason = f"the store {spec.store_root} has no misses of this layer"
        result.skipped.append({"format": format, "backend": backend, "reason": reason})
        return
    try:
        layer.tune(tokens[-1], budget, spec.routings or None, phases, buckets=tokens)
    finally:  # whatever happens, what is decided is in the result
        phases.end()
        for size in tokens:
            decision = layer.decision(size)
            if decision is None or decision.status == "extrapolated":
                result.open.append({"format": format, "backend": backend, "tokens": size})
            else:
                result.rows.append(row := _row(format, backend, size, decision))
                for entry in misses.get(size, ()) if row.own and store.unwritable is None else ():
                    store.forget(entry)


def _most(spec: TuneSpec) -> int:
    """max_num_tokens of the layer: everything that may be tuned."""
    if not spec.from_misses:
        return max(spec.tokens)
    sizes = [
        size for entry in Store(spec.store_root).entries(("miss",)) for size in entry.data.get("sizes", [])
    ]
    return max([1, *map(int, sizes)])


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
        complete=decision.record.complete,
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
