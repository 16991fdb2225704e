"""Run an operation with every tactic it offers: capture its choices once, then replay them one by one.

As in TensorRT-LLM, for tests of kernels:

    with tuner.capture() as tactics:
        expected = operation(x)
    for combination in tactics:                       # ((runner, tactic), ...): one pair for each choice
        with tuner.replay(combination):
            assert_close(operation(x), expected)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moestro.errors import TuningError
from moestro.tuning.spec.keys import shapes_of
from moestro.tuning.spec.runner import DEFAULT_TACTIC, valid_tactics
from moestro.tuning.spec.specs import TuningConfig

__all__ = ["Replay", "TacticsCapture"]

Choice = tuple[Any, Any]
Checker = Callable[[Sequence[Choice]], bool]


@dataclass(frozen=True)
class _Asked:
    """One choose_one that was captured."""

    op: str
    runners: Sequence[Any]
    config: TuningConfig
    inputs: Sequence[Any]
    kwargs: Mapping[str, Any]

    def choices(self) -> list[Choice]:
        """Every tactic of every runner; the default of one that offers none."""
        shapes = shapes_of(self.inputs)
        profile = self.config.profile(shapes, self.config.sizes(shapes))
        return [
            (runner, tactic)
            for runner in self.runners
            for tactic in valid_tactics(runner, self.inputs, profile, self.kwargs) or (DEFAULT_TACTIC,)
        ]


class TacticsCapture:
    """The choices that an operation asked for, in order. Iterating gives every combination of tactics that all
    checkers (register_runner_tactic_comb_checker) take.
    """

    checkers: ClassVar[list[Checker]] = []

    def __init__(self) -> None:
        self.asked: list[_Asked] = []

    def __iter__(self) -> Iterator[tuple[Choice, ...]]:
        if not self.asked:
            raise TuningError(
                "nothing was captured: run the operation inside `with tuner.capture() as tactics:`"
            )
        for combination in itertools.product(*(asked.choices() for asked in self.asked)):
            if all(checker(combination) for checker in self.checkers):
                yield combination

    @classmethod
    def register_runner_tactic_comb_checker(cls, checker: Checker) -> Checker:
        """Leave combinations out for which `checker` is false; works as a decorator."""
        cls.checkers.append(checker)
        return checker

    def answer(
        self,
        op: str,
        runners: Sequence[Any],
        config: TuningConfig,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Choice | None:
        """Note a choice; it is then made as ever."""
        self.asked.append(_Asked(op, runners, config, inputs, dict(kwargs)))
        return None


class Replay:
    """Answers the captured choices with a combination, again and again in their order."""

    def __init__(self, capture: TacticsCapture | None, combination: Sequence[Choice]) -> None:
        if capture is None or not capture.asked:
            raise TuningError("nothing was captured: use capture() before replay()")
        if len(combination) != len(capture.asked):
            raise TuningError(
                f"replay() needs a choice for each of the {len(capture.asked)} that were captured, "
                f"got {len(combination)}"
            )
        self._capture, self._combination, self._next = capture, combination, 0

    def answer(
        self,
        op: str,
        runners: Sequence[Any],
        config: TuningConfig,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Choice | None:
        """The next choice. Raises TuningError if another operation asks than was captured."""
        at = self._next
        asked = self._capture.asked[at]
        if asked.op != op:
            raise TuningError(
                f"Custom op mismatch in replay: choice {at} was captured of {asked.op!r}, asked by {op!r}"
            )
        self._next = (at + 1) % len(self._combination)
        runner, tactic = self._combination[at]
        if any(runner is known for known in runners):
            return runner, tactic
        index = next((i for i, known in enumerate(asked.runners) if known is runner), None)
        if index is None or index >= len(runners):
            raise TuningError(f"{runner!r} is not among the runners that were captured for {op!r}")
        return runners[index], tactic
