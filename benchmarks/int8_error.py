"""What int8 activations would cost in error: one layer with NVFP4 weights, exact, in bf16 and in int8 blocks.

    python benchmarks/int8_error.py

x and the intermediate are quantised symmetrically, to nearest, with one scale per 16 or 32 columns or per token. Prints
the relative error norm against float32 for activations like those of real models: heavy tails, channels of outliers.
"""

from __future__ import annotations

import torch

import moestro

E, K, H, I, N = 16, 4, 2048, 768, 32  # noqa: E741
WAYS = {"bf16": 0, "int8 per 16": 16, "int8 per 32": 32, "int8 per token": -1}


def main() -> None:
    torch.manual_seed(0)
    gate_up, down = torch.randn(E, 2 * I, H) / H**0.5, torch.randn(E, H, I) / I**0.5
    dense = moestro.ExpertWeights.from_dense(gate_up, down, "nvfp4").dequantize()
    weights, ids = torch.randn(N, E).softmax(-1).topk(K)
    weights /= weights.sum(-1, keepdim=True)
    for name, x in activations().items():
        x = (x / x.square().mean(-1, keepdim=True).sqrt()).bfloat16().float()
        exact = layer(x, ids, weights, dense, None)
        errors = {way: layer(x, ids, weights, dense, block) - exact for way, block in WAYS.items()}
        print(f"{name:24s}", *(f"{way} {float(e.norm() / exact.norm()):.4f}" for way, e in errors.items()))


def activations() -> dict[str, torch.Tensor]:
    normal = torch.randn(N, H)
    few, some = torch.ones(H), torch.ones(H)
    few[torch.randperm(H)[:8]] = 50
    some[torch.randperm(H)[: H // 16]] = 20
    return {
        "normal": normal,
        "Laplace": torch.distributions.Laplace(0.0, 1.0).sample((N, H)),
        "Student's t, 3 degrees": torch.distributions.StudentT(3.0).sample((N, H)),
        "lognormal channels": normal * torch.randn(H).exp(),
        "1/16 of channels x 20": normal * some,
        "8 channels x 50": normal * few,
    }


def layer(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    dense: tuple[torch.Tensor, torch.Tensor],
    block: int | None,
) -> torch.Tensor:
    """The layer in float32 with x and the intermediate rounded to bf16 (0), int8 blocks, or not at all (None)."""
    y = torch.zeros_like(x)
    for n, token in enumerate(rounded(x, block)):
        for k, e in enumerate(ids[n].tolist()):
            h = dense[0][e] @ token
            a = torch.nn.functional.silu(h[:I]) * h[I:]
            y[n] += weights[n, k] * (dense[1][e] @ rounded(a, block))
    return y


def rounded(x: torch.Tensor, block: int | None) -> torch.Tensor:
    if block is None:
        return x
    if block == 0:
        return x.bfloat16().float()
    blocks = x.unflatten(-1, (-1, block if block > 0 else x.shape[-1]))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((blocks / scale).round() * scale).flatten(-2)


if __name__ == "__main__":
    main()
