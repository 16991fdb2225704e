"""What the kernels' host side asks the GPU; answers for Hopper where there is none, to interpret and compile."""

from __future__ import annotations

from functools import lru_cache

import torch

from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton.device import common

BLOCK_SCALES = (10, 0)  # the first capability whose tensor cores take scales of blocks


@lru_cache
def capability() -> tuple[int, int]:
    """The compute capability."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def is_hopper() -> bool:
    """Whether the chip is a Hopper; without a device, yes, interpreted or not: weights are laid out for one."""
    return capability()[0] == 9


def has_wgmma() -> bool:
    """Whether kernels that spell out wgmma run here; without a device, whether they compile."""
    return not common.INTERPRETED and is_hopper()


def has_block_scales() -> bool:
    """Whether tensor cores take a scale for each block of both operands: on sm_100 (sm_120's instructions are others)."""
    return BLOCK_SCALES <= capability() < (12, 0)


def multiplies_fp4(problem: MoeProblem) -> bool:
    """Whether a problem goes to FP4 tensor cores: NVFP4 times NVFP4."""
    w4a4 = problem.weight_format == "nvfp4" and problem.input_format == "nvfp4"
    return w4a4 and has_block_scales()
