"""The tensors of safetensors files by name, mapped: a tensor's bytes are read when they are first looked at.

What is wrong with a file is found when it is opened: an index that is broken, names files that are not there, or
tensors that its files do not hold; a shard that was cut short.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moestro.errors import FormatError
from moestro.formats.pages import release
from moestro.tuning.forks import Lock

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


class Safetensors(Mapping[str, torch.Tensor]):
    """A checkpoint: a .safetensors file, a folder with an index, model.safetensors or such files, or a list of files.

    Tensors share the files' pages (on Linux) and are not to be written to. Reading is safe from several threads.
    Raises FormatError for a path without such files, and for files that cannot be what they say.
    """

    def __init__(self, path: str | Path | Iterable[str | Path]) -> None:
        several = not isinstance(path, str | Path)
        self.path = None if several else Path(path)  # type: ignore[arg-type]
        self._open: dict[Path, Any] = {}
        self._lock = Lock()
        self._files = self._names_of([Path(p) for p in path]) if several else self._find(Path(path))  # type: ignore[arg-type, union-attr]

    def __getitem__(self, name: str) -> torch.Tensor:
        handle = self._handle(self._files[name])
        try:
            return handle.get_tensor(name)  # type: ignore[no-any-return]
        except Exception as error:  # safetensors raises its own kinds, and those of the system
            raise FormatError(f"{self._files[name]} does not give {name}: {error}") from error

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor. Raises KeyError for a name that there is not."""
        return self._files[name]

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of a tensor, without reading it."""
        part = self._handle(self._files[name]).get_slice(name)
        word = part.get_dtype()
        if word not in DTYPES:
            raise FormatError(
                f"{self._files[name]}: {name} has the dtype {word}, which moestro does not read"
            )
        return DTYPES[word], tuple(part.get_shape())

    def under(self, prefix: str) -> list[str]:
        """The names that begin with `prefix` and a dot, in order."""
        start = bisect_left(self._sorted, f"{prefix}.")
        return self._sorted[start : bisect_left(self._sorted, f"{prefix}/")]  # "/" follows "."

    def done_with(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give back the memory of mapped tensors; whoever looks again reads them from the file again."""
        release(tensors)

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self._files)

    def _handle(self, file: Path) -> Any:
        with self._lock:
            if file not in self._open:
                self._open[file] = _open(file)
            return self._open[file]

    def _find(self, path: Path) -> dict[str, Path]:
        if (index := path / INDEX).is_file():
            return self._by_index(index)
        if (whole := path / WHOLE).is_file():  # others are copies: Mistral's consolidated one, a variant
            return self._names_of([whole])
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise FormatError(f"path must be a safetensors file or a folder with some, got {str(path)!r}")
        return self._names_of(files)

    def _names_of(self, files: list[Path]) -> dict[str, Path]:
        names: dict[str, Path] = {}
        for file in files:
            for name in self._handle(file).keys():  # noqa: SIM118
                if name in names:
                    raise FormatError(f"{name} must be in one file, got it in {names[name]} and {file}")
                names[name] = file
        return names

    def _by_index(self, index: Path) -> dict[str, Path]:
        where = _weight_map(index)
        there: dict[str, set[str]] = {}
        for file in sorted(set(where.values())):
            if not (index.parent / file).is_file():
                raise FormatError(f"{index} names the file {file}, which is not there")
            there[file] = set(self._handle(index.parent / file).keys())
        for name, file in where.items():
            if name not in there[file]:
                raise FormatError(f"{index} says that {name} is in {file}, which does not hold it")
        return {name: index.parent / file for name, file in where.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text())
    except (OSError, ValueError) as error:
        raise FormatError(f"the index {index} cannot be read as JSON: {error}") from error
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise FormatError(f"the index {index} must have a weight_map of tensor names to file names")
    return where


def _open(file: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise FormatError("reading checkpoints needs safetensors: pip install 'moestro[hf]'") from error
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.is_file() else 0
        raise FormatError(f"{file} cannot be read as safetensors ({size} bytes): {error}") from error
