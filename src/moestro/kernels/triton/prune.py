"""Which tactics are worth measuring: those whose estimate is within FACTOR of the smallest.

The estimate (tactics.cost) is a roofline, and wrong by up to 1.32 in favour of a slower tactic: of 120 sizes of
eight models that were tuned without pruning, from 1 to 16384 tokens, a factor of 1.32 keeps the best one of all but
one, where the default is as fast (benchmarks/results/h200-tuning.json; `moestro bench recall` computes it,
tests/bench/test_recall.py fails if a measured best would be dropped). The rest is margin for sizes and kernels that
were not measured; each kernel costs tuning about 0.2 s. What is left out can still be run, by name.
"""

from __future__ import annotations

from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import tactics
from moestro.kernels.triton.tactics import Tactic

FACTOR = 1.4


def worth_measuring(problem: MoeProblem, num_tokens: int) -> list[Tactic]:
    """The candidates within FACTOR of the smallest estimate, that one first."""
    found = tactics.candidates(problem, num_tokens)
    estimates = [tactics.cost(problem, tactic, num_tokens) for tactic in found]
    limit = FACTOR * min(estimates, default=0.0)
    return [tactic for tactic, estimate in zip(found, estimates, strict=True) if estimate <= limit]
