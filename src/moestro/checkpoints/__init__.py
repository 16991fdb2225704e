"""Experts read from checkpoints: mapped from safetensors, one at a time, never copied whole.

tensors = checkpoints.Safetensors("path/to/model")
experts = checkpoints.Experts(tensors, "model.layers.0.mlp.experts")
w = moestro.ExpertWeights.from_experts(experts)        # biases, input scales and AWQ scales travel along

checkpoints.convert("path/to/model", "path/to/result", format="nvfp4", layout="modelopt")
print(checkpoints.inspect("path/to/model"))
"""

from moestro.checkpoints.convert import convert
from moestro.checkpoints.experts import Experts
from moestro.checkpoints.files import Safetensors
from moestro.checkpoints.inspect import Inspection, inspect

__all__ = ["Experts", "Inspection", "Safetensors", "convert", "inspect"]
