"""Which candidates of a bucket may be timed: they give what the default gives, and write nothing that is not theirs.

What an output must be: check.py. What a candidate must not write are the weights, whoever holds them: the static
inputs, the tensors in keyword arguments, and those that a runner has as attributes, at any depth. They are compared
with a copy and put back; what does not fit into a quarter of the free memory is told by a checksum, and cannot be
put back. They are looked at when a candidate differs and after the last one, not after each: they can be gigabytes.
If something has been written by then, all who may have done it are run again, each alone.

Some of what a runner holds is meant to be written: what the default tactic writes, results, and workspaces. An
attribute is a workspace if its name says so; a one-dimensional tensor of bytes, as kernels take them for scratch,
is one if the default tactic gives the same whatever a candidate left in it.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moestro import machine
from moestro.errors import TuningError
from moestro.tuning.measure.bits import bits, overwrite, place_of, same_bits
from moestro.tuning.measure.check import Reference
from moestro.tuning.measure.leaves import tensors_in
from moestro.tuning.measure.request import Candidate, Job, UnfitError, is_out_of_memory
from moestro.tuning.spec.keys import is_torch
from moestro.tuning.spec.specs import OptimizationProfile

__all__ = ["Statics", "Verification", "Watched", "statics_of"]

SHARE = 0.25  # of the free memory that copies may take
CHUNK = 1 << 23  # items of a checksum at a time
SCRATCH = re.compile(
    r"(^|[._\[\]'])(workspace|scratch|buffer|cache|tmp|temp|semaphores?|counters?)s?($|[._\[\]'])"
)


class Watched:
    """One tensor and what is in it."""

    def __init__(self, where: str, tensor: Any, keep: bool) -> None:
        self.where, self.tensor = where, tensor
        self.memory = tensor.detach()  # the same memory, where the tensor itself is resized or given another
        self.copy = tensor.detach().clone() if keep else None
        self.checksum = None if keep else _checksum(tensor)

    @property
    def input(self) -> int | None:
        """Which input it is."""
        return int(self.where.removeprefix("input ")) if self.where.startswith("input ") else None

    @property
    def from_caller(self) -> bool:
        """Whether the caller passed it, rather than a runner holding it."""
        return self.where.startswith(("input ", "argument "))

    @property
    def changed(self) -> bool:
        if self._moved:
            return True
        if self.copy is not None:
            return not same_bits(self.tensor, self.copy)
        return _checksum(self.tensor) != self.checksum

    @property
    def _moved(self) -> bool:
        """Whether it is another piece of memory, or seen otherwise, than it was."""
        return self.tensor.dtype != self.memory.dtype or place_of(self.tensor) != place_of(self.memory)

    def restore(self) -> None:
        """Put back where it was and what was in it. Raises TuningError where no copy could be kept."""
        if self._moved:
            self.tensor.data = self.memory
        if self.copy is None:
            raise TuningError(
                f"{self.where} was overwritten by a candidate and is too large to have been copied: load it again"
            )
        overwrite(self.tensor, self.copy)

    @property
    def may_be_scratch(self) -> bool:
        """Whether it looks like a workspace: one dimension of bytes."""
        return (
            self.tensor.dim() == 1 and self.tensor.dtype.itemsize == 1 and not self.tensor.is_floating_point()
        )


class Statics:
    """The tensors that are watched while candidates of one operation are tried."""

    def __init__(
        self, inputs: Sequence[Any], static: Iterable[int], kwargs: Mapping[str, Any], runners: Sequence[Any]
    ) -> None:
        """static: which inputs never change with the size."""
        named = [(f"input {i}", inputs[i]) for i in static if is_torch(inputs[i])]
        named += [(f"argument {path}", tensor) for path, tensor in tensors_in(dict(kwargs))]
        for runner in runners:
            name = type(runner).__qualname__
            named += [(f"{name}{p}", t) for p, t in tensors_in(_Attributes(runner)) if not SCRATCH.search(p)]
        once = {place_of(t): (where, t) for where, t in reversed(named) if _can_be_watched(t)}
        self.watched = _copied(list(once.values()))
        self.outputs: set[int] = set()  # inputs of static size that the operation writes its result into
        self._released: list[Watched] = []

    def changed(self) -> list[Watched]:
        """Those that hold something else than they did."""
        return [one for one in self.watched if one.changed]

    def accept(self) -> None:
        """Preparation has run: what a runner has made of its own tensors is what is to stay."""
        for one in self.changed():
            if one.from_caller:
                one.restore()
            else:
                self.watched[self.watched.index(one)] = Watched(one.where, one.tensor, one.copy is not None)

    def release(self, which: Iterable[Watched]) -> None:
        """These are meant to be written. Those that the caller gave are put back at the end (`put_back`)."""
        gone = set(map(id, which))
        self._released += [one for one in self.watched if id(one) in gone and one.from_caller]
        self.watched = [one for one in self.watched if id(one) not in gone]

    def release_places(self, tensors: Iterable[Any]) -> None:
        """The memory of these tensors is meant to be written: the operation's outputs."""
        places = {place_of(t) for t in tensors}
        self.release([one for one in self.watched if place_of(one.tensor) in places])

    def put_back(self) -> None:
        """The caller's tensors that the operation writes, as they were before it was tuned."""
        for one in self._released:
            if one.copy is not None and one.changed:
                one.restore()

    def take_outputs(self) -> set[int]:
        """Static inputs that have changed, to be looked at as outputs from now on; they are put back."""
        found = [one for one in self.changed() if one.input is not None and not one.may_be_scratch]
        for one in found:
            one.restore()
        self.outputs |= {one.input for one in found if one.input is not None}
        self.release(found)
        return self.outputs

    def restore(self, still_right: Callable[[], bool] = lambda: False) -> list[str]:
        """Put back what has changed; the names of what must not have. still_right(): whether the default tactic
        gives what it gave, as things are; asked where only workspaces seem to have been written.
        """
        changed = self.changed()
        if changed and all(one.may_be_scratch for one in changed) and still_right():
            self.release(changed)
            return []
        for one in changed:
            one.restore()
        return [one.where for one in changed]


