"""Draws the README's picture from a recorded result:

python benchmarks/picture.py benchmarks/results/cpu_bench_qwen3-30b-a3b.json docs/img/cpu_bench_qwen3-30b-a3b.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

from moestro.bench import plots, results


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(plots.ratio(results.read(source)))


if __name__ == "__main__":
    main()
