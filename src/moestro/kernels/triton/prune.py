"""Which tactics are worth measuring: those whose estimate is within FACTOR of the smallest.

The estimate (tactics.cost) is a roofline, and wrong by up to 1.3 in favour of a slower tactic: in 36 measured
cells of three models from 1 to 16384 tokens the best one was always kept from a factor of 1.27 on
(benchmarks/results/h100-candidates.json; `moestro bench recall` computes it, tests/bench/test_recall.py fails
if a measured best would be dropped). The rest is margin for sizes and kernels that were not measured. What is
left out can still be run, by name.
"""

from __future__ import annotations

from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import tactics
from moestro.kernels.triton.tactics import Tactic

FACTOR = 1.5


def worth_measuring(problem: MoeProblem, num_tokens: int) -> list[Tactic]:
    """The candidates within FACTOR of the smallest estimate, that one first."""
    found = tactics.candidates(problem, num_tokens)
    estimates = [tactics.cost(problem, tactic, num_tokens) for tactic in found]
    limit = FACTOR * min(estimates, default=0.0)
    return [tactic for tactic, estimate in zip(found, estimates, strict=True) if estimate <= limit]
