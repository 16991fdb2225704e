"""A decision in words and a table: what was chosen, why, who came second, and what would change it."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moestro.tuning.spec.evidence import CandidateEvidence, Evidence, Record
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.spec.plain_json import to_json
from moestro.tuning.spec.specs import Sizes

__all__ = [
    "Case",
    "age_text",
    "explain",
    "explain_miss",
    "ratio_text",
    "runner_text",
    "seconds_text",
    "tactic_text",
]

SHOWN = 12  # candidates in a table; a tuning may have hundreds
ROOM = 118  # columns from which ratios by probe and notes have columns of their own


@dataclass(frozen=True)
class Case:
    """One question: which decision answers these sizes (None: any), and what is known beside it."""

    key: StaticKey
    record: Record
    records: Mapping[Sizes, Record]  # of the same key and probes
    sizes: Sizes | None = None
    within: bool = True
    source: str = "memory"
    facts: Mapping[str, Any] | None = None  # of the environment that it was measured in


def explain(case: Case, width: int = 120) -> str:
    """The explanation as text of this width."""
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False)
    for line in _headline(case):
        console.print(line, markup=False, soft_wrap=True)
    if case.record.evidence.candidates:
        console.print(_table(case, width))
    for title, lines in (("Measured", _conditions(case)), ("What would change it", _changes(case))):
        console.print(f"\n{title}", markup=False)
        for line in lines:
            console.print(f"  - {line}", markup=False, soft_wrap=True)
    return stream.getvalue().rstrip() + "\n"


def _headline(case: Case) -> Iterator[str]:
    record, evidence = case.record, case.record.evidence
    asked = f" at size {_sizes(case.sizes)}" if case.sizes is not None else ""
    status = record.status if case.within else "extrapolated"
    chosen = f"{runner_text(record.runner)}, tactic {tactic_text(record.tactic)}"
    yield f"{case.key.op}{asked}: {chosen}  [{status}]"
    where = f"decided at bucket {_sizes(record.bucket)}" if record.bucket else "decided"
    kind = ", a point between buckets where the winner changes" if record.learned else ""
    yield f"{where}{kind}; {age_text(record.created)}, from {case.source}"
    yield f"why: {_why(record, evidence)}"
    if not record.complete:
        yield "the budget ended before the race did: tune again to finish it"


def _why(record: Record, evidence: Evidence) -> str:
    chosen = evidence.of(record.runner, record.tactic)
    if chosen is None:
        return "no evidence is stored with it"
    if chosen.reason == "the only one left" or record.status != "measured":
        return chosen.reason or record.status
    default = _default(evidence)
    others = [c for c in evidence.candidates if c.ratio is not None and c is not chosen]
    beside = f" Of {len(evidence.candidates)} candidates {len(others) + 1} were timed."
    floor = f"noise floor {evidence.noise_floor:.2%}"
    if chosen is default:
        best = min((c.ratio for c in others if c.ratio is not None), default=None)
        nearest = "" if best is None else f"; the best other one had {ratio_text(best)} of its time"
        return f"the default: nothing was proven faster by more than the margin ({floor}){nearest}." + beside
    return (
        f"{chosen.reason}: {ratio_text(chosen.ratio)} of the default's time "
        f"[{ratio_text(chosen.low)}, {ratio_text(chosen.high)}], {floor}.{beside}"
    )


def _default(evidence: Evidence) -> CandidateEvidence | None:
    return next((c for c in evidence.candidates if c.tactic == -1), None)


def _table(case: Case, width: int) -> Any:
    from rich import box
    from rich.table import Table

    evidence, wide = case.record.evidence, width >= ROOM
    probes = sorted({name for c in evidence.candidates for name in c.probes}) if wide else []
    probes = probes if len(probes) > 1 else []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name, least in (("runner", 0), ("tactic", 10), ("", 0)):
        table.add_column(name, no_wrap=name != "tactic", overflow="fold", min_width=least)
    for name in ("time", "ratio", "interval", *_headings(probes), "runs"):
        table.add_column(name, justify="right", no_wrap=True)  # a figure is whole
    if wide:
        table.add_column("note", overflow="fold")
    ordered = sorted(evidence.candidates, key=_rank)
    for c in ordered[:SHOWN]:
        interval = f"{ratio_text(c.low)} - {ratio_text(c.high)}" if c.low else ""
        by_probe = [ratio_text(c.probes.get(p, {}).get("ratio")) for p in probes]
        note = "" if c.reason == c.fate else c.reason
        tactic = tactic_text(c.tactic) if wide or not note else f"{tactic_text(c.tactic)}: {note}"
        cells = [runner_text(c.runner), tactic, c.fate, seconds_text(c.median), ratio_text(c.ratio), interval]
        table.add_row(*map(_plain, [*cells, *by_probe, str(c.samples or ""), *([note] if wide else [])]))
    if len(ordered) > SHOWN:
        table.add_row("", f"and {len(ordered) - SHOWN} more")
    return table


def _headings(probes: list[str]) -> list[str]:
    """The probes' names without their arguments, where these tell none apart; they are told in full below."""
    short = [name.partition("(")[0] for name in probes]
    return short if len(set(short)) == len(short) else probes


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _rank(c: CandidateEvidence) -> tuple[Any, ...]:
    order = ("winner", "finalist", "eliminated", "failed", "not measured", "quarantined")
    return c.fate != "winner", c.ratio is None, c.ratio or 0.0, order.index(c.fate) if c.fate in order else 9


