"""What triton_kernels' routing and products take as Triton functions: which experts a token has, and SiLU.

`bits` packs the ids that are given into the package's bit matrix (its own router makes it from logits). `silu` is
the activation that its product applies in the epilogue, of columns gate, up, gate, up, …
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["bits", "silu"]

TOKENS = 128  # of one program


@triton.jit(do_not_specialize=["N"])
def _bits(ids, words, N, K: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1)
    word = tl.zeros((TOKENS,), tl.int32)
    for k in range(K):
        expert = tl.load(ids + token * K + k, token < N, other=-1)
        word |= tl.where((expert >> 5) == column, 1 << (expert & 31), 0)
    tl.store(words + token * COLUMNS + column, word, token < N)


def bits(ids: torch.Tensor, words: torch.Tensor) -> None:
    """words [N, ⌈E/32⌉] int32: bit e % 32 of words[n, e // 32] is set if expert e is among ids[n] (int32 [N, K])."""
    tokens, top_k = ids.shape
    grid = (triton.cdiv(tokens, TOKENS), words.shape[1])
    _bits[grid](ids, words, tokens, K=top_k, COLUMNS=words.shape[1], TOKENS=TOKENS)


@triton.jit
def silu(input):
    gate, up = tl.split(tl.reshape(input, (input.shape[0], input.shape[1] // 2, 2)))
    gate = gate.to(tl.float32)
    return gate / (1 + tl.exp(-gate)) * up.to(tl.float32)
