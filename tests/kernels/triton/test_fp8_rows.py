"""Rows in e4m3, and which FP8 products are offered."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import triton
from fp8_rows import turned

from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import call, choose, nvrtc
from moestro.kernels.triton.device.fp8 import Recipe, quantize_fp8
from moestro.kernels.triton.paths import fp8 as fp8_path
from moestro.kernels.triton.paths import fp8_cuda, fp8_once

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU itself: tests/gpu")


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


def test_wide_rows_are_quantised_at_once_and_few_of_them_by_more_warps() -> None:
    """A row of Mixtral's intermediate in two passes took longer than a fifth of a layer's products."""
    x = torch.randn(2, 8200).float()
    ids, scales = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2)
    wide = triton.next_power_of_2(8200)
    assert wide <= call.AT_ONCE
    found = {}
    for whole in (True, False):
        data = torch.full((2, 8320), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
        how = Recipe(False, False, 1, 0, 4, wide if whole else 2048, True, whole)
        quantize_fp8[(2,)](x, ids, ids, data, scales, 8200, HOW=how, PDL=False)
        assert torch.equal(scales, x.abs().amax(1) / 448)
        found[whole] = data.view(torch.uint8)
    assert torch.equal(found[True], found[False])
    warps = [
        call.quantising_warps(width, rows) for rows in (64, 65536) for width in (128, 2048, 4096, 8192, 16384)
    ]
    assert warps == [4, 8, 16, 16, 16, 4, 4, 8, 8, 16]


@pytest.mark.parametrize("num_tokens", [1, 64, 1024, 16384])
def test_fp8_blocks_run_in_cuda_cpp_but_where_bits_must_not_follow_the_batch(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_path, "has_wgmma", lambda: True)
    monkeypatch.setattr(nvrtc, "why_missing", lambda: None)
    p = MoeProblem(32, 32, 0, 8, 7168, 2048, "fp8_block", input_format="fp8")
    assert {t.path for t in choose.candidates(p, num_tokens)} == {"fp8_once", "fp8_once_cuda"}
    assert choose.default(p, num_tokens) == choose.FP8_BLOCKS
    invariant = replace(p, batch_invariant=True)
    assert {t.path for t in choose.candidates(invariant, num_tokens)} == {"fp8_once"}
    assert choose.default(invariant, num_tokens) == fp8_once.LARGE
    halved = replace(p, intermediate_size=1984)  # gate and up that are no whole blocks
    assert choose.default(halved, num_tokens) == fp8_once.LARGE


@pytest.mark.parametrize("num_tokens", [1, 16, 256, 4096, 16384])
def test_batch_invariant_problems_keep_to_paths_whose_bits_agree(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_path, "has_wgmma", lambda: True)
    monkeypatch.setattr(nvrtc, "why_missing", lambda: None)
    p = MoeProblem(32, 32, 0, 8, 7168, 2048, "nvfp4", input_format="fp8")
    free, bound = (
        choose.candidates(p, num_tokens),
        choose.candidates(replace(p, batch_invariant=True), num_tokens),
    )
    assert any(t.path == "fp8_cuda" for t in free)
    assert {t.path for t in bound} == {"fp8", "fp8_once"}
    assert choose.default(replace(p, batch_invariant=True), num_tokens) in bound
    assert choose.default(p, num_tokens) in free


@pytest.mark.parametrize(("fmt", "paths"), [("mxfp4", {"fp8", "fp8_once"}), ("fp8_block", {"fp8_once"})])
@pytest.mark.parametrize("num_tokens", [1, 256, 16384])
def test_without_nvrtc_the_default_is_a_path_that_needs_none_and_a_line_says_why(
    num_tokens: int,
    fmt: str,
    paths: set[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fp8_path, "has_wgmma", lambda: True)
    monkeypatch.setattr(nvrtc, "why_missing", lambda: "there is no libnvrtc")
    p = MoeProblem(32, 32, 0, 8, 7168, 2048, fmt, input_format="fp8")
    tactics = choose.candidates(p, num_tokens)
    assert {t.path for t in tactics} == paths
    choose._say_slower.cache_clear()
    assert choose.default(p, num_tokens) in tactics
    assert choose.default(p, num_tokens) in tactics
    assert [r.getMessage() for r in caplog.records if "slower" in r.getMessage()] == [
        "FP8 products run on slower kernels than could be: there is no libnvrtc"
    ]
    invariant = replace(p, batch_invariant=True)
    assert choose.default(invariant, num_tokens).path in paths
    assert len(caplog.records) == 1
    wanted = choose.FP8_BLOCKS if fmt == "fp8_block" else fp8_cuda.tactic(80, 256)
    assert choose.why_not(p, wanted, num_tokens) == "there is no libnvrtc"
