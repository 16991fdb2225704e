"""What tuning says while it works: nothing, lines to a function, or one line that is drawn anew in the
terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Progress", "showing"]

Progress = bool | Callable[[str], None]


@contextmanager
def showing(progress: Progress) -> Iterator[Callable[[str], None]]:
    """A function that takes lines of progress, while the context lasts."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda text: None
    else:
        from rich.console import Console

        with Console(stderr=True).status("tuning", spinner="dots") as status:
            yield lambda text: status.update(text)
