"""Moestro: fused Mixture-of-Experts layers and the autotuner that keeps them fast.

The public names are imported when first used, so that `import moestro` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moestro.errors import (
    BackendError,
    CheckpointWarning,
    DeviceError,
    DTypeError,
    FormatError,
    ModelError,
    MoestroError,
    RoutingError,
    ShapeError,
    StoreWarning,
    TuningError,
    TuningWarning,
)

if TYPE_CHECKING:
    from moestro import checkpoints, formats, parallel, routing, tuning
    from moestro.integrations.transformers.loading import load
    from moestro.kernels.activations import Activation, GeGLUTanh, ReLU2, SwiGLU
    from moestro.moe import reference
    from moestro.moe.checks import debug_checks
    from moestro.moe.layer import FusedMoE
    from moestro.moe.op import fused_moe
    from moestro.moe.weights import ExpertWeights
    from moestro.moe.workspace import Workspace
    from moestro.routing import route
    from moestro.tuning import AutoTuner, autotune

__version__ = "0.1.0"

# name -> the module that has it
_NAMES = {
    "Activation": "moestro.kernels.activations",
    "AutoTuner": "moestro.tuning",
    "ExpertWeights": "moestro.moe.weights",
    "FusedMoE": "moestro.moe.layer",
    "GeGLUTanh": "moestro.kernels.activations",
    "ReLU2": "moestro.kernels.activations",
    "SwiGLU": "moestro.kernels.activations",
    "Workspace": "moestro.moe.workspace",
    "autotune": "moestro.tuning",
    "debug_checks": "moestro.moe.checks",
    "fused_moe": "moestro.moe.op",
    "load": "moestro.integrations.transformers.loading",
    "route": "moestro.routing",
}
_MODULES = {"reference": "moestro.moe.reference"} | {
    name: f"moestro.{name}"
    for name in ("checkpoints", "errors", "formats", "kernels", "moe", "parallel", "routing", "tuning")
}

__all__ = [
    "Activation",
    "AutoTuner",
    "BackendError",
    "CheckpointWarning",
    "DTypeError",
    "DeviceError",
    "ExpertWeights",
    "FormatError",
    "FusedMoE",
    "GeGLUTanh",
    "ModelError",
    "MoestroError",
    "ReLU2",
    "RoutingError",
    "ShapeError",
    "StoreWarning",
    "SwiGLU",
    "TuningError",
    "TuningWarning",
    "Workspace",
    "autotune",
    "checkpoints",
    "debug_checks",
    "formats",
    "fused_moe",
    "load",
    "parallel",
    "reference",
    "route",
    "routing",
    "tuning",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    else:
        raise AttributeError(f"module 'moestro' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *globals()})
