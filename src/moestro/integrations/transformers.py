"""Transformers' experts on Moestro: `experts_implementation="moestro"` (Transformers 5.7 and newer).

    import moestro.integrations.transformers as moestro_hf
    moestro_hf.register()                                  # once
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moestro")

Every experts module gets a FusedMoE at its first call, made from its own parameters: transposed and
interleaved layouts are put in order, and the activation is recognised by what the module's own gate computes.
With format="bf16" the values are the module's; "nvfp4" (or another format) quantises them. Where that, or a
backend's kernel layout, makes a copy, the module still has its own parameters. Parameters that were replaced
or written since are noticed, and the layer is made again. For inference: there is no derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface

from moestro.errors import BackendError
from moestro.kernels.activations import Activation, GeGLUTanh, ReLU2, SwiGLU
from moestro.moe.layer import FusedMoE
from moestro.moe.weights import ExpertWeights

NAME = "moestro"
LAYER = "_moestro_layer"  # in a module's __dict__, not among its submodules: it is no part of its state
PROBE_ROWS = 4


def register(name: str = NAME, *, format: str = "bf16", max_num_tokens: int = 8192, **options: Any) -> None:
    """Make an experts implementation known to Transformers under `name`.

    format: of the weights. max_num_tokens: the largest batch of a layer; longer ones are cut.
    options: further keywords of FusedMoE (backend=, input_format=, deterministic=, ...).
    """
    settings = {"format": format, "max_num_tokens": max_num_tokens, **options}

    def experts_forward(
        module: torch.nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        return _forward(module, hidden_states, top_k_index, top_k_weights, settings)

    ExpertsInterface.register(name, experts_forward)


def prepare(model: torch.nn.Module, top_k: int | None = None, **settings: Any) -> list[FusedMoE]:
    """Make the layers of all experts modules of a model now, and not at their first calls; for tuning ahead.

    top_k: by default the model's config.num_experts_per_tok. settings: as in register().
    """
    top_k = top_k or model.config.num_experts_per_tok  # type: ignore[union-attr,assignment]
    modules = [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]
    return [_layer_of(module, int(top_k), settings) for module in modules]  # type: ignore[arg-type]


@dataclass
class _Made:
    """A layer, and what it was made from."""

    layer: FusedMoE
    sources: tuple[tuple[int, int], ...]  # (address, version) of the module's parameters
    settings: dict[str, Any]


def _forward(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,  # [N, H]
    top_k_index: torch.Tensor,  # [N, K]
    top_k_weights: torch.Tensor,  # [N, K], in any floating dtype
    settings: dict[str, Any],
) -> torch.Tensor:
    layer = _layer_of(module, top_k_index.shape[-1], settings)
    x, ids, weights = hidden_states.contiguous(), top_k_index.contiguous(), top_k_weights.float().contiguous()
    size = layer.max_num_tokens
    if len(x) <= size:
        return layer(x, ids, weights)  # type: ignore[no-any-return]
    cuts = [slice(at, at + size) for at in range(0, len(x), size)]
    return torch.cat([layer(x[cut], ids[cut], weights[cut]) for cut in cuts])


def _layer_of(module: torch.nn.Module, top_k: int, settings: dict[str, Any]) -> FusedMoE:
    made: _Made | None = module.__dict__.get(LAYER)
    if torch.compiler.is_compiling() and made is not None:
        return made.layer
    sources = tuple((p.data_ptr(), p._version) for p in module.parameters())
    if made is None or made.sources != sources or made.settings != settings or made.layer.top_k != top_k:
        made = _Made(_make_layer(module, top_k, settings), sources, settings)
        module.__dict__[LAYER] = made
    return made.layer


def _make_layer(module: Any, top_k: int, settings: dict[str, Any]) -> FusedMoE:
    if getattr(module, "has_post_expert_norm", False):
        raise BackendError(f"{type(module).__name__} normalises after each expert, which moestro does not do")
    options = dict(settings)
    w = ExpertWeights.from_dense(
        _rows(
            module, "gate_up_proj" if module.has_gate else "up_proj", interleaved=not module.is_concatenated
        ),
        _rows(module, "down_proj"),
        options.pop("format", "bf16"),
        gate_up_bias=_bias(module, "gate_up_proj" if module.has_gate else "up_proj"),
        down_bias=_bias(module, "down_proj"),
    )
    return FusedMoE(w, top_k, activation=_activation(module, w), **options)


def _rows(module: Any, name: str, interleaved: bool = False) -> torch.Tensor:
    """A parameter as [E, out, in], gate rows before up rows; itself where it is that already."""
    weight: torch.Tensor = getattr(module, name).detach()
    weight = weight.mT if module.is_transposed else weight
    if interleaved and module.has_gate:
        weight = torch.cat([weight[:, 0::2], weight[:, 1::2]], dim=1)
    return weight.contiguous()


def _bias(module: Any, name: str) -> torch.Tensor | None:
    if not module.has_bias:
        return None
    bias: torch.Tensor = getattr(module, f"{name}_bias").detach()
    if name == "gate_up_proj" and not module.is_concatenated:
        bias = torch.cat([bias[:, 0::2], bias[:, 1::2]], dim=1)
    return bias.contiguous()


def _activation(module: Any, w: ExpertWeights) -> Activation:
    """The activation of ours that computes what the module's gate does, found by comparing them."""
    columns = w.intermediate_size * (2 if w.gated else 1)
    h = torch.linspace(-12, 12, PROBE_ROWS * columns, device=w.device).view(PROBE_ROWS, columns)
    h = h[:, torch.randperm(columns, generator=torch.Generator().manual_seed(0)).to(w.device)]
    theirs = h
    if w.gated and not module.is_concatenated:
        theirs = torch.stack(h.chunk(2, dim=-1), dim=-1).flatten(-2)  # gate, up, gate, up, ...
    with torch.no_grad():
        expected = module._apply_gate(theirs) if w.gated else module.act_fn(theirs)
    for candidate in _candidates(module):
        if candidate.gated == w.gated and torch.allclose(candidate(h), expected, rtol=1e-4, atol=1e-5):
            return candidate
    raise BackendError(f"{type(module).__name__} has an activation that moestro does not know")


def _candidates(module: Any) -> Iterator[Activation]:
    yield from (SwiGLU(), GeGLUTanh(), ReLU2())
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    if alpha is not None or limit is not None:
        for shift in (1.0, 0.0):
            yield SwiGLU(alpha=1.0 if alpha is None else float(alpha), limit=limit, up_shift=shift)
