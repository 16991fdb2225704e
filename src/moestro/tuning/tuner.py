"""AutoTuner: which runner and tactic serve these inputs.

Outside an `autotune` context a call is a look-up: the decision of the nearest measured size, else the
default. Inside one, what is not known is measured first (campaign.py), written to the store the moment it is
known, and looked up. A look-up takes no lock; a measurement holds one that only other measurements wait for.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from moestro.errors import TuningError, TuningWarning, as_optional
from moestro.tuning.contexts import Contexts, Options
from moestro.tuning.forks import survive
from moestro.tuning.group import group_of, leaving
from moestro.tuning.lookup.known import DecisionsOfKey, KnownDecisions
from moestro.tuning.lookup.sites import CallSite, CallSites, Lookup
from moestro.tuning.measure.budget import Budget
from moestro.tuning.measure.campaign import Campaign
from moestro.tuning.measure.request import Job
from moestro.tuning.measure.scope import capturing
from moestro.tuning.measure.timers import Timer, as_timer
from moestro.tuning.progress import Progress, showing
from moestro.tuning.spec.evidence import Record
from moestro.tuning.spec.keys import StaticKey, device_of, shapes_of, static_key
from moestro.tuning.spec.policy import MeasurementPolicy
from moestro.tuning.spec.runner import DEFAULT_TACTIC, check_runners
from moestro.tuning.spec.specs import Probe, Sizes, TuningConfig
from moestro.tuning.spec.tactic_list import TacticList, from_environment
from moestro.tuning.store.environment import Environment, environment_for
from moestro.tuning.store.store import Store, default_store
from moestro.tuning.together import run_campaign
from moestro.tuning.toolbox import Toolbox

__all__ = ["AutoTuner", "autotune"]

Choice = tuple[Any, Any]  # (runner, tactic)
_MISSING: Any = object()


class AutoTuner(Toolbox):
    """Chooses runners and tactics; see the module, and toolbox.py for what else it does.

    store: a folder or Store for decisions; None keeps them in memory. timer: any timer, else the device's
    own. clock: what budgets are kept by. tactics: files of tactics that are banned or allowed
    (spec/tactic_list.py), besides those of $MOESTRO_TACTICS.
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
        tactics: Iterable[str | os.PathLike[str]] = (),
    ) -> None:
        self.store = _as_store(store)
        self.policy = as_optional("policy", policy, MeasurementPolicy, TuningError) or MeasurementPolicy()
        self._timer = as_timer(timer)
        self._timers = {}
        self._clock = clock
        self._contexts = Contexts()
        self._sites = CallSites()
        self._known = KnownDecisions(self.store, TacticList([*from_environment(), *tactics]))
        self._measuring = threading.RLock()
        survive(self)

    def forked(self) -> None:
        """This process is a child: locks are made anew, or it would wait for threads that are not there."""
        type(self)._default_lock = threading.Lock()
        self._measuring = threading.RLock()
        self._contexts.forked()
        self._known.forked()

    @classmethod
    def get(cls) -> AutoTuner:
        """The process's tuner, with the user's store."""
        if cls._default is None:
            with cls._default_lock:
                if cls._default is None:
                    cls._default = cls(store=default_store())
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
        skip_ops: Iterable[str] | str | None = None,
        policy: MeasurementPolicy | None = None,
        probes: Sequence[Probe] | None = None,
        progress: Progress | None = None,
        crossover: bool | None = None,
        only_sizes_seen: bool | None = None,
        ahead: bool | None = None,
        group: Any = None,
        strategy: str | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[AutoTuner]:
        """Tune what is not known, in this thread, until the context is left.

        tune_mode: False only looks up. cache: where decisions are read from and written to. budget_s: seconds
        of tuning. tuning_buckets, round_up: replace the operations' own buckets and rounding. skip_ops: these
        get their default. policy, probes: how to measure and on what. crossover: search for where winners
        change. only_sizes_seen: the sizes of calls are the buckets, and none besides. ahead: no call is waiting,
        so that the budget is for all sizes alike. progress: True draws a line; a function gets the lines. What is
        not given is inherited from the context outside. Raises TuningError for settings that make no sense.

        group: a torch.distributed.ProcessGroup whose ranks all make the same calls in this context and come to
        one decision, by the slowest rank's time. strategy: of group.STRATEGIES, "parallel" by default.
        timeout_s: how long ranks wait for each other, the group's own time-out by default; then all get the
        default tactic, with a TuningWarning that names who was missing.
        """
        outer = self._contexts.current or Options()
        inner = outer.inner(
            tune=tune_mode,
            store=_as_store(cache),
            budget=None if budget_s is None else Budget(budget_s, self._clock, outer.budget),
            buckets=tuning_buckets,
            round_up=round_up,
            skip_ops=skip_ops,
            policy=policy,
            probes=probes,
            progress=progress,
            crossover=crossover,
            only_sizes_seen=only_sizes_seen,
            ahead=ahead,
            group=group_of(group, strategy, timeout_s),
        )
        if strategy == "independent":
            inner = replace(inner, group=None)  # also inside a context with a group
        if inner.store is not None:
            self._known.attach(inner.store)
        entered = self._contexts.push(inner)
        try:
            with leaving(inner.group if inner.group is not outer.group else None):
                yield self
        finally:
            self._contexts.pop(entered)

    # --- choosing ------------------------------------------------------------------------------------
    def choose_one(
        self,
        custom_op: str = _MISSING,
        runners: Sequence[Any] = _MISSING,
        tuning_config: TuningConfig = _MISSING,
        inputs: Sequence[Any] = _MISSING,
        **kwargs: Any,
    ) -> Choice:
        """(runner, tactic) for these inputs; kwargs are passed to forward when candidates are measured, and to
        get_valid_tactics where it takes them. `op` and `config` are other names of the first and third.

        Raises TuningError for runners or buckets that make no sense, and inside CUDA graph capture if tuning
        would have to measure.
        """
        contexts = self._contexts
        if not contexts.active or contexts.current is None:
            sites = self._sites
            try:
                if len(runners) == 1:  # the usual call: unpacking a map costs 0.1 µs more
                    site = sites.known.get((custom_op, id(tuning_config), id(runners[0])))
                else:
                    site = sites.known.get((custom_op, id(tuning_config), *map(id, runners)))
                if site is None:
                    site = sites.get(custom_op, runners, tuning_config, None)
            except (TypeError, AttributeError):
                site = None  # no sequence of runners, or names in kwargs; _choose says so
            if site is not None:
                for guard, view in site.guards:
                    if guard(runners, inputs, kwargs):
                        pick = view.quick(inputs)
                        if pick is None:
                            break
                        return runners[pick[0]], pick[1]
        if custom_op is _MISSING or tuning_config is _MISSING:
            custom_op, tuning_config = kwargs.pop("op", custom_op), kwargs.pop("config", tuning_config)
        return self._choose(custom_op, runners, tuning_config, inputs, kwargs)[0]

    def bind(
        self, op: str, runners: Sequence[Any], config: TuningConfig, **kwargs: Any
    ) -> Callable[[Sequence[Any]], Choice]:
        """pick(inputs) -> (runner, tactic), decided by the dynamic sizes alone.

        For inputs that differ in nothing else: the first call's key counts for all. Only the dynamic input's
        dtype is looked at again; where it is another, so is the key.
        """
        check_runners(runners)
        contexts, bisect = self._contexts, bisect_left
        fast: Any = None  # (view, its table, bounds, choices, picks by size, input, dim, dtype)

        def pick(inputs: Sequence[Any]) -> Choice:
            if fast is not None and (not contexts.active or contexts.current is None):
                view, table, bounds, choices, by_size, tensor, dim, dtype = fast
                if view.fast is table:
                    value = inputs[tensor]
                    if value.dtype is dtype:
                        at = bisect(bounds, value.shape[dim])
                        if at < len(choices):
                            choice = choices[at]
                            if choice is not None:
                                return choice  # type: ignore[no-any-return]
                            known = by_size.get(value.shape[dim])
                            if known is not None:
                                return runners[known[0]], known[1]
            return slow(inputs)

        def slow(inputs: Sequence[Any]) -> Choice:
            nonlocal fast
            choice, view = self._choose(op, runners, config, inputs, kwargs)
            table = view.fast if view is not None else None
            if view is not None and table is not None and len(view.dims) == 1 and contexts.current is None:
                tensor, dim = view.dims[0]
                choices = [None if pick is None else (runners[pick[0]], pick[1]) for pick in table[1]]
                by_size = view.validity.by_size
                fast = (view, table, table[0], choices, by_size, tensor, dim, inputs[tensor].dtype)
            return choice

        return pick

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
        for name, value in (("op", op), ("runners", runners), ("config", config), ("inputs", inputs)):
            if value is _MISSING:
                raise TuningError(f"choose_one needs {name}")
        check_runners(runners)
        if options is not None and options.answers is not None:
            answer = options.answers.answer(op, runners, config, inputs, kwargs)
            if answer is not None:
                return answer, None
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
        elif record is None:
            self._known.stats.missed(op, sizes)
        index, tactic = view.pick(record, site.config, runners, inputs, kwargs, sizes)
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
        if not isinstance(config, TuningConfig):
            raise TuningError(f"{op}: config must be a TuningConfig, got {type(config).__name__}")
        if not isinstance(inputs, Sequence):
            raise TuningError(f"{op}: inputs must be a list or tuple, got {type(inputs).__name__}")
        site = self._sites.get(op, runners, config, options)
        view = site.guarded(runners, inputs, kwargs)
        environment = functools.partial(self._environment, site, runners, inputs, options)
        if view is None:
            key = static_key(op, runners, site.config, inputs, kwargs)
            device = device_of(inputs)
            here = site.environments.get(device)
            if here is None:
                tuning = options is not None and options.tune
                # Reading kernels' sources takes 0.2 s the first time: of the budget, too.
                with options.budget.running() if options and tuning else contextlib.nullcontext():
                    here = site.environments[device] = environment()
            view = site.view(key, device, here.name, lambda: self._book(key, device, site.config))
            site.guard(view, runners, inputs, kwargs)
        self._known.open(view.book, options, environment)
        return site, view, site.config.sizes(shapes_of(inputs))

    def _book(self, key: StaticKey, device: str, config: TuningConfig) -> DecisionsOfKey:
        book = self._known.book(key, device, len(config.dynamic_tensor_specs))
        book.private = book.private or config.exclude_from_cache
        return book

    def _environment(
        self, site: CallSite, runners: Sequence[Any], inputs: Sequence[Any], options: Options | None
    ) -> Environment:
        policy = self._policy_of(site.config, options)
        device = device_of(inputs)
        clock = self._timer_for(device, policy, site.config.use_cuda_graph).name
        return environment_for(device, runners, policy, clock)

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
        group = options.group
        if group.broken if group is not None else options.budget.left <= 0:
            return
        if capturing():
            record, within = view.find(sizes)
            if record is not None and within:
                return  # it may not be finished, but it serves
            raise TuningError(
                f"{site.op}: nothing is known for sizes {sizes}, and tuning inside CUDA graph capture is not "
                "possible (active outer CUDA Graph capture): run the operation once under autotune() before capturing it"
            )
        policy = self._policy_of(site.config, options)
        device = device_of(inputs)
        timer = self._timer_for(device, policy, site.config.use_cuda_graph)
        environment = self._environment(site, runners, inputs, options)
        decisions, store, book = self._known, self._known.target(options), view.book
        shown = options.progress if group is None or group.rank == 0 else False
        with self._measuring, options.budget.running(), decisions.measuring(), showing(shown) as listener:
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
                banned=decisions.tactics.over(book.banned, site.op),
                ban=lambda candidate, reason: decisions.ban(book, store, environment, candidate.name, reason),
                warm=decisions.warm(book, store, environment),
                listener=listener,
                group=group,
            )
            first = tuple(
                spec.bucket_of(size)
                for spec, size in zip(site.config.dynamic_tensor_specs, sizes, strict=True)
            )
            known = functools.partial(book.records, view.probes, environment.name, view.accepts)
            keep = functools.partial(decisions.keep, book, store, environment)
            campaign = Campaign(job, known, keep, first, book.too_large, options.crossover, options.ahead)
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
        environment = functools.partial(self._environment, site, runners, inputs, options)
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


def autotune(
    tune_mode: bool = True, cache: str | os.PathLike[str] | Store | None = None, **options: Any
) -> contextlib.AbstractContextManager[AutoTuner]:
    """AutoTuner.get().autotune(...): tune what is not known, in this thread, until the context is left."""
    return AutoTuner.get().autotune(tune_mode, cache, **options)
