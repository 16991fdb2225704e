"""Bench results as plots: latency, ratio to the best peer, fraction of the roofline, memory.

Each function takes a BenchResult and returns an SVG element for an HTML page, with the figures of a size or a bar as
marks (tuning/show/svg.py). Needs matplotlib (the extra `report`); `why_not` says so before any work. Moestro's lines
are coloured, the peers' grey. A plot is as wide as a phone, so that its text has its own size there.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moestro.bench.results import BenchResult, Row
from moestro.machine import bytes_text
from moestro.tuning.show.svg import Mark, inline, strips

__all__ = ["latency", "memory", "ratio", "roofline", "seconds_text", "why_not"]

OURS = {"bf16": "#0b6e4f", "nvfp4": "#c8553d", "mxfp4": "#3d5a98", "fp8_block": "#8a5a9e", "int4": "#b08900"}
MORE = ("#b8860b", "#0e7490", "#7c2d12")
PEERS = ("#6b7280", "#9ca3af", "#374151", "#b0a8a0", "#565d66")
OUR_MARKERS, PEER_MARKERS = "oDsP^", "v<>x+"
INCHES = 5.0  # 360 units of an SVG: one each for the pixels of a phone's page
HEIGHT, LEGEND_ROW = 3.1, 0.21  # inches, without the legend, and of its rows
AXIS_UNITS, DIGIT_UNITS = 280, 6.4  # of the x axis, and of a digit at 10
NARROW = 22  # letters of a name with which two columns of a legend fit
LABELLED = 2  # lines of ours whose points have their figures beside them; more would hide each other


def why_not() -> str | None:
    """Why no plots can be drawn here; None if they can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "plots need matplotlib: pip install 'moestro[report]'"
    return None


def latency(result: BenchResult) -> str:
    """Median latency against N, both logarithmic, with a band between the quartiles."""
    with _figure("Latency of one layer", "ms, median; band: middle half of the samples") as (figure, axes):
        for contender, style in _styles(result):
            rows = _rows(result, contender)
            ns = [row.tokens for row in rows]
            axes.plot(ns, [row.median_s * 1e3 for row in rows], label=contender, **style)
            low, high = [row.low_s * 1e3 for row in rows], [row.high_s * 1e3 for row in rows]
            axes.fill_between(ns, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
        _tokens_axis(axes, result)
        _legend(axes)
        return inline(figure, "Latency of one layer", _strips(axes, result, _latency_words))


def ratio(result: BenchResult) -> str:
    """How many times as fast as the fastest peer at each N; nothing below 1 is hidden."""
    with _figure("Speed against the fastest peer", "× (2 = twice as fast)") as (figure, axes):
        dashes = (0, (4, 3))
        axes.axhline(1.0, color="#111827", linewidth=1.0, linestyle=dashes, label="the fastest peer")
        labelled = len({row.contender for row in result.rows if row.ours}) <= LABELLED
        for contender, style in _styles(result):
            rows = [row for row in _rows(result, contender) if row.ratio_to_best_peer is not None]
            if rows and rows[0].ours:
                ratios = [row.ratio_to_best_peer or 0.0 for row in rows]
                axes.plot([row.tokens for row in rows], ratios, label=contender, **style)
                for row, value in zip(rows, ratios, strict=True) if labelled else ():
                    _ratio_label(axes, result, row, value, style["color"])
        high = axes.get_ylim()[1] * 1.14  # the highest figure lies above its point, the lowest below
        least = min((row.ratio_to_best_peer or high for row in result.rows if row.ours), default=high)
        axes.set_ylim(0.0 if least > 0.15 * high else -0.12 * high, high)
        _tokens_axis(axes, result)
        _legend(axes)
        return inline(figure, "Speed against the fastest peer", _strips(axes, result, _ratio_words))


def roofline(result: BenchResult) -> str:
    """Fraction of the roofline at each N, each contender against the bytes of its own format."""
    subtitle = "% of what memory and arithmetic allow,\nby each format's own bytes"
    with _figure("Fraction of the roofline", subtitle) as (figure, axes):
        for contender, style in _styles(result):
            rows = _rows(result, contender)
            axes.plot([r.tokens for r in rows], [100 * r.roofline for r in rows], label=contender, **style)
        axes.set_ylim(0, max(100.0, axes.get_ylim()[1]))
        _tokens_axis(axes, result)
        _legend(axes)
        return inline(figure, "Fraction of the roofline", _strips(axes, result, _roofline_words))


def memory(result: BenchResult) -> str:
    """Weight bytes of one layer per contender."""
    entries = _memory_entries(result)
    height = 0.9 + 0.42 * len(entries)
    with _figure("Memory of one layer's weights", "all experts", size=(INCHES, height)) as (figure, axes):
        labels = [label for label, _, _ in entries]
        values = [bytes_ for _, bytes_, _ in entries]
        colors = [_colors(result).get(label, PEERS[1]) for label in labels]
        axes.barh(range(len(entries)), values, color=colors, height=0.62)
        notes = [
            bytes_text(bytes_) + (f"  ({share:.3f} × bf16)" if share is not None else "")
            for _, bytes_, share in entries
        ]
        for index, (note, value) in enumerate(zip(notes, values, strict=True)):
            place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 10}
            axes.annotate(note, (value, index), **place)
        axes.set_yticks(range(len(entries)), [_folded(label) for label in labels])
        axes.set_xlim(0, max(values) * 1.9)  # room for the longest bar's note
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        marks = [
            Mark(axes, (label, note), y=(index - 0.5, index + 0.5))
            for index, (label, note) in enumerate(zip(labels, notes, strict=True))
        ]
        return inline(figure, "Memory of one layer's weights", marks)


