"""humming (humming-kernels 0.1.19, github.com/vllm-project/humming), as vLLM 0.33 calls it.

| name | weights | activations |
|---|---|---|
| humming | NVFP4 | as they are |
| humming_mxfp4 | MXFP4 | as they are |
| humming_fp8 | MXFP4 | e4m3, a scale a token |

A layer is: align, indexed GEMM 1, activation, indexed GEMM 2, weighted sum. The products and their settings are
humming's (its heuristics for this device and number of pairs; compiled by NVRTC at first use). Aligning and the sum
are glue.py's: vLLM has kernels of its own for them. FP8 activations are quantised by humming's input kernel, x before
the first product, the intermediate in one kernel with the activation; gpt-oss's clamped SwiGLU is that kernel's too,
plain SiLU of bf16 glue.py's. Where the two products have different tile heights, pairs are aligned for both. Weights
come in by humming's readers of ModelOpt's and gpt-oss's checkpoints, padded as vLLM pads them.

With NVFP4 weights it has no legal schedule for FP8 activations ("weight scale group=16 is smaller than MMA K=32").
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moestro.bench.adapters.base import Adapter, installed, swiglu_only
from moestro.bench.contenders import Call
from moestro.bench.layers import Case, activation_of
from moestro.bench.models import MoeShape
from moestro.formats import MXFP4, NVFP4
from moestro.kernels.activations import SwiGLU

if TYPE_CHECKING:
    from moestro.bench.adapters.glue import Aligned
    from moestro.formats.base import FormatTensor
    from moestro.moe.weights import ExpertWeights

__all__ = ["ADAPTER", "FP8", "MXFP4_WEIGHTS"]

COMPUTE = json.dumps({"gemm_type": "indexed"})
PAD_ROWS, PAD_COLUMNS = 256, 128  # vLLM's
LOCKS = 2048  # of stream-K, as humming's own layer has


def _checkpoint(weight: FormatTensor, bias: torch.Tensor | None) -> tuple[Any, dict[str, torch.Tensor]]:
    """humming's reader of the format, and the tensors as it knows them."""
    if isinstance(weight, NVFP4):
        from humming.schema.modelopt import ModeloptNvfp4WeightSchema as Schema

        tensors = {
            "weight": weight.packed,
            "weight_scale": weight.scale,
            "weight_scale_2": weight.global_scale,
        }
    else:
        from humming.schema.mxfp4 import Mxfp4WeightSchema as Schema

        assert isinstance(weight, MXFP4)
        tensors = {"weight": weight.packed, "weight_scale": weight.scale}
    return Schema(), tensors if bias is None else tensors | {"bias": bias.bfloat16()}


