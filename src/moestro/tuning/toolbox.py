"""What an AutoTuner can do besides choosing: reading again, statistics, rankings, single timings, captures.

The names are FlashInfer's and TensorRT-LLM's. AutoTuner (tuner.py) inherits them.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.contexts import Contexts, Options
from moestro.tuning.lookup.known import KnownDecisions
from moestro.tuning.lookup.sites import CallSites
from moestro.tuning.measure.scope import measured
from moestro.tuning.show.stats import Statistics
from moestro.tuning.spec.buckets import round_to_nearest_bucket
from moestro.tuning.spec.keys import device_of
from moestro.tuning.spec.policy import MeasurementPolicy
from moestro.tuning.spec.runner import DEFAULT_TACTIC
from moestro.tuning.spec.specs import TuningConfig
from moestro.tuning.store.records import Decision
from moestro.tuning.testing import Replay, TacticsCapture

__all__ = ["Toolbox"]

SAMPLES = 10  # of profile_tactic


class Toolbox:
    """See the module."""

    TacticsCapture = TacticsCapture
    _contexts: Contexts
    _known: KnownDecisions
    _sites: CallSites
    _measuring: threading.RLock
    _last_capture: TacticsCapture | None = None
    policy: MeasurementPolicy

    # --- what is known -------------------------------------------------------------------------------
    @property
    def is_tuning_mode(self) -> bool:
        """Whether a call in this thread would measure what is not known."""
        options = self._contexts.current
        return options is not None and options.tune

    @property
    def stats(self) -> Statistics:
        """What was tuned, what failed, and what found no decision, in this process."""
        return self._known.stats

    def reset_statistics(self) -> None:
        """Start counting again."""
        self._known.stats = Statistics()

    def print_statistics(self) -> None:
        """Print `stats`."""
        print(self.stats)

    def clear_cache(self) -> None:
        """Forget every decision in memory. Those of stores are read again when they are next asked for."""
        self._sites.clear()
        self._known.clear()

    def reload(self) -> int:
        """Read the stores again now, rather than when the background thread finds that they have changed; how
        many decisions came or changed.
        """
        return self._known.reload()

    def get_effective_map_to_tuning_buckets(
        self, tuning_config: TuningConfig, spec_idx: int = 0
    ) -> Callable[[int], int]:
        """The map of a specification as the contexts of this thread have it, for runners with buckets of their
        own.
        """
        options = self._contexts.current
        config = tuning_config if options is None else options.apply(tuning_config)
        spec = config.dynamic_tensor_specs[spec_idx]
        if options is None or options.buckets is not None or not options.round_up:
            return spec.map_to_tuning_buckets
        return lambda size: round_to_nearest_bucket(size, spec.buckets(max(1, size)), round_up=True)

    # --- rankings and timings ------------------------------------------------------------------------
    def rank_tactics(
        self,
        op: str,
        runners: Sequence[Any],
        config: TuningConfig,
        inputs: Sequence[Any],
        k: int = 1,
        **kwargs: Any,
    ) -> list[Any]:
        """Up to k tactics of one runner for these inputs, the best first: the choice, then the others by their
        measured ratio to the default. Tuned first inside autotune(True). [-1] where nothing is known.

        Raises TuningError for another number of runners, or k < 1.
        """
        if k < 1:
            raise TuningError(f"k must be at least 1, got {k}")
        if len(runners) != 1:
            raise TuningError(f"rank_tactics takes exactly one runner, got {len(runners)} for {op!r}")
        _, chosen = self.choose_one(op, runners, config, inputs, **kwargs)
        decision = self.decision(op, runners, config, inputs, **kwargs)
        options = self._contexts.current
        if decision is None or (options is not None and op in options.skip_ops):
            return [chosen]
        raced = [
            c
            for c in decision.evidence.candidates
            if c.median is not None and c.fate in {"winner", "finalist", "eliminated"}
        ]
        paired = all(c.ratio is not None for c in raced)  # not where the default itself fails
        raced.sort(key=lambda c: (c.ratio if paired else c.median) or 0.0)
        others = [c.tactic for c in raced]
        return [chosen, *(t for t in others if t not in (chosen, DEFAULT_TACTIC))][:k]

    def prepare_tactic_profile(
        self, inputs: Sequence[Any], tuning_config: TuningConfig
    ) -> tuple[TuningConfig, list[Sequence[Any]]]:
        """What profile_tactic takes: the configuration as the contexts have it, and the inputs. Every tactic is
        timed on these very tensors; the timer takes care of what is in the cache.
        """
        options = self._contexts.current
        return (tuning_config if options is None else options.apply(tuning_config)), [inputs]

    def profile_tactic(
        self,
        runner: Any,
        inputs: Sequence[Any],
        tactic: Any,
        tuning_config: TuningConfig,
        input_batches: Sequence[Sequence[Any]] | None = None,
        **kwargs: Any,
    ) -> float:
        """Milliseconds of one run of a tactic on these inputs: the median of a few, timed as a race would.

        Nothing is decided or remembered by it. What the runner raises is raised.
        """
        (inputs, *_) = input_batches or (inputs,)
        options = self._contexts.current
        policy = self._policy_of(tuning_config, options)
        timer = self._timer_for(device_of(inputs), policy, tuning_config.use_cuda_graph)
        call = functools.partial(runner, inputs, tactic=tactic, **kwargs)
        with self._measuring, self._known.measuring():
            sample = timer.prepare(measured(call))
            return statistics.median(float(sample()) for _ in range(SAMPLES)) * 1e3

    # --- every tactic of an operation ----------------------------------------------------------------
    @contextlib.contextmanager
    def capture(self) -> Iterator[TacticsCapture]:
        """Note each choice that is made inside; iterate over what this gives for all combinations of tactics."""
        capture = TacticsCapture()
        self._last_capture = capture
        with self._answering(capture):
            yield capture

    @contextlib.contextmanager
    def replay(self, combination: Sequence[tuple[Any, Any]]) -> Iterator[None]:
        """Answer the choices made inside with one combination of what was captured last.

        Raises TuningError if nothing was captured, or when another operation asks.
        """
        with self._answering(Replay(self._last_capture, combination)):
            yield

    @contextlib.contextmanager
    def _answering(self, answers: TacticsCapture | Replay) -> Iterator[None]:
        outer = self._contexts.current or Options(tune=False)
        entered = self._contexts.push(replace(outer, answers=answers))
        try:
            yield
        finally:
            self._contexts.pop(entered)

    # --- of AutoTuner --------------------------------------------------------------------------------
    def choose_one(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """See AutoTuner."""
        raise NotImplementedError

    def decision(self, *args: Any, **kwargs: Any) -> Decision | None:
        """See AutoTuner."""
        raise NotImplementedError

    def _policy_of(self, config: TuningConfig, options: Options | None) -> MeasurementPolicy:
        raise NotImplementedError

    def _timer_for(self, device: str, policy: MeasurementPolicy, graph: bool) -> Any:
        raise NotImplementedError
