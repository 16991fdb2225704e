"""Experts read from checkpoints: mapped from safetensors, one at a time, never copied whole.

tensors = checkpoints.Safetensors("path/to/model")
experts = checkpoints.Experts(tensors, "model.layers.0.mlp.experts")
w = moestro.ExpertWeights.from_experts(experts, **experts.input_scales())
"""

from moestro.checkpoints.experts import Experts
from moestro.checkpoints.files import Safetensors

__all__ = ["Experts", "Safetensors"]
