"""How what a command measured reaches its reader: on the terminal and into files, each whatever becomes of the others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moestro.cli.console import errors
from moestro.errors import MoestroError

__all__ = ["every", "keeping", "write_results", "wrote"]


def every(*steps: Callable[[], object]) -> None:
    """Take every step: one that fails takes nothing from those after it. What has failed is raised at the end, errors of
    ours as one MoestroError; where the terminal is gone, or something else went wrong, they are said and that is raised.
    """
    ours: list[MoestroError] = []
    others: list[Exception | SystemExit] = []
    for step in steps:
        try:
            step()
        except MoestroError as error:
            ours.append(error)
        except (Exception, SystemExit) as error:  # SystemExit: rich's, where the terminal is gone
            others.append(error)
    if ours and not others:
        raise ours[0] if len(ours) == 1 else MoestroError("\n".join(map(str, ours)))
    for one in ours:
        errors.print(f"error: {one}", style="red", markup=False, highlight=False, soft_wrap=True)
    if others:
        raise others[0]


def write_results(json_file: Path | None, data: Mapping[str, Any]) -> None:
    """The file that --json asks for, if any, and a line that says so."""
    from moestro.bench import results

    if json_file is not None:
        results.write_json(json_file, data)
        wrote("results", json_file)


def wrote(what: str, path: Path) -> None:
    """Say where something is."""
    errors.print(f"{what}: {path}", style="dim", markup=False, highlight=False, soft_wrap=True)


def keeping(write: Callable[..., None]) -> Callable[..., None]:
    """`write`, for what is so far: where it fails, measuring goes on, and that is said once."""
    said: set[str] = set()

    @functools.wraps(write)
    def attempt(*arguments: Any) -> None:
        try:
            write(*arguments)
        except MoestroError as error:
            if not said:
                errors.print(f"{error}; measuring goes on", style="yellow", markup=False, soft_wrap=True)
            said.add(str(error))

    return attempt
