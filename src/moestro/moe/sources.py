"""The tensors that a layer's packed weights were made from, followed while they live: written in place, they count.

A layer has a copy of its own in a kernel layout. Without this, a write to the tensors it was made from would be seen by
a backend that runs them as they are and missed by one that packs them. Looked at are version counters, which torch
moves with every write of its own (copy_, mul_, an optimiser's step, load_state_dict); a write through `.data`, under
inference_mode, or by something else than torch moves none. Nothing is kept alive: references are weak.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

from moestro.errors import MoestroError
from moestro.formats.base import FormatTensor
from moestro.moe import flat
from moestro.moe.weights import ExpertWeights


class _Followed(NamedTuple):
    """One tensor: it, and the caller's own tensor that it is a view of; its version, None where torch counts none."""

    references: tuple[weakref.ref[torch.Tensor], ...]
    version: int | None

    def tensor(self) -> torch.Tensor | None:
        return next((t for reference in self.references if (t := reference()) is not None), None)


class Sources:
    """What `w` consists of, for a layer whose weights are `packed` from it."""

    def __init__(self, w: ExpertWeights, packed: ExpertWeights) -> None:
        self._spec = w.spec
        self._all = [_follow(tensor, w) for tensor in w.tensors]
        pieces = {id(t) for part in (w.gate_up, w.down) for t in _tensors(part)}
        shared = {id(t) for t in packed.tensors} - pieces  # biases that the layer has itself
        self._at = [i for i, t in enumerate(w.tensors) if id(t) not in shared]
        self._copied = [self._all[i] for i in self._at]

    @classmethod
    def of(cls, w: ExpertWeights, packed: ExpertWeights) -> Sources | None:
        """None where there is nothing to follow: the layer runs `w` as it is."""
        return None if packed is w else cls(w, packed)

    @property
    def marks(self) -> tuple[tuple[weakref.ref[torch.Tensor], int], ...]:
        """(reference, version) of every copied tensor whose writes are counted: what a call looks at."""
        return tuple(
            (reference, followed.version)
            for followed in self._copied
            for reference in followed.references
            if followed.version is not None
        )

    def changed(self) -> bool:
        """Whether a copied tensor that lives was written since."""
        return any(
            (t := reference()) is not None and t._version != version for reference, version in self.marks
        )

    def again(self) -> ExpertWeights:
        """The weights as they are now. Raises MoestroError where a tensor is gone."""
        tensors = [followed.tensor() for followed in self._all]
        there = [t.detach() for t in tensors if t is not None]
        if len(there) != len(tensors):
            raise MoestroError(
                f"the layer's source tensors must be there to be packed again, and {len(tensors) - len(there)} of "
                f"{len(tensors)} are gone; make a new layer from the new weights"
            )
        made: ExpertWeights = flat.unflatten(there, self._spec)
        for i, tensor in enumerate(tensors):
            self._all[i] = self._all[i]._replace(version=None if tensor is None else _version(tensor))
        self._copied = [self._all[i] for i in self._at]
        return made


def _follow(tensor: torch.Tensor, w: ExpertWeights) -> _Followed:
    owners = [reference for reference in w.given if _is_whole(reference(), tensor)]
    return _Followed((weakref.ref(tensor), *owners), _version(tensor))


def _is_whole(given: torch.Tensor | None, tensor: torch.Tensor) -> bool:
    """Whether `tensor` is the caller's tensor seen again, with its memory and its version counter."""
    if given is None or given.is_meta or given is tensor:
        return False
    same = given.data_ptr() == tensor.data_ptr() and given.dtype == tensor.dtype
    return same and given.shape == tensor.shape and given.stride() == tensor.stride()


def _tensors(part: FormatTensor) -> tuple[torch.Tensor, ...]:
    return tuple(getattr(part, "pieces", ()))


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
