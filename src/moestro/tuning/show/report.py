"""What the tuner chose and why, as HTML: plots of the decisions in a store, inlined as SVG with marks (svg.py).

Four plots for each family of decisions (one key, environment and set of probes): the ratio of every tactic to
the default over the sizes; where winners change; the chosen one against the default with its interval; and
what the tuning took. Each is a function of a Family, so that other pages may use one alone. Needs matplotlib.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.show.explain import age_text, ratio_text, runner_text, seconds_text, tactic_text
from moestro.tuning.show.families import Family, families
from moestro.tuning.show.svg import Mark, inline, strips
from moestro.tuning.spec.evidence import Record
from moestro.tuning.store.store import Store

__all__ = ["chosen_plot", "crossover_plot", "heat_map", "section", "time_plot"]

ROWS = 24  # tactics in a heat map: the best ones
SERIES = 6  # lines in a crossover plot
SHOWN = 5  # of them, in a size's label
HEAT = "Time over the default's, by tactic and size"
CROSSOVER = "Where winners change"
CHOSEN = "The chosen one against the default"
TIME = "What the tuning of each size took"
DARK, ACCENT, SOFT = "#1f2937", "#0f766e", "#9ca3af"

Candidate = tuple[str, str]  # (runner, tactic) as shown


def section(store: Path) -> str:
    """HTML of all families of decisions in a store, the largest first; a line that says so if there are none.

    Raises TuningError if matplotlib is not installed.
    """
    _pyplot()
    source, found = Store(store), shown(store)
    if not found:
        return f"<h2>Tuning</h2><p>{html.escape(str(store))} holds no decisions over a dynamic size.</p>"
    return "<h2>Tuning</h2>" + "".join(_family(family, source) for family in found)


def shown(store: Path) -> list[Family]:
    """The families of decisions over several sizes in a store, the largest first."""
    found = [f for f in families(Store(store).entries()) if f.dynamic == 1 and len(f.records) > 1]
    return sorted(found, key=lambda f: -len(f.records))


def _family(family: Family, source: Store) -> str:
    head, _, inputs = family.title.partition("\n")
    facts = {k: v for k, v in source.facts(family.environment).items() if k not in {"policy", "sources"}}
    spent = sum(record.evidence.seconds for record in family.records.values())
    learned = sum(record.learned for record in family.records.values())
    words = (
        f"{len(family.records)} sizes, {learned} of them learned where winners change; "
        f"{seconds_text(spent)} of measuring; {', '.join(f'{k} {v}' for k, v in facts.items())}"
    )
    plots = ((HEAT, heat_map), (CROSSOVER, crossover_plot), (CHOSEN, chosen_plot), (TIME, time_plot))
    figures = "".join(
        f"<figure{' class=wide' * (plot is heat_map)}><figcaption>{html.escape(title)}</figcaption>{plot(family)}"
        "</figure>"
        for title, plot in plots
    )
    return (
        f"<h3>{html.escape(head)}</h3><p>{html.escape(inputs.strip())}<br>{html.escape(words)}</p>"
        f"{figures}{_table(family)}"
    )


def heat_map(family: Family) -> str:
    """Tactic × size: log-ratio to the default, below 1 in green; the chosen one of each size is marked."""
    ratios = _ratios(family)
    best = sorted(ratios, key=lambda c: _middle(ratios[c].values()))[:ROWS]
    sizes = [bucket[0] for bucket in family.records]
    cells = [[math.log2(ratios[c].get(size, math.nan)) for size in sizes] for c in best]
    limit = max(0.2, *(abs(x) for row in cells for x in row if math.isfinite(x)))
    limit = min(limit, 1.5)

    def draw(figure: Any) -> list[Mark]:
        axes = figure.subplots()
        image = axes.imshow(
            cells, cmap="BrBG_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        for column, record in enumerate(family.records.values()):
            chosen = _name(record.runner, record.tactic)
            if chosen in best:
                axes.plot(column, best.index(chosen), "o", color=DARK, markersize=5)
        axes.set_xticks(range(len(sizes)), [str(s) for s in sizes], rotation=90)
        axes.set_yticks(range(len(best)), [_label(c, best) for c in best])
        axes.set_xlabel("size")
        bar = figure.colorbar(image, ax=axes, pad=0.01)
        ticks = [t for t in (-1.5, -1, -0.5, 0, 0.5, 1, 1.5) if abs(t) <= limit]
        bar.set_ticks(ticks, labels=[f"{2**t:.2f}" for t in ticks])
        return _cells(axes, family, ratios, best)

    return _svg(draw, HEAT, width=1.5 + 0.32 * len(sizes), height=1.2 + 0.24 * len(best))


def _cells(
    axes: Any, family: Family, ratios: dict[Candidate, dict[int, float]], shown: list[Candidate]
) -> list[Mark]:
    """A mark for each measured cell; the Tab key stops at the chosen one of each size."""
    marks = []
    for column, (bucket, record) in enumerate(family.records.items()):
        chosen = _name(record.runner, record.tactic)
        for row, candidate in enumerate(shown):
            ratio = ratios[candidate].get(bucket[0])
            if ratio is None:
                continue
            words = [f"size {bucket[0]}", _label(candidate, shown), f"{ratio:.3f} of the default's time"]
            words += ["chosen"] * (candidate == chosen)
            x, y = (column - 0.5, column + 0.5), (row - 0.5, row + 0.5)
            marks.append(Mark(axes, words, x, y, stop=candidate == chosen))
    return marks


def crossover_plot(family: Family) -> str:
    """Ratio to the default over the size, of those that win somewhere; a line where the winner changes."""
    ratios = _ratios(family)
    wins: dict[Candidate, int] = {}
    for record in family.records.values():
        name = _name(record.runner, record.tactic)
        wins[name] = wins.get(name, 0) + 1
    shown = sorted(wins, key=lambda c: -wins[c])[:SERIES]
    edges = [
        math.sqrt(low[0] * high[0])
        for (low, a), (high, b) in zip(
            list(family.records.items()), list(family.records.items())[1:], strict=False
        )
        if _name(a.runner, a.tactic) != _name(b.runner, b.tactic)
    ]

    def draw(figure: Any) -> list[Mark]:
        axes = figure.subplots()
        for candidate in shown:
            points = sorted(ratios.get(candidate, {}).items())
            axes.plot(
                *zip(*points, strict=True), "o-", markersize=3, linewidth=1.2, label=_label(candidate, shown)
            )
        for edge in edges:
            axes.axvline(edge, color=SOFT, linewidth=0.8, linestyle=":")
        _size_axis(axes)
        axes.set_ylabel("time / default's")
        axes.legend(frameon=False)
        return strips(axes, {bucket[0]: _crossing(bucket[0], ratios, shown) for bucket in family.records})

    return _svg(draw, CROSSOVER)


def _crossing(size: int, ratios: dict[Candidate, dict[int, float]], shown: list[Candidate]) -> list[str]:
    """The ratios of a size, the best first."""
    here = sorted((ratios[c][size], c) for c in shown if size in ratios.get(c, {}))
    return [f"size {size}", *(f"{_label(c, shown)}: {ratio:.3f}" for ratio, c in here[:SHOWN])]


def chosen_plot(family: Family) -> str:
    """The chosen one's ratio to the default with its interval, and the noise floor, over the size."""
    rows: list[tuple[float, ...]] = []
    words: dict[float, list[str]] = {}
    for bucket, record in family.records.items():
        won = record.evidence.of(record.runner, record.tactic)
        if won is not None and won.ratio is not None and won.low is not None and won.high is not None:
            rows.append((bucket[0], won.ratio, won.low, min(won.high, 4.0), record.evidence.noise_floor))
            words[bucket[0]] = [
                f"size {bucket[0]}: {tactic_text(record.tactic)}",
                f"{won.ratio:.3f} of the default's time ({won.low:.3f} to {won.high:.3f})",
                f"noise floor {100 * record.evidence.noise_floor:.2f} %",
            ]

    def draw(figure: Any) -> list[Mark]:
        axes = figure.subplots()
        if rows:
            sizes, ratio, low, high, floor = zip(*rows, strict=True)
            errors = [
                [r - a for r, a in zip(ratio, low, strict=True)],
                [b - r for r, b in zip(ratio, high, strict=True)],
            ]
            axes.fill_between(
                sizes, [1 - f for f in floor], [1 + f for f in floor], color=SOFT, alpha=0.3, linewidth=0
            )
            axes.errorbar(
                sizes, ratio, yerr=errors, fmt="o-", color=ACCENT, markersize=3, linewidth=1, capsize=2
            )
        axes.axhline(1, color=DARK, linewidth=0.8)
        _size_axis(axes)
        axes.set_ylabel("time / default's")
        return strips(axes, words)

    return _svg(draw, CHOSEN)


