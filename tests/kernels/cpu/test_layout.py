"""Panels hold exactly the checkpoint's values, in as many bytes; packing needs little memory beside them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cpu_cases import Case, relative_error, run, with_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.errors import DTypeError, FormatError, ShapeError
from moestro.formats import BF16, MXFP4, NVFP4, FormatTensor, FP8Block
from moestro.kernels.cpu import CpuRunner, layout


def random_nvfp4(experts: int, rows: int, columns: int, seed: int = 0) -> NVFP4:
    g = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (experts, rows, columns // 2), generator=g, dtype=torch.uint8)
    scale = torch.randint(0, 127, (experts, rows, columns // 16), generator=g, dtype=torch.uint8)
    return NVFP4(packed, scale.view(torch.float8_e4m3fn), torch.rand(experts, 2, generator=g))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(0, 10**6))
def test_packing_and_unpacking_nvfp4_gives_the_same_bits(
    experts: int, rows: int, columns: int, gated: bool, seed: int
) -> None:
    source = random_nvfp4(experts, 32 * rows, 16 * columns, seed)
    panels = layout.pack(source, gated)
    back = panels.to_checkpoint()
    assert panels.shape == source.shape
    assert torch.equal(back.packed, source.packed)
    assert torch.equal(back.scale.view(torch.uint8), source.scale.view(torch.uint8))
    assert torch.equal(back.global_scale, source.global_scale)
    assert torch.equal(panels.dequantize(), source.dequantize())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_packing_and_unpacking_mxfp4_gives_the_same_bits(
    experts: int, rows: int, columns: int, gated: bool
) -> None:
    packed = torch.randint(0, 256, (experts, 32 * rows, 16 * columns), dtype=torch.uint8)
    scale = torch.randint(0, 255, (experts, 32 * rows, columns), dtype=torch.uint8)
    panels = layout.pack(MXFP4(packed, scale), gated)
    back = panels.to_checkpoint()
    assert panels.shape == (experts, 32 * rows, 32 * columns)
    assert torch.equal(back.packed, packed)
    assert torch.equal(back.scale, scale)
    assert torch.equal(panels.expert(0).to_checkpoint().packed, packed[0])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 18), st.booleans(), st.integers(0, 10**6))
def test_packing_and_unpacking_fp8_blocks_gives_the_same_bits(
    experts: int, rows: int, columns: int, gated: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    shape = (experts, 32 * rows, 16 * columns)
    data = torch.randint(0, 255, shape, generator=g, dtype=torch.uint8)
    data[(data & 0x7F) == 0x7F] = 0x81
    blocks = (experts, -(-shape[1] // 128), -(-shape[2] // 128))
    source = FP8Block(data.view(torch.float8_e4m3fn), torch.rand(blocks, generator=g))
    panels = layout.pack(source, gated)
    back = panels.to_checkpoint()
    assert panels.shape == source.shape
    assert torch.equal(back.data.view(torch.uint8), data)
    assert torch.equal(back.scale_inv, source.scale_inv)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_packing_and_unpacking_bf16_gives_the_same_bits(
    experts: int, rows: int, columns: int, gated: bool
) -> None:
    source = BF16(torch.randn(experts, 32 * rows, 16 * columns).bfloat16())
    panels = layout.pack(source, gated)
    assert panels.shape == source.shape
    assert torch.equal(panels.to_checkpoint().data, source.data)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fmt", ["nvfp4", "bf16"])
def test_an_expert_of_a_packed_tensor_is_that_of_the_source(fmt: str, gated: bool) -> None:
    source = random_nvfp4(3, 64, 48) if fmt == "nvfp4" else BF16(torch.randn(3, 64, 48).bfloat16())
    panels = layout.pack(source, gated)
    assert isinstance(panels, FormatTensor)
    assert torch.equal(panels.expert(1).dequantize(), source.expert(1).dequantize())
    assert torch.equal(panels.to("cpu").dequantize(), source.dequantize())


def test_packed_weights_take_no_more_bytes_but_a_float_per_row() -> None:
    source = random_nvfp4(4, 64, 96)
    assert layout.pack(source, True).nbytes == source.nbytes + 4 * 4 * 64
    dense = BF16(torch.randn(4, 64, 96).bfloat16())
    assert layout.pack(dense, True).nbytes == dense.nbytes


@pytest.mark.parametrize("fmt", ["nvfp4", "bf16"])
def test_a_runner_on_prepared_weights_gives_the_same_bits_and_copies_nothing(fmt: str) -> None:
    case = Case(fmt)
    w, call = case.weights(), case.call(11)
    prepared = w.with_tensors(*CpuRunner.prepare(case.problem, w))
    assert prepared.layout == "cpu_panels"
    runner = CpuRunner(with_layout(case.problem, prepared), prepared)
    assert runner._weights[0] is prepared.gate_up
    assert torch.equal(run(CpuRunner(case.problem, w), call), run(runner, call))
    assert torch.equal(prepared.dequantize()[0], w.dequantize()[0])


def test_donated_weights_hold_the_same_values() -> None:
    case = Case()
    w, plain = case.fresh_weights(), case.weights()
    gate_up, down = CpuRunner.prepare(case.problem, w, donate=True)
    assert torch.equal(gate_up.dequantize(), plain.gate_up.dequantize())
    assert torch.equal(down.dequantize(), plain.down.dequantize())


def test_donating_part_of_a_tensor_leaves_the_rest_of_it_alone() -> None:
    both = torch.randn(2, 3, 256, 512).bfloat16()
    kept = both[1].clone()
    layout.pack(BF16(both[0]), True, donate=True)
    assert torch.equal(both[1], kept)


def test_experts_that_differ_from_the_first_are_an_error() -> None:
    packer = layout.Packer(2, False)
    packer.put(0, BF16(torch.zeros(32, 32).bfloat16()))
    with pytest.raises(ShapeError, match=r"\[32, 32\], got \[32, 64\]"):
        packer.put(1, BF16(torch.zeros(32, 64).bfloat16()))
    with pytest.raises(DTypeError, match="NVFP4"):
        packer.put(1, NVFP4.quantize(torch.zeros(32, 32)))
    with pytest.raises(ShapeError, match="got none"):
        layout.Packer(0, False).done()


def test_packing_holds_one_copy_and_of_donated_memory_no_second() -> None:
    """Measured on a process: the highest resident set while packing 64 MiB."""
    code = (
        "import resource, sys, torch\n"
        "from moestro.formats import BF16\n"
        "from moestro.kernels.cpu import layout\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "layout.pack(BF16(torch.zeros(1, 32, 32).bfloat16()), True)\n"
        "source = BF16(torch.ones(64, 512, 1024, dtype=torch.bfloat16))\n"
        "before = peak(); packed = layout.pack(source, True, sys.argv[1] == 'donate')\n"
        "print((peak() - before) / source.nbytes)\n"
        "assert bool((packed.data == 1).all())\n"
    )
    grown = {
        mode: float(
            subprocess.run([sys.executable, "-c", code, mode], capture_output=True, check=True).stdout
        )
        for mode in ("donate", "copy")
    }
    assert grown["donate"] < 0.2
    assert grown["copy"] < 1.2


def test_weights_that_change_in_place_are_packed_again() -> None:
    case = Case("bf16")
    w, call = case.fresh_weights(), case.call(4)
    runner = CpuRunner(case.problem, w)
    before = run(runner, call)
    w.down.data.mul_(2)
    assert torch.equal(before * 2, run(runner, call))


def test_runners_on_the_same_weights_share_one_packed_copy() -> None:
    w = Case().weights()
    first, second = (CpuRunner(Case().problem, w) for _ in range(2))
    assert first._weights[0] is second._weights[0]


def test_row_groups_keep_their_global_scales() -> None:
    case = Case()
    parts = [NVFP4.quantize(torch.randn(6, 48, 80) * s) for s in (1.0, 30.0)]
    down = NVFP4.quantize(torch.randn(6, 80, 48))
    w = case.weights().with_tensors(NVFP4.cat_rows(parts), down)
    call = case.call(5)
    y = run(CpuRunner(case.problem, w), call)
    assert relative_error(y, case.expected(call, w)) < 4e-3


def test_what_cannot_be_packed_says_why() -> None:
    with pytest.raises(ShapeError, match="divisible by 16"):
        layout.pack(BF16(torch.zeros(2, 24, 32).bfloat16()), False)
    with pytest.raises(ShapeError, match="divisible by 16"):
        layout.pack(BF16(torch.zeros(2, 48, 32).bfloat16()), True)
    with pytest.raises(DTypeError, match=r"float32"):
        layout.pack(BF16(torch.zeros(2, 32, 32)), False)
    bad = random_nvfp4(1, 32, 32)
    bad.scale.view(torch.uint8)[0, 3, 1] = 0x85
    with pytest.raises(FormatError, match="negative"):
        layout.pack(bad, False)
    nan = MXFP4(torch.zeros(1, 32, 16, dtype=torch.uint8), torch.full((1, 32, 1), 255, dtype=torch.uint8))
    with pytest.raises(FormatError, match="255"):
        layout.pack(nan, False)
    bad_fp8 = torch.zeros(1, 32, 32, dtype=torch.uint8)
    bad_fp8[0, 1, 2] = 0xFF
    with pytest.raises(FormatError, match="NaN"):
        layout.pack(FP8Block(bad_fp8.view(torch.float8_e4m3fn), torch.ones(1, 1, 1)), False)
