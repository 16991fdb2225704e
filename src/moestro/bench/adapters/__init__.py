"""Peers on GPUs: adapters to other people's MoE kernels, each used where its package is installed.

| name | package | weights | run here |
|---|---|---|---|
| humming | humming-kernels | nvfp4 | yes, H100 |
| marlin | vllm | nvfp4 | no: written from vLLM's source |
| vllm_triton | vllm | bf16 | no: written from vLLM's source |
| triton_kernels | Triton's repository (not the package of that name on PyPI) | bf16 | no: written from its source |

Before a peer is timed on a case its output is compared with the float32 reference on the same weights
(measure.py); one that is wrong is reported and not timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moestro.bench.adapters import humming, triton_kernels, vllm
from moestro.bench.adapters.base import Adapter, AdapterContender, PeerLayer

__all__ = ["ADAPTERS", "Adapter", "AdapterContender", "PeerLayer"]

ADAPTERS: Mapping[str, Adapter] = MappingProxyType(
    {adapter.name: adapter for adapter in (humming.ADAPTER, vllm.MARLIN, vllm.TRITON, triton_kernels.ADAPTER)}
)
