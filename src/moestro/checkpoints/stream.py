"""A safetensors file whose tensors are written as they come: none is kept, in any order, from several threads.

The names, dtypes and shapes must be known before: they make the header, and a place for each tensor. The file is
what safetensors' own save_file writes, byte for byte: tensors by dtype, then by name, so that each is aligned.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from math import prod
from pathlib import Path
from types import TracebackType

import torch

from moestro.checkpoints.files import DTYPES
from moestro.errors import FileError, FormatError

Shape = tuple[torch.dtype, tuple[int, ...]]
WORDS = {dtype: word for word, dtype in DTYPES.items()}
# safetensors' own order (its enum of dtypes, the last first), which puts the widest first.
ORDER = (
    "I64",
    "F64",
    "F32",
    "I32",
    "BF16",
    "F16",
    "I16",
    "F8_E8M0",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
    "BOOL",
)
ALIGNMENT = 8  # of the header


class TensorFile:
    """The file at `path`, with a place for every tensor of `layout` (name -> dtype, shape).

    Raises FormatError for a dtype that safetensors has no word for here, FileError where the disk has no
    room for the whole, or does not take it. A with block ends with the file synced, or removed after an error.
    """

    def __init__(self, path: Path, layout: dict[str, Shape]) -> None:
        self.path, self._layout = path, layout
        header, self._places = _placed(path, layout)
        self._missing = set(layout)
        try:
            self._file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o666)
        except OSError as error:
            raise FileError(f"{path} cannot be made: {error}") from error
        try:
            self._reserve(len(header) + sum(_nbytes(shape) for shape in layout.values()))
            self._write(header, 0)
        except BaseException:
            self._drop()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor where it belongs. FormatError for one of another dtype or shape than was said, or a second."""
        expected, found = self._layout.get(name), (tensor.dtype, tuple(tensor.shape))
        if expected != found:
            raise FormatError(
                f"{name} must be {expected} as its kind's first one in {self.path}, got {found}"
            )
        if name not in self._missing:
            raise FormatError(f"{name} has been written to {self.path} before")
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._write(memoryview(flat.numpy().data), self._places[name])
        self._missing.discard(name)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._missing:
            error = FormatError(f"{self.path} must get {sorted(self._missing)[0]}, which nothing gave")
        if kind is not None or error is not None:
            self._drop()
            if kind is None and error is not None:
                raise error
            return
        os.fsync(self._file)
        os.close(self._file)

    def _reserve(self, size: int) -> None:
        """Room for the whole, so that a full disk is found before the work."""
        try:
            os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                os.ftruncate(self._file, size)
                return
            free = shutil.disk_usage(self.path.parent).free
            raise FileError(
                f"{self.path} needs {size} bytes, and {free} are free there: {error.strerror}"
            ) from error

    def _write(self, content: bytes | memoryview, at: int) -> None:
        rest = memoryview(content)
        while rest:
            try:
                done = os.pwrite(self._file, rest, at)
            except OSError as error:
                raise FileError(f"{self.path} cannot be written: {error}") from error
            rest, at = rest[done:], at + done

    def _drop(self) -> None:
        os.close(self._file)
        self.path.unlink(missing_ok=True)


def _placed(path: Path, layout: dict[str, Shape]) -> tuple[bytes, dict[str, int]]:
    """The header, and where each tensor's bytes begin in the file."""
    for name, (dtype, _) in layout.items():
        if dtype not in WORDS:
            raise FormatError(f"{name} cannot be written to {path}: safetensors has no word for {dtype} here")
    names = sorted(layout, key=lambda name: (ORDER.index(WORDS[layout[name][0]]), name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, at = {}, 0
    for name in names:
        dtype, shape = layout[name]
        end = at + _nbytes(layout[name])
        entries[name] = {"dtype": WORDS[dtype], "shape": list(shape), "data_offsets": [at, end]}
        offsets[name], at = at, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: begin + at for name, at in offsets.items()}


def _nbytes(shape: Shape) -> int:
    dtype, sizes = shape
    return prod(sizes) * dtype.itemsize