def _conditions(case: Case) -> Iterator[str]:
    record, evidence = case.record, case.record.evidence
    probes = ", ".join(record.probes) or "values like the inputs'"
    took = seconds_text(evidence.seconds)
    yield f"inputs: {probes}; clock: {evidence.clock}; {evidence.samples} runs in {took}"
    if evidence.policy:
        shown = ("confidence", "min_gain", "verify", "cold_cache", "isolate")
        yield "policy: " + ", ".join(f"{k}={evidence.policy[k]}" for k in shown if k in evidence.policy)
    yield f"environment: {record.environment or 'unknown'}"
    if case.facts:
        facts = [f"{k} {v}" for k, v in case.facts.items() if k not in {"policy", "sources", "clock"}]
        yield ", ".join(facts)


def _changes(case: Case) -> Iterator[str]:
    record = case.record
    points = sorted(case.records)
    if case.sizes is not None and not case.within:
        yield f"tuning at {_sizes(case.sizes)}: it lies beyond everything tuned"
    if len(record.bucket) == 1 and record.bucket in case.records:
        yield from _boundaries(case, points)
    rivals = [c for c in record.evidence.candidates if c.fate == "finalist" and c.ratio is not None]
    for c in sorted(rivals, key=_rank)[:2]:
        yield f"{tactic_text(c.tactic)} was not told apart from it ({ratio_text(c.ratio)} of the default)"
    banned = [c for c in record.evidence.candidates if c.fate == "quarantined"]
    if banned:
        names = ", ".join(tactic_text(c.tactic) for c in banned[:4])
        yield f"lifting the quarantine of {len(banned)} ({names}): moestro cache prune --kind quarantine"
    yield "another device, driver, torch, triton, kernel source or policy: each has its own decisions"


def _boundaries(case: Case, points: list[Sizes]) -> Iterator[str]:
    at = points.index(case.record.bucket)
    mine = (case.record.runner, to_json(case.record.tactic))
    for direction, word in ((-1, "below"), (1, "above")):
        other = at
        while 0 <= other + direction < len(points):
            other += direction
            there = case.records[points[other]]
            if (there.runner, to_json(there.tactic)) != mine:
                edge = points[other - direction][0]
                low, high = sorted((edge, points[other][0]))
                yield (
                    f"a size {word}: between {low} and {high} the winner becomes "
                    f"{runner_text(there.runner)}, tactic {tactic_text(there.tactic)}"
                )
                break


def explain_miss(key: StaticKey, others: Iterable[StaticKey]) -> str:
    """Why nothing is known for a key: what sets it apart from the nearest key of its op that something is
    known of.
    """
    same_op = [other for other in others if other.op == key.op and other.text != key.text]
    if not same_op:
        return f"{key.op}: nothing is known; the default serves. Run it once under autotune().\n"
    apart = min((list(_apart(key.fields, other.fields)) for other in same_op), key=len)
    lines = [
        f"{key.op}: nothing is known for these inputs; the default serves.",
        "The nearest that is known has",
    ]
    lines += [f"  - {where}: {there}, here {here}" for where, here, there in apart[:8]]
    return "\n".join(lines) + "\n"


def _apart(here: Any, there: Any, where: str = "") -> Iterator[tuple[str, str, str]]:
    """(place, value here, value there) of every difference of two JSON values."""
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        for name in sorted({*here, *there}):
            yield from _apart(here.get(name), there.get(name), f"{where}.{name}" if where else str(name))
    elif isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        for i, (mine, theirs) in enumerate(zip(here, there, strict=True)):
            yield from _apart(mine, theirs, f"{where}[{i}]")
    elif json.dumps(here, sort_keys=True) != json.dumps(there, sort_keys=True):
        yield where, _brief(here), _brief(there)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def runner_text(runner: str) -> str:
    """The class of a runner's identity."""
    return runner.partition("#")[0].rpartition(".")[2]


def _sizes(sizes: Sizes | None) -> str:
    return " x ".join(map(str, sizes or ()))


def tactic_text(tactic: Any) -> str:
    """A tactic as a person would write it."""
    if dataclasses.is_dataclass(tactic) and not isinstance(tactic, type):
        fields = {f.name: getattr(tactic, f.name) for f in dataclasses.fields(tactic)}
    else:
        return "default (-1)" if tactic == -1 else str(tactic)
    return " ".join(f"{name}={value}" for name, value in fields.items())


def ratio_text(ratio: float | None) -> str:
    """A ratio with three decimals; empty for none."""
    return "" if ratio is None else f"{ratio:.3f}" if ratio < 100 else "inf"


def seconds_text(seconds: float | None) -> str:
    """Seconds in the unit that fits; empty for none."""
    if seconds is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def age_text(created: float) -> str:
    """How long ago a time was."""
    seconds = max(0.0, time.time() - created)
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now" if seconds < 60 else "a minute ago"
