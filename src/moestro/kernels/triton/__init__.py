"""The MoE operator in Triton kernels: sm_90 measured, sm_100 compiled."""

from moestro.kernels.triton.layout import TritonNVFP4
from moestro.kernels.triton.runner import TritonRunner
from moestro.kernels.triton.tactics import Tactic

__all__ = ["Tactic", "TritonNVFP4", "TritonRunner"]
