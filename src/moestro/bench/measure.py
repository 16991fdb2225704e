"""Measuring contenders side by side.

For each case all contenders run in one process, in rounds: one sample of each per round, the order rotated,
so that whatever drifts (clock, neighbours, temperature) drifts for all. A sample is one call from cold
weights, through a timer of moestro.tuning. Several layers are taken in turn. Before any timing each
contender runs once, and its output is compared with the first bf16 contender's; and, where there is a
`truth`, with the float32 reference on the weights of its own format. Who is wrong is not timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from moestro.bench.contenders import Call, Contender, input_format_of
from moestro.bench.layers import Case
from moestro.errors import MoestroError

__all__ = ["Measured", "Outcome", "Plan", "Timer", "measure_case", "quartiles"]

WRONG = 0.02  # relative error norm of two bf16 implementations of the same layer; they differ by 0.4 % or so
ERROR = 0.01  # relative error norm against the reference, on the same weights
QUANTISED = {
    "int8": 0.02,
    "fp8": 0.03,
    "nvfp4": 0.05,
}  # the same, of quantised activations, where the last bit of an
# intermediate (peers round it to bf16 before) turns a code into the next one
EXACT = {
    "int8": 0.03,
    "fp8": 0.07,
    "nvfp4": 0.2,
}  # of quantised activations against unrounded ones. fp8 on an H200: 4.4 to 4.7 %, NVFP4 folded into e4m3 5.9 to 6.1 %

Truth = Callable[[Contender, Case], torch.Tensor | None]


class Timer(Protocol):
    """A timer of moestro.tuning.measure.timers."""

    @property
    def name(self) -> str: ...

    def prepare(self, call: Call) -> Callable[[], float]:
        """A sampler: runs the call once, as served, and returns seconds."""


@dataclass(frozen=True)
class Plan:
    """How long to measure: at least `min_rounds` per case, then until `seconds` per contender or
    `max_rounds`. Where that takes over three times as long, `few_rounds` are enough; and on a CPU a peer is left out
    of whom one call takes a second, ten times `seconds` and ten times as long as the fastest's, twice in a row: in a
    first call much happens once.
    """

    min_rounds: int = 7
    max_rounds: int = 101
    seconds: float = 1.0
    few_rounds: int = 3

    def enough(self, rounds: int, elapsed: float, contenders: int) -> bool:
        """Whether so many rounds, in so many seconds, will do."""
        budget = self.seconds * contenders
        if rounds >= self.min_rounds:
            return elapsed > budget
        return rounds >= self.few_rounds and elapsed > 3 * budget

    def too_slow(self, seconds: float, fastest: float) -> bool:
        return seconds > 10 * max(self.seconds, fastest, 0.1)


@dataclass(frozen=True)
class Measured:
    """The samples of one contender on one case."""

    contender: str
    num_tokens: int
    seconds: tuple[float, ...]
    clock: str
    difference: float | None = None  # relative error norm against the first bf16 contender's output
    error: float | None = (
        None  # relative error norm against the reference of the same weights and activations
    )
    exact_error: float | None = None  # against the exact product, where activations are quantised

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Outcome:
    """What came of one case."""

    measured: list[Measured] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # contender -> why it was not asked
    failed: dict[str, str] = field(default_factory=dict)  # contender -> what went wrong
    interrupted: bool = False


def quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    """The lower and upper quartile (the value itself for a single sample)."""
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, high


def measure_case(
    contenders: Sequence[Contender],
    case: Case,
    timer_of: Callable[[Contender], Timer],
    plan: Plan = Plan(),
    on_step: Callable[[str], None] = lambda _: None,
    truth: Truth | None = None,
    exact: Truth | None = None,
) -> Outcome:
    """Measure every contender that can run the case.

    `on_step` hears what happens ("checking …", "round 3"). `truth` gives the float32 reference [N, H] for a
    contender's weights and format of activations, `exact` the one of unquantised activations; or None where it
    cannot be had. KeyboardInterrupt ends the case; whole rounds that
    were measured stay in the outcome.
    """
    outcome = Outcome()
    samples: dict[str, list[float]] = {}
    lanes: dict[str, _Lane] = {}
    try:
        with torch.inference_mode():
            lanes = _prepare(contenders, case, timer_of, outcome, on_step, (truth, exact), plan)
            samples = {name: [] for name in lanes}
            _run_rounds(lanes, samples, plan, on_step)
    except KeyboardInterrupt:
        outcome.interrupted = True
    for name, lane in lanes.items():
        if samples.get(name):
            taken = tuple(samples[name])
            outcome.measured.append(
                Measured(
                    name, case.num_tokens, taken, lane.clock, lane.difference, lane.error, lane.exact_error
                )
            )
    return outcome


@dataclass(frozen=True)
class _Lane:
    calls: tuple[
        Call, ...
    ]  # one per layer; kept while they are timed, for a graph may refer to their tensors
    samplers: tuple[Callable[[], float], ...]
    clock: str
    difference: float | None
    error: float | None
    exact_error: float | None


def _prepare(
    contenders: Iterable[Contender],
    case: Case,
    timer_of: Callable[[Contender], Timer],
    outcome: Outcome,
    on_step: Callable[[str], None],
    truths: tuple[Truth | None, Truth | None],
    plan: Plan,
) -> dict[str, _Lane]:
    lanes: dict[str, _Lane] = {}
    fastest = float("inf")
    first: torch.Tensor | None = None  # the first bf16 contender's output
    for contender in contenders:
        reason = contender.why_not(case)
        if reason is not None:
            outcome.skipped[contender.name] = reason
            continue
        on_step(f"checking {contender.name}")
        try:
            calls = tuple(contender.calls(case))
            output, took = _timed(calls[0])
            if not contender.ours and case.x.device.type == "cpu" and plan.too_slow(took, fastest):
                output, took = _timed(calls[0])
            fastest = min(fastest, took)
            difference = None if first is None else _difference(output, first)
            if contender.format == "bf16" and difference is not None and not difference < WRONG:
                raise MoestroError(f"its output differs from the first bf16 contender's by {difference:.2g}")
            error, exact_error = _errors(contender, case, output, *truths)
            if not contender.ours and case.x.device.type == "cpu" and plan.too_slow(took, fastest):
                outcome.skipped[contender.name] = (
                    f"one call takes {took:.1f} s, the fastest's {fastest:.2g} s"
                )
                continue
            timer = timer_of(contender)
            samplers = tuple(map(timer.prepare, calls))
            lanes[contender.name] = _Lane(calls, samplers, timer.name, difference, error, exact_error)
        except Exception as raised:
            if contender.ours and not isinstance(raised, (MoestroError, RuntimeError, NotImplementedError)):
                raise  # a defect of ours; other people's code may raise anything
            outcome.failed[contender.name] = _first_line(raised)
            continue
        if first is None and contender.format == "bf16":
            first = output.clone()
    return lanes


def _errors(
    contender: Contender, case: Case, output: torch.Tensor, truth: Truth | None, exact: Truth | None
) -> tuple[float | None, float | None]:
    """Against the reference, and for quantised activations against the exact product. MoestroError beyond a bound."""
    taken = input_format_of(contender)
    found: list[float | None] = []
    for ask, bound, what in (
        (truth, ERROR if taken is None else QUANTISED[taken], "float32 reference"),
        (None, 0.0, "") if taken is None else (exact, EXACT[taken], "exact product"),
    ):
        expected = None if ask is None else ask(contender, case)
        error = None if expected is None else _difference(output, expected)
        if error is not None and not error < bound:
            raise MoestroError(f"its output differs from the {what} by {error:.2g}")
        found.append(error)
    return found[0], found[1]


def _timed(call: Call) -> tuple[torch.Tensor, float]:
    """The output of a call, in float32, and the seconds it took on the host."""
    start = time.perf_counter()
    return call().float(), time.perf_counter() - start


def _run_rounds(
    lanes: dict[str, _Lane], samples: dict[str, list[float]], plan: Plan, on_step: Callable[[str], None]
) -> None:
    names = list(lanes)
    start = time.monotonic()
    for number in range(plan.max_rounds):
        if plan.enough(number, time.monotonic() - start, len(names)):
            return
        on_step(f"round {number + 1}")
        first = number % len(names) if names else 0
        taken: dict[str, float] = {}
        for name in names[first:] + names[:first]:
            samplers = lanes[name].samplers
            taken[name] = samplers[number % len(samplers)]()
        for name, seconds in taken.items():  # only whole rounds count, so that all have the same ones
            samples[name].append(seconds)


def _difference(output: torch.Tensor, truth: torch.Tensor) -> float:
    norm = float(torch.linalg.vector_norm(truth))
    distance = float(torch.linalg.vector_norm(output - truth))
    return distance / norm if norm else distance


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"
