"""The activation of ours that computes what an experts module's gate does.

Numbers (alpha, limits, shifts, caps) are read from the module and its config under whatever names they have there,
and every candidate they give is compared with the module's own gate, at values far beyond any clamp: a limit that
a probe does not reach would be lost without a word.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from moestro.errors import BackendError
from moestro.kernels.activations import Activation, ClampedSilu, GeGLUTanh, ReLU2, SoftcapSwiGLU, SwiGLU

# Magnitudes from far inside any clamp to far beyond: published limits are 7 to 30, activations reach hundreds.
MAGNITUDES = (0.0, 0.01, 0.3, 1.0, 2.5, 4.0, 6.5, 9.0, 13.0, 25.0, 60.0, 300.0, 3000.0, 40000.0)
WORDS = {
    "alpha": ("alpha", "beta"),
    "limit": ("limit", "clamp", "clip", "max_val"),
    "shift": ("shift", "offset"),
    "cap": ("cap",),
}


def activation_of(module: Any, *, gated: bool, concatenated: bool = True) -> Activation:
    """The activation for a Transformers experts module. Raises BackendError for one that moestro has not."""
    values = _values(module)
    h = _probe(gated, values)
    expected = _theirs(module, h, gated, concatenated)
    for candidate in _candidates(values):
        if candidate.gated == gated and _same(candidate(h), expected):
            return candidate
    raise BackendError(
        f"{type(module).__name__} has an activation that moestro does not know: "
        f"{_describe(module)}; it has SwiGLU (with alpha, limits and a shift), GeGLU (tanh), relu² without a gate, "
        "soft-capped SwiGLU and SwiGLU clamped after silu"
    )


def _probe(gated: bool, values: dict[str, list[float]]) -> torch.Tensor:
    """Rows of every pair (gate, up) of the magnitudes, with both signs, and just inside and outside each limit."""
    points = [*MAGNITUDES, *(f * v for v in values["limit"] + values["cap"] for f in (0.99, 1.01, 2.0))]
    points = sorted({sign * p for p in points for sign in (1.0, -1.0)})
    if not gated:
        return torch.tensor([points, points], dtype=torch.float32)
    pairs = torch.tensor(list(itertools.product(points, points)), dtype=torch.float32)
    return torch.cat([pairs[:, 0], pairs[:, 1]])[None].repeat(2, 1)  # [2, 2P]


def _theirs(module: Any, h: torch.Tensor, gated: bool, concatenated: bool) -> torch.Tensor:
    device = next(
        (t.device for t in [*module.parameters(), *module.buffers()] if t.device.type != "meta"), None
    )
    h = h.to(device or "cpu")
    with torch.no_grad(), torch.device(device or "cpu"):
        if not gated:
            return _on_host(module.act_fn(h))
        if not concatenated:
            h = torch.stack(h.chunk(2, dim=-1), dim=-1).flatten(-2)  # gate, up, gate, up, ...
        return _on_host(module._apply_gate(h))


def _on_host(value: torch.Tensor) -> torch.Tensor:
    return value.float().cpu()


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


def _candidates(values: dict[str, list[float]]) -> Iterator[Activation]:
    yield from (SwiGLU(), GeGLUTanh(), ReLU2())
    limits: list[float | None] = [None, *values["limit"]]
    for alpha, limit, shift in itertools.product(
        [1.0, *values["alpha"]], limits, [0.0, 1.0, *values["shift"]]
    ):
        yield SwiGLU(alpha=alpha, limit=limit, up_shift=shift)
    for limit in values["limit"]:
        yield ClampedSilu(limit)
    for gate_cap, up_cap in itertools.product(values["cap"], values["cap"]):
        yield SoftcapSwiGLU(gate_cap, up_cap)


def _values(module: Any) -> dict[str, list[float]]:
    """Numbers by what they may be: attributes of the module, of its activation and of its config."""
    found: dict[str, list[float]] = {kind: [] for kind in WORDS}
    parts = [module, getattr(module, "act_fn", None), getattr(module, "config", None)]
    parts += [child for child in getattr(parts[1], "_modules", {}).values() if child is not None]
    for part in parts:
        for name, value in _attributes(part):
            for kind, words in WORDS.items():
                if any(word in name.lower() for word in words) and value not in found[kind]:
                    found[kind].append(value)
    return found


def _attributes(part: Any) -> Iterator[tuple[str, float]]:
    for name, value in list(getattr(part, "__dict__", {}).items()):
        numbers = value if isinstance(value, list | tuple) and len(value) <= 512 else [value]
        for number in numbers:  # a limit per layer, too
            if isinstance(number, int | float) and not isinstance(number, bool) and number == number:
                yield name, abs(float(number))


def _describe(module: Any) -> str:
    act = getattr(module, "act_fn", None)
    return type(act).__name__ if isinstance(act, torch.nn.Module) else str(act)
