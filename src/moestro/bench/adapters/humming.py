"""humming (humming-kernels, github.com/vllm-project/humming) on NVFP4 weights, W4A16, as vLLM calls it.

A layer is: align, indexed GEMM 1, SiLU, indexed GEMM 2, weighted sum. The products and their settings are
humming's (its heuristics for this device and number of pairs; compiled by NVRTC at first use); its package has
no alignment, activation or sum of its own that vLLM would use, so those are glue.py's. Where humming's two
products have different tile heights, pairs are aligned for both. Weights come in by humming's reader of
ModelOpt checkpoints, padded as vLLM pads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from moestro.bench.adapters.base import Adapter, installed, plain_silu
from moestro.bench.contenders import Call
from moestro.bench.layers import Case
from moestro.bench.models import MoeShape
from moestro.formats import NVFP4

if TYPE_CHECKING:
    from moestro.bench.adapters.glue import Aligned
    from moestro.formats.base import FormatTensor
    from moestro.moe.weights import ExpertWeights

__all__ = ["ADAPTER"]

COMPUTE = json.dumps({"gemm_type": "indexed"})
PAD_ROWS, PAD_COLUMNS = 256, 128  # vLLM's
LOCKS = 2048  # of stream-K, as humming's own layer has


class _Product:
    """One of the two grouped products: [pairs or tokens, C] -> [pairs, R]."""

    def __init__(self, weight: FormatTensor) -> None:
        from humming.schema.modelopt import ModeloptNvfp4WeightSchema
        from humming.transform import prepare_and_transform_humming_tensors

        assert isinstance(weight, NVFP4)
        experts, rows, columns = weight.shape
        tensors = {
            "weight": weight.packed,
            "weight_scale": weight.scale,
            "weight_scale_2": weight.global_scale,
        }
        schema, tensors = ModeloptNvfp4WeightSchema().convert_humming(
            tensors, [rows], [columns], torch.bfloat16, num_experts=experts, device=weight.packed.device
        )
        self.rows = rows
        self.config, self.tensors = prepare_and_transform_humming_tensors(
            tensors,
            rows,
            columns,
            schema,
            num_experts=experts,
            pad_n_to_multiple=PAD_ROWS,
            pad_k_to_multiple=PAD_COLUMNS,
            torch_dtype=torch.bfloat16,
            device=weight.packed.device,
        )
        self.locks = torch.zeros(LOCKS, dtype=torch.int32, device=weight.packed.device)

    def settings(self, pairs: int) -> dict[str, Any]:
        """humming's choice for so many pairs."""
        from humming.tune import get_heuristics_config

        entries = get_heuristics_config(
            layer_config=self.config, gemm_type="indexed", device=self.tensors["weight"].device
        )
        return next(dict(chosen) for above, most, chosen in entries if above < pairs <= most)

    def compile(self, pairs: Iterable[int]) -> None:
        """Compile, in parallel, what these numbers of pairs need; it is found on disk from then on."""
        from humming.kernel.humming import HummingKernel

        needed = {_tuning(self.settings(count)) for count in pairs}
        together = json.dumps([entry for tuning in sorted(needed) for entry in json.loads(tuning)])
        device = self.tensors["weight"].device
        HummingKernel.prepare_kernels(self.config.to_str(), COMPUTE, together, device=device)

    def bind(self, top_k: int, pairs: int) -> Callable[..., None]:
        """product(inputs, outputs, aligned): outputs [pairs, R]; inputs one row per `top_k` pairs."""
        from humming.forward import humming_forward

        tuning = _tuning(self.settings(pairs))

        def product(inputs: torch.Tensor, outputs: torch.Tensor, aligned: Aligned) -> None:
            humming_forward(
                self.config,
                inputs,
                **self.tensors,
                outputs=outputs,
                sorted_ids=aligned.pairs,
                expert_ids=aligned.experts,
                num_tokens_padded=aligned.length,
                locks=self.locks,
                top_k=top_k,
                valid_shape_m=pairs,
                compute_config=COMPUTE,
                tuning_config=tuning,
            )

        return product


def _tuning(settings: dict[str, Any]) -> str:
    """Settings as humming takes them, for every size: its launcher also looks up size 1."""
    return json.dumps([[0, 1 << 30, settings]])


class _Layer:
    """Both products with what is between and around them."""

    def __init__(self, weights: ExpertWeights, shape: MoeShape) -> None:
        self._shape = shape
        self._first, self._second = _Product(weights.gate_up), _Product(weights.down)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for p in (self._first, self._second) for t in p.tensors.values())

    def compile(self, cases: Sequence[Case]) -> None:
        for product in (self._first, self._second):
            product.compile(map(self._pairs_here, cases))

    def _pairs_here(self, case: Case) -> int:
        """Pairs of local experts, as vLLM estimates them without looking."""
        shape, pairs = self._shape, case.ids.numel()
        here = pairs if shape.local_pairs else pairs * shape.num_local_experts / shape.num_experts
        return math.ceil(here)

    def bind(self, case: Case) -> Call:
        from moestro.bench.adapters import glue

        shape, x, ids, here = self._shape, case.x, case.ids, self._pairs_here(case)
        pairs, local = ids.numel(), shape.num_local_experts
        heights = [int(p.settings(here)["block_shape"][0]) for p in (self._first, self._second)]
        first, second = self._first.bind(shape.top_k, here), self._second.bind(1, here)
        align = glue.Aligner(pairs, local, (heights[0], heights[1]), x.device)
        hidden = x.new_empty(pairs, self._first.rows)
        activated = x.new_empty(pairs, shape.intermediate_size)
        y = x.new_empty(pairs, shape.hidden_size)
        out = torch.empty_like(x)

        def call() -> torch.Tensor:
            align(ids)
            first(x, hidden, align.first)
            glue.silu_and_mul(hidden, activated)
            second(activated, y, align.second)
            glue.weighted_sum(y, case.weights, ids, out, local)
            return out

        return call


def _missing(shape: MoeShape) -> str | None:
    return installed("humming", "pip install humming-kernels") or plain_silu(shape)


ADAPTER = Adapter("humming", "nvfp4", _missing, _Layer)
