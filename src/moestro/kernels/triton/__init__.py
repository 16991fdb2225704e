"""The MoE operator in Triton kernels, and some in CUDA C++: sm_90 measured, sm_100 compiled."""

from moestro.kernels.triton import tactics as _older_names  # noqa: F401 (so that stored decisions can be read)
from moestro.kernels.triton.layout import PACKED, TritonNVFP4
from moestro.kernels.triton.runner import TritonRunner
from moestro.kernels.triton.tactic import Tactic, Tile

__all__ = ["PACKED", "Tactic", "Tile", "TritonNVFP4", "TritonRunner"]
