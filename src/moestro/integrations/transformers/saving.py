"""What save_pretrained writes for packed experts: the layout that the model came in, or that its format has.

Packed Linear layers of the same format are written in the same layout. Those of another format, or with a scale of
their input (AWQ), are written dequantised; with those that are dense they are named in the config's list of modules
without quantisation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch

from moestro.checkpoints.writers import WRITERS, Writer, config_for, expert_tensors, writer_for
from moestro.errors import FormatError
from moestro.formats import INT4, FormatTensor
from moestro.integrations.transformers.bound import SIDE, bound_to
from moestro.integrations.transformers.linears import packed_linears
from moestro.integrations.transformers.modules import experts_modules
from moestro.integrations.transformers.packed import PREFIX
from moestro.moe.linear import PREFIX as LINEAR_PREFIX
from moestro.moe.linear import PackedLinear
from moestro.moe.weights import ExpertWeights

log = logging.getLogger("moestro")


def checkpoint_state(model: Any, raw: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(state dict with the experts in a checkpoint's layout, the quantisation config that says so)."""
    packed = {name: module for name, module in experts_modules(model) if _is_quantised(module)}
    state = {key: value for key, value in _plain_state(model).items() if not _below(key, packed)}
    written: set[str] = set()
    writer: Writer | None = None
    activations = False
    groups: set[tuple[int, bool]] = set()
    for name, module in packed.items():
        found = bound_to(module)
        assert found is not None
        w = found.weights.unpacked()
        writer = writer_for(_layout(raw, w.format), w.format)
        activations = activations or w.gate_up_input_scale is not None
        side = {part: getattr(w, part) for part in SIDE}
        side["up_has_down_pre_scale"] = w.up_has_down_pre_scale
        state.update(expert_tensors(writer, name, each(w), side, gated=w.gated))
        written.add(w.format)
        groups |= {(part.group, part.symmetric) for part in (w.gate_up, w.down) if isinstance(part, INT4)}
    if len(written) > 1:
        raise FormatError(
            f"experts of one checkpoint must have one format to be written, got {', '.join(written)}"
        )
    if len(groups) > 1:
        raise FormatError(
            f"int4 experts must have one (group, symmetric) to be written, got {sorted(groups)}"
        )
    group, symmetric = next(iter(groups), (32, True))
    linears = dict(packed_linears(model))
    if writer is None:
        writer = _writer_of_linears(linears.values(), raw)
    quantised = _put_linears(state, linears, writer)
    activations = activations or any(linears[name].input_scale is not None for name in quantised)
    excluded = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in quantised]
    config = None
    if writer is not None:
        config = config_for(writer, excluded, activations=activations, group=group, symmetric=symmetric)
    return state, config or raw


def _writer_of_linears(linears: Iterable[PackedLinear], raw: dict[str, Any]) -> Writer | None:
    """The row for a model without packed experts: of its Linear layers' first format."""
    for linear in linears:
        if linear.format != "bf16":
            return writer_for(_layout(raw, linear.format), linear.format)
    return None


def _put_linears(
    state: dict[str, torch.Tensor], linears: dict[str, PackedLinear], writer: Writer | None
) -> set[str]:
    """Packed Linear layers in a checkpoint's layout instead of ours; the names of those that are quantised there."""
    quantised = set()
    for name, linear in linears.items():
        for key in [key for key in state if key.startswith(f"{name}.{LINEAR_PREFIX}")]:
            del state[key]
        if linear.format == "bf16":
            continue
        if writer is None or linear.format != writer.format or linear.pre_scale is not None:
            state[f"{name}.weight"] = linear.dequantize()
            log.warning("%s: %s is written dequantised, as %s", name, linear.format, linear.dtype)
            continue
        pieces = writer.pieces(linear.unpacked())
        if linear.input_scale is not None:
            pieces |= writer.input_scale(linear.input_scale.clone())
        state.update({f"{name}.{suffix}": piece.contiguous() for suffix, piece in pieces.items()})
        quantised.add(name)
    return quantised


def each(w: ExpertWeights) -> Any:
    """(gate_up, down) of one expert after the other."""
    parts: list[FormatTensor] = [w.gate_up, w.down]
    for e in range(w.num_experts):
        yield tuple(part.expert(e) for part in parts)


def _is_quantised(module: Any) -> bool:
    found = bound_to(module)
    return found is not None and found.packed and found.weights.format != "bf16"


def _plain_state(model: Any) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def _below(key: str, names: Any) -> bool:
    return f".{PREFIX}" in key and any(key.startswith(f"{name}.{PREFIX}") for name in names)


def _layout(raw: dict[str, Any], format: str) -> str | None:
    """The layout that a config stands for, where it can hold the format."""
    method = str(raw.get("quant_method"))
    return method if (method, format) in WRITERS else None