# --- words -----------------------------------------------------------------------------------------------
def seconds_text(*seconds: float) -> str:
    """Milliseconds, or microseconds where the first is below one, with three significant digits: "4 ms", and what
    follows in brackets, in the same unit: "4 ms (3.6 to 4.4)".
    """
    scale, unit = (1e6, "µs") if seconds[0] < 1e-3 else (1e3, "ms")
    first, *rest = (f"{s * scale:,.0f}" if s * scale >= 100 else f"{s * scale:.3g}" for s in seconds)
    return f"{first} {unit}" + (f" ({' to '.join(rest)})" if rest else "")


def _strips(axes: Any, result: BenchResult, words: Callable[[Row], str | None]) -> list[Mark]:
    """A strip for each N with a line for each contender, the fastest first."""
    said: dict[float, list[str]] = {}
    for row in sorted(result.rows, key=lambda row: row.median_s):
        if (text := words(row)) is not None:
            said.setdefault(row.tokens, [f"N = {row.tokens}"]).append(f"{row.contender}: {text}")
    return strips(axes, {n: said[n] for n in said})


def _latency_words(row: Row) -> str:
    return seconds_text(row.median_s, row.low_s, row.high_s)


def _ratio_words(row: Row) -> str | None:
    if not row.ours or row.ratio_to_best_peer is None:
        return None
    return f"{row.ratio_to_best_peer:.2f} × the fastest peer's speed"


def _roofline_words(row: Row) -> str:
    return f"{100 * row.roofline:.0f} % ({row.weight_bytes_per_s / 1e9:,.1f} GB/s, {row.tflops:.3g} TFLOP/s)"


def _folded(label: str) -> str:
    """A contender's name in lines of a bar's label."""
    return "\n".join(label.split(" ", 1))


# --- drawing ---------------------------------------------------------------------------------------------
def _ratio_label(axes: Any, result: BenchResult, row: Row, value: float, color: str) -> None:
    """The figure beside its point: above the highest of its N, below the others, so that all can be read."""
    others = [r.ratio_to_best_peer or 0.0 for r in result.rows if r.ours and r.tokens == row.tokens]
    above = value >= max(others)
    axes.annotate(
        f"{value:.1f}" if value < 10 else f"{value:.0f}",
        (row.tokens, value),
        xytext=(0, 7 if above else -14),
        textcoords="offset points",
        ha="center",
        fontsize=10,
        color=color,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5},
    )


