"""Routing distributions: which experts the tokens of a synthesised batch go to.

A distribution gives every token top_k distinct experts. Popularities p [E] become ids by the Gumbel top-k
trick (Kool et al., arXiv 1903.06059): the k largest of log p + Gumbel noise are k draws without replacement,
each proportional to p among the experts that are left. An expert's load is at most 1/top_k of the pairs, so
loads are flatter than the popularities, the more the larger top_k / num_experts.

All draws come from numpy's PCG64 seeded by `seed`, so that machines agree. For all but Balanced the first tokens of
a larger sample are the smaller sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from moestro.errors import RoutingError, as_count
from moestro.routing.router import check_top_k

CHUNK = 1 << 21  # noise values drawn at once: 8 MiB, whatever the number of tokens


@runtime_checkable
class Distribution(Protocol):
    """Where the tokens of a batch go."""

    @property
    def name(self) -> str:
        """The distribution and its parameters, as keys and reports show it."""

    def sample(self, num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
        """int32 [N, K] on the CPU, distinct experts per token, the same for the same arguments.

        Raises RoutingError unless 1 <= top_k <= num_experts and num_tokens >= 0.
        """


@dataclass(frozen=True)
class Balanced:
    """Every expert has the same number of pairs, give or take one; tokens and neighbours are shuffled."""

    @property
    def name(self) -> str:
        return "balanced"

    def sample(self, num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
        """int32 [N, K]; see Distribution."""
        check_sample(num_tokens, num_experts, top_k, seed)
        rng = np.random.default_rng(seed)
        # Dealt out in one fixed order, each token gets top_k consecutive experts: distinct, and even.
        dealt = np.arange(num_tokens * top_k, dtype=np.int64) % num_experts
        ids = rng.permutation(num_experts).astype(np.int32)[dealt].reshape(num_tokens, top_k)
        return torch.from_numpy(rng.permutation(ids))


@dataclass(frozen=True)
class Uniform:
    """Every token draws its experts independently, all equally likely."""

    @property
    def name(self) -> str:
        return "uniform"

    def sample(self, num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
        """int32 [N, K]; see Distribution."""
        check_sample(num_tokens, num_experts, top_k, seed)
        return gumbel_top_k(np.zeros(num_experts), num_tokens, top_k, np.random.default_rng(seed))


@dataclass(frozen=True)
class Zipf:
    """The r-th most popular expert has popularity proportional to r^-alpha; which expert that is, the seed
    says.

    alpha 0 is uniform. Raises RoutingError unless alpha is finite and not negative.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not (_is_number(self.alpha) and math.isfinite(self.alpha) and self.alpha >= 0):
            raise RoutingError(f"alpha of Zipf must be finite and at least 0, got {self.alpha!r}")

    @property
    def name(self) -> str:
        return f"zipf({float(self.alpha)})"

    def sample(self, num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
        """int32 [N, K]; see Distribution."""
        check_sample(num_tokens, num_experts, top_k, seed)
        rng = np.random.default_rng(seed)
        rank = 1 + rng.permutation(num_experts)
        return gumbel_top_k(-self.alpha * np.log(rank), num_tokens, top_k, rng)


@dataclass(frozen=True)
class Dirichlet:
    """Popularities drawn from a symmetric Dirichlet whose effective number of experts is about a fraction of
    them.

    The effective number is 1 / Σ p². For concentration c, E[Σ p²] = (c + 1) / (c·E + 1), so that c = (f·E -
    1) / (E·(1 - f)) makes it f·E in expectation; f = 1 is uniform. One draw of p serves all tokens.

    Raises RoutingError unless 0 < effective_fraction <= 1, and in sample() where f·E is not above 1 expert.
    """

    effective_fraction: float = 0.5

    def __post_init__(self) -> None:
        if not (_is_number(self.effective_fraction) and 0 < self.effective_fraction <= 1):
            raise RoutingError(
                f"effective_fraction of Dirichlet must be in (0, 1], got {self.effective_fraction!r}"
            )

    @property
    def name(self) -> str:
        return f"dirichlet({float(self.effective_fraction)})"

    def sample(self, num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
        """int32 [N, K]; see Distribution."""
        check_sample(num_tokens, num_experts, top_k, seed)
        rng = np.random.default_rng(seed)
        return gumbel_top_k(self.log_popularity(num_experts, rng), num_tokens, top_k, rng)

    def log_popularity(self, num_experts: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """log p [E] but for a constant."""
        f = self.effective_fraction
        if f == 1:
            return np.zeros(num_experts)
        if f * num_experts <= 1:
            raise RoutingError(
                f"effective_fraction · num_experts must be above 1 expert, got {f} · {num_experts}"
            )
        concentration = (f * num_experts - 1) / (num_experts * (1 - f))
        # A Gamma(c) variable is Gamma(c + 1) · U^(1/c): in logarithms a tiny c does not underflow.
        log_u = -rng.standard_exponential(num_experts)
        return np.asarray(np.log(rng.gamma(concentration + 1, size=num_experts)) + log_u / concentration)


@dataclass(frozen=True)
class Correlated:
    """Tokens that follow each other share experts, as those of one sequence do in a verify step of speculative
    decoding: a token keeps each of its predecessor's experts with probability `overlap`.

    The others are drawn from all that it does not keep, all equally likely: 0 is uniform, 1 sends every token to the
    first one's experts. N tokens go to about K + (N - 1) · (1 - overlap) · K different experts, as long as that is
    small beside E. Raises RoutingError unless 0 <= overlap <= 1.
    """

    overlap: float = 0.5

    def __post_init__(self) -> None:
        if not (_is_number(self.overlap) and 0 <= self.overlap <= 1):
            raise RoutingError(f"overlap of Correlated must be in [0, 1], got {self.overlap!r}")

    @property
    def name(self) -> str:
        return f"correlated({float(self.overlap)})"

    def sample(self, num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
        """int32 [N, K]; see Distribution. An expert that is kept keeps its place in the row."""
        check_sample(num_tokens, num_experts, top_k, seed)
        rng = np.random.default_rng(seed)
        ids = np.empty((num_tokens, top_k), dtype=np.int32)
        for n in range(num_tokens):
            kept = rng.random(top_k) < self.overlap if n else np.zeros(top_k, dtype=bool)
            order = rng.permutation(num_experts)
            if n:
                ids[n] = ids[n - 1]
                order = order[~np.isin(order, ids[n, kept])]
            ids[n, ~kept] = order[: top_k - kept.sum()]
        return torch.from_numpy(ids)


def gumbel_top_k(
    log_popularity: npt.NDArray[np.float64], num_tokens: int, top_k: int, rng: np.random.Generator
) -> torch.Tensor:
    """int32 [N, K]: for each token top_k draws without replacement, in the order drawn."""
    num_experts = len(log_popularity)
    logits = torch.from_numpy(log_popularity - log_popularity.max()).float()
    ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device="cpu")
    step = max(1, CHUNK // num_experts)
    for start in range(0, num_tokens, step):
        rows = min(step, num_tokens - start)
        noise = torch.from_numpy(rng.standard_exponential((rows, num_experts), dtype=np.float32))
        # -log of an exponential variable is Gumbel noise.
        ids[start : start + rows] = torch.sub(logits, noise.log_(), out=noise).topk(top_k, dim=-1).indices
    return ids


def sample_weights(num_tokens: int, top_k: int, seed: int = 0) -> torch.Tensor:
    """Routing weights float32 [N, K] like a router's: softmax of normal logits, largest first."""
    check_sample(num_tokens, top_k, top_k)
    logits = np.random.default_rng(seed).standard_normal((num_tokens, top_k), dtype=np.float32)
    return torch.softmax(torch.from_numpy(logits), dim=-1).sort(dim=-1, descending=True).values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_sample(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> None:
    """RoutingError unless num_tokens tokens can have top_k distinct of num_experts experts, and seed is 0 or more."""
    as_count("seed", seed, RoutingError, least=0)
    if as_count("num_tokens", num_tokens, RoutingError, least=None) < 0:
        raise RoutingError(f"num_tokens must be at least 0, got {num_tokens}")
    check_top_k(top_k, as_count("num_experts", num_experts, RoutingError))
