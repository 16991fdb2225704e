"""The core's NEON kernels, and plain C++ on 64-bit ARM: the tests of this machine's instruction sets, run under qemu.

"neon_bf16" has all tables of "neon_dot" and one more, from the same text: these two and plain C++ are held by a few
tests, unless MOESTRO_TEST_ARM=all asks for every test on all four (twice the time).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from cpu_cases import INVARIANT, TACTICS, Case, relative_error, rows_alone, run
from emulated import EmulatedCore

# These take the fixture `isa` of the module that they are in: here, ARM's.
from test_correct import (  # noqa: F401
    GPT_OSS,
    TOLERANCE,
    test_a_float16_intermediate_beyond_its_range_is_kept,
    test_a_token_may_name_an_expert_more_than_once,
    test_activations_and_biases,
    test_an_expert_may_get_all_tokens_and_others_none,
    test_decoding_first_is_exact_for_every_code_and_scale,
    test_every_e4m3_code_is_decoded_exactly,
    test_every_number_of_tokens_in_a_unit,
    test_every_path_agrees_with_the_reference,
    test_every_value_of_the_type_survives,
    test_float16_and_float32_lose_nothing_to_bf16,
    test_fp8_blocks_at_odd_edges,
    test_gpt_oss_in_its_own_format,
    test_ids_out_of_any_range_are_ignored,
    test_infinities_and_nan_do_not_vanish,
    test_no_tokens,
    test_pairs_of_other_ranks_contribute_nothing,
    test_sizes_that_fill_no_tile,
    test_subnormal_block_scales_survive,
    test_the_number_of_threads_changes_no_bit,
    test_weights_beyond_floats_decode_to_infinity,
)
from test_integers import (  # noqa: F401
    test_int8_is_what_the_reference_defines,
    test_int8_of_zeros_infinity_and_nan,
    test_int8_without_a_gate_and_with_an_odd_number_of_halves,
)
from test_sanitized import setup_module_of_the_package

from moestro import ExpertWeights
from moestro.formats import INT4
from moestro.kernels.cpu import CpuRunner, core

ALL = ("generic", "neon", "neon_dot", "neon_bf16")
ISAS = ALL if os.environ.get("MOESTRO_TEST_ARM") == "all" else ("neon", "neon_bf16")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not())),
    pytest.mark.usefixtures("one_torch_thread"),  # a test of threads asks for its own
]


@pytest.fixture(scope="session")
def arm_program() -> Path:
    with pytest.MonkeyPatch.context() as patch:
        build = setup_module_of_the_package(patch)
        patch.setattr("platform.machine", lambda: "aarch64")
        return emulated.program(build)


@pytest.fixture(scope="session")
def arm(arm_program: Path) -> Iterator[EmulatedCore]:
    made = EmulatedCore(arm_program, core.load())
    yield made
    made.close()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, arm: EmulatedCore, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(core, "load", lambda: arm)
    monkeypatch.setenv(core.ISA_VARIABLE, request.param)
    return str(request.param)


@pytest.mark.parametrize("isa", [name for name in ALL if name not in ISAS], indirect=True)
@pytest.mark.parametrize("num_tokens", [1, 21])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fmt", core.FORMATS)
def test_the_other_instruction_sets_agree_with_the_reference(
    isa: str, fmt: str, dtype: torch.dtype, num_tokens: int
) -> None:
    case = Case(fmt, 96, 160, activation=GPT_OSS, biases=True, dtype=dtype)
    w, call = case.weights(), case.call(num_tokens)
    runner, expected = CpuRunner(case.problem, w), case.expected(call, w)
    errors = {tactic: relative_error(run(runner, call, tactic), expected) for tactic in TACTICS}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ("max", ("neon_bf16", "neon_dot", "neon", "generic", "amx_emulated")),
        ("neoverse-n1", ("neon_dot", "neon", "generic", "amx_emulated")),
        ("cortex-a53", ("neon", "generic", "amx_emulated")),
    ],
)
def test_a_processor_has_the_instruction_sets_that_it_says(
    arm_program: Path, processor: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = EmulatedCore(arm_program, core.load(), processor)
    monkeypatch.setattr(core, "load", lambda: made)
    monkeypatch.delenv(core.ISA_VARIABLE, raising=False)
    assert core.available_isas() == expected
    assert core.choose_isa() == expected[0]
    case = Case()
    call, w = case.call(5), case.weights()  # and the fastest of them runs on it
    assert relative_error(run(CpuRunner(case.problem, w), call), case.expected(call, w)) < TOLERANCE
    made.close()


@pytest.mark.parametrize("isa", ALL[1:], indirect=True)
@pytest.mark.parametrize("num_tokens", [1, 5, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_every_path_gives_the_same_bits(isa: str, fmt: str, dtype: torch.dtype, num_tokens: int) -> None:
    """What is decoded in registers and what is decoded first: the same products, added in the same order."""
    case = Case(fmt, 544, 96, experts=2, top_k=2, activation=GPT_OSS, dtype=dtype)
    runner, call = CpuRunner(case.problem, case.weights()), case.call(num_tokens)
    first, *others = (run(runner, call, tactic) for tactic in TACTICS)
    assert all(torch.equal(first, y) for y in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("fmt", "input_format"), INVARIANT)
def test_rows_do_not_depend_on_the_batch(
    isa: str, fmt: str, input_format: str | None, dtype: torch.dtype
) -> None:
    case = Case(fmt, 96, 160, dtype=dtype, input_format=input_format, batch_invariant=True, biases=True)
    runner, call = CpuRunner(case.problem, case.weights()), case.call(11)
    alone = rows_alone(runner, call)
    for tactic in TACTICS:
        assert torch.equal(alone, run(runner, call, tactic)), tactic


@pytest.mark.parametrize("isa", ALL, indirect=True)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_type", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int4_with_any_codes_scales_and_zero_points(
    isa: str, dtype: torch.dtype, scale_type: torch.dtype, symmetric: bool
) -> None:
    """gate_up and down have groups of their own, the one's longer than a piece that is decoded."""
    g = torch.Generator().manual_seed(1)

    def drawn(rows: int, columns: int, group: int) -> INT4:
        packed = torch.randint(0, 256, (3, rows, columns // 2), dtype=torch.uint8, generator=g)
        scale = (torch.rand(3, rows, columns // group, generator=g) + 0.1) * columns**-0.5 / 4
        zero = torch.randint(0, 17, scale.shape, dtype=torch.uint8, generator=g)
        return INT4.of(packed, scale.to(scale_type), None if symmetric else zero)

    case = Case("int4", 768, 96, experts=3, top_k=2, dtype=dtype)
    w = ExpertWeights(drawn(192, 768, 768), drawn(768, 96, 32))
    runner = CpuRunner(case.problem, w)
    for num_tokens in (1, 19):
        call = case.call(num_tokens)
        expected = case.expected(call, w)
        errors = {tactic: relative_error(run(runner, call, tactic), expected) for tactic in TACTICS}
        assert max(errors.values()) < (TOLERANCE if dtype == torch.bfloat16 else 2e-6), errors


@pytest.mark.parametrize("outlier", ["none", "a channel", "all bits set"])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_products_in_two_planes_of_bytes_are_within_1e_3_of_exact_ones(
    arm: EmulatedCore, fmt: str, outlier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As int16 of AVX2 is: where they differ, it tips a rounding of the intermediate or the result to bf16 over."""
    monkeypatch.setattr(core, "load", lambda: arm)
    case = Case(fmt, 96, 160, activation=GPT_OSS)
    x, ids, weights = case.call(19)
    if outlier == "a channel":
        x[:, 7] *= 50  # as those of real models
    if outlier == "all bits set":  # its integer would need 128 in the first plane; it is halved
        x[3:9, 5] = 1.9921875 * 4
        x[9:14, 21] = -1.9921875 * 4
        x[14:, :16] = 1.9921875
    found = []
    for forced in ("generic", "neon_dot"):
        monkeypatch.setenv(core.ISA_VARIABLE, forced)
        runner = CpuRunner(case.problem, case.weights())
        found.append(run(runner, (x, ids, weights)).float())
    assert runner.arithmetic == "int16"
    assert relative_error(found[1], found[0]) < 1e-3


def test_packing_gives_the_same_panels(arm: EmulatedCore) -> None:
    g = torch.Generator().manual_seed(1)
    for gated in (False, True):
        bf16 = torch.randint(0, 1 << 15, (64, 48), generator=g).to(torch.int16)
        fp8 = torch.randint(0, 256, (64, 48), generator=g).to(torch.uint8)
        scale = torch.randint(0, 127, (64, 3), generator=g).to(torch.uint8)
        codes = torch.randint(0, 256, (64, 24), generator=g).to(torch.uint8)
        here = [torch.empty_like(t) for t in (bf16, fp8, codes, scale)]
        native = core.load()
        native.moestro_cpu_pack_bf16(here[0].data_ptr(), bf16.data_ptr(), 64, 48, gated, 1)
        native.moestro_cpu_pack_fp8(here[1].data_ptr(), fp8.data_ptr(), 64, 48, gated, 1)
        pointers = (t.data_ptr() for t in (here[2], here[3], codes, scale))
        native.moestro_cpu_pack_fp4(*pointers, 64, 48, 16, gated, 1)
        there = (
            arm.pack(emulated.PACK_BF16, bf16, None, gated, 48),
            arm.pack(emulated.PACK_FP8, fp8, None, gated, 48),
            arm.pack(emulated.PACK_FP4, codes, scale, gated, 48),
        )
        expected = [bytes(t.view(torch.uint8).numpy().tobytes()) for t in here]
        assert there == (expected[0], expected[1], expected[2] + expected[3])


@pytest.mark.parametrize(
    ("forced", "arithmetics"),
    [
        ("generic", {"float32"}),
        ("neon", {"float32", "int8"}),
        ("neon_dot", {"float32", "int16", "int8"}),
        ("neon_bf16", {"float32", "bf16", "int16", "int8"}),
    ],
)
def test_each_arithmetic_in_use_has_a_rate(arm: EmulatedCore, forced: str, arithmetics: set[str]) -> None:
    assert {name for name in core.ARITHMETICS if arm.rate(forced, name) > 0} == arithmetics


def problems() -> list[Any]:
    kinds = [(fmt, None) for fmt in core.FORMATS] + [("nvfp4", "int8"), ("mxfp4", "int8")]
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return [Case(fmt, 96, 160, dtype=dtype, input_format=how) for fmt, how in kinds for dtype in dtypes]


@pytest.mark.parametrize("case", problems(), ids=lambda case: f"{case.fmt}-{case.dtype}-{case.input_format}")
def test_the_arithmetic_that_is_stated_has_a_rate(isa: str, arm: EmulatedCore, case: Case) -> None:
    """`moestro bench` holds a row against the rate of what its runner says it multiplies with."""
    stated = CpuRunner(case.problem, case.weights()).arithmetic
    assert arm.rate(isa, stated) > 0 or (isa, stated) == ("generic", "int8")
