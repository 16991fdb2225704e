"""Which candidates of a bucket may be timed: they give what the default gives, and write nothing that is not theirs.

The weights are looked at when a candidate differs and after the last one, not after each: they can be gigabytes.
If something has been written by then, all who may have done it are run again, each alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moestro.tuning.measure.check import Reference
from moestro.tuning.measure.request import Candidate, Job, UnfitError, is_out_of_memory
from moestro.tuning.measure.statics import Statics
from moestro.tuning.spec.specs import OptimizationProfile

__all__ = ["Verification"]


class Verification:
    """The checks at one bucket. inputs: one list a probe; before: for each the dynamic ones as they were before
    anything ran.
    """

    def __init__(
        self,
        job: Job,
        profile: OptimizationProfile,
        inputs: Sequence[Sequence[Any]],
        before: Sequence[Mapping[int, Any]],
        late: Callable[[], bool],
    ) -> None:
        self.job, self.profile, self.inputs, self.before, self.late = job, profile, inputs, before, late
        self.statics: Statics = job.watched(profile)
        self.reference: Candidate | None = None
        self._references: list[Reference] = []

    def sound(
        self,
        candidates: Sequence[Candidate],
        skip: Callable[[Candidate, int], bool],
        fail: Callable[[Candidate, Exception], None],
    ) -> list[Candidate]:
        """Those that are fit, the reference first. skip(candidate, how many are sound): leave it out; fail: told
        of those that are not.
        """
        sound: list[Candidate] = []
        for candidate in candidates:
            if skip(candidate, len(sound)):
                continue
            error = self._error(candidate)
            if error is None:
                sound.append(candidate)
            elif self.written():
                sound = self.alone([*sound, candidate], fail)
            else:
                fail(candidate, error)
        return self.alone(sound, fail) if self.written() else sound

    def written(self) -> list[str]:
        """What was written and must not have been; it is put back."""
        return self.statics.restore(lambda: all(r.still_right() for r in self._references))

    def alone(
        self, candidates: Sequence[Candidate], fail: Callable[[Candidate, Exception], None]
    ) -> list[Candidate]:
        """Those that are fit, each run alone, with a look at the weights after it."""
        left = []
        for candidate in candidates:
            error = self._error(candidate)
            if candidate is not self.reference and (names := self.written()):
                error = UnfitError(f"changes {', '.join(names)}, which it may only read")
            if error is None:
                left.append(candidate)
            else:
                fail(candidate, error)
        return left

    @property
    def reference_runs(self) -> int:
        """How often the reference has run so far, for all probes."""
        return sum(reference.runs for reference in self._references)

    # --- one candidate -----------------------------------------------------------------------------------
    def _error(self, candidate: Candidate) -> Exception | None:
        """Run it on every probe: what is wrong, or None. The first one that runs becomes the reference."""
        if candidate is self.reference:
            return None
        # The default may fail once by accident (a device that is busy), and everything is held against it.
        for attempt in range(2 if candidate.is_default else 1):
            try:
                self._look_at(candidate)
            except Exception as error:
                if attempt == 1 or not candidate.is_default or is_out_of_memory(error):
                    return error
            else:
                return None
        return None

    def _look_at(self, candidate: Candidate) -> None:
        if self.reference is None:
            self._references = [
                self._reference_of(candidate, inputs, before)
                for inputs, before in zip(self.inputs, self.before, strict=True)
            ]
            self.reference = candidate
            self.statics.release_places(t for r in self._references for t in r.written)
            self.statics.release(self.statics.changed())
            return
        for inputs, reference in zip(self.inputs, self._references, strict=True):
            run = functools.partial(self.job.run, candidate, inputs)
            why = reference.why_wrong(run, lambda: not self.statics.changed())
            if why is not None:
                raise UnfitError(why)

    def _reference_of(
        self, candidate: Candidate, inputs: Sequence[Any], before: Mapping[int, Any]
    ) -> Reference:
        dynamic = [i for i in range(len(inputs)) if self.profile.is_dynamic(i)]
        hook = getattr(self.job.runners[candidate.index], "tolerance", None)
        make = functools.partial(
            Reference,
            functools.partial(self.job.run, candidate, inputs),
            inputs,
            tolerance=functools.partial(hook, inputs) if callable(hook) else None,
            kwargs=self.job.kwargs,
            before=before,
            hurry=self.late,
        )
        reference = make(written=[*dynamic, *sorted(self.statics.outputs)])
        # It returns nothing and changes no dynamic input: its output is an input that never changes its size.
        unseen = not reference.returns and not reference.outputs_changed
        if unseen and (found := self.statics.take_outputs()):
            reference = make(written=[*dynamic, *sorted(found)])
        return reference
