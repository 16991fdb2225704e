"""The plugin's log: below vLLM's own logger, so that vLLM's handler and level apply. Each line once a process."""

from __future__ import annotations

import logging

LOGGER = logging.getLogger("vllm.moestro")
_said: set[tuple[int, str]] = set()


def once(level: int, text: str) -> None:
    """Log a line unless this process has."""
    if (level, text) in _said:
        return
    _said.add((level, text))
    LOGGER.log(level, "moestro: %s", text, stacklevel=3)


def info(text: str) -> None:
    once(logging.INFO, text)


def warning(text: str) -> None:
    once(logging.WARNING, text)


def forget() -> None:
    """Say everything again (tests)."""
    _said.clear()
