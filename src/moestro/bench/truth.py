"""What a layer should give: the float32 reference on a contender's own weights, for a case.

NVFP4 contenders are held against the dequantised NVFP4 weights, bf16 ones against the bf16 weights: quantising
is not their error. One copy of the weights per format and one answer per case are kept; where the GPU has no
room for them, there is no reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moestro.bench.contenders import Contender
from moestro.bench.layers import Case, LayerSource, activation_of
from moestro.moe import reference

if TYPE_CHECKING:
    from moestro.moe.weights import ExpertWeights

__all__ = ["References"]


class References:
    """References of one layer: references(contender, case) -> [N, H] float32, or None without room."""

    def __init__(self, source: LayerSource) -> None:
        self._source = source
        self._weights: dict[str, ExpertWeights] = {}
        self._case: Case | None = None
        self._answers: dict[str, torch.Tensor | None] = {}

    def __call__(self, contender: Contender, case: Case) -> torch.Tensor | None:
        if case is not self._case:
            self._case, self._answers = case, {}
        if contender.format not in self._answers:
            try:
                self._answers[contender.format] = self._compute(contender.format, case)
            except torch.OutOfMemoryError:
                self._answers[contender.format] = None
        return self._answers[contender.format]

    def _compute(self, format: str, case: Case) -> torch.Tensor:
        if format not in self._weights:
            self._weights[format] = self._source.weights(format)
        activation = activation_of(self._source.shape)
        return reference.fused_moe(
            case.x, case.ids, case.weights, self._weights[format], activation=activation
        )
