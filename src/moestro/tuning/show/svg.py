"""Plots as SVG inside a page, with a label for what is under the pointer or has the keyboard's focus.

matplotlib draws; over its drawing lie invisible rectangles, the marks: a strip of a size, a bar, a cell. Each has its
words as <title> (what a browser shows by itself, and what is read aloud), and is a stop of the Tab key. A page that
holds STYLE and SCRIPT shows them at once in a box that stays inside the window; without them nothing is lost but that.
Text stays text, so it can be searched and has the size that the page gives it.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

__all__ = ["SCRIPT", "STYLE", "Mark", "inline", "strips"]

LEAST = 0.95  # pixels of a page for a unit of the drawing; a plot that is wider than its place is scrolled
RC = {"svg.fonttype": "none"}
STYLE = """
.mark { outline: none; } .mark:hover, .mark:focus-visible { fill: #111827; fill-opacity: .07; }
.mark:focus-visible { stroke: #0b6e4f; stroke-width: 1.5; }
.tip { position: fixed; z-index: 9; max-width: min(360px, calc(100vw - 16px)); padding: 6px 9px; border-radius: 6px;
  background: #111827; color: #fff; font-size: 13px; line-height: 1.4; white-space: pre-line; pointer-events: none;
  overflow-wrap: anywhere; }
.tip[hidden] { display: none; }
"""
SCRIPT = """<script>(() => {
  const tip = Object.assign(document.createElement("div"), {className: "tip", hidden: true});
  document.body.append(tip);
  for (const mark of document.querySelectorAll(".mark")) {  // a browser's own box would come over this one
    const title = mark.querySelector("title");
    mark.dataset.tip = title.textContent;
    title.remove();
  }
  const show = (mark, x, y) => {
    if (tip.textContent !== mark.dataset.tip) tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const free = (at, size, room) => Math.max(8, Math.min(at, room - size - 8));
    tip.style.left = free(x + 14, tip.offsetWidth, innerWidth) + "px";
    tip.style.top = free(y + 14, tip.offsetHeight, innerHeight) + "px";
  };
  const hide = () => { tip.hidden = true; };
  const of = event => event.target instanceof Element ? event.target.closest(".mark") : null;
  addEventListener("pointermove", e => of(e) ? show(of(e), e.clientX, e.clientY) : hide());
  addEventListener("pointerdown", e => of(e) ? show(of(e), e.clientX, e.clientY) : hide());
  addEventListener("focusin", e => {
    const mark = of(e);
    if (!mark || !mark.matches(":focus-visible")) return;
    mark.scrollIntoView({block: "nearest"});
    const box = mark.getBoundingClientRect();
    show(mark, (box.left + box.right) / 2, Math.max(0, box.top));
  });
  addEventListener("focusout", hide);
  addEventListener("keydown", e => { if (e.key === "Escape") hide(); });
})();</script>"""


class Mark(NamedTuple):
    """A rectangle of a plot and its words, a line each. x, y: from, to in data coordinates; None is the plot's edge.

    stop: whether the Tab key stops there.
    """

    axes: Any
    words: Sequence[str]
    x: tuple[float | None, float | None] = (None, None)
    y: tuple[float | None, float | None] = (None, None)
    stop: bool = True


def strips(axes: Any, words: Mapping[float, Sequence[str]], log: bool = True) -> list[Mark]:
    """A strip from top to bottom around each place on the x axis, up to the middle between neighbours."""
    places = sorted(words)
    middle = [math.sqrt(a * b) if log else (a + b) / 2 for a, b in pairwise(places)]
    edges = [None, *middle, None]
    return [Mark(axes, words[x], (edges[i], edges[i + 1])) for i, x in enumerate(places)]


def inline(figure: Any, name: str, marks: Iterable[Mark] = ()) -> str:
    """The figure as an SVG element named `name`, with its marks. matplotlib's settings are those at this call."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context(RC):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].rstrip().removesuffix("</svg>")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # of no use, and the same in every plot of a page
    size = re.search(r'viewBox="0 0 (\S+) (\S+)"', text)
    assert size is not None
    width, height = map(float, size.groups())
    least = f"min-width:{LEAST * width:.0f}px"
    text = text.replace("<svg ", f'<svg role="group" aria-label="{html.escape(name)}" style="{least}" ', 1)
    return text + "".join(_rectangle(figure, mark, width, height) for mark in marks) + "</svg>"


def _rectangle(figure: Any, mark: Mark, width: float, height: float) -> str:
    box = mark.axes.get_position()
    left, right = (_place(figure, mark.axes, value, 0) for value in mark.x)
    one, other = (_place(figure, mark.axes, value, 1) for value in mark.y)
    x0, x1 = box.x0 if left is None else left, box.x1 if right is None else right
    y0, y1 = sorted((box.y0 if one is None else one, box.y1 if other is None else other))
    x0, x1, y0, y1 = max(x0, box.x0), min(x1, box.x1), max(y0, box.y0), min(y1, box.y1)
    words = html.escape("\n".join(mark.words))
    stop = f'tabindex="0" role="img" aria-label="{words}" ' if mark.stop else ""
    return (
        f'<rect class="mark" {stop}x="{x0 * width:.1f}" y="{(1 - y1) * height:.1f}" '
        f'width="{max(x1 - x0, 0) * width:.1f}" height="{max(y1 - y0, 0) * height:.1f}" '
        f'fill="transparent"><title>{words}</title></rect>'
    )


def _place(figure: Any, axes: Any, value: float | None, which: int) -> float | None:
    """A data coordinate (0: x, 1: y) as a fraction of the figure."""
    if value is None:
        return None
    point = [(axes.get_xlim()[0], axes.get_ylim()[0])]
    point[0] = (value, point[0][1]) if which == 0 else (point[0][0], value)
    found = figure.transFigure.inverted().transform(axes.transData.transform(point))
    return float(found[0][which])
