"""TensorRT-LLM's tuner (`tensorrt_llm._torch.autotuner`) by its own names, over ours.

autotune(cache_path="x.json") keeps our decisions in the folder x.json.d and, for TensorRT-LLM's own readers, the
winners of this rank in x.json.
"""

from __future__ import annotations

import ast
import contextlib
import enum
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.compat.profiles import nearest_profile, optimization_profiles
from moestro.compat.tuner import PeerTuner, ProfilingCache, store_beside
from moestro.errors import StoreWarning, TuningError, TuningWarning
from moestro.tuning import (
    ConstraintSpec,
    DynamicDim,
    DynamicTensorSpec,
    OptimizationProfile,
    StaticDim,
    TuningConfig,
    last_positive_power_of_2,
    next_positive_power_of_2,
)
from moestro.tuning import TunableRunner as _Runner
from moestro.tuning.lookup.known import Statistics as AutoTunerStatistics
from moestro.tuning.spec.specs import Dim
from moestro.tuning.store.store import write_text_atomically

__all__ = [
    "AutoTuner",
    "AutoTunerProfilingCache",
    "AutoTunerStatistics",
    "ConstraintSpec",
    "Dim",
    "DistributedTuningStrategy",
    "DynamicDim",
    "DynamicTensorSpec",
    "FakeTensor",
    "OptimizationProfile",
    "StaticDim",
    "TunableRunner",
    "TuningConfig",
    "autotune",
    "get_power_of_2_num_tokens_buckets",
    "last_positive_power_of_2",
    "next_positive_power_of_2",
]


RANK_FILE = re.compile(r"(?P<stem>.*)\.rank(?P<rank>\d+)\.json", re.DOTALL)
IN_CHILDREN = "TLLM_AUTOTUNER_MULTIPROCESS"  # set to 1, TensorRT-LLM asks should_profile_tactic_in_subprocess
_said: set[str] = set()  # classes whose hook a warning has named


class DistributedTuningStrategy(enum.Enum):
    """Who tunes, of a group of ranks."""

    BROADCAST = "broadcast"
    INDEPENDENT = "independent"
    MERGE = "merge"
    PARALLEL = "parallel"


@dataclass
class FakeTensor:
    """A tensor without values."""

    dtype: Any
    device: Any
    shape: list[Dim]


def get_power_of_2_num_tokens_buckets(max_num_tokens: int) -> tuple[int, ...]:
    """Powers of two from the largest one that is at most max_num_tokens down to 1."""
    most = last_positive_power_of_2(max_num_tokens)
    return tuple(1 << k for k in reversed(range(most.bit_length())))


class TunableRunner(_Runner):
    """As TensorRT-LLM's: unique_id() is its configuration; by default its attributes."""

    def unique_id(self) -> Any:
        """What tells this runner from others of its class."""
        return tuple(self.__dict__.values())

    unique_id.is_default = True  # type: ignore[attr-defined]  # then public attributes count, by name

    def should_profile_tactic_in_subprocess(
        self, custom_op: str, inputs: Any, tactic: Any, tuning_config: TuningConfig, **kwargs: Any
    ) -> bool:
        """TensorRT-LLM's hook for tactics that may end the process. Not asked here: MeasurementPolicy(isolate=True)
        runs every tactic in a child first. A TuningWarning says so where TensorRT-LLM would have asked.
        """
        return False


