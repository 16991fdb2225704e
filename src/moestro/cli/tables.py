"""Bench results on a terminal: one row per number of tokens, one column group per contender."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moestro.bench.parity import Delta
from moestro.bench.results import BenchResult, Row
from moestro.bench.tune import TuneResult, TuneRow
from moestro.bench.worst import Worst
from moestro.cli.console import seconds_text
from moestro.machine import bytes_text

__all__ = ["bench_view", "heading", "parity_view", "tune_view", "worst_view"]


def heading(result: BenchResult) -> Text:
    """What was measured, where, and the ceilings."""
    problem, where, ceilings = result.problem, result.environment, result.ceilings
    ranks = f" · EP{problem['ep']}" if problem["ep"] > 1 else ""
    sizes = "E{num_experts} K{top_k} H{hidden_size} I{intermediate_size}".format(**problem)
    layers = f" · {result.conditions['layers']} layers" if result.conditions["layers"] > 1 else ""
    text = Text()
    text.append(problem["name"], style="bold")
    text.append(f"  {sizes}{ranks}{layers} · routing {result.conditions['routing']}\n")
    text.append(
        f"{where['device_name']}, {where['threads']} threads, torch {where['torch']} · "
        f"memory {ceilings['bytes_per_s'] / 1e9:.1f} GB/s, {ceilings['dtype']} "
        f"{ceilings['flops_per_s'] / 1e12:.3g} TFLOP/s\n",
        style="dim",
    )
    return text


def bench_view(result: BenchResult) -> RenderableType:
    """The whole result: heading, times, memory, what was left out."""
    parts: list[RenderableType] = [heading(result)]
    if result.rows:
        parts += [_times(result), _legend(result)]
    if result.memory:
        parts.append(_memory(result))
    parts += _fallbacks(result)
    parts += _left_out(result)
    if result.interrupted:
        parts.append(Text("interrupted: what was measured is above", style="yellow"))
    return Group(*parts)


def _fallbacks(result: BenchResult) -> list[RenderableType]:
    """Peers whose dtype is no fair measure here, with the reason, once each reason."""
    marked: dict[str, list[str]] = {}
    for row in result.rows:
        names = marked.setdefault(row.facts["fallback"], []) if row.facts.get("fallback") else []
        if row.contender not in names:
            names.append(row.contender)
    return [Text(f"{', '.join(names)}: {why}", style="yellow") for why, names in marked.items()]


def _times(result: BenchResult) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("\nN", justify="right")
    ours = {row.contender for row in result.rows if row.ours}
    scale, unit = _unit(result)
    for name in result.contenders:
        brand, _, kind = name.partition(" ")
        if name in ours:
            table.add_column(f"{brand}\n{kind} {unit}", justify="right")
            table.add_column("×\npeer", justify="right")
            table.add_column("roof\n%", justify="right")
        elif brand == "transformers":
            table.add_column(f"{kind}\n{unit}", justify="right", style="dim")
        else:
            table.add_column(f"{brand}\n{kind} {unit}", justify="right", style="dim")
    for tokens in result.tokens:
        cells = [Text(str(tokens), style="bold")]
        rows = [result.row(name, tokens) for name in result.contenders]
        best = min((row.median_s for row in rows if row and not row.ours), default=None)
        for name, row in zip(result.contenders, rows, strict=True):
            cells += _cells(row, best, name in ours, scale)
        table.add_row(*cells)
    return table


def _unit(result: BenchResult) -> tuple[float, str]:
    """One unit for the whole table, so that its columns can be compared at a glance: milliseconds if none is
    below a half, where they would lose digits.
    """
    seconds = [row.median_s for row in result.rows]
    return (1e3, "ms") if max(seconds) >= 5e-3 and min(seconds) >= 5e-4 else (1e6, "µs")


def _cells(row: Row | None, best_peer: float | None, ours: bool, scale: float) -> list[Text]:
    if row is None:
        return [Text("–", style="dim")] * (3 if ours else 1)
    time = Text(_digits(row.median_s * scale), style="bold not dim" if row.median_s == best_peer else "")
    time.append(f" ±{min(99, 100 * row.spread):.0f}%", style="dim not bold")
    if not ours:
        return [time]
    if row.ratio_to_best_peer is None:
        ratio = Text("–", style="dim")
    else:
        color = (
            "green" if row.ratio_to_best_peer >= 1 else "yellow" if row.ratio_to_best_peer >= 0.95 else "red"
        )
        ratio = Text(f"{row.ratio_to_best_peer:.2f}", style=f"bold {color}")
    return [time, ratio, Text(f"{100 * row.roofline:.0f}")]


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _legend(result: BenchResult) -> Text:
    clocks = " / ".join(sorted({row.clock for row in result.rows}))
    low, high = (f(row.samples for row in result.rows) for f in (min, max))
    samples = f"{low}" if low == high else f"{low} to {high}"
    peers = list(dict.fromkeys(f"{r.contender.split()[0]} {r.format}" for r in result.rows if not r.ours))
    text = Text(
        (f"Peers: {', '.join(peers)}; the fastest of each row is bold. " if peers else "")
        + f"Medians of {samples} alternating rounds ({clocks}), ± half the middle half. "
        "× peer: speed against the fastest peer, 2.00 is twice as fast. "
        "roof: % of what memory and matrix rate allow for the format's bytes.\n",
        style="dim",
    )
    if result.busy:
        text.append(
            "This machine was busy: the spreads are large. Measure again when it is quiet.\n", "yellow"
        )
    return text


def _memory(result: BenchResult) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("weights of one layer")
    table.add_column("bytes", justify="right")
    table.add_column("× bf16", justify="right")
    table.add_column("runs on")
    backends: dict[str, list[str]] = {}
    for row in result.rows:
        known = backends.setdefault(row.contender, [])
        if row.facts.get("backend") and row.facts["backend"] not in known:
            known.append(row.facts["backend"])
    seen: set[tuple[str, int]] = set()
    for entry in result.memory:
        label = entry["contender"]
        if not label.startswith("moestro"):
            label = f"{label.split()[0]} {entry['format']}"
        if (label, entry["bytes"]) not in seen:
            seen.add((label, entry["bytes"]))
            table.add_row(
                label,
                bytes_text(entry["bytes"]),
                f"{entry['ratio_to_bf16']:.3f}",
                ", ".join(backends.get(label, [])),
            )
    return table


def _left_out(result: BenchResult) -> list[RenderableType]:
    """Reasons for what is missing, the numbers of tokens with the same reason together."""
    parts: list[RenderableType] = []
    for entries, word, style in ((result.skipped, "not run", "dim"), (result.failed, "failed", "red")):
        grouped: dict[tuple[str, str], list[int]] = {}
        for entry in entries:
            reason = entry["reason"]
            key = (entry["contender"], _without_numbers(reason))
            grouped.setdefault(key, [])
            if entry["tokens"] is not None:
                grouped[key].append(entry["tokens"])
        first = {(e["contender"], _without_numbers(e["reason"])): e["reason"] for e in reversed(entries)}
        for (contender, kind), tokens in grouped.items():
            where = f" at N = {', '.join(map(str, tokens))}" if tokens else ""
            parts.append(Text(f"{contender} {word}{where}: {first[contender, kind]}", style=style))
    return [Text(""), *parts] if parts else []


def _without_numbers(reason: str) -> str:
    return "".join(char for char in reason if not char.isdigit() and char != ".")


def parity_view(found: Sequence[Delta], runs: Sequence[BenchResult]) -> RenderableType:
    """Δ% per N and EP: mean, spread, and every run."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    for title in ("EP", "N", "Δ mean", "spread", "runs"):
        table.add_column(title, justify="right")
    table.add_column("contender")
    table.add_column("against")
    for delta in found:
        color = "green" if delta.mean <= 0 else "red"
        every = "  ".join(f"{value:+.1f}" for value in delta.percent)
        table.add_row(
            str(delta.ep),
            str(delta.tokens),
            Text(f"{delta.mean:+.1f}%", style=f"bold {color}"),
            f"{delta.spread:.1f}",
            Text(every, style="dim"),
            delta.contender,
            Text(delta.peer, style="dim"),
        )
    note = Text(
        "Δ = our median / the peer's - 1 per run: negative is faster. Spread: points between runs.", "dim"
    )
    return Group(heading(runs[0]), table, note)


