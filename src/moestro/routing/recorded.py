"""Recorded routing: the experts that real tokens went to, kept in a file.

The file holds ids [M, K], or those of several layers, [M, layers, K]; distinct in each row: `.npy` (the array),
`.pt` (the tensor, or {"ids", "num_experts", "weights"}) or `.safetensors` (tensors "ids" and perhaps "weights",
metadata "num_experts"). record() writes any of them.
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

from moestro.errors import FileError, RoutingError
from moestro.routing.distributions import check_sample

SUFFIXES = (".npy", ".pt", ".safetensors")


@dataclass(frozen=True)
class Recorded:
    """The routing of a file, consecutive tokens of it, from its start again when it is shorter than the
    batch. Of a recording of several layers, the layer `layer`; None: all of them, one after the other.

    seed 0 starts at the first recorded token, another seed at a token that it draws. The file is read once,
    when first needed. Raises RoutingError for a file that cannot be read, or does not hold routing.
    """

    path: str | Path
    layer: int | None = None

    @property
    def name(self) -> str:
        """ "recorded(FILE@HASH)", the hash being of the content: another recording is another name."""
        of = "" if self.layer is None else f" layer {self.layer}"
        return f"recorded({Path(self.path).name}@{self._digest}{of})"

    def sample(self, num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
        """int32 [N, K]; see Distribution. RoutingError if the recording has another top_k or num_experts."""
        check_sample(num_tokens, num_experts, top_k, seed)
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
        return ids[(torch.arange(num_tokens, device="cpu") + start) % max(1, recorded_tokens)]

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(_read_bytes(Path(self.path))).hexdigest()[:8]

    @cached_property
    def _recording(self) -> tuple[torch.Tensor, int | None]:
        ids, num_experts, _ = read(Path(self.path))
        layers = ids[:, None] if ids.ndim == 2 else ids  # [M, layers, K]
        if self.layer is None:
            return layers.transpose(0, 1).flatten(0, 1).contiguous(), num_experts
        if not 0 <= self.layer < layers.shape[1]:
            raise RoutingError(f"layer must be in 0..{layers.shape[1] - 1} of {self.path}, got {self.layer}")
        return layers[:, self.layer].contiguous(), num_experts


def record(
    path: str | Path,
    ids: torch.Tensor,
    num_experts: int | None = None,
    *,
    weights: torch.Tensor | None = None,
) -> None:
    """Write ids (integers [M, K] or [M, layers, K], distinct in each row) to `path`, as its suffix says.

    num_experts, and weights of ids' shape, are kept by .pt and .safetensors. The file's folder is made. Raises
    RoutingError for ids that are not routing, or another suffix; FileError where path cannot be written.
    """
    path = Path(path)
    _check_all("ids", ids, num_experts)
    ids = ids.detach().cpu().to(torch.int32).contiguous()
    check_suffix(path)
    tensors = {"ids": ids} if weights is None else {"ids": ids, "weights": weights.float().cpu().contiguous()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(path, tensors, num_experts)
    except RoutingError:
        raise
    except Exception as error:  # each writer raises its own kinds where there is no room, or no permission
        raise FileError(f"{path} cannot be written: {error}") from error


def _save(path: Path, tensors: dict[str, torch.Tensor], num_experts: int | None) -> None:
    if path.suffix == ".npy":
        np.save(path, tensors["ids"].numpy())
    elif path.suffix == ".pt":
        torch.save({**tensors, "num_experts": num_experts}, path)
    else:
        save_file = _safetensors("safetensors.torch").save_file
        save_file(tensors, path, metadata=None if num_experts is None else {"num_experts": str(num_experts)})


def read(path: Path) -> tuple[torch.Tensor, int | None, torch.Tensor | None]:
    """(ids int32 [M, K] or [M, layers, K], num_experts and weights where the file has them), checked."""
    ids, num_experts, weights = _load(path)
    _check_all(str(path), ids, num_experts)
    return ids.to(torch.int32), num_experts, weights


def _check_all(name: str, ids: torch.Tensor, num_experts: int | None) -> None:
    check_ids(name, ids.flatten(0, 1) if ids.ndim == 3 else ids, num_experts)


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


def _load(path: Path) -> tuple[torch.Tensor, int | None, torch.Tensor | None]:
    """(ids, num_experts and weights where the file has them) of any of the three formats."""
    check_suffix(path)
    if not path.is_file():
        raise RoutingError(f"path must be a file of recorded routing, got {path}, which is no file")
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False)), None, None
        if path.suffix == ".pt":
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(loaded, torch.Tensor):
                return loaded, None, None
            return loaded["ids"], loaded.get("num_experts"), loaded.get("weights")
        with _safetensors("safetensors").safe_open(path, framework="pt") as file:
            stated = (file.metadata() or {}).get("num_experts")
            weights = file.get_tensor("weights") if "weights" in file.keys() else None  # noqa: SIM118
            return file.get_tensor("ids"), None if stated is None else int(stated), weights
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


def check_suffix(path: Path) -> None:
    """RoutingError unless path ends as a recording's file does."""
    if path.suffix not in SUFFIXES:
        raise RoutingError(f"path must end in {', '.join(SUFFIXES)}, got {path}")


def _safetensors(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RoutingError(
            "a .safetensors recording needs the package safetensors: pip install moestro[hf]"
        ) from error
