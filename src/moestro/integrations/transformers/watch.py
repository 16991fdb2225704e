"""Whether a module's weights are still those that its layer was made from.

Looked at in every call: each parameter's address and version (a write through torch moves the version), and on
CPUs one value of every expert in every tensor, for what moves no version: writes through `.data` (weight sync of
trainers, PEFT's merge), an adapter that is switched on or off, memory that was freed and given to another tensor.
Not seen: a `.data` write that leaves all the looked-at values as they were; on a GPU any `.data` write (reading a
value would wait for the device); that a module has been given another activation or limit. `refresh` drops the
layers; see docs/checkpoints.md for the cost of the look.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

LEAST = 16  # values looked at in a tensor, whatever the number of experts
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
STEP = 0.6180339887  # of an expert's values: a place in the middle of each, another one in each


class Watch:
    """What the weights were when a layer was made."""

    __slots__ = ("_places", "_samples", "_stamps")

    def __init__(self, module: Any, names: list[str]) -> None:
        tensors = list(_sources(module, names))
        self._stamps = _stamps(module)
        self._places = [_places(tensor) for tensor in tensors]
        self._samples = [
            None if at is None else _sample(t, at) for t, at in zip(tensors, self._places, strict=True)
        ]

    def same(self, module: Any, names: list[str]) -> bool:
        """Whether the module's weights are still what they were."""
        if self._stamps != _stamps(module):
            return False
        tensors = list(_sources(module, names))
        if len(tensors) != len(self._places):
            return False
        for tensor, at, sample in zip(tensors, self._places, self._samples, strict=True):
            if at is None or sample is None:
                continue
            if tensor.numel() <= at[-1] or not torch.equal(_sample(tensor, at), sample):
                return False
        return True


def _sources(module: Any, names: list[str]) -> Iterator[torch.Tensor]:
    """The tensors that the weights are made of: parameters, and what parametrisations hold."""
    parameters = module._parameters
    parametrised = module._modules.get("parametrizations")
    for name in names:
        if (own := parameters.get(name)) is not None:
            yield own
        elif parametrised is not None and name in parametrised:
            for part in parametrised[name].modules():
                yield from (p for p in part._parameters.values() if p is not None)
                yield from (b for b in part._buffers.values() if b is not None)
                yield from (v for v in vars(part).values() if isinstance(v, torch.Tensor))


def _stamps(module: Any) -> list[tuple[int, int]]:
    """(address, version) of the parameters; tensors made under inference_mode have no version.

    Putting a parametrisation on and off, as PEFT does around every call, moves the version without a write: on CPUs
    the values decide then.
    """
    parametrised = "parametrizations" in module._modules
    return [
        (p.data_ptr(), -1 if p.is_inference() or (parametrised and p.device.type == "cpu") else p._version)
        for p in module.parameters()
    ]


def _places(tensor: torch.Tensor) -> torch.Tensor | None:
    """Where to look, as flat places; None for a tensor that is not looked into."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return None
    count = min(tensor.numel(), max(LEAST, tensor.shape[0] if tensor.ndim > 1 else 1))
    share = tensor.numel() / count
    inside = torch.arange(1, count + 1, dtype=torch.float64) * STEP % 1.0
    return ((torch.arange(count, dtype=torch.float64) + inside) * share).long().clamp_(max=tensor.numel() - 1)


def _sample(tensor: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The bits of the values at these places: NaN equals itself then."""
    flat = tensor.detach()
    values = torch.take(flat.view(torch.uint8) if flat.dtype.itemsize == 1 else flat, at)
    return values.view(BITS[values.dtype.itemsize])
