"""4-bit weights decoded in registers beside FP8 products, on the CPU (gluon_machine.py), against their reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import gluon_machine
from test_kernels import inputs_of, make, poisoned

from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import choose
from moestro.kernels.triton.device import fp8 as fp8_device
from moestro.kernels.triton.device import fp8_registers as kernels
from moestro.kernels.triton.device.fp8 import Recipe, quantize_fp8
from moestro.kernels.triton.paths import fp8 as fp8_path
from moestro.kernels.triton.paths import fp8_registers as path
from moestro.kernels.triton.paths.fp8_registers import TABLE
from moestro.kernels.triton.tactic import Tactic
from moestro.moe import reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU itself: tests/gpu")

TOLERANCE = 1e-2
TILES = TABLE["fp8"]
ODD, TWO_STRIPS = (next(t for t in TILES if (t.pairs1, t.gemm1.warps) == size) for size in ((96, 8), (64, 4)))
WIDE = [t for t in TILES if t.pairs1 in (80, 128, 192)]


def name(tactic: Tactic) -> str:
    return "-".join(map(str, (tactic.pairs1, *tactic.gemm1, tactic.narrow or "whole")))


def turned(columns: int) -> torch.Tensor:
    """The column of each place of rows of whole blocks."""
    p = torch.arange(-(-columns // 128) * 128)
    return p // 128 * 128 + p // 4 % 4 * 32 + p // 32 % 4 * 8 + p // 16 % 2 * 4 + p % 4


class Quantize:
    """quantize_fp8 in torch: Triton's interpreter loses the carry where a mantissa is rounded up to a power of two."""

    __name__, params = "quantize_fp8", ()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(x: Any, ids: Any, pairs: Any, data: Any, scales: Any, columns: int, **meta: Any) -> None:
            assert grid == (len(data),)
            if meta["HOW"].gather:  # what no expert here reads is quantised, too
                x = x[pairs.long() // meta["HOW"].top_k]
            scale = (x.float().abs().amax(1) / 448).clamp(min=torch.finfo(torch.float32).tiny)
            scales.copy_(torch.where(x.float().abs().amax(1) == 0, 1.0, scale))
            full = torch.zeros(data.shape)
            full[:, :columns] = x.float() / scales[:, None]
            order = turned(columns) if meta["HOW"].turned else slice(columns)
            data.copy_(full[:, order].to(torch.float8_e4m3fn))

        return launch


@pytest.fixture
def on_machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    kernel = kernels.fp4_fp8_registers

    def start(seed: int, **mutants: tuple[str, str]) -> None:
        monkeypatch.setattr(fp8_path, "has_wgmma", lambda: True)
        monkeypatch.setattr(kernels, "fp4_fp8_registers", gluon_machine.GluonMachine(kernel, seed, mutants))
        monkeypatch.setattr(fp8_device, "quantize_fp8", Quantize())

    return start


def error(runner: Any, plain: Any, inputs: list[torch.Tensor], tactic: Tactic) -> float:
    p = runner.problem
    poisoned(runner, len(inputs[1]), tactic)
    runner.forward(inputs, tactic)
    truth = reference.fused_moe(*inputs[:3], plain, activation=p.activation, input_format="fp8",
                                expert_offset=p.expert_offset, weight_rounding="e4m3")  # fmt: skip
    return float((inputs[3].float() - truth).norm() / truth.norm())


ODD_SIZES = [
    *((t, "nvfp4", True) for t in TILES),
    *((t, "nvfp4", False) for t in WIDE),
    *((t, "mxfp4", True) for t in (ODD, TWO_STRIPS)),
]


@pytest.mark.parametrize(
    ("tile", "fmt", "by_place"),
    ODD_SIZES,
    ids=[
        f"{name(t)}-{fmt}-{'by place where wide' if by_place else 'gathered'}"
        for t, fmt, by_place in ODD_SIZES
    ],
)
def test_products_match_the_reference_on_odd_sizes(
    tile: Tactic, fmt: str, by_place: bool, on_machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged experts, biases, experts of other ranks, an id that no rank has, an expert without pairs."""
    on_machine(tile.pairs1 + sum(tile.gemm1) + len(tile.narrow))
    if not by_place:
        monkeypatch.setattr(path, "BY_PLACE", 0)
    odd = ((4, 2, 144, 80), (4, 2, 384, 112)) if fmt == "nvfp4" else ((4, 2, 160, 96), (4, 2, 384, 96))
    for sizes, tokens in zip(odd, ((1, 37), (420,)), strict=True):
        runner, plain = make(sizes, fmt, biases=True, foreign=1, input_format="fp8")
        for n in tokens:
            inputs = inputs_of(runner, n)
            inputs[1][inputs[1] == 2] = 3
            inputs[1][n - 1] = torch.tensor([-7, 1])
            assert error(runner, plain, inputs, tile) < TOLERANCE


MUTANTS = {  # function, its text, the wrong text
    "gathered rows: a stage is filled before it is empty": (
        "_gather", "mbarrier.wait(ring.empty.index(stage), phase)", "pass"),
    "rows in order: a stage is filled before it is empty": (
        "_copy", "mbarrier.wait(ring.empty.index(stage), phase)", "pass"),
    "fewer bytes are expected than come": ("_copy", "TILE.rows * 72", "TILE.rows * 64"),
    "more bytes are expected of a gathered stage than come": ("_gather", "TILE.rows * 64", "TILE.rows * 72"),
    "two blocks are expected of a stage that has one": ("_expect", "first + 1 < blocks", "first < blocks"),
    "the pairs beyond 64 are copied from the first on": ("_copy", "start + W + p * PIECE", "start + p * PIECE"),
    "codes of another block": ("_copy_codes", "b * 64", "b * 32"),
    "scales of another strip": ("_copy_scales", "m * STRIPS", "m"),
    "rows of x at half of their distance": ("_bytes", "128;", "64;"),
    "a stage is read before it is there": ("_arrived", "mbarrier.wait(ring.full.index(stage), phase)", "pass"),
    "the proxies are not fenced": ("_arrived", "fence_async_shared()", "pass"),
    "a product is added while it runs": ("_retired", "wait(2 * RUNNING", "wait(2 * RUNNING + 1"),
    "a span goes on from the one before": ("sums_of_64", "number > first", "True"),
    "the second block is the first": ("sums_of_64", "2 * stage + 1, True", "2 * stage, True"),
    "the last block of an odd number is left out": ("sums_of_64", "blocks % 2 == 1", "blocks % 2 == 2"),
    "columns in another order": ("_bytes", "(0, 4, 1, 5, 2, 3)", "(0, 4, 1, 5, 3, 2)"),
    "scales of the other row": ("_tables", "prmt.b32 $1, w, x, 0x622A", "prmt.b32 $1, w, x, 0x4008"),
}  # fmt: skip
OF_POWERS = {
    "six times a power of two is four times it": ("_tables_of_powers", "0x14100c08", "0x10100c08"),
    "nothing times a power of two is not nothing": ("_tables_of_powers", "0x01000100", "0x00010001"),
    "the words of a block in another order": ("_joined", "(0, 3, 2, 1)", "(0, 2, 3, 1)"),
}
OF_TWO_STRIPS = {
    "a product is added while it runs": ("_retired_both", "wait(RUNNING", "wait(RUNNING + 1"),
    "the second block is the first": ("_second_block", "2 * stage + 1", "2 * stage"),
    "the lower strip is the upper": ("_second_block", "ROW + 64", "ROW"),
    "the last block of an odd number is left out": ("sums_of_128", "blocks % 2 == 1", "blocks % 2 == 2"),
}
CASES = [
    *((n, m, ODD, "nvfp4") for n, m in MUTANTS.items()),
    *((n, m, ODD, "mxfp4") for n, m in OF_POWERS.items()),
    *((n, m, TWO_STRIPS, "nvfp4") for n, m in OF_TWO_STRIPS.items()),
]


@pytest.mark.parametrize(
    ("what", "mutant", "tile", "fmt"), CASES, ids=[f"{c[0]}-{c[2].pairs1}-{c[3]}" for c in CASES]
)
def test_the_machine_notices_a_kernel_that_is_wrong(
    what: str,
    mutant: tuple[str, str, str],
    tile: Tactic,
    fmt: str,
    on_machine: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In its producer, which gathers in the first product, and in its consumers; both products have an odd block."""
    monkeypatch.setattr(path, "BY_PLACE", 0)
    runner, plain = make((2, 2, 384, 1152), fmt, input_format="fp8")
    inputs = inputs_of(runner, 80)
    function, old, new = mutant

    def right(seed: int) -> bool:
        on_machine(seed, **{function: (old, new)})
        return error(runner, plain, inputs, tile) < TOLERANCE

    on_machine(0)
    assert error(runner, plain, inputs, tile) < TOLERANCE
    assert gluon_machine.notices(right, 8)


def test_rows_are_quantised_in_the_order_of_products() -> None:
    """Places of a block hold its columns in the order that a wgmma's A registers give them; the last block ends in zeros."""
    x = torch.randn(3, 144).bfloat16()
    ids, scales = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3)
    data = torch.full((3, 256), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    quantize_fp8[(3,)](
        x, ids, ids, data, scales, 144, HOW=Recipe(False, False, 2, 0, 4, 256, True), PDL=False
    )
    exact = torch.zeros(3, 256)
    exact[:, :144] = x.float()
    found, wanted = data.float() * scales[:, None], exact[:, turned(144)]
    assert torch.all(found[wanted == 0] == 0)
    assert float(((found - wanted).abs() < 0.07 * wanted.abs() + 1e-3).float().mean()) > 0.95  # see Quantize


@pytest.mark.parametrize("num_tokens", [1, 16, 256, 4096, 16384])
def test_batch_invariant_problems_keep_to_paths_whose_bits_agree(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_path, "has_wgmma", lambda: True)
    p = MoeProblem(32, 32, 0, 8, 7168, 2048, "nvfp4", input_format="fp8")
    free, bound = (
        choose.candidates(p, num_tokens),
        choose.candidates(replace(p, batch_invariant=True), num_tokens),
    )
    assert any(t.path == "fp8_registers" for t in free)
    assert {t.path for t in bound} == {"fp8", "fp8_once"}
    assert choose.default(replace(p, batch_invariant=True), num_tokens) in bound
    assert choose.default(p, num_tokens) in free
