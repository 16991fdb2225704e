"""What a layer should give: the float32 reference on a contender's own weights, for a case.

NVFP4 contenders are held against the dequantised NVFP4 weights, bf16 ones against the bf16 weights: quantising
is not their error. One that quantises activations is held against the reference that does so as well (with 4-bit
weights as FP8 tensor cores take them, docs/numerics.md), and beside it against the exact product. One copy of the
weights per format and one answer per case are kept; where the GPU has no room for them, there is no reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moestro.bench.contenders import Contender, input_format_of
from moestro.bench.layers import Case, LayerSource, activation_of
from moestro.moe import reference

if TYPE_CHECKING:
    from moestro.moe.weights import ExpertWeights

__all__ = ["References"]

ROUNDINGS: dict[str | None, dict[str, Any]] = {"fp8": {"weight_rounding": "e4m3"}}


class References:
    """References of one layer: references(contender, case) -> [N, H] float32, or None without room."""

    def __init__(self, source: LayerSource) -> None:
        self._source = source
        self._weights: dict[str, ExpertWeights] = {}
        self._case: Case | None = None
        self._answers: dict[tuple[str, str | None], torch.Tensor | None] = {}

    def __call__(self, contender: Contender, case: Case) -> torch.Tensor | None:
        """Of the contender's weights and its format of activations."""
        return self._answer(contender.format, input_format_of(contender), case)

    def exact(self, contender: Contender, case: Case) -> torch.Tensor | None:
        """Of the contender's weights and unquantised activations."""
        return self._answer(contender.format, None, case)

    def _answer(self, format: str, input_format: str | None, case: Case) -> torch.Tensor | None:
        if case is not self._case:
            self._case, self._answers = case, {}
        key = format, input_format
        if key not in self._answers:
            try:
                self._answers[key] = self._compute(format, input_format, case)
            except torch.OutOfMemoryError:
                self._answers[key] = None
        return self._answers[key]

    def _compute(self, format: str, input_format: str | None, case: Case) -> torch.Tensor:
        if format not in self._weights:
            self._weights[format] = self._source.weights(format)
        return reference.fused_moe(
            case.x,
            case.ids,
            case.weights,
            self._weights[format],
            activation=activation_of(self._source.shape),
            input_format=input_format,
            **ROUNDINGS.get(input_format, {}),
        )
