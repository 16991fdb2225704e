"""What is in a checkpoint: per layer the layout, sizes, memory here, which backend will run it, and why others won't.

FAULTS are what other engines have got wrong with such checkpoints, each with the public report of it: worth knowing
where results differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moestro.checkpoints.experts import Experts
from moestro.checkpoints.files import Safetensors
from moestro.checkpoints.finding import expert_prefixes, quantised_modules
from moestro.checkpoints.scheme import parse, raw_scheme
from moestro.errors import FormatError
from moestro.formats import NVFP4, FormatTensor
from moestro.kernels import backends
from moestro.kernels.activations import ReLU2, SwiGLU
from moestro.kernels.cpu import linear as cpu
from moestro.kernels.problem import MoeProblem

SUBNORMAL = 0x08  # e4m3 codes below it, but 0, are subnormal
TILE = 128  # sizes that are no multiple are padded by other engines


@dataclass(frozen=True)
class Layer:
    """One layer's experts."""

    prefix: str
    layout: str
    format: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    biased: bool
    nbytes: int  # in the checkpoint, and about as many in memory
    backend: str  # that moestro will run it with here
    why_not: dict[str, str]  # the other backends


@dataclass(frozen=True)
class Inspection:
    """A checkpoint. scheme: what its config says; None: unquantised."""

    path: str
    scheme: str | None
    layers: list[Layer]
    other_bytes: int
    quantised_modules: dict[str, str]  # beside the experts: module -> layout, and what becomes of it here
    faults: list[str]

    @property
    def expert_bytes(self) -> int:
        """Of all layers' experts."""
        return sum(layer.nbytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect(path: str | Path, device: str = "cpu") -> Inspection:
    """Look at the checkpoint in a folder (or a .safetensors file); reads names, shapes and one expert a layer.

    Raises FormatError for one that is not whole or not known, as loading it would.
    """
    tensors = Safetensors(path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    raw = raw_scheme(folder)
    scheme = str(parse(raw)) if raw is not None else None
    prefixes = expert_prefixes(tensors)
    if not prefixes:
        raise FormatError(f"{path} has no experts (tensors named ...experts.0.gate_proj.weight, ...)")
    config = _config(folder)
    layers, faults = [], dict.fromkeys(_config_faults(config))
    for prefix in prefixes:
        experts = Experts(tensors, prefix)
        first = next(iter(experts))
        layer = _layer(prefix, experts, first, device)
        layers.append(layer)
        faults |= dict.fromkeys(text for text, seen in FAULTS.items() if seen(layer, experts, first))
    others = _others(tensors, prefixes, device)
    below = tuple(f"{prefix}." for prefix in prefixes)
    rest = sum(_bytes(tensors, name) for name in tensors if not name.startswith(below))
    return Inspection(str(path), scheme, layers, rest, others, list(faults))


def _others(tensors: Safetensors, prefixes: list[str], device: str) -> dict[str, str]:
    """Quantised modules beside the experts; one of each layout is read, to see what it becomes."""
    words: dict[str, str] = {}
    found = {}
    for name, (row, pieces) in quantised_modules(tensors, prefixes).items():
        if row.name not in words:
            weight = row.read(name, {suffix: tensors[pieces[suffix]] for suffix in row.pieces})
            packed = device == "cpu" and cpu.why_not(weight.format, None) is None
            words[row.name] = (
                f"{row.name} -> {f'{weight.format} on cpu' if packed else 'dequantised on torch'}"
            )
        found[name] = words[row.name]
    return found


def _bytes(tensors: Safetensors, name: str) -> int:
    dtype, shape = tensors.info(name)
    return torch.Size(shape).numel() * dtype.itemsize


def _layer(prefix: str, experts: Experts, first: tuple[FormatTensor, FormatTensor], device: str) -> Layer:
    gate_up, down = first
    side = experts.side_tensors()
    problem = MoeProblem(
        num_experts=len(experts),
        num_local_experts=len(experts),
        expert_offset=0,
        top_k=1,
        hidden_size=down.shape[0],
        intermediate_size=down.shape[1],
        weight_format=gate_up.format,
        activation=SwiGLU() if experts.gated else ReLU2(),
        device=device,
        weight_dtype=getattr(gate_up, "data", torch.empty(0)).dtype if gate_up.format == "bf16" else None,
        biased="gate_up_bias" in side,
    )
    reasons = {name: backends.why_not(name, problem) for name in backends.BACKENDS}
    runs = [name for name, reason in reasons.items() if reason is None]
    return Layer(
        prefix,
        experts.layout,
        gate_up.format,
        len(experts),
        problem.hidden_size,
        problem.intermediate_size,
        experts.gated,
        problem.biased,
        experts.nbytes,
        runs[0] if runs else "none",
        {name: reason for name, reason in reasons.items() if reason is not None},
    )


Seen = Callable[[Layer, Experts, tuple[FormatTensor, FormatTensor]], bool]


def _differing_scales(layer: Layer, experts: Experts, first: tuple[FormatTensor, FormatTensor]) -> bool:
    gate_up = first[0]
    return isinstance(gate_up, NVFP4) and gate_up.row_groups == 2 and bool(gate_up.global_scale.diff().any())


def _subnormal_scales(layer: Layer, experts: Experts, first: tuple[FormatTensor, FormatTensor]) -> bool:
    tensors = [t for t in first if isinstance(t, NVFP4)]
    codes = [t.scale.view(torch.uint8) for t in tensors]
    return any(bool(((code > 0) & (code < SUBNORMAL)).any()) for code in codes)


FAULTS: dict[str, Seen] = {
    "gate and up have different global scales: vLLM's Marlin path uses gate's for up": _differing_scales,
    "block scales include subnormal e4m3: Marlin flushes the smallest to zero": _subnormal_scales,
    "the global scale divides: Transformers' compressed-tensors experts leave it out (transformers 48371)": (
        lambda layer, experts, first: "nvfp4-pack" in layer.layout
    ),
    "experts have no gate: engines that take one for granted fail (vLLM 31782)": (
        lambda layer, experts, first: not layer.gated
    ),
    "inputs have AWQ scales (pre_quant_scale): an engine that passes them over gives other values": (
        lambda layer, experts, first: "gate_up_pre_scale" in experts.side_tensors()
    ),
    "sizes are no multiple of 128: other engines pad, or refuse": (
        lambda layer, experts, first: bool(layer.hidden_size % TILE or layer.intermediate_size % TILE)
    ),
}


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise FormatError(f"{path} cannot be read as JSON: {error}") from error
    return {**content, **(content.get("text_config") or {})}


def _config_faults(config: dict[str, Any]) -> list[str]:
    found = []
    if config.get("swiglu_limit") is not None or config.get("model_type") == "gpt_oss":
        found.append("SwiGLU is clamped: NVFP4 paths have lost the clamp (vLLM 49070)")
    if config.get("routed_scaling_factor") not in (None, 1, 1.0):
        found.append("routing weights are scaled: engines have left that out (SGLang 29931)")
    return found