class _Attributes:
    """A runner's attributes, to be walked: the runner itself may define how it is iterated."""

    def __init__(self, runner: Any) -> None:
        self.__dict__.update(getattr(runner, "__dict__", {}))
        for cls in type(runner).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(runner, name) and not name.startswith("__"):
                    self.__dict__[name] = getattr(runner, name)


def _can_be_watched(tensor: Any) -> bool:
    import torch

    return (
        is_torch(tensor)
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and not tensor.is_quantized
        and tensor.numel() > 0
        and type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    )


def _copied(named: Sequence[tuple[str, Any]]) -> list[Watched]:
    """The tensors with copies, the small ones first, as far as memory allows."""
    room: dict[str, float] = {}
    watched, large = [], []
    for where, tensor in sorted(named, key=lambda one: one[1].nbytes):
        device = str(tensor.device)
        left = room.setdefault(device, SHARE * _free_bytes(tensor.device))
        keep = tensor.nbytes <= left
        room[device] = left - tensor.nbytes * keep
        large += [] if keep else [where]
        watched.append(Watched(where, tensor, keep))
    if large:
        warnings.warn(
            f"no copy of {', '.join(large)} is kept while tuning (memory): a candidate that overwrites it is "
            "found out, but cannot be undone",
            ResourceWarning,
            stacklevel=2,
        )
    return watched


def _free_bytes(device: Any) -> float:
    if device.type == "cuda":
        import torch

        return float(torch.cuda.mem_get_info(device)[0])
    memory = machine.memory()
    return float(memory.available if memory is not None else 1 << 30)


def _checksum(tensor: Any) -> tuple[int, ...]:
    """Sums of the bits and of the bits weighted by where they are, with 64-bit overflow."""
    import torch

    flat = bits(tensor).reshape(-1)
    plain, placed = 0, 0
    for at, chunk in enumerate(flat.split(CHUNK)):
        wide = chunk.to(torch.int64)
        weights = torch.arange(1, 2 * len(wide), 2, dtype=torch.int64, device=wide.device) * 0x9E3779B1
        plain += int(wide.sum()) * (2 * at + 1)
        placed += int((wide * weights).sum()) * (2 * at + 1)
    return plain, placed


def statics_of(job: Job, profile: OptimizationProfile) -> Statics:
    """The weights and what else a job's candidates must not write, as they were before anything ran."""
    if job.statics is None:
        static = [i for i in range(len(job.inputs)) if not profile.is_dynamic(i)]
        job.statics = Statics(job.inputs, static, job.kwargs, job.runners)
    return job.statics  # type: ignore[no-any-return]


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
        self.statics: Statics = statics_of(job, profile)
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
