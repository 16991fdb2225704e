"""FlashInfer's tuner by its own names: `from moestro.compat.flashinfer import autotune, autotuner`."""

from moestro.compat.flashinfer import autotuner
from moestro.compat.flashinfer.autotuner import autotune

__all__ = ["autotune", "autotuner"]