class AutoTunerProfilingCache(ProfilingCache):
    """Key -> (index of the runner, tactic, milliseconds)."""

    def __init__(self, tuner: AutoTuner) -> None:
        super().__init__(tuner._decided, lambda: super(PeerTuner, tuner).clear_cache())
        self._tuner = tuner

    def search_cache(
        self,
        custom_op: str,
        runners: Sequence[Any],
        input_shapes: Sequence[Sequence[int]],
        tuning_config: TuningConfig,
        apply_map_to_tuning_buckets: bool = True,
    ) -> tuple[bool, int, Any, float]:
        """(whether something is known, index of the runner, tactic, milliseconds)."""
        hit, index, tactic, _ = self._tuner.search_cache(custom_op, runners, input_shapes, tuning_config)
        if not hit:
            return False, *self.fallback_entry()
        key = self._tuner._get_cache_key(custom_op, runners[index], input_shapes, tuning_config)
        return True, index, tactic, float(self.get(key, (0, 0, float("inf")))[2])

    def get_cache_key(
        self,
        custom_op: str,
        runner: Any,
        input_shapes: Sequence[Sequence[int]],
        tuning_config: TuningConfig,
        apply_map_to_tuning_buckets: bool = True,
    ) -> tuple[Any, ...]:
        """(op, class, unique id, profile). apply_map_to_tuning_buckets=False: the shapes as they are."""
        config = tuning_config if apply_map_to_tuning_buckets else TuningConfig()
        key: tuple[Any, ...] = self._tuner._get_cache_key(custom_op, runner, input_shapes, config)
        return key

    def get_specific_custom_op(self, custom_op: str) -> dict[Any, Any]:
        """What is known of one operation."""
        return {key: value for key, value in self.items() if key[0] == custom_op}

    def fallback_entry(self) -> tuple[int, int, float]:
        """What serves where nothing is known."""
        return 0, -1, float("inf")

    def save_cache(self, file_path: str | os.PathLike[str], rank: int = 0) -> None:
        """Write what is known to a file as TensorRT-LLM's, beside what other ranks have there."""
        path = Path(file_path)
        data: dict[str, Any] = {"metadata": {"creation_timestamp": time.time(), "lib_version": "moestro"}}
        with contextlib.suppress(OSError, ValueError):
            data = json.loads(path.read_text(encoding="utf-8"))
        data[f"rank_{rank}"] = {
            str(key): {"runner_id": index, "tactic": repr(tactic), "min_time": milliseconds}
            for key, (index, tactic, milliseconds) in self.items()
        }
        write_text_atomically(path.absolute(), json.dumps(data, indent=2))

    def load_cache(self, file_path: str | os.PathLike[str], rank: int = 0) -> None:
        """Serve what a file has for a rank, before everything else. What is no literal there is left out, with a
        warning. "x.rank1.json", as older versions call a rank's own file, is rank 1 of x.json where there is no such
        file. Raises FileNotFoundError, or TuningError for what is no such file.
        """
        older = RANK_FILE.fullmatch(os.fspath(file_path))
        if older is not None and not Path(file_path).exists():
            file_path, rank = f"{older['stem']}.json", int(older["rank"])
        try:
            entries = json.loads(Path(file_path).read_text(encoding="utf-8"))[f"rank_{rank}"].items()
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TuningError(
                f"{file_path} is not a cache of TensorRT-LLM for rank {rank}: {error!r}"
            ) from error
        for text, entry in entries:
            try:
                key, tactic = ast.literal_eval(text), ast.literal_eval(entry["tactic"])
                self.given[key] = (int(entry["runner_id"]), tactic, float(entry["min_time"]))
            except (ValueError, SyntaxError, KeyError, TypeError, RecursionError) as error:
                warnings.warn(
                    f"{file_path}: {text} cannot be read ({error}); not used", StoreWarning, stacklevel=2
                )


