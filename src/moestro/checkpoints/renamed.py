"""A checkpoint's tensors under other names: those of the model that they are loaded into."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from moestro.checkpoints.files import Safetensors


class Renamed(Mapping[str, torch.Tensor]):
    """tensors, each under its key in `names` (new name -> name in the checkpoint)."""

    def __init__(self, tensors: Safetensors, names: dict[str, str]) -> None:
        self._tensors, self._names = tensors, names
        self._sorted = sorted(names)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._tensors.file_of(self._names[name])

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of a tensor, without reading it."""
        return self._tensors.info(self._names[name])

    def under(self, prefix: str) -> list[str]:
        """The names that begin with `prefix` and a dot, in order."""
        start = bisect_left(self._sorted, f"{prefix}.")
        return self._sorted[start : bisect_left(self._sorted, f"{prefix}/")]

    def done_with(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give back the memory of mapped tensors."""
        self._tensors.done_with(tensors)
