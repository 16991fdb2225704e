"""Bench results as plots: latency, ratio to the best peer, fraction of the roofline, memory.

Each function takes a BenchResult and returns an SVG element for an HTML page. Needs matplotlib (the extra
`report`); `why_not` says so before any work. Moestro's lines are coloured, the peers' grey.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moestro.bench.results import BenchResult, Row

__all__ = ["latency", "memory", "ratio", "roofline", "why_not"]

OURS = {"bf16": "#0b6e4f", "nvfp4": "#c8553d", "mxfp4": "#3d5a98", "fp8_block": "#8a5a9e", "int4": "#b08900"}
MORE = ("#b8860b", "#0e7490", "#7c2d12")
PEERS = ("#6b7280", "#9ca3af", "#374151", "#b0a8a0", "#565d66")
OUR_MARKERS, PEER_MARKERS = "oDsP^", "v<>x+"


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
        return _svg(figure)


def ratio(result: BenchResult) -> str:
    """How many times as fast as the fastest peer at each N; nothing below 1 is hidden."""
    with _figure("Speed against the fastest peer", "× (2 = twice as fast)") as (figure, axes):
        axes.axhline(1.0, color="#111827", linewidth=1.0, linestyle=(0, (4, 3)))
        axes.annotate(
            "fastest peer",
            (0.01, 1.0),
            xycoords=("axes fraction", "data"),
            xytext=(0, -12),
            textcoords="offset points",
            ha="left",
            fontsize=8.5,
            color="#374151",
        )
        for contender, style in _styles(result):
            rows = [row for row in _rows(result, contender) if row.ratio_to_best_peer is not None]
            if rows and rows[0].ours:
                ratios = [row.ratio_to_best_peer or 0.0 for row in rows]
                axes.plot([row.tokens for row in rows], ratios, label=contender, **style)
                for row, value in zip(rows, ratios, strict=True):
                    _ratio_label(axes, result, row, value, style["color"])
        low, high = axes.get_ylim()
        axes.set_ylim(min(0.0, low), high * 1.06)
        _tokens_axis(axes, result)
        _legend(axes)
        return _svg(figure)


def roofline(result: BenchResult) -> str:
    """Fraction of the roofline at each N, each contender against the bytes of its own format."""
    subtitle = "% of what bandwidth and matrix rate allow; each format against its own bytes"
    with _figure("Fraction of the roofline", subtitle) as (figure, axes):
        for contender, style in _styles(result):
            rows = _rows(result, contender)
            axes.plot([r.tokens for r in rows], [100 * r.roofline for r in rows], label=contender, **style)
        axes.set_ylim(0, max(100.0, axes.get_ylim()[1]))
        _tokens_axis(axes, result)
        _legend(axes)
        return _svg(figure)


def memory(result: BenchResult) -> str:
    """Weight bytes of one layer per contender."""
    entries = _memory_entries(result)
    height = 0.9 + 0.42 * len(entries)
    with _figure("Memory of one layer's weights", "MiB", size=(6.3, height)) as (figure, axes):
        labels = [label for label, _, _ in entries]
        values = [bytes_ / 2**20 for _, bytes_, _ in entries]
        colors = [_colors(result).get(label, PEERS[1]) for label in labels]
        axes.barh(range(len(entries)), values, color=colors, height=0.62)
        for index, (_, bytes_, share) in enumerate(entries):
            note = f"{bytes_ / 2**20:,.0f} MiB" + (f"  ({share:.3f} × bf16)" if share is not None else "")
            axes.annotate(
                note,
                (bytes_ / 2**20, index),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axes.set_yticks(range(len(entries)), labels)
        axes.set_xlim(0, max(values) * 1.35)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        return _svg(figure)


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
        fontsize=8.5,
        color=color,
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
def _figure(title: str, subtitle: str, size: tuple[float, float] = (6.3, 3.8)) -> Iterator[tuple[Any, Any]]:
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
        axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color="#111827", pad=24)
        axes.text(
            0,
            1,
            subtitle,
            transform=axes.transAxes,
            fontsize=9,
            color="#6b7280",
            va="bottom",
            ha="left",
            clip_on=False,
        ).set_position((0, 1.025))
        yield figure, axes


def _tokens_axis(axes: Any, result: BenchResult) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(result.tokens, [str(n) for n in result.tokens])
    axes.minorticks_off()
    axes.set_xlabel("tokens N", color="#374151")


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
