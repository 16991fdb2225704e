"""Decisions made on other probes that a configuration accepts: they serve beside its own, and are not made again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tuning_fakes import Kernel, config, inputs, quiet_clock, tuner

from moestro.tuning import Probe, TuningConfig

OLD, NEW = ("uniform", "zipf(1.0)"), ("uniform", "zipf(1.0)", "trained")
TIMES = {-1: 3e-3, 0: 1e-3, 1: 2e-3}


def probes(names: tuple[str, ...]) -> tuple[Probe, ...]:
    return tuple(Probe(name, lambda inputs, profile, seed: list(inputs)) for name in names)


class Setting:
    """A tuner on a store, and the configuration as it was before and as it is now."""

    def __init__(self, store: Path, sizes: tuple[int, ...] = (8, 64)) -> None:
        self.clock = quiet_clock()
        self.kernel = Kernel(self.clock, TIMES)
        self.tuner = tuner(self.clock, store, verify=False)
        self.before: TuningConfig = replace(config(sizes), probes=probes(OLD))
        self.now: TuningConfig = replace(config(sizes), probes=probes(NEW), accepts=(OLD,))

    def tune(self, cfg: TuningConfig, size: int, **options: Any) -> int:
        """Runs of the kernel that a tuning took."""
        runs = self.clock.runs
        with self.tuner.autotune(True, **options):
            self.tuner.choose_one("op", [self.kernel], cfg, inputs(size))
        return self.clock.runs - runs

    def decision(self, cfg: TuningConfig, size: int) -> Any:
        return self.tuner.decision("op", [self.kernel], cfg, inputs(size))


def test_what_was_decided_on_accepted_probes_serves_and_is_not_measured_again(tmp_path: Path) -> None:
    first = Setting(tmp_path)
    first.tune(first.before, 64)
    later = Setting(tmp_path)
    assert later.decision(later.now, 64).tactic == 0
    assert later.decision(later.now, 64).record.probes == OLD
    assert later.tune(later.now, 64) == 0, "nothing is left to decide"
    assert later.tune(replace(later.now, accepts=()), 64) > 0, "unless it is not accepted"


def test_new_sizes_are_decided_on_all_probes_and_the_old_ones_go_on_serving(tmp_path: Path) -> None:
    first = Setting(tmp_path, (8,))
    first.tune(first.before, 8)
    later = Setting(tmp_path, (8, 64))
    assert later.tune(later.now, 64) > 0
    assert later.decision(later.now, 64).record.probes == NEW
    assert later.decision(later.now, 8).record.probes == OLD, "beside the new one"
    again = Setting(tmp_path, (8, 64))
    assert [again.decision(again.now, size).record.probes for size in (8, 64)] == [OLD, NEW]
    assert again.tune(again.now, 64) == 0


def test_probes_that_are_asked_for_are_measured(tmp_path: Path) -> None:
    first = Setting(tmp_path)
    first.tune(first.before, 64)
    later = Setting(tmp_path)
    assert later.tune(later.now, 64, probes=probes(NEW)) > 0
    assert later.decision(later.now, 64).record.probes == NEW, "its own come first from then on"


@pytest.mark.parametrize("accepts", [(), (("other",),)])
def test_what_is_not_accepted_still_serves_where_there_is_nothing_else(
    tmp_path: Path, accepts: tuple[tuple[str, ...], ...]
) -> None:
    first = Setting(tmp_path)
    first.tune(first.before, 64)
    later = Setting(tmp_path)
    assert later.decision(replace(later.now, accepts=accepts), 64).tactic == 0


def test_a_third_probe_costs_a_round_half_as_much_again_and_keeps_the_budget(tmp_path: Path) -> None:
    def spent(names: tuple[str, ...], budget: float | None) -> float:
        clock = quiet_clock(noise=0.02)
        kernel = Kernel(clock, {-1: 1.3e-3, **{i: 1e-3 * (1 + 0.02 * i) for i in range(12)}})
        t, cfg = tuner(clock), replace(config((64, 1024)), probes=probes(names))
        with t.autotune(True, budget_s=budget):
            t.choose_one("op", [kernel], cfg, inputs(1024))
        found = t.decision("op", [kernel], cfg, inputs(1024))
        assert found is not None
        assert found.tactic == 0
        assert found.record.probes == names
        assert set(found.evidence.of(found.record.runner, 0).probes) == set(names), "a ratio for each"  # type: ignore[union-attr]
        return clock.now

    assert spent(NEW, None) < 2.2 * spent(OLD, None)
    assert spent(NEW, 0.5) < 0.55
