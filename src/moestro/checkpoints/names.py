"""The tensors of one layer's experts, sorted out by name: which expert, which projection, which piece.

Everything below the layer's prefix has a place here, or is an error: nothing is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moestro.errors import FormatError

# The names of an expert's projections, in the order gate, up, down; without a gate; or gate and up in one.
NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("gate_up_proj", "down_proj"),
    ("up_proj", "down_proj"),
)
STACKED_NAMES = (("gate_up_proj", "down_proj"), ("up_proj", "down_proj"))


@dataclass(frozen=True)
class Names:
    """Where the pieces of a layer's experts are."""

    prefix: str
    projections: tuple[str, ...]
    stacked: bool
    count: int  # experts; 0 where they are stacked, which their tensors' shapes say
    # by projection, or (expert, projection): suffix -> the tensor's name
    pieces: dict[str | tuple[int, str], dict[str, str]]


def names_under(tensors: Mapping[str, torch.Tensor], prefix: str) -> list[str]:
    """The names of tensors below a prefix."""
    if under := getattr(tensors, "under", None):
        return list(under(prefix))
    return [name for name in tensors if name.startswith(f"{prefix}.")]


def sort_out(tensors: Mapping[str, torch.Tensor], prefix: str) -> Names:
    """The experts under `prefix`.

    Raises FormatError where there are none, and names what is missing, or has no place.
    """
    rest = {name: name.removeprefix(f"{prefix}.").split(".") for name in names_under(tensors, prefix)}
    if not rest:
        near = _nearest(tensors, prefix)
        raise FormatError(
            f"prefix must lead to experts ({prefix}.0.gate_proj.weight, ...), got {prefix!r}{near}"
        )
    if any(parts[0].isdigit() for parts in rest.values()):
        return _modules(tensors, prefix, rest)
    return _stacked(prefix, rest)


def _modules(tensors: Mapping[str, torch.Tensor], prefix: str, rest: dict[str, list[str]]) -> Names:
    found: dict[int, dict[str, dict[str, str]]] = {}
    for name, parts in rest.items():
        if len(parts) != 3 or not parts[0].isdigit():
            raise FormatError(f"{name} has no place among the experts of {prefix} (expert.projection.tensor)")
        here = found.setdefault(int(parts[0]), {}).setdefault(parts[1], {})
        if (other := here.setdefault(parts[2], name)) != name:
            raise FormatError(f"{name} has no place: {other} is the same expert's")
    some = set.union(*(set(projections) for projections in found.values()))
    projections = next((names for names in NAMES if set(names) == some), None)
    if projections is None:
        name = next(iter(rest))
        raise FormatError(f"{_unknown_projections(prefix, some)} ({name} is {tensors[name].dtype})")
    count = max(found) + 1
    if missing := [e for e in range(count) if e not in found]:
        raise FormatError(
            f"{prefix}.{missing[0]} is missing: {prefix} must have the experts 0 to {count - 1}, "
            f"got none of {', '.join(map(str, missing[:8]))}"
        )
    for e in range(count):
        for projection in projections:
            if projection not in found[e]:
                raise FormatError(f"{prefix}.{e}.{projection} is missing: the other experts have one")
    pieces: dict[str | tuple[int, str], dict[str, str]] = {
        (e, projection): found[e][projection] for e in range(count) for projection in projections
    }
    _check_alike(prefix, projections, count, pieces)
    return Names(prefix, projections, False, count, pieces)


def _check_alike(
    prefix: str,
    projections: tuple[str, ...],
    count: int,
    pieces: dict[str | tuple[int, str], dict[str, str]],
) -> None:
    """Every expert's projection has the tensors that most have."""
    for projection in projections:
        sets = [frozenset(pieces[e, projection]) for e in range(count)]
        usual = max(set(sets), key=sets.count)
        for e, here in enumerate(sets):
            where = f"{prefix}.{e}.{projection}"
            if lost := sorted(usual - here):
                raise FormatError(
                    f"{where}.{lost[0]} is missing: the same projection of other experts has one"
                )
            if extra := sorted(here - usual):
                raise FormatError(
                    f"{where}.{extra[0]} is there, but the same projection of other experts has none"
                )


def _stacked(prefix: str, rest: dict[str, list[str]]) -> Names:
    some = {".".join(parts) for parts in rest.values()}
    gated = any(name.startswith("gate_up_proj") for name in some)
    projections = STACKED_NAMES[0] if gated else STACKED_NAMES[1]
    pieces: dict[str | tuple[int, str], dict[str, str]] = {projection: {} for projection in projections}
    for name, parts in rest.items():
        text = ".".join(parts)
        projection = next(
            (p for p in projections if text == p or text[: len(p) + 1] in (f"{p}_", f"{p}.")), None
        )
        if projection is None:
            raise FormatError(f"{name} has no place among the stacked experts of {prefix}")
        suffix = text[len(projection) + 1 :]
        pieces[projection]["" if suffix == "weight" else suffix] = name
    for projection in projections:
        if not pieces[projection]:
            raise FormatError(f"{prefix}.{projection} is missing; there is {', '.join(sorted(some))}")
    return Names(prefix, projections, True, 0, pieces)


def _unknown_projections(prefix: str, some: set[str]) -> str:
    for names in NAMES:
        if set(names) < some and not any(set(names) < set(other) <= some for other in NAMES):
            extra = sorted(some - set(names))
            return f"{prefix}.N.{extra[0]} has no place beside {', '.join(names)}"
    lost = [sorted(set(names) - some) for names in NAMES if set(names) & some]
    hint = f"; {prefix}.N.{lost[0][0]} is missing" if lost and lost[0] else ""
    return f"the experts of {prefix} have the projections {', '.join(sorted(some))}, which moestro does not know{hint}"


def _nearest(tensors: Mapping[str, torch.Tensor], prefix: str) -> str:
    found = sorted({name.partition(".experts.")[0] + ".experts" for name in tensors if ".experts." in name})
    return f"; there are experts under {', '.join(found[:3])}" if found else ""
