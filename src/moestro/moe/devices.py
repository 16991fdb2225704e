"""Where tensors are made and kernels launched: on the weights' device, whatever is the default or the current one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Inside, tensors without a device= are made on `device`, and it is the current one of its kind.

    For packing and everything else that is not on the hot path: `torch.set_default_device("meta")`, or a layer made
    under `with torch.device("meta")`, would take scratch tensors elsewhere.
    """
    with torch.device(device), current(device):
        yield


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launches go to `device`; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def elsewhere(device: torch.device) -> Callable[[], bool] | None:
    """Whether another GPU than `device` is the current one, asked for each call; None on a CPU."""
    if device.type != "cuda" or device.index is None:
        return None
    index = device.index
    now = (
        getattr(torch._C, "_cuda_getDevice", None) or torch.cuda.current_device
    )  # without a look at CUDA's start

    return lambda: now() != index
