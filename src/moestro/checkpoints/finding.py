"""Which layers of a checkpoint have experts, and which other modules are quantised."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

import torch

from moestro.checkpoints.files import Safetensors
from moestro.checkpoints.layouts import MODULES, Layout, recognise

EXPERTS = re.compile(r"^(.*\bexperts)\.(?:\d+\.|gate_up_proj|up_proj|down_proj)")
QUANTISED = {torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn}
CACHE_SCALES = {"k_scale", "v_scale", "q_scale", "kv_scale", "prob_output_scale", "output_scale"}


def expert_prefixes(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The prefixes of all layers' experts, in the order of their numbers. Shared experts are no experts."""
    found = {m.group(1) for name in tensors if (m := EXPERTS.match(name))}
    real = {prefix for prefix in found if not prefix.endswith(("shared_experts", "shared_expert"))}
    return sorted(
        real, key=lambda prefix: [(len(p), p) if p.isdigit() else (0, p) for p in prefix.split(".")]
    )


def quantised_modules(tensors: Safetensors, prefixes: list[str]) -> dict[str, tuple[Layout, dict[str, str]]]:
    """The other modules whose weight is quantised: (row, its tensors by suffix). FormatError for unknown schemes."""
    experts = tuple(f"{prefix}." for prefix in prefixes)
    groups: dict[str, dict[str, str]] = {}
    for name in tensors:
        if not name.startswith(experts):
            module, _, suffix = name.rpartition(".")
            groups.setdefault(module, {})[suffix] = name
    found = {}
    for module, pieces in groups.items():
        mine = {suffix: name for suffix, name in pieces.items() if suffix not in CACHE_SCALES}
        if mine and is_quantised(mine, tensors):
            dtypes = {suffix: tensors.info(name)[0] for suffix, name in mine.items()}
            found[module] = recognise(module, dtypes, MODULES), mine
    return found


class Described(Protocol):
    """Tensors of which dtype and shape are known without reading them."""

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]: ...


def is_quantised(pieces: dict[str, str], tensors: Described) -> bool:
    """Whether a module's tensors, by suffix, are more than a plain weight."""
    if {"weight_packed", "qweight", "weight_scale", "weight_scale_inv", "weight_scale_2"} & set(pieces):
        return True
    return "weight" in pieces and tensors.info(pieces["weight"])[0] in QUANTISED
