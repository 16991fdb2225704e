"""What an AutoTuner can do besides choosing: say why, read again, count, rank, time a tactic, capture and replay.

Most names are FlashInfer's and TensorRT-LLM's. AutoTuner (tuner.py) inherits them.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from moestro.errors import TuningError
from moestro.tuning.contexts import Contexts, Options
from moestro.tuning.lookup.known import KnownDecisions, Statistics
from moestro.tuning.lookup.sites import CallSite, CallSites, Lookup
from moestro.tuning.measure.scope import measured
from moestro.tuning.measure.timers import Timer, default_timer
from moestro.tuning.show.explain import Case, explain, explain_miss
from moestro.tuning.spec.buckets import round_to_nearest_bucket
from moestro.tuning.spec.evidence import Decision
from moestro.tuning.spec.keys import device_of
from moestro.tuning.spec.policy import MeasurementPolicy
from moestro.tuning.spec.runner import DEFAULT_TACTIC, check_runners
from moestro.tuning.spec.specs import Sizes, TuningConfig
from moestro.tuning.testing import Replay
from moestro.tuning.testing import TacticsCapture as _Capture

__all__ = ["Toolbox"]

Choice = tuple[Any, Any]  # (runner, tactic)

SAMPLES = 10  # of profile_tactic


class Toolbox:
    """See the module."""

    TacticsCapture: ClassVar[type[_Capture]] = _Capture
    _contexts: Contexts
    _known: KnownDecisions
    _sites: CallSites
    _measuring: threading.RLock
    _timer: Timer | None
    _timers: dict[Any, Timer]
    _last_capture: _Capture | None = None
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

    # --- a decision and its reasons ------------------------------------------------------------------
    def decision(
        self, op: str, runners: Sequence[Any], config: TuningConfig, inputs: Sequence[Any], **kwargs: Any
    ) -> Decision | None:
        """What choose_one would answer, with its evidence, without tuning; None where nothing is known."""
        options = self._contexts.current
        check_runners(runners)
        site, view, sizes = self._locate(op, runners, config, inputs, kwargs, options)
        record, within = view.find(sizes)
        if record is None:
            return None
        index, tactic = view.pick(record, site.config, runners, inputs, kwargs, sizes)
        return Decision(
            runner=runners[index],
            tactic=tactic,
            bucket=record.bucket[0] if len(record.bucket) == 1 else record.bucket,
            status=record.status if within else "extrapolated",
            evidence=record.evidence,
            record=record,
            source=record.source,
        )

    def explain(
        self, op: str, runners: Sequence[Any], config: TuningConfig, inputs: Sequence[Any], **kwargs: Any
    ) -> str:
        """What choose_one would answer and why, who came second, and what would change it, as text."""
        check_runners(runners)
        options = self._contexts.current
        _, view, sizes = self._locate(op, runners, config, inputs, kwargs, options)
        record, within = view.find(sizes)
        book = view.book
        if record is None:
            return explain_miss(book.key, [b.key for b in self._known.books() if b.everything()])
        store = self._known.target(options)
        case = Case(
            key=book.key,
            record=record,
            records=book.serving(record.probes, view.environment, view.accepts),
            sizes=sizes,
            within=within,
            source=record.source,
            facts=store.facts(record.environment) if store is not None else None,
        )
        return explain(case)

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
    def capture(self) -> Iterator[_Capture]:
        """Note each choice that is made inside; iterate over what this gives for all combinations of tactics."""
        capture = _Capture()
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
    def _answering(self, answers: _Capture | Replay) -> Iterator[None]:
        outer = self._contexts.current or Options(tune=False)
        entered = self._contexts.push(replace(outer, answers=answers))
        try:
            yield
        finally:
            self._contexts.pop(entered)

    # --- of AutoTuner --------------------------------------------------------------------------------
    def choose_one(self, *args: Any, **kwargs: Any) -> Choice:
        """See AutoTuner."""
        raise NotImplementedError

    def _locate(
        self,
        op: str,
        runners: Sequence[Any],
        config: TuningConfig,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Options | None,
    ) -> tuple[CallSite, Lookup, Sizes]:
        raise NotImplementedError

    def _policy_of(self, config: TuningConfig, options: Options | None) -> MeasurementPolicy:
        """The context's policy, else the tuner's, with the operation's wish for a cold or warm cache."""
        policy = (options and options.policy) or self.policy
        cold = config.cold
        return policy if cold is None or cold == policy.cold_cache else replace(policy, cold_cache=cold)

    def _timer_for(self, device: str, policy: MeasurementPolicy, graph: bool) -> Timer:
        if self._timer is not None:
            return self._timer
        known = self._timers.get((device, policy, graph))
        if known is None:
            known = self._timers[device, policy, graph] = default_timer(device, policy, graph=graph)
        return known
