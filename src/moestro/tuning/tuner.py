"""AutoTuner: which runner and tactic serve these inputs.

Outside an `autotune` context a call is a look-up: the decision of the nearest measured size, else the
default. Inside one, what is not known is measured first (campaign.py), written to the store the moment it is
known, and looked up. A look-up takes no lock; a measurement holds one that only other measurements wait for.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from moestro.errors import TuningError, TuningWarning
from moestro.tuning.contexts import Contexts, Options
from moestro.tuning.group import group_of
from moestro.tuning.lookup.known import KnownDecisions
from moestro.tuning.lookup.sites import CallSite, CallSites, Lookup
from moestro.tuning.measure.budget import Budget
from moestro.tuning.measure.campaign import Campaign
from moestro.tuning.measure.request import Job
from moestro.tuning.measure.timers import Timer, default_timer
from moestro.tuning.progress import Progress, showing
from moestro.tuning.show.explain import Case, explain, explain_miss
from moestro.tuning.spec.keys import device_of, shapes_of, static_key
from moestro.tuning.spec.policy import MeasurementPolicy
from moestro.tuning.spec.runner import DEFAULT_TACTIC, check_runners
from moestro.tuning.spec.specs import Probe, Sizes, TuningConfig
from moestro.tuning.store.environment import Environment, environment_for
from moestro.tuning.store.records import Decision, Record
from moestro.tuning.store.store import Store, default_root
from moestro.tuning.together import run_campaign

__all__ = ["AutoTuner", "autotune"]

Choice = tuple[Any, Any]  # (runner, tactic)


class AutoTuner:
    """Chooses runners and tactics; see the module.

    store: a folder or Store for decisions; None keeps them in memory. timer: any timer, else the device's
    own. clock: what budgets are kept by.
    """

    _default: ClassVar[AutoTuner | None] = None
    _default_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self,
        store: str | os.PathLike[str] | Store | None = None,
        timer: Timer | None = None,
        policy: MeasurementPolicy | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = _as_store(store)
        self.policy = policy or MeasurementPolicy()
        self._timer = timer
        self._timers: dict[Any, Timer] = {}
        self._clock = clock
        self._contexts = Contexts()
        self._sites = CallSites()
        self._known = KnownDecisions(self.store)
        self._measuring = threading.RLock()

    @classmethod
    def get(cls) -> AutoTuner:
        """The process's tuner, with the user's store."""
        if cls._default is None:
            with cls._default_lock:
                if cls._default is None:
                    cls._default = cls(store=default_root())
        return cls._default

    # --- contexts ------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def autotune(
        self,
        tune_mode: bool = True,
        cache: str | os.PathLike[str] | Store | None = None,
        *,
        budget_s: float | None = None,
        tuning_buckets: Iterable[int] | None = None,
        round_up: bool | None = None,
        skip_ops: Iterable[str] | None = None,
        policy: MeasurementPolicy | None = None,
        probes: Sequence[Probe] | None = None,
        progress: Progress | None = None,
        crossover: bool | None = None,
        group: Any = None,
        strategy: str | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[AutoTuner]:
        """Tune what is not known, in this thread, until the context is left.

        tune_mode: False only looks up. cache: where decisions are read from and written to. budget_s: seconds
        of tuning. tuning_buckets, round_up: replace the operations' own buckets and rounding. skip_ops: these
        get their default. policy, probes: how to measure and on what. crossover: search for where winners
        change. progress: True draws a line in the terminal; a function gets the lines. What is not given is
        inherited from the context outside. Raises TuningError for settings that make no sense.

        group: a torch.distributed.ProcessGroup whose ranks all make the same calls in this context; they come
        to one decision, by the slowest rank's time. strategy: "parallel" (the default), "broadcast", "merge"
        or "independent" (group.STRATEGIES says what they do). timeout_s: how long a rank waits for the
        others, the group's own time-out by default; then all get the default tactic, with a TuningWarning
        that names who was missing.
        """
        outer = self._contexts.current or Options()
        inner = outer.inner(
            tune=tune_mode,
            store=_as_store(cache),
            budget=None if budget_s is None else Budget(budget_s, self._clock),
            buckets=tuning_buckets,
            round_up=round_up,
            skip_ops=skip_ops,
            policy=policy,
            probes=probes,
            progress=progress,
            crossover=crossover,
            group=group_of(group, strategy, timeout_s),
        )
        if strategy == "independent":
            inner = replace(inner, group=None)  # also inside a context with a group
        self._contexts.push(inner)
        try:
            yield self
        except BaseException as error:
            if inner.group is not None and inner.group is not outer.group:
                inner.group.leave(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._contexts.pop()

    # --- choosing ------------------------------------------------------------------------------------
    def choose_one(
        self, op: str, runners: Sequence[Any], config: TuningConfig, inputs: Sequence[Any], **kwargs: Any
    ) -> Choice:
        """(runner, tactic) for these inputs; kwargs are passed to forward when candidates are measured.

        Raises TuningError for runners or buckets that make no sense, and inside CUDA graph capture if tuning
        would have to measure.
        """
        contexts = self._contexts
        if not contexts.active or contexts.current is None:
            try:
                site = self._sites.known.get((op, id(config), *map(id, runners)))
            except TypeError:
                site = None  # no sequence of runners; _choose says so
            if site is not None:
                for guard, view in site.guards:
                    if guard(runners, inputs, kwargs):
                        pick = view.quick(inputs)
                        if pick is None:
                            break
                        return runners[pick[0]], pick[1]
        return self._choose(op, runners, config, inputs, kwargs)[0]

    def bind(
        self, op: str, runners: Sequence[Any], config: TuningConfig, **kwargs: Any
    ) -> Callable[[Sequence[Any]], Choice]:
        """pick(inputs) -> (runner, tactic), decided by the dynamic sizes alone.

        For inputs that differ in nothing else: the first call's key counts for all. Only the dynamic input's
        dtype is looked at again; where it is another, so is the key.
        """
        check_runners(runners)
        contexts, bisect = self._contexts, bisect_left
        fast: Any = None  # (view, its table, bounds, choices, input, dim, dtype)

        def pick(inputs: Sequence[Any]) -> Choice:
            if fast is not None and (not contexts.active or contexts.current is None):
                view, table, bounds, choices, tensor, dim, dtype = fast
                if view.fast is table:
                    value = inputs[tensor]
                    if value.dtype is dtype:
                        at = bisect(bounds, value.shape[dim])
                        if at < len(choices):
                            return choices[at]  # type: ignore[no-any-return]
            return slow(inputs)

        def slow(inputs: Sequence[Any]) -> Choice:
            nonlocal fast
            choice, view = self._choose(op, runners, config, inputs, kwargs)
            table = view.fast if view is not None else None
            if view is not None and table is not None and len(view.dims) == 1 and contexts.current is None:
                tensor, dim = view.dims[0]
                choices = [(runners[index], tactic) for index, tactic in table[1]]
                fast = (view, table, table[0], choices, tensor, dim, inputs[tensor].dtype)
            return choice

        return pick

    def decision(
        self, op: str, runners: Sequence[Any], config: TuningConfig, inputs: Sequence[Any], **kwargs: Any
    ) -> Decision | None:
        """What choose_one would answer, with its evidence, without tuning; None where nothing is known."""
        options = self._contexts.current
        check_runners(runners)
        _, view, sizes = self._locate(op, runners, config, inputs, kwargs, options)
        record, within = view.find(sizes)
        if record is None:
            return None
        index, tactic = view.pick(record)
        return Decision(
            runner=runners[index],
            tactic=tactic,
            bucket=record.bucket[0] if len(record.bucket) == 1 else record.bucket,
            status=record.status if within else "extrapolated",
            evidence=record.evidence,
            record=record,
            source=view.book.sources.get((record.probes, record.bucket), "memory"),
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
            records=book.records(record.probes),
            sizes=sizes,
            within=within,
            source=book.sources.get((record.probes, record.bucket), "memory"),
            facts=store.facts(record.environment) if store is not None else None,
        )
        return explain(case)

    # --- inside --------------------------------------------------------------------------------------
    def _choose(
        self,
        op: str,
        runners: Sequence[Any],
        config: TuningConfig,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> tuple[Choice, Lookup | None]:
        options = self._contexts.current
        check_runners(runners)
        if options is not None and op in options.skip_ops:
            return (runners[0], DEFAULT_TACTIC), None
        site, view, sizes = self._locate(op, runners, config, inputs, kwargs, options)
        if options is not None and options.tune and (options.group is not None or sizes not in view.done):
            self._tune(site, view, runners, inputs, kwargs, sizes, options)
            if options.group is not None and options.group.broken:
                return (runners[0], DEFAULT_TACTIC), None
        record, within = view.find(sizes)
        if record is not None and not within:
            self._missing(site, view, runners, inputs, sizes, record)
        index, tactic = view.pick(record)
        return (runners[index], tactic), view

    def _locate(
        self,
        op: str,
        runners: Sequence[Any],
        config: TuningConfig,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Options | None,
    ) -> tuple[CallSite, Lookup, Sizes]:
        site = self._sites.get(op, runners, config, options)
        view = site.guarded(runners, inputs, kwargs)
        if view is None:
            key = static_key(op, runners, site.config, inputs, kwargs)
            device = device_of(inputs)
            view = site.view(key, device, lambda: self._known.book(key, device))
            site.guard(view, runners, inputs, kwargs)
        environment = functools.partial(self._environment, site.config, runners, inputs, options)
        self._known.open(view.book, device_of(inputs), options, environment)
        return site, view, site.config.sizes(shapes_of(inputs))

    def _environment(
        self, config: TuningConfig, runners: Sequence[Any], inputs: Sequence[Any], options: Options | None
    ) -> Environment:
        policy = (options and options.policy) or self.policy
        device = device_of(inputs)
        clock = self._timer_for(device, policy, config.use_cuda_graph).name
        return environment_for(device, runners, policy, clock)

    def _timer_for(self, device: str, policy: MeasurementPolicy, graph: bool) -> Timer:
        if self._timer is not None:
            return self._timer
        known = self._timers.get((device, policy, graph))
        if known is None:
            known = self._timers[device, policy, graph] = default_timer(device, policy, graph=graph)
        return known

    def _tune(
        self,
        site: CallSite,
        view: Lookup,
        runners: Sequence[Any],
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        sizes: Sizes,
        options: Options,
    ) -> None:
        group, done = options.group, sizes in view.done
        if group.broken if group is not None else options.budget.left <= 0:
            return
        if _capturing():
            if done:
                return
            raise TuningError(
                f"{site.op}: nothing is known for sizes {sizes}, and tuning inside CUDA graph capture is not "
                "possible: run the operation once under autotune() before capturing it"
            )
        policy = options.policy or self.policy
        device = device_of(inputs)
        timer = self._timer_for(device, policy, site.config.use_cuda_graph)
        environment = self._environment(site.config, runners, inputs, options)
        decisions, store, book = self._known, self._known.target(options), view.book
        shown = options.progress if group is None or group.rank == 0 else False
        with self._measuring, showing(shown) as progress:
            decisions.refresh(book, store, environment)
            job = Job(
                key=book.key,
                runners=runners,
                config=site.config,
                inputs=inputs,
                kwargs=kwargs,
                policy=policy,
                timer=timer,
                budget=options.budget,
                sizes=sizes,
                banned=book.banned,
                ban=lambda candidate, reason: decisions.ban(book, store, environment, candidate.name, reason),
                warm=decisions.warm(book, store, environment),
                progress=progress,
                group=group,
            )
            first = tuple(
                spec.bucket_of(size)
                for spec, size in zip(site.config.dynamic_tensor_specs, sizes, strict=True)
            )
            known = functools.partial(book.records, view.probes)
            keep = functools.partial(decisions.keep, book, store, environment)
            campaign = Campaign(job, known, keep, first, book.too_large, options.crossover)
            if run_campaign(campaign, environment.name, {"tuning_buckets": options.buckets}):
                view.finished(sizes)

    def _missing(
        self,
        site: CallSite,
        view: Lookup,
        runners: Sequence[Any],
        inputs: Sequence[Any],
        sizes: Sizes,
        record: Record,
    ) -> None:
        """Warn, once, that sizes are beyond what was tuned, and remember them."""
        options = self._contexts.current
        environment = functools.partial(self._environment, site.config, runners, inputs, options)
        if self._known.miss(view.book, self._known.target(options), sizes, record, environment):
            asked, used = (" x ".join(map(str, s)) for s in (sizes, record.bucket))
            warnings.warn(
                f"{site.op}: size {asked} is beyond everything tuned; the decision for {used} is used. "
                "Tune at this size, or run `moestro tune --from-misses`",
                TuningWarning,
                stacklevel=4,
            )
        view.accept(sizes)


def _as_store(store: str | os.PathLike[str] | Store | None) -> Store | None:
    return store if store is None or isinstance(store, Store) else Store(store)


def _capturing() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def autotune(
    tune_mode: bool = True, cache: str | os.PathLike[str] | Store | None = None, **options: Any
) -> contextlib.AbstractContextManager[AutoTuner]:
    """AutoTuner.get().autotune(...): tune what is not known, in this thread, until the context is left."""
    return AutoTuner.get().autotune(tune_mode, cache, **options)
