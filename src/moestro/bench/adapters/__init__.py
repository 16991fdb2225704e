"""Peers on GPUs: adapters to other people's MoE kernels, each used where its package is installed.

| name | package | weights | activations |
|---|---|---|---|
| humming, humming_mxfp4 | humming-kernels | nvfp4, mxfp4 | as they are |
| humming_fp8 | humming-kernels | mxfp4 | fp8, a scale a token |
| triton_kernels, triton_kernels_mxfp4 | Triton's repository (PyPI has another of that name) | bf16, mxfp4 | as they are |
| deep_gemm | DeepGEMM | fp8_block | fp8, a scale per 128 columns |
| deep_gemm_products | DeepGEMM | fp8_block | the same; the two products alone: a bound, not a peer |
| marlin, vllm_triton | vllm | nvfp4, bf16 | as they are |

docs/peers.md says which were run on a GPU. Before a peer is timed on a case its output is compared with the float32
reference on the same weights and activations (measure.py); one that is wrong is reported and not timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moestro.bench.adapters import deep_gemm, humming, triton_kernels, vllm
from moestro.bench.adapters.base import Adapter, AdapterContender, PeerLayer, whole_peer

__all__ = ["ADAPTERS", "Adapter", "AdapterContender", "PeerLayer", "whole_peer"]

ADAPTERS: Mapping[str, Adapter] = MappingProxyType(
    {
        adapter.name: adapter
        for adapter in (
            humming.ADAPTER,
            humming.MXFP4_WEIGHTS,
            humming.FP8,
            vllm.MARLIN,
            vllm.TRITON,
            triton_kernels.ADAPTER,
            triton_kernels.MXFP4_WEIGHTS,
            deep_gemm.LAYER,
            deep_gemm.PRODUCTS,
        )
    }
)