def time_plot(family: Family) -> str:
    """Seconds of measuring for each size."""
    sizes = [str(bucket[0]) for bucket in family.records]
    seconds = [record.evidence.seconds for record in family.records.values()]
    colours = [SOFT if record.learned else ACCENT for record in family.records.values()]

    def draw(figure: Any) -> list[Mark]:
        axes = figure.subplots()
        axes.bar(range(len(sizes)), seconds, color=colours)
        axes.set_xticks(range(len(sizes)), sizes, rotation=90)
        axes.set_xlabel("size (grey: learned points)")
        axes.set_ylabel("seconds")
        return [
            Mark(axes, (f"size {size}", f"{seconds_text(spent)} of measuring"), (i - 0.5, i + 0.5))
            for i, (size, spent) in enumerate(zip(sizes, seconds, strict=True))
        ]

    return _svg(draw, TIME, width=1.5 + 0.2 * len(sizes))


def _table(family: Family) -> str:
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in _row(r))}</tr>" for r in family.records.values()
    )
    head = "".join(
        f"<th>{name}</th>"
        for name in ("size", "runner", "tactic", "time", "ratio", "interval", "runs", "age")
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _row(record: Record) -> list[str]:
    won = record.evidence.of(record.runner, record.tactic)
    interval = f"{ratio_text(won.low)} to {ratio_text(won.high)}" if won is not None and won.low else ""
    return [
        str(record.bucket[0]),
        runner_text(record.runner),
        tactic_text(record.tactic),
        seconds_text(won.median if won else None),
        ratio_text(won.ratio if won else None),
        interval,
        str(record.evidence.samples),
        age_text(record.created),
    ]


def _ratios(family: Family) -> dict[Candidate, dict[int, float]]:
    """Candidate -> size -> ratio to the default."""
    found: dict[Candidate, dict[int, float]] = {}
    for bucket, record in family.records.items():
        for c in record.evidence.candidates:
            if c.ratio is not None and c.ratio > 0:
                found.setdefault(_name(c.runner, c.tactic), {})[bucket[0]] = c.ratio
    return found


def _name(runner: str, tactic: Any) -> Candidate:
    return runner, tactic_text(tactic if isinstance(tactic, str) else _tuples(tactic))


def _tuples(tactic: Any) -> Any:
    """Losing tactics are stored as lists where the winner is a tuple: one name for both."""
    return tuple(map(_tuples, tactic)) if type(tactic) in {list, tuple} else tactic


def _label(candidate: Candidate, among: Iterable[Candidate]) -> str:
    runner, tactic = candidate
    several = len({other for other, _ in among}) > 1
    text = f"{runner_text(runner)} {tactic}" if several else tactic
    return text if len(text) <= 48 else f"{text[:45]}..."


def _middle(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _size_axis(axes: Any) -> None:
    """Sizes on a logarithmic scale, as plain numbers."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("size")


def _pyplot() -> Any:
    try:
        from matplotlib import figure
    except ImportError as error:
        raise TuningError("plots need matplotlib: pip install 'moestro[report]'") from error
    return figure


def _svg(draw: Callable[[Any], list[Mark]], name: str, width: float = 5.0, height: float = 3.2) -> str:
    """The figure that `draw` draws, with the marks that it returns; matplotlib keeps no state of it."""
    import matplotlib

    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = _pyplot().Figure(
            figsize=(min(max(width, 5.0), 14.0), min(height, 9.0)), layout="constrained"
        )
        return inline(figure, name, draw(figure))
