"""batch_invariant=True: a token's row has the same bits whatever else is in the batch, for every tactic."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import INVARIANT, TACTICS, Case, rows_alone, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_correct import GPT_OSS, ISAS

from moestro.kernels.cpu import CpuRunner, CpuTactic, core


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(core.ISA_VARIABLE, request.param)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("fmt", "input_format"), INVARIANT)
def test_rows_do_not_depend_on_the_batch(
    isa: str, fmt: str, input_format: str | None, dtype: torch.dtype
) -> None:
    case = Case(
        fmt,
        544,
        160,
        activation=GPT_OSS,
        dtype=dtype,
        input_format=input_format,
        batch_invariant=True,
        biases=True,
    )
    runner, call = CpuRunner(case.problem, case.weights()), case.call(53)
    alone = rows_alone(runner, call)
    tactics = [*TACTICS, *runner.get_valid_tactics([*call, None], None)]
    for tactic in tactics:
        assert torch.equal(alone, run(runner, call, tactic)), tactic


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_few_tokens_have_the_bits_they_have_without_it(isa: str, fmt: str) -> None:
    """Invariance is the path of few tokens for all of them: up to 24 of an expert it costs nothing (docs/cpu.md)."""
    if isa.startswith("amx"):
        pytest.skip("tiles are left alone only when invariance is asked for")
    results = []
    for invariant in (False, True):
        case = Case(
            fmt, 544, 160, activation=GPT_OSS, dtype=torch.float32, batch_invariant=invariant, biases=True
        )
        results.append(run(CpuRunner(case.problem, case.weights()), case.call(9)))
    assert torch.equal(*results)


@settings(max_examples=30, deadline=None)
@given(
    isa=st.sampled_from(ISAS or ("generic",)),
    fmt=st.sampled_from(["nvfp4", "bf16"]),
    num_tokens=st.integers(2, 60),
    seed=st.integers(0, 10**6),
    token_tile=st.integers(1, 40),
    row_tile=st.integers(1, 5),
    dequant_from=st.integers(1, 40),
    wave=st.integers(0, 60),
)
def test_order_chunks_and_neighbours_change_no_bit(
    isa: str, fmt: str, num_tokens: int, seed: int, **cut: int
) -> None:
    case = Case(fmt, 80, 48, experts=3, top_k=2, batch_invariant=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(core.ISA_VARIABLE, isa)
        runner = CpuRunner(case.problem, case.weights())
    call = case.call(num_tokens, seed)
    whole = run(runner, call)
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
    shuffled = run(runner, tuple(t[order].contiguous() for t in call), CpuTactic(**cut))
    assert torch.equal(whole[order], shuffled)
    at = seed % num_tokens
    parts = [tuple(t[piece] for t in call) for piece in (slice(0, at), slice(at, None))]
    assert torch.equal(whole, torch.cat([run(runner, part) for part in parts]))
