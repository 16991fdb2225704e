"""Transformers' experts as contenders: eager, batched_mm, grouped_mm, on the tensors of Moestro's bf16. Peers
that only run on GPUs are in adapters/.

The modules are Transformers' own classes, built on the meta device and given our weights as their
parameters, so no copy is made where the layouts agree (gpt-oss stores transposed and interleaved matrices:
one copy). ids are int64 and routing weights in x.dtype, as Transformers' routers hand them on; both are
made outside the timing.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from moestro.bench import cpu_ceilings
from moestro.bench.adapters import ADAPTERS
from moestro.bench.contenders import Call, Contender
from moestro.bench.layers import GPT_OSS_SWIGLU, Case, LayerSource
from moestro.bench.models import MoeShape

__all__ = [
    "IMPLEMENTATIONS",
    "TransformersExperts",
    "experts_module",
    "peer_names",
    "transformers_missing",
    "transformers_peers",
]

NO_SENTINEL = ("swiglu_oai", "relu2")  # GptOssExperts and NemotronHExperts index by the sentinel id

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def transformers_missing() -> str | None:
    """Why Transformers cannot be a peer here; None if it can."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install 'moestro[hf]')"
    try:
        from transformers.integrations import moe  # noqa: F401
    except ImportError as error:
        return f"this transformers has no experts interface (5.0 or newer is needed): {error}"
    return None


def _config(shape: MoeShape) -> SimpleNamespace:
    """What the experts' constructors read of a config."""
    act = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "relu2": "relu2", "swiglu_oai": "silu"}
    return SimpleNamespace(
        num_experts=shape.num_local_experts,
        num_local_experts=shape.num_local_experts,
        n_routed_experts=shape.num_local_experts,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        moe_intermediate_size=shape.intermediate_size,
        moe_latent_size=None,
        hidden_act=act[shape.activation],
        mlp_hidden_act=act[shape.activation],
        swiglu_alpha=GPT_OSS_SWIGLU.alpha,
        swiglu_limit=GPT_OSS_SWIGLU.limit,
        _experts_implementation="eager",
    )


def _interleaved(rows: torch.Tensor) -> torch.Tensor:
    """[L, 2I, ...] gate rows then up rows -> gate and up alternating, as gpt-oss stores them."""
    gate, up = rows.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)


def _parameters(source: LayerSource) -> dict[str, torch.Tensor]:
    """Parameter name -> tensor for the Transformers class of this shape."""
    gate_up, down = source.dense
    if source.shape.activation == "swiglu_oai":
        first, second = source.biases
        if first is None or second is None:
            shape = source.shape
            first = gate_up.new_zeros(shape.num_local_experts, shape.gate_up_rows)
            second = gate_up.new_zeros(shape.num_local_experts, shape.hidden_size)
        return {
            "gate_up_proj": _interleaved(gate_up).transpose(1, 2).contiguous(),  # [L, H, 2I]
            "gate_up_proj_bias": _interleaved(first),
            "down_proj": down.transpose(1, 2).contiguous(),  # [L, I, H]
            "down_proj_bias": second,
        }
    return {"gate_up_proj" if source.shape.gated else "up_proj": gate_up, "down_proj": down}


def _experts_class(shape: MoeShape) -> Any:
    if shape.activation == "swiglu_oai":
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        return GptOssExperts
    if not shape.gated:
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        return NemotronHExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    return Qwen3MoeExperts


def experts_module(source: LayerSource, dtype: torch.dtype | None = None) -> Any:
    """The layer as Transformers' experts module, sharing our tensors; with a dtype of its own, a copy."""
    with torch.device("meta"):
        module = _experts_class(source.shape)(_config(source.shape))
    for name, tensor in _parameters(source).items():
        setattr(module, name, torch.nn.Parameter(tensor.to(dtype or tensor.dtype), requires_grad=False))
    module._is_expert_parallel = source.shape.ep > 1 and not source.shape.local_pairs
    return module.eval()


class TransformersExperts:
    """One experts implementation of Transformers over the layers of `sources`.

    `fallback` says why its dtype is no fair measure here: it travels with every row.
    """

    ours = False

    def __init__(
        self,
        implementation: str,
        modules: Sequence[Any],
        shape: MoeShape,
        memory: int,
        fallback: str | None = None,
    ) -> None:
        self.implementation = implementation
        self._modules = modules
        self._shape = shape
        self._memory = memory
        self._fallback = fallback
        self._dtype = next(modules[0].parameters()).dtype
        self.format = "float32" if self._dtype == torch.float32 else "bf16"
        self.name = f"transformers {implementation}" + (" float32" if self.format == "float32" else "")

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._modules[0].parameters())

    def copied_bytes(self, num_tokens: int) -> int:
        """Bytes of weights that one call copies: batched_mm gathers both matrices of every pair."""
        if self.implementation != "batched_mm":
            return 0
        itemsize = int(next(self._modules[0].parameters()).itemsize)
        return num_tokens * self._shape.top_k * self._shape.weights_per_expert * itemsize

    def why_not(self, case: Case) -> str | None:
        needed = self.copied_bytes(case.num_tokens)
        if needed > self._memory:
            return (
                f"would copy {needed / 2**30:.1f} GiB of weights for {case.num_tokens} tokens "
                f"(limit {self._memory / 2**30:.1f} GiB, --peer-memory)"
            )
        sentinels = self._modules[0]._is_expert_parallel
        if sentinels and self.implementation == "eager" and self._shape.activation in NO_SENTINEL:
            return "the eager forward of this model's experts takes no pairs of other ranks"
        return None

    def calls(self, case: Case) -> Sequence[Call]:
        ids = case.ids.long()
        x = case.x.to(self._dtype)
        weights = case.weights.to(x.dtype)
        if self._modules[0]._is_expert_parallel:  # other ranks' pairs: the sentinel id, and weight zero
            elsewhere = ids >= self._shape.num_local_experts
            ids = ids.masked_fill(elsewhere, self._shape.num_local_experts)
            weights = weights.masked_fill(elsewhere, 0.0)
        return [functools.partial(self._run, module, x, ids, weights) for module in self._modules]

    def facts(self, case: Case) -> dict[str, Any]:
        return {} if self._fallback is None else {"fallback": self._fallback}

    def _run(self, module: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        # The modules are shared by the three implementations, so each call says which one it is.
        module.config._experts_implementation = self.implementation
        return module(x, ids, weights)  # type: ignore[no-any-return]


def transformers_peers(
    sources: Sequence[LayerSource], names: Sequence[str] = IMPLEMENTATIONS, memory: int = 1 << 30
) -> list[Contender]:
    """The named implementations over the same modules; `memory` bounds the weights that one call may copy,
    in bytes. On a CPU for which torch has no kernels of the weights' dtype they are marked, and float32 copies
    of the modules take part beside them.
    """
    shape, modules = sources[0].shape, [experts_module(source) for source in sources]
    fallback = cpu_ceilings.fallback(sources[0].dtype) if sources[0].device == "cpu" else None
    peers: list[Contender] = [TransformersExperts(name, modules, shape, memory, fallback) for name in names]
    if fallback is not None:
        wide = [experts_module(source, torch.float32) for source in sources]
        peers += [TransformersExperts(name, wide, shape, memory) for name in names]
    return peers


def peer_names(device: str) -> tuple[str, ...]:
    """Every peer that can be asked for on a device, installed or not."""
    return (*IMPLEMENTATIONS, *(ADAPTERS if device.startswith("cuda") else ()))
