"""A file written tensor by tensor is safetensors' own, and one that cannot be written says why and leaves nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moestro import checkpoints
from moestro.checkpoints.files import DTYPES
from moestro.checkpoints.stream import TensorFile
from moestro.errors import FileError, FormatError


def test_the_bytes_are_those_of_save_file_in_whatever_order_they_come(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {"ünï.scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    for i, dtype in enumerate(DTYPES.values()):
        raw = torch.randint(
            0, 2 if dtype is torch.bool else 256, (3, (i + 1) * 8), generator=g, dtype=torch.uint8
        )
        tensors[f"t.{i}"] = raw.view(dtype) if dtype is not torch.bool else raw.bool()
    tensors["strided"] = torch.arange(12.0).view(3, 4).t()
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with TensorFile(tmp_path / "ours", layout) as file:
        for name in sorted(tensors, reverse=True):
            file.write(name, tensors[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_does_not_fit_its_place_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    layout = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    for tensors, match in (
        ({"a": torch.ones(3)}, "a must be"),
        ({"c": torch.ones(2)}, "c must be None"),
        ({"a": torch.ones(2)}, "must get b"),
    ):
        with pytest.raises(FormatError, match=match), TensorFile(tmp_path / "f", layout) as file:  # noqa: PT012
            for name, tensor in tensors.items():
                file.write(name, tensor)
        assert not (tmp_path / "f").exists()


def source(folder: Path) -> Path:
    folder.mkdir()
    names = ("gate_proj", "up_proj", "down_proj")
    tensors = {
        f"model.layers.0.mlp.experts.{e}.{n}.weight": torch.ones(32, 32) for e in range(2) for n in names
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_full_disk_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    src, dst = source(tmp_path / "src"), tmp_path / "dst"
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(FileError, match=r"needs \d+ bytes, and \d+ are free there: No space"):
            checkpoints.convert(src, dst)
    assert [p.name for p in dst.iterdir()] == [".moestro-convert.json"]
    checkpoints.convert(src, dst)  # goes on


def test_a_disk_that_fills_up_while_writing_leaves_no_half_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst, real, count = source(tmp_path / "src"), tmp_path / "dst", os.pwrite, 0

    def failing(*arguments: object) -> int:
        nonlocal count
        count += 1
        if count > 3:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(FileError, match=r"cannot be written: .*Input/output error"):
            checkpoints.convert(src, dst)
    assert list(dst.glob("*.safetensors")) == list(dst.glob("*.partial")) == []


def test_a_target_that_cannot_be_made_and_columns_that_cannot_be_blocked_are_named(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be made"):
        checkpoints.convert(src, tmp_path / "file" / "dst")
    narrow = {f"model.layers.0.mlp.experts.0.{n}.weight": torch.ones(24, 24) for n in ("w1", "w2", "w3")}
    other = tmp_path / "narrow"
    other.mkdir()
    save_file(narrow, other / "model.safetensors")
    with pytest.raises(FormatError, match=r"nvfp4 needs columns divisible by 16, got \[24, 24\]"):
        checkpoints.convert(other, tmp_path / "d1")


def test_another_calibration_is_another_conversion(tmp_path: Path) -> None:
    src, dst = source(tmp_path / "src"), tmp_path / "dst"
    prefix = "model.layers.0.mlp.experts"
    seen = {prefix: {"gate_up": torch.ones(2), "down": torch.ones(2)}}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.convert(src, dst, calibration=seen, progress=stop)
    seen[prefix]["down"] = torch.full((2,), 3.0)
    with pytest.raises(FormatError, match="another conversion"):
        checkpoints.convert(src, dst, calibration=seen)
    with pytest.raises(FormatError, match=r"calibration must be of experts in .*, got nowhere"):
        checkpoints.convert(src, tmp_path / "d", calibration={"nowhere": {}})
