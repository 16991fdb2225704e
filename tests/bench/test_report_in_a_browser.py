"""The report as a reader sees it, in headless Chromium at two widths: nothing beyond the edge, nothing overlapping.

Skipped, with the reason, where no Chromium is installed (MOESTRO_CHROMIUM names one elsewhere).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from bench_plain import some_result

from moestro.bench import plots
from moestro.bench.report import page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
# Writes what it sees into the page, which --dump-dom prints: elements beyond the edge, and siblings that overlap.
LOOK = """
<script>window.addEventListener("load", () => {
  const box = e => e.getBoundingClientRect(), found = {width: innerWidth, beyond: [], overlapping: [], plots: 0};
  for (const e of document.querySelectorAll(".plots > *, .plots svg, .cards > *, .tuning > *, h1, h2, p"))
    if (box(e).right > innerWidth + 1) found.beyond.push(e.tagName + "." + e.className.toString());
  for (const list of document.querySelectorAll(".plots, .cards")) {
    const all = [...list.children];
    for (const a of all) for (const b of all) {
      const p = box(a), q = box(b);
      if (a !== b && p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1)
        found.overlapping.push(a.tagName + " " + b.tagName);
    }
  }
  found.plots = [...document.querySelectorAll(".plots svg")].filter(e => box(e).width > 100).length;
  const pre = document.createElement("pre"); pre.id = "seen"; pre.textContent = JSON.stringify(found);
  document.body.append(pre);
});</script>
"""


def chromium() -> str:
    named = os.environ.get("MOESTRO_CHROMIUM")
    found = named or next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(
            f"no Chromium here: none of {', '.join(NAMES)} is on PATH, and MOESTRO_CHROMIUM is not set"
        )
    return found


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off_and_nothing_overlaps(tmp_path: Path, width: int) -> None:
    browser = chromium()
    if (reason := plots.why_not()) is not None:
        pytest.skip(f"no plots here: {reason}")
    file = tmp_path / "report.html"
    file.write_text(page([some_result()]).replace("</body>", f"{LOOK}</body>"))
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},2000",
        "--dump-dom",
    ]
    done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    match = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert match is not None, done.stderr
    seen = json.loads(match.group(1))
    assert seen["beyond"] == []
    assert seen["overlapping"] == []
    assert seen["plots"] > 0


def test_columns_of_plots_are_never_wider_than_the_page() -> None:
    """The rule that cut all plots off at 390 px: a least width without a bound."""
    text = page([some_result()])
    assert "minmax(480px, 1fr)" not in text
    assert text.count("minmax(min(480px, 100%), 1fr)") == 2
