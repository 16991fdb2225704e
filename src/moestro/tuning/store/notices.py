"""Warnings of stores. What the background reader (lookup/watch.py) finds goes to the log: `warnings` is one for the
whole process, so a warning from its thread would land in whatever another thread does just then, or end it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

from moestro.errors import StoreWarning

__all__ = ["in_background", "notice"]

_thread = threading.local()


@contextlib.contextmanager
def in_background() -> Iterator[None]:
    """While this lasts, this thread's notices go to the log."""
    _thread.background = True
    try:
        yield
    finally:
        _thread.background = False


def notice(message: str, stacklevel: int = 3) -> bool:
    """Warn (StoreWarning), or log it in the background; whether it was a warning."""
    if getattr(_thread, "background", False):
        logging.getLogger("moestro.tuning").warning("%s", message)
        return False
    warnings.warn(message, StoreWarning, stacklevel=stacklevel)
    return True
