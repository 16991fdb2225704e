"""What a checkpoint says of its quantisation: config.json's quantization_config, or ModelOpt's hf_quant_config.json.

The tensors decide how they are read (layouts.py); this says what was meant, so that an algorithm that moestro does
not know is an error that names it, before anything is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from moestro.errors import FormatError, unknown_name

# ModelOpt's quant_algo: what it becomes here.
MODELOPT = {
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
    "NVFP4_AWQ": "nvfp4",
    "MXFP4": "mxfp4",
    "W4A8_MXFP4_FP8": "mxfp4",
    "MXFP8": "mxfp8",
    "FP8": "fp8_block",
    "FP8_PB_WO": "fp8_block",
}
COMPRESSED_TENSORS = {
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
    "mxfp8-quantized": "mxfp8",
    "float-quantized": "fp8_block",
    "naive-quantized": "fp8_block",
    "pack-quantized": "int4",
    "mixed-precision": "mixed",
    "dense": "bf16",
}
METHODS = {"modelopt", "compressed-tensors", "mxfp4", "fp8", "mxfp8", "awq", "gptq"}


@dataclass(frozen=True)
class Scheme:
    """method: who made it. algorithm: what the whole is. layers: their own algorithms, where they differ."""

    method: str
    algorithm: str
    layers: dict[str, str] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    activations: bool = False  # whether the producer calibrated quantised activations (W4A4, W8A8)

    def format_of(self, name: str) -> str | None:
        """The format that is meant for the experts `name`; None where the config does not say it of them all."""
        if any(fnmatch(name, pattern) or pattern in name for pattern in self.excluded):
            return None
        if self.method == "modelopt":
            return MODELOPT.get(self.algorithm)
        if self.method == "compressed-tensors" and not self.layers:
            found = COMPRESSED_TENSORS.get(self.algorithm)
            return None if found in ("mixed", "bf16") else found
        return {"gpt-oss": "mxfp4", "AWQ": "int4", "GPTQ": "int4"}.get(self.method)

    def __str__(self) -> str:
        mixed = f" ({', '.join(sorted(set(self.layers.values())))})" if self.layers else ""
        return f"{self.method} {self.algorithm}{mixed}"


def raw_scheme(folder: str | Path) -> dict[str, Any] | None:
    """The quantisation config of a folder as it stands there; None for an unquantised checkpoint."""
    path = Path(folder)
    for name in ("config.json", "hf_quant_config.json"):
        if not (path / name).is_file():
            continue
        try:
            content = json.loads((path / name).read_text())
        except (OSError, ValueError) as error:
            raise FormatError(f"{path / name} cannot be read as JSON: {error}") from error
        if name == "hf_quant_config.json":
            return {"quant_method": "modelopt", **content}
        for part in (content, content.get("text_config") or {}):
            if isinstance(found := part.get("quantization_config"), dict):
                return found
    return None


def parse(raw: dict[str, Any]) -> Scheme:
    """What a quantisation config means. Raises FormatError for a method or algorithm that moestro does not read."""
    method = str(raw.get("quant_method", "modelopt" if "quantization" in raw else ""))
    if method not in METHODS:
        raise FormatError(unknown_name("quant_method", method, METHODS))
    if method == "modelopt":
        return _modelopt(raw)
    if method == "compressed-tensors":
        return _compressed_tensors(raw)
    excluded = tuple(raw.get("modules_to_not_convert") or ())
    if method in ("awq", "gptq"):
        return _integers(method, raw, excluded)
    if method == "mxfp4":
        return Scheme("gpt-oss", "MXFP4", excluded=excluded)
    block = raw.get("weight_block_size")
    words = f"FP8 {block[0]}x{block[1]}" if block else "FP8 per tensor"
    if raw.get("scale_fmt") == "ue8m0" or method == "mxfp8":
        words += ", ue8m0 scales"
    return Scheme("fp8", words, excluded=excluded, activations=True)


def _modelopt(raw: dict[str, Any]) -> Scheme:
    inner = raw.get("quantization") or raw
    algorithm = _upper(inner.get("quant_algo"))
    excluded = tuple(inner.get("exclude_modules") or inner.get("ignore") or ())
    layers: dict[str, str] = {}
    if algorithm == "MIXED_PRECISION":
        for name, layer in (inner.get("quantized_layers") or {}).items():
            layers[name] = _known(_upper(layer.get("quant_algo")), MODELOPT, f"quant_algo of {name}")
        if not layers:
            raise FormatError(
                "quantized_layers must name the layers of a MIXED_PRECISION checkpoint, got none"
            )
    else:
        _known(algorithm, MODELOPT, "quant_algo")
    weights_only = algorithm.startswith("W4A16") or algorithm == "FP8_PB_WO"
    return Scheme("modelopt", algorithm, layers, excluded, activations=not weights_only)


# What these methods' configs must say, where they say it; the first is what they mean by saying nothing.
INTEGERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "awq": {"bits": (4,), "version": ("gemm",), "format": ("gemm",), "checkpoint_format": ("gemm",)},
    "gptq": {
        "bits": (4,),
        "desc_act": (False, None),
        "checkpoint_format": ("gptq",),
        "format": ("gptq",),
    },
}


def _integers(method: str, raw: dict[str, Any], excluded: tuple[str, ...]) -> Scheme:
    for key, known in INTEGERS[method].items():
        value = raw.get(key, raw.get("w_bit", known[0]) if key == "bits" else known[0])
        if (value.lower() if isinstance(value, str) else value) not in known:
            raise FormatError(
                f"{key} of {method} must be {known[0]!r}, got {value!r}, which moestro does not read"
            )
    group = raw.get("group_size", raw.get("q_group_size"))
    return Scheme(method.upper(), f"INT4 in groups of {group}", excluded=excluded)


def _require_int4(name: str, group: Any) -> None:
    """A pack-quantized group must be of 4-bit integers whose groups are of columns in their order."""
    weights = (group.get("weights") or {}) if isinstance(group, dict) else {}
    for key, known in {
        "num_bits": (4,),
        "type": ("int",),
        "actorder": (None, "static", "weight", False),
    }.items():
        value = weights.get(key, known[0])
        if (value.lower() if isinstance(value, str) else value) not in known:
            raise FormatError(
                f"{key} of {name} must be {known[0]!r} for pack-quantized, got {value!r}, which moestro does not read"
            )


def _upper(algorithm: Any) -> str:
    """ModelOpt writes some in lower case ("mxfp4", "fp8_pb_wo")."""
    return str(algorithm).upper()


def _require_plain(raw: dict[str, Any]) -> None:
    """Weights that are transformed, or sparse, are not what their codes and scales stand for."""
    if ((raw.get("transform_config") or {}).get("config_groups") or {}) != {}:
        raise FormatError(
            "transform_config of compressed-tensors must have no config_groups, got "
            f"{', '.join(raw['transform_config']['config_groups'])}: moestro rotates neither weights nor inputs"
        )
    sparse = (raw.get("sparsity_config") or {}).get("format") or "dense"
    if sparse != "dense":
        raise FormatError(
            f"sparsity_config of compressed-tensors must have the format 'dense', got {sparse!r}: moestro does not read it"
        )


def _compressed_tensors(raw: dict[str, Any]) -> Scheme:
    _require_plain(raw)
    algorithm = _known(str(raw.get("format")), COMPRESSED_TENSORS, "format")
    groups = raw.get("config_groups") or {}
    layers = {}
    for name, group in groups.items():
        if isinstance(group, dict) and group.get("format"):
            layers[name] = _known(str(group["format"]), COMPRESSED_TENSORS, f"format of {name}")
        if layers.get(name, algorithm) == "pack-quantized":
            _require_int4(name, group)
    activations = any(isinstance(g, dict) and g.get("input_activations") for g in groups.values())
    mixed = layers if algorithm == "mixed-precision" else {}
    return Scheme("compressed-tensors", algorithm, mixed, tuple(raw.get("ignore") or ()), activations)


def _known(word: str, table: dict[str, str], kind: str) -> str:
    if word not in table:
        raise FormatError(
            unknown_name(kind, word, [*table, *(["MIXED_PRECISION"] if table is MODELOPT else [])])
        )
    return word
