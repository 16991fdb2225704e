"""A runner: one implementation of an operation, which offers tactics and runs any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any


class TunableRunner(ABC):
    """One implementation of an operation. Written as for FlashInfer or TensorRT-LLM; such runners run unchanged."""

    @abstractmethod
    def get_valid_tactics(self, inputs: Sequence[Any], profile: Any) -> Sequence[Any]:
        """The tactics that can run these inputs; -1, the default tactic, is always one and need not be listed."""

    @abstractmethod
    def forward(
        self, inputs: Sequence[Any], tactic: Any = -1, do_preparation: bool = False, **kwargs: Any
    ) -> Any:
        """Run `tactic`; -1 must run for every valid input. With do_preparation, only what precedes measuring."""

    def get_cache_key_extras(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What else a decision depends on."""
        return ()

    def __call__(self, inputs: Sequence[Any], **kwargs: Any) -> Any:
        return self.forward(inputs, **kwargs)
