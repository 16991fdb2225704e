"""What experts' inputs reach on a text: the largest magnitude of x and of the intermediate, of every expert.

For the input scales that convert() writes (W4A4). The model runs Transformers' own experts, one expert at a time,
with their inputs looked at on the way; nothing is kept but two numbers an expert.
"""

from __future__ import annotations

from typing import Any

import torch

from moestro.errors import BackendError, FormatError
from moestro.integrations.transformers.modules import experts_modules, up_name

Calibration = dict[str, dict[str, torch.Tensor]]


def calibrate(model: Any, batches: list[torch.Tensor]) -> Calibration:
    """{experts module: {"gate_up": amax of x [E], "down": amax of the intermediate [E]}} over token ids [B, S]."""
    seen: Calibration = {}
    handles = []
    for name, module in experts_modules(model):
        seen[name] = {
            part: torch.zeros(module.num_experts, dtype=torch.float32) for part in ("gate_up", "down")
        }

        def look(m: Any, args: Any, kwargs: Any, found: dict[str, torch.Tensor] = seen[name]) -> None:
            values = [*args, *kwargs.values()]
            _look(m, values[0], values[1], found)

        handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
    if not handles:
        raise BackendError(f"{type(model).__name__} has no experts that run through Transformers' interface")
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _look(module: Any, x: torch.Tensor, ids: torch.Tensor, found: dict[str, torch.Tensor]) -> None:
    name = up_name(module)
    for e in torch.unique(ids).tolist():
        if e >= module.num_experts:
            continue  # a sentinel: an expert elsewhere
        rows = x[(ids == e).any(-1)]
        weight = getattr(module, name)[e]
        h = rows @ (weight if module.is_transposed else weight.T)
        if module.has_bias:
            h = h + getattr(module, f"{name}_bias")[e]
        act = module._apply_gate(h) if module.has_gate else module.act_fn(h)
        for part, values in (("gate_up", rows), ("down", act)):
            found[part][e] = torch.maximum(found[part][e], values.abs().amax().float().cpu())


def text_batches(tokenizer: Any, text: str, length: int = 512, batches: int = 16) -> list[torch.Tensor]:
    """Token ids [1, length] of a text, as many as there are, at most `batches`. FormatError where it has none."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise FormatError(f"the text must have at least one token, got none in {len(text)} characters")
    cuts = [ids[:, at : at + length] for at in range(0, ids.shape[1], length)]
    return [cut for cut in cuts if cut.shape[1]][:batches]
