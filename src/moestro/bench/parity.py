"""Parity: whole runs repeated, and how far Moestro is from a peer in each, per N and EP.

What a reviewer of a kernel change asks for: not one ratio but its mean over fresh processes, with the
spread. Each run is a process of its own (`moestro bench … --json`), so that allocation, order and
compilation differ as they do between servers. Δ% = (our median / the peer's median - 1)·100: negative is
faster.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moestro.bench import results
from moestro.bench.results import BenchResult
from moestro.errors import MoestroError

__all__ = ["SCHEMA", "Delta", "deltas", "repeat", "write"]

SCHEMA = "moestro.parity/1"


@dataclass(frozen=True)
class Delta:
    """Moestro against one peer at one N and EP, over all runs."""

    ep: int
    tokens: int
    contender: str
    peer: str
    percent: tuple[float, ...]  # one per run

    @property
    def mean(self) -> float:
        return statistics.fmean(self.percent)

    @property
    def spread(self) -> float:
        """Largest less smallest, in points."""
        return max(self.percent) - min(self.percent)


def deltas(runs: Iterable[BenchResult], peer: str | None = None) -> list[Delta]:
    """One Delta per (EP, N, contender of ours), against the named peer or the fastest one of each run.

    `peer` matches a contender's name or a word of it ("grouped_mm", "humming"). Cells that a run did not measure are
    left out of it.
    """
    found: dict[tuple[int, int, str], list[float]] = {}
    names: dict[tuple[int, int, str], set[str]] = {}
    for run in runs:
        for tokens in run.tokens:
            rows = [row for row in run.rows if row.tokens == tokens]
            peers = [
                row for row in rows if not row.ours and peer in (None, row.contender, *row.contender.split())
            ]
            if not peers:
                continue
            best = min(peers, key=lambda row: row.median_s)
            for row in rows:
                if row.ours:
                    key = (run.problem["ep"], tokens, row.contender)
                    found.setdefault(key, []).append(100 * (row.median_s / best.median_s - 1))
                    names.setdefault(key, set()).add(best.contender)
    return [
        Delta(*key, " / ".join(sorted(names[key])), tuple(values)) for key, values in sorted(found.items())
    ]


def repeat(
    arguments: Sequence[str],
    runs: int,
    eps: Sequence[int],
    on_run: Callable[[int, int], None] = lambda ep, run: None,
    keep: Path | None = None,
) -> Iterator[BenchResult]:
    """Run `moestro bench ARGUMENTS --ep EP` `runs` times per EP, each in a process of its own; each result as it comes.

    `keep` is a folder for every run's JSON. KeyboardInterrupt ends it after the runs that are complete.
    Raises MoestroError with the last lines of a run that fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for run in range(runs):  # EPs within runs, so that drift falls on all of them
                for ep in eps:
                    on_run(ep, run)
                    path = folder / f"ep{ep}-run{run}.json"
                    _bench([*arguments, "--ep", str(ep), "--json", str(path)])
                    yield results.read(path)
        except KeyboardInterrupt:
            pass


def write(path: Path, found: Sequence[Delta], runs: Sequence[BenchResult]) -> None:
    """Write the deltas with the conditions of the first run. Raises MoestroError if the file cannot be
    written.
    """
    first = runs[0]
    data = {
        "schema": SCHEMA,
        "command": results.command_line(),
        "date": results.now(),
        "environment": first.environment,
        "conditions": first.conditions,
        "runs": len(runs),
        "deltas": [{**asdict(delta), "mean": delta.mean, "spread": delta.spread} for delta in found],
    }
    results.write_json(path, data)


def _bench(arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "moestro.cli", "bench", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        said = (finished.stderr.strip() or finished.stdout.strip()).splitlines()[-8:]
        raise MoestroError("a bench run failed:\n" + "\n".join(said))
