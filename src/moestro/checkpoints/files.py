"""The tensors of safetensors files by name, mapped: a tensor's bytes are read when they are first looked at."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from moestro.errors import FormatError
from moestro.formats.pages import release

INDEX = "model.safetensors.index.json"


class Safetensors(Mapping[str, torch.Tensor]):
    """A checkpoint: a .safetensors file, or a folder with an index or with such files.

    Tensors share the files' pages (on Linux) and are not to be written to. Raises FormatError for a path
    without such files.
    """

    def __init__(self, path: str | Path) -> None:
        self._files = _files_by_tensor(Path(path))
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._handle(self._files[name]).get_tensor(name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def done_with(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give back the memory of mapped tensors; whoever looks again reads them from the file again."""
        release(tensors)

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = _open(file)
        return self._open[file]


def _files_by_tensor(path: Path) -> dict[str, Path]:
    if (index := path / INDEX).is_file():
        return {name: path / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise FormatError(f"path must be a safetensors file or a folder with some, got {str(path)!r}")
    return {name: file for file in files for name in _open(file).keys()}  # noqa: SIM118


def _open(file: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise FormatError("reading checkpoints needs safetensors: pip install safetensors") from error
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file} cannot be read as safetensors: {error}") from error