class AutoTuner(PeerTuner):
    """TensorRT-LLM's AutoTuner; see PeerTuner."""

    _measures = 2, 10, 1000

    def __init__(self, *measures: int, **ours: Any) -> None:
        super().__init__(*measures, **ours)
        self.mapping: Any = None
        self.profiling_cache: AutoTunerProfilingCache = AutoTunerProfilingCache(self)

    def choose_one(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As PeerTuner.choose_one."""
        if os.environ.get(IN_CHILDREN) == "1" and self.is_tuning_mode:
            _say_who_is_not_asked(kwargs["runners"] if "runners" in kwargs else args[1])
        return super().choose_one(*args, **kwargs)

    def print_profiling_cache(self) -> None:
        """Print what is known."""
        for key, value in self.profiling_cache.items():
            print(f"{key}: {value}")

    def setup_distributed_state(self, mapping: Any, *_: Any) -> None:
        """Remember this rank's place, for the files of autotune(cache_path=). Ranks decide together inside
        moestro.autotune(group=, strategy=).
        """
        self.mapping = mapping

    @property
    def rank(self) -> int:
        """This process's rank; 0 before setup_distributed_state."""
        return int(getattr(self.mapping, "rank", 0))

    # --- their names for parts -----------------------------------------------------------------------
    @staticmethod
    def _get_cache_key(
        custom_op: str,
        runner: Any,
        input_shapes: Sequence[Sequence[int]],
        tuning_config: TuningConfig,
        extras: tuple[Any, ...] = (),
    ) -> Any:
        profile = nearest_profile(input_shapes, tuning_config)
        return (custom_op, type(runner).__name__, str(_unique_id(runner)), profile)

    def _seeded_hit(
        self,
        op: str,
        runners: Sequence[Any],
        shapes: Sequence[Sequence[int]],
        config: TuningConfig,
        inputs: Sequence[Any] | None,
    ) -> tuple[bool, int, Any, Any] | None:
        for index, runner in enumerate(runners):
            entry = self.profiling_cache.given.get(self._get_cache_key(op, runner, shapes, config))
            if entry is not None:
                return True, index, entry[1], None
        return None

    def _optimization_profiles(
        self, tuning_config: TuningConfig, inputs: Sequence[Any]
    ) -> list[OptimizationProfile]:
        return optimization_profiles(tuning_config, inputs, with_size=True)

    def _decided(self) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for book in self._known.books():
            for record in book.everything():
                index = book.key.runners.index(record.runner)
                identity = book.key.fields["runners"][index]
                names = tuple(identity["config"].values())
                won = record.evidence.of(record.runner, record.tactic)
                milliseconds = won.median * 1e3 if won is not None and won.median else float("inf")
                profile = _profile_of(book.key.fields["inputs"], record.bucket)
                found[book.key.op, identity["class"].rpartition(".")[2], str(names), profile] = (
                    index,
                    record.tactic,
                    milliseconds,
                )
        return found


def _say_who_is_not_asked(runners: Sequence[Any]) -> None:
    """Name each class, once, whose own should_profile_tactic_in_subprocess is not asked."""
    base = TunableRunner.should_profile_tactic_in_subprocess
    for cls in map(type, runners):
        name = f"{cls.__module__}.{cls.__qualname__}"
        if getattr(cls, "should_profile_tactic_in_subprocess", base) is not base and name not in _said:
            _said.add(name)
            warnings.warn(
                f"{name}.should_profile_tactic_in_subprocess is not asked ({IN_CHILDREN}=1): give "
                "MeasurementPolicy(isolate=True), which runs every tactic in a child process first",
                TuningWarning,
                stacklevel=3,
            )


def _unique_id(runner: Any) -> Any:
    own: Callable[[], Any] | None = getattr(runner, "unique_id", None)
    return own() if own is not None else tuple(vars(runner).values())


def _profile_of(inputs: Sequence[Any], bucket: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    sizes = iter(bucket)
    shapes = []
    for described in inputs:
        shape = described.get("shape", [0])
        one = bucket[0] if len(bucket) == 1 else None
        shapes.append(tuple((one or next(sizes, -1)) if size is None else size for size in shape))
    return tuple(shapes)


@contextlib.contextmanager
def autotune(
    tune_mode: bool = True,
    cache_path: str | None = None,
    rank: int | None = None,
    skip_dynamic_tuning_buckets: bool = False,
    **ours: Any,
) -> Iterator[None]:
    """TensorRT-LLM's autotune for AutoTuner.get(). skip_dynamic_tuning_buckets: only the sizes that calls have
    are tuned, not the buckets below them. ours: what moestro.autotune takes besides (budget_s, policy, group).
    """
    tuner = AutoTuner.get()
    assert isinstance(tuner, AutoTuner)
    here = tuner.rank if rank is None else rank
    store = store_beside(cache_path)
    with tuner.autotune(tune_mode, store, only_sizes_seen=skip_dynamic_tuning_buckets or None, **ours):
        yield
    if cache_path is not None and tune_mode:
        tuner.profiling_cache.save_cache(cache_path, here)
