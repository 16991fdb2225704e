"""How a long run tells what it is doing."""

from __future__ import annotations

__all__ = ["Listener"]


class Listener:
    """Hears how a run goes and says nothing; the command line draws it."""

    def stage(self, text: str, total: int) -> None:
        """A stage begins, of `total` steps."""

    def step(self, text: str) -> None:
        """Something within the stage goes on."""

    def done(self) -> None:
        """One step of the stage is done."""
