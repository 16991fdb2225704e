"""DeepGEMM (github.com/deepseek-ai/DeepGEMM, as vLLM 0.33 bundles it): FP8 block weights, FP8 activations per 128.

| name | what is timed |
|---|---|
| deep_gemm | the whole layer: align, quantise, product 1, SiLU and quantise, product 2, weighted sum |
| deep_gemm_products | the two grouped products alone, on what the layer made of the case: a bound, not a peer |

The products are DeepGEMM's "contiguous" ones with the ends of experts on the device (vLLM's way on Hopper), so that a
graph can hold them; an expert's rows are padded to its alignment (128). It compiles them at first use with nvcc, which
it finds by CUDA_HOME; the package is a compiled extension and its headers, on no registry but inside vLLM's wheel
(vllm/third_party/deep_gemm: it needs no vLLM and imports under torch 2.11). What is around the products is fp8_glue.py's.
"""

from __future__ import annotations

import importlib
import os
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moestro.bench.adapters.base import Adapter, first_reason, installed, plain_silu
from moestro.bench.contenders import Call
from moestro.bench.layers import Case
from moestro.bench.models import MoeShape
from moestro.formats import FP8Block

if TYPE_CHECKING:
    from moestro.moe.weights import ExpertWeights

__all__ = ["LAYER", "PRODUCTS"]

BLOCK = 128
PLACES = ("deep_gemm", "vllm.third_party.deep_gemm")


def _package() -> Any:
    """The module, by itself or out of vLLM."""
    name = "deep_gemm" if installed("deep_gemm", "") is None else PLACES[1]
    return importlib.import_module(name)


class _Buffers:
    """What one case's calls write: rows of all pairs, padded."""

    def __init__(self, shape: MoeShape, case: Case, height: int) -> None:
        from moestro.bench.adapters import fp8_glue, glue

        x, pairs = case.x, case.ids.numel()
        self.align = glue.Aligner(pairs, shape.num_local_experts, (height, height), x.device)
        rows = len(self.align.first.pairs)
        hidden, inner = shape.hidden_size, shape.intermediate_size
        codes = partial(torch.empty, dtype=torch.float8_e4m3fn, device=x.device)
        self.ends = torch.zeros(shape.num_local_experts, dtype=torch.int32, device=x.device)
        self.places = torch.zeros(pairs, dtype=torch.int32, device=x.device)
        self.x, self.x_scale = codes(rows, hidden), fp8_glue.scales_for(rows, hidden, x.device)
        self.gate_up = x.new_empty(rows, shape.gate_up_rows)
        self.inner, self.inner_scale = codes(rows, inner), fp8_glue.scales_for(rows, inner, x.device)
        self.y, self.out = x.new_empty(rows, hidden), torch.empty_like(x)


class _Layer:
    """The layer; with `products_alone`, calls that only repeat the products of a layer that has run."""

    def __init__(self, weights: ExpertWeights, shape: MoeShape, products_alone: bool = False) -> None:
        first, second = weights.gate_up, weights.down
        assert isinstance(first, FP8Block)
        assert isinstance(second, FP8Block)
        self._shape, self._products_alone, self._deep_gemm = shape, products_alone, _package()
        self._first, self._second = (first.data, first.scale_inv), (second.data, second.scale_inv)
        self.nbytes = weights.nbytes

    def _products(self, b: _Buffers, between: Any) -> None:
        product = partial(
            self._deep_gemm.m_grouped_fp8_gemm_nt_contiguous, disable_ue8m0_cast=True, use_psum_layout=True
        )
        product((b.x, b.x_scale), self._first, b.gate_up, b.ends)
        between()
        product((b.inner, b.inner_scale), self._second, b.y, b.ends)

    def bind(self, case: Case) -> Call:
        from moestro.bench.adapters import fp8_glue

        shape, ids = self._shape, case.ids
        pairs, local = ids.numel(), shape.num_local_experts
        b = _Buffers(shape, case, self._deep_gemm.get_mk_alignment_for_contiguous_layout())
        table = b.align.first
        activate = partial(fp8_glue.silu_and_quantise, b.gate_up, table, pairs, b.inner, b.inner_scale)

        def call() -> torch.Tensor:
            b.align(ids)
            fp8_glue.ends_of(table, pairs, b.ends)
            fp8_glue.quantise_pairs(case.x, table, shape.top_k, b.x, b.x_scale, b.places)
            self._products(b, activate)
            fp8_glue.weighted_sum_of(b.y, b.places, case.weights, ids, b.out, local)
            return b.out

        def products() -> torch.Tensor:
            self._products(b, lambda: None)
            return b.out  # of the call below: the products write what they wrote then

        if self._products_alone:
            call()
        return products if self._products_alone else call


def _missing(shape: MoeShape) -> str | None:
    return first_reason(
        lambda: (
            installed("deep_gemm", "vLLM bundles it in vllm/third_party; it is on no registry")
            and installed("vllm", "pip install vllm, or its third_party/deep_gemm")
        ),
        lambda: plain_silu(shape),
        lambda: _blocks(shape),
        _no_compiler,
        _not_importable,
    )


def _blocks(shape: MoeShape) -> str | None:
    sizes = {"H": shape.hidden_size, "I": shape.intermediate_size}
    odd = {name: size for name, size in sizes.items() if size % BLOCK}
    return None if not odd else f"it runs multiples of {BLOCK}, not {odd}"


def _no_compiler() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    return None if found else f"it compiles with nvcc, which is neither on the PATH nor in {home}/bin"


def _not_importable() -> str | None:
    try:
        _package().m_grouped_fp8_gemm_nt_contiguous  # noqa: B018
    except Exception as error:  # other people's code may raise anything, say under another torch
        return f"it cannot be imported here: {type(error).__name__}: {error}"
    return None


LAYER = Adapter("deep_gemm", "fp8_block", _missing, _Layer, input_format="fp8")
PRODUCTS = Adapter("deep_gemm_products", "fp8_block", _missing, partial(_Layer, products_alone=True),
                   package="deep_gemm", input_format="fp8", part="products alone")  # fmt: skip