def worst_view(rows: Sequence[Worst]) -> RenderableType:
    """The ratio to each peer under the routing where it is least, and under every one."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    names = list(dict.fromkeys(name for row in rows for name in row.ratios))
    table.add_column("N", justify="right")
    table.add_column("contender", no_wrap=True)
    table.add_column("against", style="dim", no_wrap=True)
    table.add_column("worst ×", justify="right")
    for name in names:
        table.add_column(name.partition("(")[0] if "@" in name else name, justify="right", style="dim")
    for row in rows:
        color = "green" if row.ratio >= 1 else "yellow" if row.ratio >= 0.95 else "red"
        each = (f"{row.ratios[name]:.2f}" if name in row.ratios else "–" for name in names)
        worst = Text(f"{row.ratio:.2f}", style=f"bold {color}")
        table.add_row(str(row.tokens), row.contender, row.peer.removeprefix("transformers "), worst, *each)
    note = Text("×: speed against the peer, 2.00 is twice as fast; the least of all routings.", "dim")
    return Group(Text("\nThe worst of all routings", style="bold"), table, note)


def tune_view(result: TuneResult) -> RenderableType:
    """What was decided, per format and number of tokens, and what tuning gained over the default."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("format")
    table.add_column("N", justify="right")
    for title in ("chosen", "× default"):
        table.add_column(title, justify="right" if "×" in title else "left")
    for title in ("noise", "candidates", "samples", "time"):
        table.add_column(title, justify="right", style="dim")
    backends = {row.backend for row in result.rows} | {entry["backend"] for entry in result.open}

    def asked(backend: str) -> str:  # which one was asked for, where that was several
        return f" {backend}" if len(backends) > 1 else ""

    for row in result.rows:
        table.add_row(row.format + asked(row.backend), *_tuned_cells(row))
    problem, where = result.problem, result.environment
    head = Text()
    head.append(problem["name"], style="bold")
    head.append("  E{num_experts} K{top_k} H{hidden_size} I{intermediate_size}".format(**problem))
    head.append(f" · {where['device_name']}\n", style="dim")
    parts: list[RenderableType] = [head, *([table] if result.rows else [])]
    for entry in result.skipped:
        parts.append(Text(f"{entry['format']} {entry['backend']}: {entry['reason']}", style="yellow"))
    parts += _to_go_on_with(result, asked)
    if result.phases:
        slowest = sorted(result.phases.items(), key=lambda item: -item[1])[:4]
        spent = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in slowest)
        parts.append(Text(f"\nmost of the time: {spent}", "dim"))
    stopped = "interrupted after" if result.interrupted else "in"
    made = sum(row.own for row in result.rows)
    count = f"{made} decision{'s' * (made != 1)}"
    where_to = f"in {result.store}" if result.kept else f"not kept in {result.store}"
    parts.append(Text(f"{count} {stopped} {result.seconds:.0f} s, {where_to}", "dim"))
    return Group(*parts)


