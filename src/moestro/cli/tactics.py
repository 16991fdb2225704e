"""Stores hold tactics by the name of their class, which must be loaded before they can be read."""

from __future__ import annotations

import contextlib

__all__ = ["load_tactics"]


def load_tactics() -> None:
    """Import every backend that can be imported here, and with it the classes of its tactics."""
    from moestro.errors import BackendError
    from moestro.kernels import backends

    for name in backends.BACKENDS:
        with contextlib.suppress(BackendError):
            backends.load(name)
