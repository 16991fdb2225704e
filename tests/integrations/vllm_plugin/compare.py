"""Two runs of vLLM side by side.

Experts of ours and vLLM's own round to bf16 at other places, so logprobs may differ by a step of the bf16 logits, and
tokens only where two are that near.
"""

from __future__ import annotations

from vllm_runs import Said

STEP = 0.0626  # two steps of a bf16 logit between 4 and 8


def equal_tokens(a: Said, b: Said) -> tuple[int, int]:
    """(equal up to the first difference of each prompt, all). Where they part, the best two must be near-ties."""
    equal = total = 0
    for mine, theirs, best in zip(a.tokens, b.tokens, a.best, strict=True):
        total += len(mine)
        same = next(
            (i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), len(mine)
        )
        equal += same
        if same < len(mine):
            (first, _), (second, _) = best[same]
            assert first - second <= STEP, f"parts at token {same} with a gap of {first - second}"
    return equal, total


def worst_logprob(a: Said, b: Said) -> float:
    """The largest difference of a token's logprob under the same context."""
    worst = 0.0
    for x, y, p, q in zip(a.tokens, b.tokens, a.best, b.best, strict=True):
        for i in range(len(x)):
            mine, theirs = ({token: logprob for logprob, token in steps[i]} for steps in (p, q))
            worst = max([worst, *(abs(mine[t] - theirs[t]) for t in mine.keys() & theirs.keys())])
            if x[i] != y[i]:
                break
    return worst


def assert_same(a: Said, b: Said) -> None:
    equal, total = equal_tokens(a, b)
    worst = worst_logprob(a, b)
    print(f"{equal} of {total} tokens equal, logprobs within {worst:.4f}")
    assert worst <= STEP


def serves(said: Said, kind: str) -> bool:
    return f"moestro: serves {kind} experts" in said.log


def assert_equal(a: Said, b: Said) -> None:
    """In float32: at least 99 % of the tokens, and logprobs within 1e-3."""
    equal, total = equal_tokens(a, b)
    worst = worst_logprob(a, b)
    print(f"{equal} of {total} tokens equal, logprobs within {worst:.6f}")
    assert equal >= 0.99 * total
    assert worst <= 1e-3
