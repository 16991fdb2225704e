"""A machine with a chip that is not here, as far as the Triton backend asks: layers are made as they are there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moestro import formats
from moestro.kernels.problem import INPUT_FORMATS, MoeProblem
from moestro.kernels.triton import TritonRunner, chip
from moestro.kernels.triton.paths import PATHS

CHIPS = {"hopper": (9, 0), "sm_100": (10, 0)}
DTYPES = (torch.bfloat16, torch.float16)


def pretend(patch: pytest.MonkeyPatch, name: str, *, wgmma: bool = True) -> None:
    """Tensors of the CPU are taken for those of a chip of CHIPS. wgmma=False: its kernels are to be interpreted, which
    those that spell out wgmma cannot be.
    """
    has_wgmma = wgmma and CHIPS[name][0] == 9
    patch.setattr(chip, "capability", lambda: CHIPS[name])
    patch.setattr(chip, "has_wgmma", lambda: has_wgmma)
    for path in PATHS.values():
        if hasattr(path, "has_wgmma"):
            patch.setattr(path, "has_wgmma", lambda: has_wgmma)
    patch.setattr(TritonRunner, "why_not", classmethod(lambda cls, problem: cls._unsupported(problem)))


def taken(
    name: str, hidden: int, inter: int, **options: Any
) -> Iterator[tuple[str, str | None, torch.dtype]]:
    """(format, input format, dtype of x) of every layer that the backend says it takes on a chip."""
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, name, **options)
        for fmt in formats.FORMATS:
            for input_format in (None, *INPUT_FORMATS):
                for dtype in DTYPES:
                    dense = dtype if fmt == "bf16" else None
                    problem = MoeProblem(8, 8, 0, 2, hidden, inter, fmt, input_format=input_format, dtype=dtype,
                                         weight_dtype=dense)  # fmt: skip
                    if TritonRunner.why_not(problem) is None:
                        yield fmt, input_format, dtype