def _memory_entries(result: BenchResult) -> list[tuple[str, int, float | None]]:
    """Label, bytes and ratio; the peers share one set of weights, so they get one bar."""
    entries: list[tuple[str, int, float | None]] = []
    for entry in result.memory:
        label = entry["contender"]
        if not label.startswith("moestro"):
            label = f"{label.split()[0]} {entry['format']}"
        if label not in [known for known, _, _ in entries]:
            entries.append((label, entry["bytes"], entry["ratio_to_bf16"]))
    return entries


def _rows(result: BenchResult, contender: str) -> list[Row]:
    return sorted((row for row in result.rows if row.contender == contender), key=lambda row: row.tokens)


def _styles(result: BenchResult) -> Iterator[tuple[str, dict[str, Any]]]:
    """Contenders with their line style, peers first so that ours are drawn over them."""
    ours = {row.contender for row in result.rows if row.ours}
    peers = [name for name in result.contenders if name not in ours]
    for index, name in enumerate(peers):
        yield (
            name,
            {
                "color": PEERS[index % len(PEERS)],
                "marker": PEER_MARKERS[index % len(PEER_MARKERS)],
                "linewidth": 1.4,
                "markersize": 5,
                "linestyle": "--",
            },
        )
    for index, name in enumerate(name for name in result.contenders if name in ours):
        yield (
            name,
            {
                "color": _colors(result)[name],
                "marker": OUR_MARKERS[index % len(OUR_MARKERS)],
                "linewidth": 2.2,
                "markersize": 5.5,
            },
        )


def _colors(result: BenchResult) -> dict[str, str]:
    """Ours by contender: a format has one colour in every report, its further backends take the rest."""
    formats = dict.fromkeys((row.contender, row.format) for row in result.rows if row.ours)
    rest = [*OURS.values(), *MORE]
    found: dict[str, str] = {}
    for contender, format in formats:
        wanted = OURS.get(format, "")
        found[contender] = wanted if wanted in rest else rest[-1]
        rest = [color for color in rest if color != found[contender]] or list(MORE)
    return found


@contextmanager
def _figure(
    title: str, subtitle: str, size: tuple[float, float] = (INCHES, HEIGHT)
) -> Iterator[tuple[Any, Any]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "svg.hashsalt": title,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#9ca3af",
        "axes.grid": True,
        "grid.color": "#e5e7eb",
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "xtick.color": "#374151",
        "ytick.color": "#374151",
    }
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold", color="#111827")
        axes.set_title(subtitle, loc="left", fontsize=10, color="#6b7280")
        yield figure, axes


def _tokens_axis(axes: Any, result: BenchResult) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(result.tokens, _tick_labels(result.tokens))
    axes.minorticks_off()
    axes.set_xlabel("tokens N", color="#374151")


def _tick_labels(tokens: list[int]) -> list[str]:
    """The numbers that fit beside each other, from the largest down; the others are blank."""
    span = math.log2(tokens[-1] / tokens[0]) or 1.0
    labels, last = [""] * len(tokens), math.inf
    for i in range(len(tokens) - 1, -1, -1):
        text, place = str(tokens[i]), math.log2(tokens[i] / tokens[0]) / span * AXIS_UNITS
        if place + DIGIT_UNITS * len(text) / 2 + 4 <= last:
            labels[i], last = text, place - DIGIT_UNITS * len(text) / 2
    return labels


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = axis.get_view_interval()
    few = high / low < 1e3  # else decades alone fit beside each other
    axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 2 if max(map(len, labels)) <= NARROW else 1
        axes.figure.set_figheight(HEIGHT + LEGEND_ROW * -(-len(labels) // columns))
        axes.figure.legend(
            handles, labels, frameon=False, fontsize=10, loc="outside lower left", ncols=columns
        )
