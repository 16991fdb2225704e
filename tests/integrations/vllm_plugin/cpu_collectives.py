"""The two collectives that vLLM 0.32's CPU communicator lacks, so that data-parallel MoE models run in tests.

vLLM alone ends at the first batch of one (all_gatherv: NotImplementedError). `register` is a plugin of vLLM's: the test
puts this folder and an entry point for it in PYTHONPATH.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def register() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    if isinstance(input_, list):
        return [all_gatherv(self, one, dim, sizes) for one in input_]
    sizes = sizes or [len(input_)] * self.world_size
    rows = [input_.new_empty((size, *input_.shape[1:])) for size in sizes]
    for rank, block in enumerate(rows):
        if rank == self.rank_in_group:
            block.copy_(input_)
        torch.distributed.broadcast(block, group=self.device_group, group_src=rank)
    return torch.cat(rows)


def reduce_scatterv(
    self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
) -> torch.Tensor:
    sizes = sizes or [len(input_) // self.world_size] * self.world_size
    total = input_.float()
    torch.distributed.all_reduce(total, group=self.device_group)
    return total.split(sizes)[self.rank_in_group].to(input_.dtype)


def entry_point(folder: Path) -> str:
    """A folder for PYTHONPATH in which vLLM finds `register`; with this one's, as PYTHONPATH."""
    info = folder / "cpu_collectives-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-collectives\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ncpu_collectives = cpu_collectives:register\n"
    )
    return f"{folder}:{Path(__file__).parent}"
