"""Physical memory given back early: pages of a tensor that nobody will read again.

Weights are repacked expert by expert. Dropping each expert's source as soon as it is packed keeps the peak at one
copy and one expert, for tensors in ordinary memory and for those mapped from a file alike.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Iterable

import torch


def release(tensors: Iterable[torch.Tensor]) -> None:
    """Let the system take the whole pages under these CPU tensors; only what is contiguous, only on Linux.

    Their values are undefined afterwards: zeros, or the file's again where they are mapped from one.
    """
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel():
            begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > begin:
                _dont_need()(begin, end - begin)


@functools.cache
def _dont_need() -> Callable[[int, int], object]:
    """madvise(address, bytes, MADV_DONTNEED); nothing where the system has other rules for it."""
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advice is None or not hasattr(mmap, "MADV_DONTFORK"):  # the second is Linux's alone
        return lambda address, nbytes: None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda address, nbytes: madvise(address, nbytes, advice)
