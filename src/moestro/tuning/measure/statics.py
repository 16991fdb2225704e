"""What a candidate must not write: the weights, whoever holds them. Found out, and put back.

Watched are the static inputs, the tensors in keyword arguments, and those that a runner has as attributes, at any
depth. They are compared with a copy; what does not fit into a quarter of the free memory is told by a checksum,
and cannot be put back.

Some of what a runner holds is meant to be written: what the default tactic writes, results, and workspaces. An
attribute is a workspace if its name says so; a one-dimensional tensor of bytes, as kernels take them for scratch,
is one if the default tactic gives the same whatever a candidate left in it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moestro import machine
from moestro.errors import TuningError
from moestro.tuning.measure.bits import bits, overwrite, place_of, same_bits
from moestro.tuning.measure.leaves import tensors_in
from moestro.tuning.spec.keys import is_torch

__all__ = ["Statics", "Watched"]

SHARE = 0.25  # of the free memory that copies may take
CHUNK = 1 << 23  # items of a checksum at a time
SCRATCH = re.compile(
    r"(^|[._\[\]'])(workspace|scratch|buffer|cache|tmp|temp|semaphores?|counters?)s?($|[._\[\]'])"
)


class Watched:
    """One tensor and what is in it."""

    def __init__(self, where: str, tensor: Any, keep: bool) -> None:
        self.where, self.tensor = where, tensor
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
        if self.copy is not None:
            return not same_bits(self.tensor, self.copy)
        return _checksum(self.tensor) != self.checksum

    def restore(self) -> None:
        """Put back what was in it. Raises TuningError where no copy could be kept."""
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
