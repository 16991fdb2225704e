"""The dequantised weight of a packed layer: a tensor to read. A write would be lost without a word, so it is an error."""

from __future__ import annotations

from typing import Any, Self

import torch

from moestro.errors import BackendError

WRITES = {"__set__", "__setitem__", "set_", "requires_grad_"}


class FrozenWeight(torch.Tensor):
    """Reads like any tensor; what is computed from it is a plain tensor."""

    @classmethod
    def of(cls, dense: torch.Tensor) -> Self:
        """`dense`, to be read only."""
        return dense.detach().as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        target = (
            args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        )  # torch.nn.init's, and torch's
        written = isinstance(kwargs.get("out"), cls) or (isinstance(target, cls) and _writes(name))
        if name == "requires_grad_" and not (args[1] if len(args) > 1 else kwargs.get("requires_grad", True)):
            written = False
        if written:
            raise BackendError(
                f"the weight of a packed Linear is a dequantised copy, and {name or 'a write'} to it would be lost: "
                "the packed weight is frozen. Train or merge adapters on the dense model, or put a torch.nn.Linear "
                "with the new weight in its place"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    operator = (
        name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__index__", "__int__")
    )
    return name in WRITES or in_place or operator
