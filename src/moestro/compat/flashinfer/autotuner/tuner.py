"""FlashInfer's AutoTuner and autotune over ours.

autotune(cache="x.json") keeps our decisions in the folder x.json.d and, for FlashInfer's own readers, the winners
in x.json. A file that FlashInfer has made serves where we have measured nothing yet, if its environment is ours,
and its winners are tried first where we measure.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moestro.compat.flashinfer.autotuner import files
from moestro.compat.profiles import cache_key, nearest_profile, optimization_profiles
from moestro.compat.tuner import PeerTuner, _extras, store_beside
from moestro.errors import TuningError
from moestro.tuning.spec.inputs import synthesise
from moestro.tuning.spec.keys import shapes_of
from moestro.tuning.spec.runner import DEFAULT_TACTIC
from moestro.tuning.spec.specs import OptimizationProfile, TuningConfig
from moestro.tuning.store.flashinfer import import_flashinfer
from moestro.tuning.store.store import Store

__all__ = [
    "AutoTuner",
    "ValueProfileArena",
    "autotune",
    "get_autotune_process_group",
    "set_autotune_process_group",
]

BLOCKLIST = "FLASHINFER_TACTICS_BLOCKLIST"


class AutoTuner(PeerTuner):
    """FlashInfer's AutoTuner; see PeerTuner. Its list of blocked tactics is read, too."""

    _measures = 3, 10, 5000

    def __init__(self, *measures: int, **ours: Any) -> None:
        listed = os.environ.get(BLOCKLIST)
        tactics = [*ours.pop("tactics", ()), *([listed] if listed else [])]
        super().__init__(*measures, tactics=tactics, **ours)
        self._file_configs: dict[str, tuple[str, Any]] = {}

    # --- choosing ------------------------------------------------------------------------------------
    def choose_one(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As FlashInfer's; a loaded file serves where nothing is measured."""
        choice = super().choose_one(*args, **kwargs)
        if not self._file_configs or choice[1] != DEFAULT_TACTIC or self.is_tuning_mode:
            return choice
        given = dict(zip(("custom_op", "runners", "tuning_config", "inputs"), args, strict=False)) | kwargs
        op, runners = given.pop("custom_op"), given.pop("runners")
        config, inputs = given.pop("tuning_config"), given.pop("inputs")
        options = self._contexts.current
        if options is not None and (op in options.skip_ops or options.answers is not None):
            return choice
        if self.decision(op, runners, config, inputs, **given) is not None:
            return choice
        effective = config if options is None else options.apply(config)
        hit = self._file_hit(op, runners, shapes_of(inputs), effective, inputs)
        return choice if hit is None else (runners[hit[1]], hit[2])

    def search_cache(
        self,
        custom_op: str,
        runners: Sequence[Any],
        input_shapes: Sequence[Sequence[int]],
        tuning_config: TuningConfig,
        inputs: Sequence[Any] | None = None,
    ) -> tuple[bool, int, Any, Any]:
        """As PeerTuner.search_cache, then what a loaded file has."""
        hit = super().search_cache(custom_op, runners, input_shapes, tuning_config, inputs)
        if hit[0]:
            return hit
        return self._file_hit(custom_op, runners, input_shapes, tuning_config, inputs) or hit

    def _file_hit(
        self,
        op: str,
        runners: Sequence[Any],
        shapes: Sequence[Sequence[int]],
        config: TuningConfig,
        inputs: Sequence[Any] | None,
    ) -> tuple[bool, int, Any, Any] | None:
        for index, runner in enumerate(runners):
            key = cache_key(op, runner, shapes, config, _extras(runner, inputs))
            name, tactic = self._file_configs.get(key.file_key, ("", None))
            if name == type(runner).__name__:
                return True, index, tactic, None
        return None

    # --- files ---------------------------------------------------------------------------------------
    def load_configs(self, path: str) -> bool:
        """Serve what a file of FlashInfer's holds; False, with one warning, if it was made elsewhere.

        Raises FileNotFoundError, or TuningError for what is no such file.
        """
        entries = files.load(path)
        if entries is None:
            return False
        self._file_configs.update(entries)
        return True

    def save_configs(self, path: str) -> None:
        """Write the winners that are known here to a file as FlashInfer's, with those that were loaded and those
        that it holds. A file of another environment is left alone, with one warning.
        """
        entries = dict(self._file_configs)
        for key, (tactic, _) in self.profiling_cache.items():
            entries[key.file_key] = (key.runner_class_name, tactic)
        files.write(path, entries)

    def clear_cache(self) -> None:
        """Forget what was measured, seeded and loaded, in memory."""
        super().clear_cache()
        self._file_configs.clear()

    # --- their names for parts -----------------------------------------------------------------------
    @classmethod
    def _find_nearest_profile(
        cls, shapes: Sequence[Sequence[int]], tuning_config: TuningConfig
    ) -> tuple[tuple[int, ...], ...]:
        return nearest_profile(shapes, tuning_config)

    def _generate_optimization_profiles(
        self, tuning_config: TuningConfig, inputs: Sequence[Any]
    ) -> list[OptimizationProfile]:
        return optimization_profiles(tuning_config, inputs)

    def _prepare_input_tensors(self, profile: OptimizationProfile, inputs: Sequence[Any]) -> list[Any]:
        return synthesise(TuningConfig(), profile, inputs, None, self.policy.seed)

    def _apply_tuning_overrides(self, tuning_config: TuningConfig) -> TuningConfig:
        options = self._contexts.current
        return tuning_config if options is None else options.apply(tuning_config)

    @property
    def _effective_skip_ops(self) -> frozenset[str]:
        options = self._contexts.current
        return frozenset() if options is None else options.skip_ops

    @property
    def _override_tuning_buckets(self) -> tuple[int, ...] | None:
        options = self._contexts.current
        return None if options is None else options.buckets

    @property
    def _override_round_up(self) -> bool:
        options = self._contexts.current
        return bool(options is not None and options.round_up)


class ValueProfileArena:
    """FlashInfer's two buffers of rotating inputs. There is nothing here for it to do: making one is an error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TuningError(
            "ValueProfileArena is not needed: every candidate is measured on the same inputs, and the timer "
            "takes care of what is in the cache. Give TuningConfig(probes=) for several distributions"
        )


_group: Any = None


def set_autotune_process_group(group: Any) -> None:
    """Have autotune(...) make one decision for all ranks of a group, as autotune(group=) does."""
    global _group
    _group = group


def get_autotune_process_group() -> Any:
    """What set_autotune_process_group was given last."""
    return _group


@contextlib.contextmanager
def autotune(
    tune_mode: bool = True,
    cache: str | None = None,
    tuning_buckets: Sequence[int] | None = None,
    round_up: bool | None = None,
    skip_ops: str | set[str] | None = None,
    **ours: Any,
) -> Iterator[None]:
    """FlashInfer's autotune for AutoTuner.get(). ours: what moestro.autotune takes besides (budget_s, policy)."""
    tuner = AutoTuner.get()
    assert isinstance(tuner, AutoTuner)
    if _group is not None:
        ours = {"group": _group, **ours}
    store = _opened(tuner, cache)
    with tuner.autotune(
        tune_mode, store, tuning_buckets=tuning_buckets, round_up=round_up, skip_ops=skip_ops, **ours
    ):
        yield
    if cache is not None and tune_mode and len(tuner.profiling_cache):
        tuner.save_configs(cache)


def _opened(tuner: AutoTuner, cache: str | None) -> Store | None:
    """The store beside a cache file, and the file's own entries as what serves and what is tried first."""
    store = store_beside(cache)
    if cache is not None and store is not None and Path(cache).is_file() and tuner.load_configs(cache):
        with contextlib.suppress(TuningError):  # no tactics in it: nothing to try first
            import_flashinfer(Path(cache), store)
    return store
