"""Recorded routing: the experts that real tokens went to, kept in a file.

The file holds ids [M, K], distinct in each row: `.npy` (the array), `.pt` (the tensor, or {"ids",
"num_experts"}) or `.safetensors` (tensor "ids", metadata "num_experts"). record() writes any of them.
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moestro.errors import RoutingError
from moestro.routing.distributions import check_sample

SUFFIXES = (".npy", ".pt", ".safetensors")


@dataclass(frozen=True)
class Recorded:
    """The routing of a file, consecutive tokens of it, from its start again when it is shorter than the
    batch.

    seed 0 starts at the first recorded token, another seed at a token that it draws. The file is read once,
    when first needed. Raises RoutingError for a file that cannot be read, or does not hold routing.
    """

    path: str | Path

    @property
    def name(self) -> str:
        """ "recorded(FILE@HASH)", the hash being of the content: another recording is another name."""
        return f"recorded({Path(self.path).name}@{self._digest})"

    def sample(self, num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
        """int32 [N, K]; see Distribution. RoutingError if the recording has another top_k or num_experts."""
        check_sample(num_tokens, num_experts, top_k)
        ids, recorded_experts = self._recording
        recorded_tokens, recorded_k = ids.shape
        if recorded_k != top_k:
            raise RoutingError(f"top_k must be {recorded_k}, as recorded in {self.path}, got {top_k}")
        if recorded_experts not in (None, num_experts):
            raise RoutingError(
                f"num_experts must be {recorded_experts}, as recorded in {self.path}, got {num_experts}"
            )
        if recorded_tokens and int(ids.max()) >= num_experts:
            raise RoutingError(
                f"num_experts must be above {int(ids.max())}, an id in {self.path}, got {num_experts}"
            )
        if not recorded_tokens and num_tokens:
            raise RoutingError(f"{self.path} holds no token to sample {num_tokens} from")
        start = int(np.random.default_rng(seed).integers(recorded_tokens)) if seed and recorded_tokens else 0
        return ids[(torch.arange(num_tokens) + start) % max(1, recorded_tokens)]

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(_read_bytes(Path(self.path))).hexdigest()[:8]

    @cached_property
    def _recording(self) -> tuple[torch.Tensor, int | None]:
        ids, num_experts = _load(Path(self.path))
        check_ids(str(self.path), ids, num_experts)
        return ids.to(torch.int32), num_experts


def record(path: str | Path, ids: torch.Tensor, num_experts: int | None = None) -> None:
    """Write ids (integers [M, K], distinct in each row) to `path`, in the format that its suffix names.

    num_experts is kept by .pt and .safetensors. Raises RoutingError for ids that are not routing, or another
    suffix.
    """
    path = Path(path)
    check_ids("ids", ids, num_experts)
    ids = ids.detach().cpu().to(torch.int32).contiguous()
    _check_suffix(path)
    if path.suffix == ".npy":
        np.save(path, ids.numpy())
    elif path.suffix == ".pt":
        torch.save({"ids": ids, "num_experts": num_experts}, path)
    else:
        save_file = _safetensors("safetensors.torch").save_file
        save_file(
            {"ids": ids}, path, metadata=None if num_experts is None else {"num_experts": str(num_experts)}
        )


def check_ids(name: str, ids: torch.Tensor, num_experts: int | None) -> None:
    """RoutingError unless ids are integers [M, K], in range and distinct in each row."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim != 2:
        raise RoutingError(f"{name} must hold integer ids [M, K], got {ids.dtype} {list(ids.shape)}")
    if ids.shape[1] < 1:
        raise RoutingError(f"{name} must hold at least one expert per token, got shape {list(ids.shape)}")
    if not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (num_experts is not None and high >= num_experts):
        wanted = "at least 0" if num_experts is None else f"in [0, {num_experts})"
        raise RoutingError(f"{name} must hold ids {wanted}, got ids from {low} to {high}")
    ordered = ids.sort(dim=-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(-1).nonzero().flatten()
    if len(twice):
        row = int(twice[0])
        raise RoutingError(
            f"{name} must hold distinct experts per token, got {ids[row].tolist()} in row {row}"
        )


def _load(path: Path) -> tuple[torch.Tensor, int | None]:
    """(ids, num_experts where the file says) of any of the three formats."""
    _check_suffix(path)
    if not path.is_file():
        raise RoutingError(f"path must be a file of recorded routing, got {path}, which is no file")
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False)), None
        if path.suffix == ".pt":
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            return (
                (loaded, None)
                if isinstance(loaded, torch.Tensor)
                else (loaded["ids"], loaded.get("num_experts"))
            )
        with _safetensors("safetensors").safe_open(path, framework="pt") as file:
            stated = (file.metadata() or {}).get("num_experts")
            return file.get_tensor("ids"), None if stated is None else int(stated)
    except RoutingError:
        raise
    except Exception as error:  # each reader raises its own kinds for a file that is not of its format
        raise RoutingError(
            f"path must be a {path.suffix} file of ids [M, K]; reading {path} failed: {error}"
        ) from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RoutingError(f"path must be a file of recorded routing, got {path}: {error}") from error


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise RoutingError(f"path must end in {', '.join(SUFFIXES)}, got {path}")


def _safetensors(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RoutingError(
            "a .safetensors recording needs the package safetensors: pip install moestro[hf]"
        ) from error