def _to_go_on_with(result: TuneResult, asked: Callable[[str], str]) -> Iterator[Text]:
    """What the budget or Ctrl-C left."""
    of_others = [asdict(row) for row in result.rows if not row.own]
    unfinished = [asdict(row) for row in result.rows if row.own and not row.complete]
    for what, cases in (
        ("not decided", result.open),
        ("not measured themselves", of_others),
        ("unfinished", unfinished),
    ):
        if cases:
            left = ", ".join(
                f"{case['format']}{asked(case['backend'])} N = {case['tokens']}" for case in cases
            )
            yield Text(f"{what}: {left}; run again to go on from here", style="yellow")


def _tuned_cells(row: TuneRow) -> tuple[str | Text, ...]:
    """Of one number of tokens; what belongs to the decision of another number is told there."""
    kept = row.tactic == "default"
    chosen = Text(f"{row.runner} {row.tactic}")
    if row.status != "measured":
        chosen.append(f"  ({row.status})", style="yellow")
    if not row.own:
        chosen.append(f"  (that of N = {row.bucket})", style="yellow")
        return (str(row.tokens), chosen)
    gain = Text("1 (kept)" if kept else "–" if row.gain is None else f"{row.gain:.2f}")
    return (
        str(row.tokens),
        chosen,
        Text("–", style="dim") if row.gain is None and not kept else gain,
        f"{100 * row.noise_floor:.1f}%",
        str(row.candidates),
        str(row.samples),
        seconds_text(row.seconds),
    )
