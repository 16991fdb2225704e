"""Is a call like an earlier one that passed every check? Asked of each, so answered in C++.

The full check of x, ids, weights and out reads some thirty attributes, 5 µs. The guard that torch.compile checks its
inputs with compares dtypes, devices, sizes and strides of all of them in 0.3 µs. It may say no without need (another
autograd mode, say): then the full check is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

KEPT = 4  # kinds of calls of one number of tokens: x with and without inference mode, from a view, ...
KNOWN_SIZES = 1024  # numbers of tokens that are remembered
PLAIN = (
    torch.Tensor,
    torch.nn.Parameter,
)  # of which empty_like() makes a tensor: other classes may do as they like

Check = Callable[..., bool]


class CallGuard:
    """Knows calls of the same number of tensors that passed all checks.

    by_size: by the number of tokens, what tells such a call from its tensors. It says yes only where x is a plain
    tensor, ids are int32, and dtypes, devices, sizes and strides are those of a call that passed.
    """

    def __init__(self) -> None:
        self.by_size: dict[int, tuple[Check, ...]] = {}

    def learn(self, *call: Any) -> None:
        """Remember a call that passed: x, ids, weights, and out where that was given."""
        x, ids = call[0], call[1]
        if type(x) not in PLAIN or ids.dtype != torch.int32 or torch.compiler.is_compiling():
            return
        if len({id(tensor) for tensor in call}) < len(call) or any(out.requires_grad for out in call[3:]):
            return  # whether an out may want a gradient is a matter of the autograd mode, which the guard leaves open
        known = self.by_size.get(x.shape[0], ())
        check = _compiled(*call)
        if check is None or len(known) >= KEPT or any(one(*call) for one in known):
            return
        if len(self.by_size) >= KNOWN_SIZES:
            self.by_size.clear()
        self.by_size[x.shape[0]] = (*known, check)


def _compiled(*tensors: torch.Tensor) -> Check | None:
    """None too where one is not [N, C] with the strides of contiguous rows: of 0 or 1 rows that may be."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes = [[*tensor.shape] for tensor in tensors]
        strides = [[tensor.shape[1], 1] for tensor in tensors]
        made = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)  # type: ignore[arg-type]
        check: Check = made.check
        return check if check(*tensors) else None
    except Exception:
        return None  # not in this torch, or not for these tensors
