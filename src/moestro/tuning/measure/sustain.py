"""The load before a race of long calls, and what the device's clock did meanwhile.

A GPU falls from its boost clock after seconds of load (an H100 from 1980 to 1400 MHz), and what won before need
not win after. From 1024 rows on, on a timer that says that its device slows down so (`sustains`), the default is
run for `MeasurementPolicy.sustained_s` before the race, within LOADING of the bucket's time. A timer's
`conditions()` is read before the load, after it and after the race, and goes into the evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moestro.tuning.measure.candidates import Trial

__all__ = ["FROM_SIZE", "load", "merged", "read_conditions", "together"]

FROM_SIZE = 1024
LOADING = 0.25  # of a bucket's time: the rest is for the checks and the race


def load(trial: Trial, default: Sequence[Callable[[], float]]) -> None:
    """Run the default's samplers, in turn, until the device has been loaded as the policy says."""
    job = trial.job
    read_conditions(trial)
    wanted = job.policy.sustained_s
    if not wanted or not getattr(job.timer, "sustains", False) or max(trial.bucket, default=0) < FROM_SIZE:
        return
    start, most = job.budget.spent, min(wanted, LOADING * trial.time)
    loaded = 0.0
    while loaded < most and not trial.late:
        for sampler in default:
            seconds = sampler()
            job.budget.sampled(seconds if math.isfinite(seconds) and seconds > 0 else 0.0)
        loaded = job.budget.spent - start
    trial.loaded_s = loaded
    read_conditions(trial)


def read_conditions(trial: Trial) -> None:
    """Note what the timer says of its device now, if it says anything."""
    hook = getattr(trial.job.timer, "conditions", None)
    found = hook() if callable(hook) else None
    if found:
        trial.conditions.append(found)


def together(trial: Trial) -> dict[str, Any]:
    """The trial's readings as evidence keeps them, and the seconds of load before."""
    found = merged(trial.conditions)
    if trial.loaded_s:
        found["loaded_s"] = round(trial.loaded_s, 3)
    return found


def merged(readings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several readings in one: numbers as [least, most], lists as all that was in one."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for reading in readings for name in reading):
        values = [v for reading in readings if (v := reading.get(name)) is not None]
        if values and all(isinstance(v, int | float) for v in values):
            found[name] = [min(values), max(values)]
        elif values and all(isinstance(v, list | tuple) for v in values):
            found[name] = sorted({str(one) for v in values for one in v})
        else:
            found[name] = values[-1] if values else None
    return found
