"""What a process has tuned, counted: FlashInfer's and TensorRT-LLM's AutoTunerStatistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.spec.plain_json import digest
from moestro.tuning.spec.runner import tactic_key
from moestro.tuning.spec.specs import Sizes
from moestro.tuning.spec.tactic_list import class_name
from moestro.tuning.store.records import Record

__all__ = ["Statistics"]

KEPT = 4096  # entries of a collection: what would grow without end is counted on, but not listed


@dataclass
class Statistics:
    """Counted by operation. A call that found no decision counts once for its sizes, not each time."""

    cache_misses: int = 0
    cache_miss_config_collection: dict[str, set[Sizes]] = field(default_factory=dict)
    failed_profiling_count: dict[str, set[tuple[str, Sizes]]] = field(default_factory=dict)
    tuned_op_total_configs: dict[str, int] = field(default_factory=dict)  # buckets that were tried
    tuned_op_successful_configs: dict[str, int] = field(default_factory=dict)  # buckets with a decision
    tuned_op_time_cost: dict[str, float] = field(default_factory=dict)  # seconds
    failed_tactics: dict[str, set[Any]] = field(default_factory=dict)  # "op::Runner" -> tactics

    def missed(self, op: str, sizes: Sizes) -> None:
        """A call has found no decision."""
        known = self.cache_miss_config_collection.setdefault(op, set())
        if sizes not in known:
            self.cache_misses += 1
            if len(known) < KEPT:
                known.add(sizes)

    def kept(self, key: StaticKey, record: Record) -> None:
        """A bucket has been decided. One that is only marked as covering larger sizes was counted before."""
        if record.tuned_for:
            return
        op = key.op
        self.tuned_op_total_configs[op] = self.tuned_op_total_configs.get(op, 0) + 1
        if any(c.samples for c in record.evidence.candidates):
            self.tuned_op_successful_configs[op] = self.tuned_op_successful_configs.get(op, 0) + 1
        self.tuned_op_time_cost[op] = self.tuned_op_time_cost.get(op, 0.0) + record.evidence.seconds
        for c in record.evidence.candidates:
            if c.fate in {"failed", "quarantined"}:
                failed = self.failed_profiling_count.setdefault(op, set())
                name = f"{class_name(c.runner)} {c.tactic!r}"
                if len(failed) < KEPT:
                    failed.add((name, record.bucket))
                self.failed_tactics.setdefault(f"{op}::{class_name(c.runner)}", set()).add(
                    _hashable(c.tactic)
                )

    def __str__(self) -> str:
        lines = [f"Cache misses: {self.cache_misses}"]
        for op, sizes in sorted(self.cache_miss_config_collection.items()):
            lines.append(f"  {op}: sizes {', '.join(map(str, sorted(sizes)[:16]))}")
        for op, total in sorted(self.tuned_op_total_configs.items()):
            done = self.tuned_op_successful_configs.get(op, 0)
            seconds = self.tuned_op_time_cost.get(op, 0.0)
            lines.append(f"  {op}: {done} of {total} buckets measured in {seconds:.2f} s")
            lines += [
                f"    failed: {name} at {at}" for name, at in sorted(self.failed_profiling_count.get(op, ()))
            ]
        return "\n".join(lines)


def _hashable(tactic: Any) -> Any:
    if isinstance(tactic, list | tuple):
        return tuple(map(_hashable, tactic))
    try:
        hash(tactic)
    except TypeError:
        return digest(tactic_key(tactic, None))
    return tactic
