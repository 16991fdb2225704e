"""report.html: bench results and the tuner's decisions as one self-contained page.

Plots are inline SVG, styles and the script that shows their labels are in the page, nothing is loaded from elsewhere,
so that the file can be mailed.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from moestro.bench import plots
from moestro.bench.results import BenchResult, Row
from moestro.errors import MoestroError
from moestro.machine import bytes_text
from moestro.tuning.show import svg

__all__ = ["page", "write_report"]

STYLE = """
:root { --ink: #111827; --soft: #6b7280; --line: #e5e7eb; --good: #0b6e4f; --bad: #b42318; --card: #f9fafb; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 40px 28px 80px; color: var(--ink); background: #fff;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 30px; margin: 0 0 4px; letter-spacing: -0.02em; }
h2 { font-size: 21px; margin: 52px 0 2px; letter-spacing: -0.01em; }
h3 { font-size: 16px; margin: 32px 0 8px; }
p { margin: 4px 0 12px; max-width: 78ch; } .soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 14px;
  margin: 20px 0 26px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 25px; letter-spacing: -0.02em; }
.card span { color: var(--soft); font-size: 13px; display: block; line-height: 1.4; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 26px 30px; }
figure { overflow-x: auto; } .plots figure { margin: 0; }
.plots svg { display: block; width: 100%; max-width: 500px; height: auto; }
.tuning { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 8px 30px;
  align-items: start; }
.tuning > :not(figure), .tuning > .wide { grid-column: 1 / -1; } .tuning figure { margin: 8px 0; }
.tuning figcaption { font-weight: 600; margin-bottom: 6px; }
.tuning svg { display: block; width: 100%; max-width: 640px; height: auto; }
.tuning .wide svg { max-width: 900px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px;
  margin: 6px 0 10px; }