class _Product:
    """One of the two grouped products: [pairs or tokens, C] -> [pairs, R]."""

    def __init__(self, weight: FormatTensor, bias: torch.Tensor | None, input_format: str | None) -> None:
        from humming.transform import prepare_and_transform_humming_tensors

        experts, rows, columns = weight.shape
        reader, tensors = _checkpoint(weight, bias)
        device = tensors["weight"].device
        schema, tensors = reader.convert_humming(
            tensors, [rows], [columns], torch.bfloat16, num_experts=experts, device=device
        )
        self.rows = rows
        self.config, self.tensors = prepare_and_transform_humming_tensors(
            tensors,
            rows,
            columns,
            schema,
            input_schema=None if input_format is None else _fp8_inputs(),
            num_experts=experts,
            pad_n_to_multiple=PAD_ROWS,
            pad_k_to_multiple=PAD_COLUMNS,
            has_bias=bias is not None,
            torch_dtype=torch.bfloat16,
            device=device,
        )
        self.locks = torch.zeros(LOCKS, dtype=torch.int32, device=device)

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

    def taken(
        self, inputs: torch.Tensor, activation: Mapping[str, str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(inputs as the product takes them, their scales): activated, where there is one, and quantised."""
        from humming.forward import may_process_input

        outputs, _, scales = may_process_input(self.config, inputs=inputs, **(activation or {}))
        return outputs, scales

    def bind(self, top_k: int, pairs: int) -> Callable[..., None]:
        """product(inputs, scales, outputs, aligned): outputs [pairs, R]; inputs one row per `top_k` pairs."""
        from humming.forward import humming_forward

        tuning = _tuning(self.settings(pairs))

        def product(
            inputs: torch.Tensor, scales: torch.Tensor | None, outputs: torch.Tensor, aligned: Aligned
        ) -> None:
            humming_forward(
                self.config,
                inputs,
                **self.tensors,
                outputs=outputs,
                input_scale=scales,
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


def _fp8_inputs() -> Any:
    """e4m3 with a scale a token, found at run time."""
    from humming.dtypes import float8e4m3
    from humming.schema.humming import HummingInputSchema

    return HummingInputSchema(a_dtype=float8e4m3)


def _tuning(settings: dict[str, Any]) -> str:
    """Settings as humming takes them, for every size: its launcher also looks up size 1."""
    return json.dumps([[0, 1 << 30, settings]])


def _expression(act: SwiGLU) -> dict[str, str]:
    """The activation as humming's input kernel takes it: C++ of gate a and up b, gates first."""
    most = None if act.limit is None else f"{float(act.limit)}f"
    gate = "a" if most is None else f"fminf(a, {most})"
    up = "b" if most is None else f"fmaxf(fminf(b, {most}), -{most})"
    text = f"""[](float a, float b) {{
        const float gate = {gate};
        const float up = {up};
        return gate / (1.f + expf(-{float(act.alpha)}f * gate)) * (up + {float(act.up_shift)}f);
    }}(a, b)"""
    return {"activation_type": "binary_split", "activation_impl": text}


class _Layer:
    """Both products with what is between and around them."""

    def __init__(self, weights: ExpertWeights, shape: MoeShape, input_format: str | None = None) -> None:
        self._shape, self._input_format = shape, input_format
        self._first = _Product(weights.gate_up, weights.gate_up_bias, input_format)
        self._second = _Product(weights.down, weights.down_bias, input_format)

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

    def _activate(self, pairs: int, x: torch.Tensor) -> Callable[[torch.Tensor], Any]:
        """hidden [pairs, 2I] -> (what the second product takes, its scales)."""
        from moestro.bench.adapters import glue

        act = activation_of(self._shape)
        assert isinstance(act, SwiGLU)
        if self._input_format is not None or act != SwiGLU():
            return partial(self._second.taken, activation=_expression(act))
        activated = x.new_empty(pairs, self._shape.intermediate_size)

        def silu(hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
            glue.silu_and_mul(hidden, activated)
            return activated, None

        return silu

    def bind(self, case: Case) -> Call:
        from moestro.bench.adapters import glue

        shape, x, ids, here = self._shape, case.x, case.ids, self._pairs_here(case)
        pairs, local = ids.numel(), shape.num_local_experts
        heights = [int(p.settings(here)["block_shape"][0]) for p in (self._first, self._second)]
        first, second = self._first.bind(shape.top_k, here), self._second.bind(1, here)
        align = glue.Aligner(pairs, local, (heights[0], heights[1]), x.device)
        activate = self._activate(pairs, x)
        hidden = x.new_empty(pairs, self._first.rows)
        y = x.new_empty(pairs, shape.hidden_size)
        out = torch.empty_like(x)

        def call() -> torch.Tensor:
            align(ids)
            first(*((x, None) if self._input_format is None else self._first.taken(x)), hidden, align.first)
            second(*activate(hidden), y, align.second)
            glue.weighted_sum(y, case.weights, ids, out, local)
            return out

        return call


def _missing(shape: MoeShape) -> str | None:
    return installed("humming", "pip install humming-kernels") or swiglu_only(shape)


ADAPTER = Adapter("humming", "nvfp4", _missing, _Layer)
MXFP4_WEIGHTS = Adapter("humming_mxfp4", "mxfp4", _missing, _Layer, package="humming")
FP8 = Adapter("humming_fp8", "mxfp4", _missing, partial(_Layer, input_format="fp8"), package="humming",
              input_format="fp8")  # fmt: skip
