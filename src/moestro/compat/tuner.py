"""What both peers' AutoTuner have in common over ours: choices seeded by hand, look-ups by shapes alone, a clock
that a test may replace.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, ClassVar

from moestro.compat.profiles import ProfilingCacheKey, cache_key, key_of_record
from moestro.tuning.lookup.table import make_table, roundings
from moestro.tuning.spec.keys import StaticKey, shapes_of
from moestro.tuning.spec.policy import MeasurementPolicy
from moestro.tuning.spec.runner import DEFAULT_TACTIC, identity_text, runner_identity
from moestro.tuning.spec.specs import TuningConfig
from moestro.tuning.store.store import Store, default_store
from moestro.tuning.tuner import AutoTuner

__all__ = ["PeerTuner", "ProfilingCache", "store_beside"]

_MISSING: Any = object()
Hit = tuple[bool, int, Any, Any]  # (hit, index of the runner, tactic, profile or None)


class ProfilingCache(MutableMapping[Any, Any]):
    """Key -> (tactic, profile): what a caller has put in, which serves first, then what was measured."""

    def __init__(self, decided: Callable[[], dict[Any, Any]], clear: Callable[[], None]) -> None:
        self.given: dict[Any, Any] = {}
        self._decided, self._clear = decided, clear

    def __getitem__(self, key: Any) -> Any:
        return self.given[key] if key in self.given else self._decided()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.given[key] = value

    def __delitem__(self, key: Any) -> None:
        del self.given[key]  # what was measured is forgotten by clear() only

    def __iter__(self) -> Iterator[Any]:
        return iter({**self._decided(), **self.given})

    def __len__(self) -> int:
        return len({**self._decided(), **self.given})

    def clear(self) -> None:
        """Forget all of it."""
        self.given.clear()
        self._clear()


class PeerTuner(AutoTuner):
    """See the module. A process's `get()` is one for each peer, with the user's store; it is made anew after
    `AutoTuner._instance = None`, as the peers' tests begin.
    """

    _instance: ClassVar[AutoTuner | None] = None
    # How the peer's measurement works by default: warm-up runs, timed runs, microseconds before them.
    _measures: ClassVar[tuple[int, int, int]]

    def __init__(
        self,
        warmup: int | None = None,
        repeat: int | None = None,
        stream_delay_micro_secs: int | None = None,
        **ours: Any,
    ) -> None:
        """The peer's keywords say how its measurement works and are not needed: ours samples until a choice is sure.
        ours: store, timer, policy ... as of moestro.tuning.AutoTuner.
        """
        super().__init__(**ours)
        given = (warmup, repeat, stream_delay_micro_secs)
        self.warmup, self.repeat, self.stream_delay_micro_secs = (
            usual if value is None else value for value, usual in zip(given, self._measures, strict=True)
        )
        self.profiling_cache: Any = ProfilingCache(self._decided, super().clear_cache)
        self._mode: contextlib.ExitStack | None = None

    @classmethod
    def get(cls) -> AutoTuner:
        """The process's tuner of this peer."""
        with cls._default_lock:
            if cls._instance is None:
                cls._instance = cls(store=default_store())
            return cls._instance

    # --- choosing ------------------------------------------------------------------------------------
    def choose_one(
        self,
        custom_op: str = _MISSING,
        runners: Sequence[Any] = _MISSING,
        tuning_config: TuningConfig = _MISSING,
        inputs: Sequence[Any] = _MISSING,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """As AutoTuner.choose_one; what a caller has put into `profiling_cache` serves before everything else."""
        if self._seeded():
            options = self._contexts.current
            if options is None or (custom_op not in options.skip_ops and options.answers is None):
                config = tuning_config if options is None else options.apply(tuning_config)
                hit = self._seeded_hit(custom_op, runners, shapes_of(inputs), config, inputs)
                if hit is not None:
                    return runners[hit[1]], hit[2]
        given: dict[str, Any] = {
            name: value
            for name, value in (
                ("custom_op", custom_op),
                ("runners", runners),
                ("tuning_config", tuning_config),
                ("inputs", inputs),
            )
            if value is not _MISSING
        }
        return super().choose_one(**given, **kwargs)

    def rank_tactics(
        self,
        op: str,
        runners: Sequence[Any],
        config: TuningConfig,
        inputs: Sequence[Any],
        k: int = 1,
        **kwargs: Any,
    ) -> list[Any]:
        """As AutoTuner.rank_tactics. While tuning, what was seeded for a winner alone gives way to a ranking."""
        if k > 1 and self.is_tuning_mode and len(runners) == 1:
            key = self._get_cache_key(op, runners[0], shapes_of(inputs), config, _extras(runners[0], inputs))
            self.profiling_cache.given.pop(key, None)
        return super().rank_tactics(op, runners, config, inputs, k, **kwargs)

    def search_cache(
        self,
        custom_op: str,
        runners: Sequence[Any],
        input_shapes: Sequence[Sequence[int]],
        tuning_config: TuningConfig,
        inputs: Sequence[Any] | None = None,
    ) -> Hit:
        """(whether something is known, index of the runner, tactic, profile) for these shapes, without tuning."""
        options = self._contexts.current
        config = tuning_config if options is None else options.apply(tuning_config)
        hit = self._seeded_hit(custom_op, runners, input_shapes, config, inputs)
        hit = hit or self._measured_hit(custom_op, runners, input_shapes, config)
        return hit or (False, 0, DEFAULT_TACTIC, None)

    def _seeded(self) -> bool:
        return bool(self.profiling_cache.given)

    def _seeded_hit(
        self,
        op: str,
        runners: Sequence[Any],
        shapes: Sequence[Sequence[int]],
        config: TuningConfig,
        inputs: Sequence[Any] | None,
    ) -> Hit | None:
        for index, runner in enumerate(runners):
            key = self._get_cache_key(op, runner, shapes, config, _extras(runner, inputs))
            if key in self.profiling_cache.given:
                tactic, profile = self.profiling_cache.given[key][:2]
                return True, index, tactic, profile
        return None

    def _measured_hit(
        self, op: str, runners: Sequence[Any], shapes: Sequence[Sequence[int]], config: TuningConfig
    ) -> Hit | None:
        """By shapes alone: any dtype, and any runner list that the winner took part in."""
        names = [identity_text(runner_identity(runner)) for runner in runners]
        sizes = config.sizes([tuple(shape) for shape in shapes])
        for book in self._known.books():
            if book.key.op != op or not _fits(book.key, shapes):
                continue
            records = {r.bucket: r for r in book.everything() if r.runner in names}
            table = make_table(records, roundings(config)) if records else None
            record, within = table.find(sizes) if table is not None else (None, False)
            mapped = tuple(s.bucket_of(n) for s, n in zip(config.dynamic_tensor_specs, sizes, strict=True))
            within = within or mapped in records
            if record is not None and within:
                return True, names.index(record.runner), record.tactic, None
        return None

    @staticmethod
    def _get_cache_key(
        custom_op: str,
        runner: Any,
        input_shapes: Sequence[Sequence[int]],
        tuning_config: TuningConfig,
        extras: tuple[Any, ...] = (),
    ) -> Any:
        return cache_key(custom_op, runner, input_shapes, tuning_config, extras)

    def _decided(self) -> dict[Any, Any]:
        found: dict[ProfilingCacheKey, Any] = {}
        for book in self._known.books():
            for record in book.everything():
                found[key_of_record(book.key, record)] = (record.tactic, None)
        return found

    # --- modes and clocks ----------------------------------------------------------------------------
    def clear_cache(self) -> None:
        """Forget every decision in memory, seeded ones too."""
        self.profiling_cache.clear()

    @property
    def is_tuning_mode(self) -> bool:
        """Whether a call in this thread would measure what is not known. Setting it opens or closes a tuning
        context of this thread; autotune(...) is the better way.
        """
        return super().is_tuning_mode

    @is_tuning_mode.setter
    def is_tuning_mode(self, on: bool) -> None:
        if self._mode is not None:
            self._mode.close()
            self._mode = None
        if on:
            self._mode = contextlib.ExitStack()
            self._mode.enter_context(self.autotune(True))

    def _profile_single_kernel(
        self, runner: Any, inputs: Sequence[Any], tactic: Any, tuning_config: Any = None, **kwargs: Any
    ) -> float:
        """Milliseconds of a tactic. Where this method is replaced, the race takes each of its samples from it."""
        return self.profile_tactic(runner, inputs, tactic, tuning_config or TuningConfig(), **kwargs)

    def _timer_for(self, device: str, policy: MeasurementPolicy, graph: bool) -> Any:
        if type(self)._profile_single_kernel is not PeerTuner._profile_single_kernel:
            return _ReplacedClock(self)
        return super()._timer_for(device, policy, graph)


def store_beside(path: str | os.PathLike[str] | None) -> Store | None:
    """Where our decisions are kept beside a peer's file: x.json has them in the folder x.json.d."""
    return None if path is None else Store(f"{os.fspath(path)}.d")


class _ReplacedClock:
    """A timer that asks _profile_single_kernel for each sample: a test's stand-in for a GPU."""

    name = "_profile_single_kernel"

    def __init__(self, tuner: PeerTuner) -> None:
        self._tuner = tuner

    def prepare(self, call: Callable[[], Any]) -> Callable[[], float]:
        run: Any = getattr(call, "__wrapped__", call)
        job, (candidate, inputs) = run.func.__self__, run.args

        def sample() -> float:
            milliseconds = self._tuner._profile_single_kernel(
                job.runners[candidate.index], inputs, candidate.tactic, job.config, **job.kwargs
            )
            return float(milliseconds) * 1e-3

        return sample


def _extras(runner: Any, inputs: Sequence[Any] | None) -> tuple[Any, ...]:
    hook = getattr(runner, "get_cache_key_extras", None)
    return tuple(hook(inputs)) if hook is not None and inputs is not None else ()


def _fits(key: StaticKey, shapes: Sequence[Sequence[int]]) -> bool:
    """Whether a key's static dimensions are those of these shapes."""
    known = [described.get("shape", [0]) for described in key.fields["inputs"]]
    return len(known) == len(shapes) and all(
        len(one) == len(other) and all(n is None or n == m for n, m in zip(one, other, strict=True))
        for one, other in zip(known, shapes, strict=True)
    )