th, td { padding: 4px 18px 4px 0; text-align: right; white-space: nowrap; }
tr.first td, table.facts td { border-top: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, .figures th:nth-child(2), .figures td:nth-child(2) { text-align: left; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; } table.facts td:first-child
{ color: var(--soft); white-space: nowrap; padding-right: 24px; vertical-align: top; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
code { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
@media (max-width: 640px) { body { padding: 24px 14px 60px; } h2 { margin-top: 36px; } }
"""


def write_report(path: Path, results: Sequence[BenchResult], store: Path | None = None) -> None:
    """Write the page, making its folder.

    Raises MoestroError without matplotlib, with nothing to show, or if the file cannot be written.
    """
    if (reason := plots.why_not()) is not None:
        raise MoestroError(f"report: {reason}")
    if not any(result.rows for result in results) and not _tuned(store):
        raise MoestroError(
            f"report: nothing to show: no bench rows, and no decisions for several sizes in {store or 'a store'}"
        )
    tuning = _tuning(store) if store is not None else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(results, tuning))
    except OSError as error:
        raise MoestroError(f"report: cannot write {path}: {error.strerror or error}") from error


def page(results: Sequence[BenchResult], tuning: str = "") -> str:
    """The page as text; `tuning` is HTML of the tuner's own section."""
    sections = "".join(_section(result) for result in results if result.rows)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Moestro report</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{svg.STYLE}</style></head><body><h1>Moestro</h1>"
        f'<p class="soft">Mixture-of-Experts layers: measured, compared, tuned.</p>{sections}{tuning}'
        f"{svg.SCRIPT}</body></html>\n"
    )


def _tuning(store: Path) -> str:
    from moestro.tuning.show import report as tuner

    return f'<section class="tuning">{tuner.section(store)}</section>'


def _tuned(store: Path | None) -> bool:
    from moestro.tuning.show import report as tuner

    return store is not None and bool(tuner.shown(store))


def _section(result: BenchResult) -> str:
    problem, where = result.problem, result.environment
    ranks = f", rank 0 of EP{problem['ep']}" if problem["ep"] > 1 else ""
    title = f"{problem['name']}{ranks}"
    sizes = (
        f"{problem['num_experts']} experts, top {problem['top_k']}, hidden {problem['hidden_size']}, "
        f"intermediate {problem['intermediate_size']}; routing {result.conditions['routing']}"
    )
    device = (
        f"{where['device_name']} ({where['threads']} threads)"
        if where["device"] == "cpu"
        else where["device_name"]
    )
    drawn = [plots.latency(result), plots.roofline(result), plots.memory(result)]
    if any(row.ratio_to_best_peer is not None for row in result.rows):
        drawn.insert(1, plots.ratio(result))
    parts = [
        f"<section><h2>{_text(title)}</h2><p class='soft'>{_text(sizes)}<br>{_text(device)}, torch "
        f"{_text(where['torch'])}, {_text(result.date)}</p>",
        _busy(result),
        _cards(result),
        '<div class="plots">' + "".join(f"<figure>{plot}</figure>" for plot in drawn) + "</div>",
        "<h3>Figures</h3>",
        _table(result),
        _left_out(result),
        "<h3>Conditions</h3>",
        _conditions(result),
        "</section>",
    ]
    return "".join(parts)


def _busy(result: BenchResult) -> str:
    if not result.busy:
        return ""
    return "<p class='bad'>This machine was busy: the spreads are large. Measure again when it is quiet.</p>"


def _cards(result: BenchResult) -> str:
    cards = []
    for name in result.contenders:
        rows = [row for row in result.rows if row.contender == name]
        ratios = {row.tokens: row.ratio_to_best_peer for row in rows if row.ratio_to_best_peer is not None}
        if rows[0].ours and ratios:
            low, high = (f(ratios, key=lambda n: ratios[n]) for f in (min, max))
            cards.append(
                (
                    f"{ratios[low]:.2f}× to {ratios[high]:.2f}×",
                    f"{name}: speed against the fastest peer, worst (N = {low}) to best (N = {high})",
                )
            )
    for entry in result.memory:
        if entry["contender"].startswith("moestro") and entry["format"] != "bf16":
            text = f"{entry['contender']}: weights of a layer against bf16, {bytes_text(entry['bytes'])}"
            cards.append((f"{entry['ratio_to_bf16']:.3f}×", text))
    ceilings = result.ceilings
    cards.append(
        (
            f"{ceilings['bytes_per_s'] / 1e9:,.1f} GB/s",
            f"this machine's memory, with {ceilings['flops_per_s'] / 1e12:,.3g} {ceilings['dtype']} TFLOP/s "
            "the ceilings of the roofline, the best of the run",
        )
    )
    inner = "".join(
        f"<div class='card'><b>{_text(figure)}</b><span>{_text(text)}</span></div>" for figure, text in cards
    )
    return f"<div class='cards'>{inner}</div>"


def _table(result: BenchResult) -> str:
    head = "".join(
        f"<th>{title}</th>"
        for title in (
            "N",
            "contender",
            "median",
            "middle half",
            "× best peer",
            "roofline",
            "GB/s",
            "TFLOP/s",
            "choice",
        )
    )
    body = "".join(
        _row(row, first=index == 0)
        for tokens in result.tokens
        for index, row in enumerate(row for row in result.rows if row.tokens == tokens)
    )
    note = (
        "Medians, one layer, cold weights, all contenders in alternating rounds of one process. GB/s counts "
        "the weights of the experts that are hit, in the contender's format; × best peer above 1 is faster "
        "than the fastest peer."
    )
    table = f"<table class='figures'><tr>{head}</tr>{body}</table>"
    return f"<div class='scroll'>{table}</div><p class='soft'>{note}</p>"


def _row(row: Row, first: bool) -> str:
    scale, unit = (1e6, "µs") if row.median_s < 1e-3 else (1e3, "ms")
    ratio = "–"
    if row.ratio_to_best_peer is not None:
        kind = "" if not row.ours else "good" if row.ratio_to_best_peer >= 0.95 else "bad"
        ratio = f"<span class='{kind}'>{row.ratio_to_best_peer:.2f}</span>"
    choice = " ".join(
        str(row.facts[key])
        for key in ("backend", "tactic", "status", "fallback")
        if row.facts.get(key) is not None
    )
    cells = [
        f"<b>{row.tokens}</b>" if first else "",
        f"<b>{_text(row.contender)}</b>" if row.ours else _text(row.contender),
        f"{_digits(row.median_s * scale)} {unit}",
        f"{_digits(row.low_s * scale)} to {_digits(row.high_s * scale)}",
        ratio,
        f"{100 * row.roofline:.0f} %",
        f"{row.weight_bytes_per_s / 1e9:,.1f}",
        f"{row.tflops:.3g}",
        f"<code>{_text(choice)}</code>" if choice else "",
    ]
    return f"<tr{first * ' class=first'}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _left_out(result: BenchResult) -> str:
    lines = []
    for entries, word in ((result.skipped, "not run"), (result.failed, "failed")):
        for entry in entries:
            where = "" if entry["tokens"] is None else f" at N = {entry['tokens']}"
            lines.append(f"<li>{_text(entry['contender'])} {word}{where}: {_text(entry['reason'])}</li>")
    if result.interrupted:
        lines.append("<li>The run was interrupted; what was measured before is shown.</li>")
    if not lines:
        return ""
    items = "".join(lines)
    return f"<details class='soft'><summary>What was left out, and why</summary><ul>{items}</ul></details>"


def _conditions(result: BenchResult) -> str:
    facts = {"command": result.command, **result.environment, **result.conditions}
    cells = {key: _text(value) for key, value in facts.items() if value not in (None, "", [])}
    cells["command"] = f"<code>{cells['command']}</code>"
    rows = "".join(f"<tr><td>{_text(key)}</td><td>{cell}</td></tr>" for key, cell in cells.items())
    return f"<table class='facts'>{rows}</table>"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _text(value: object) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return html.escape(str(value))
