"""Is a call like an earlier one that passed every check? Asked of each, so answered in C++.

The full check of x, ids and weights reads some twenty attributes, 5 µs. The guard that torch.compile checks its inputs
with compares dtypes, devices, static sizes and strides of all three in 0.3 µs; here the number of tokens is left open,
and compared beside it. It may say no without need (another autograd mode, say): then the full check is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moestro.moe.checks import Limits

KEPT = 4  # kinds of calls: x with and without inference mode, from a view, ...

Check = Callable[[Any, Any, Any], bool]


class CallGuard:
    """Knows calls that passed `check_call`."""

    def __init__(self, limits: Limits) -> None:
        self._most = limits.max_num_tokens
        self._checks: tuple[Check, ...] = ()

    def holds(self, x: Any, ids: Any, weights: Any) -> bool:
        """Whether `check_call` would pass: x is a tensor, ids are int32, and all is as in an earlier call."""
        for check in self._checks:
            if check(x, ids, weights):
                num_tokens = x.size(0)
                same = num_tokens == ids.size(0) == weights.size(0)
                return same and (self._most is None or num_tokens <= self._most)
        return False

    def learn(self, x: Any, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Remember a call that passed. x of 0 or 1 tokens may have any stride there, and teaches nothing."""
        if len(self._checks) >= KEPT or not isinstance(x, torch.Tensor) or ids.dtype != torch.int32:
            return
        if torch.compiler.is_compiling() or len({id(x), id(ids), id(weights)}) < 3:
            return
        check = _compiled(x, ids, weights)
        if check is not None and not any(known(x, ids, weights) for known in self._checks):
            self._checks = (*self._checks, check)


def _compiled(*tensors: torch.Tensor) -> Check | None:
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes: Any = [[None, tensor.shape[1]] for tensor in tensors]
        strides: Any = [[tensor.shape[1], 1] for tensor in tensors]  # what contiguous rows have, whatever N
        check: Check = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return check if check(*tensors) else None
    except Exception:
        return None  # not in this torch, or not for these tensors
