"""Tactics: the defaults always fit, the table holds what it says, and the estimate orders sensibly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from moestro.errors import BackendError
from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import Tactic, Tile, choose
from moestro.kernels.triton.paths import PATHS, dense, dequantized, fused, kind_of, warp_specialized
from moestro.kernels.triton.paths.warp_specialized import tactic as warp
from moestro.kernels.triton.tactic import MAX_PAIRS
from moestro.kernels.triton.tactics import Tactic as OlderTactic

SIZES = {"qwen3": (128, 8, 2048, 768), "mixtral": (8, 2, 4096, 14336), "deepseek": (32, 8, 7168, 2048)}
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


@settings(max_examples=200, deadline=None)
@given(
    experts=st.integers(1, 384),
    top_k=st.integers(1, 10),
    hidden=st.integers(1, 1000),
    inter=st.integers(1, 2000),
    num_tokens=st.integers(1, 100_000),
    fmt=st.sampled_from(["nvfp4", "mxfp4", "mxfp8", "fp8_block", "bf16"]),
    deterministic=st.booleans(),
)
def test_the_default_fits_every_problem(
    experts: int, top_k: int, hidden: int, inter: int, num_tokens: int, fmt: str, deterministic: bool
) -> None:
    p = MoeProblem(
        experts, experts, 0, min(top_k, experts), hidden * 8, inter * 8, fmt, deterministic=deterministic
    )
    default = choose.default(p, num_tokens)
    assert choose.why_not(p, default, num_tokens) is None
    assert choose.candidates(p, num_tokens) != []


@pytest.mark.parametrize("top_k", [1, 8])
def test_more_pairs_than_the_kernels_count_are_an_error_that_names_the_limit(top_k: int) -> None:
    p = MoeProblem(128, 128, 0, top_k, 2048, 768, "nvfp4")
    most = MAX_PAIRS // top_k
    assert choose.why_not(p, choose.default(p, most), most) is None
    with pytest.raises(
        BackendError, match=f"at most {MAX_PAIRS} pairs at once, got {most + 1} tokens of {top_k}"
    ):
        choose.default(p, most + 1)


def test_every_entry_of_the_table_is_a_candidate_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (warp_specialized, dense):
        monkeypatch.setattr(path, "has_wgmma", lambda: True)
    p = MoeProblem(8, 8, 0, 2, 4096, 14336, "nvfp4")
    for problem in (p, replace(p, weight_format="bf16"), replace(p, input_format="nvfp4")):
        found = {t for n in (1, 8, 4096) for t in choose.candidates(problem, n)}
        tables = [path.TABLE.get(kind_of(problem), ()) for path in PATHS.values() if path.NAME != "fp4"]
        assert {choose.fitted(p, t) for table in tables for t in table} == found


@pytest.mark.parametrize(("here", "path"), [(True, "warp_specialized"), (False, "fused")])
def test_many_pairs_of_an_expert_take_the_warp_specialized_path_where_there_is_wgmma(
    here: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warp_specialized, "has_wgmma", lambda: here)
    p = MoeProblem(32, 32, 0, 8, 7168, 2048, "nvfp4")
    default = choose.default(p, 1024)
    assert default.path == path
    assert choose.why_not(p, default, 1024) is None
    assert choose.default(replace(p, input_format="nvfp4"), 1024).path == "fused"


FUSED32 = fused.tactic(32, Tile(64, 2, 4, 4), Tile(64, 2, 4, 4))
HALVES = {
    (pairs, rows): dense.tactic(pairs, Tile(rows, 4, 8, stages))
    for pairs, rows, stages in ((96, 128, 7), (96, 256, 4), (144, 256, 4), (192, 128, 5), (288, 128, 4))
}
LONG_WALK = replace(dense.FULL, raster_group=16)
# µs of dense layers on one H200, 2026-11-29 (docs/kernels.md)
DENSE_TIMES: dict[tuple[str, int], dict[Tactic, float]] = {
    ("deepseek", 64): {FUSED32: 666, dense.FEW: 678, HALVES[96, 128]: 679, dequantized.LARGE: 838},
    ("deepseek", 256): {
        HALVES[96, 128]: 728, HALVES[96, 256]: 738, dense.FULL: 742, dequantized.LARGE: 797},
    ("deepseek", 1024): {
        HALVES[288, 128]: 1341, HALVES[144, 256]: 1441, dense.FULL: 1514, dequantized.LARGE: 1598},
    ("deepseek", 16384): {
        dense.FULL: 18068, LONG_WALK: 19357, HALVES[192, 128]: 19437, replace(dense.FULL, narrow=""): 19440,
        dequantized.LARGE: 20909},
    ("qwen3", 4096): {
        HALVES[288, 128]: 643, replace(dense.FULL, narrow=""): 678, dense.FULL: 685, dequantized.LARGE: 740},
    ("qwen3", 16384): {
        LONG_WALK: 2158, replace(dense.FULL, narrow=""): 2209, dense.FULL: 2253, dequantized.LARGE: 2528},
}  # fmt: skip


@pytest.mark.parametrize(("model", "num_tokens"), DENSE_TIMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_measured_best_of_dense_weights_is_the_default_and_is_raced(
    model: str, num_tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "has_wgmma", lambda: True)
    experts, top_k, hidden, inter = SIZES[model]
    p = MoeProblem(
        experts, experts, 0, top_k, hidden, inter, "bf16", dtype=dtype, device="cuda", weight_dtype=dtype
    )
    times = DENSE_TIMES[model, num_tokens]
    best = min(times, key=lambda t: times[t])
    assert choose.default(p, num_tokens) == best
    raced = choose.worth_measuring(p, num_tokens)
    assert best in raced
    assert (LONG_WALK in raced) == (num_tokens * top_k >= 1000 * experts)
    assert choose.default(replace(p, batch_invariant=True), num_tokens) == best


@pytest.mark.parametrize(
    ("per_expert", "tile"),
    [(40, (64, 128)), (64, (96, 128)), (100, (128, 256)), (128, (144, 256)), (160, (192, 128)),
     (256, (288, 128)), (400, (128, 256))],
)  # fmt: skip
def test_dense_tiles_hold_an_expert_and_the_most_that_it_usually_draws(
    per_expert: int, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as there are tiles so wide; where there is no wgmma, the dequantized path's."""
    p = MoeProblem(32, 32, 0, 8, 7168, 2048, "bf16", device="cuda")
    assert choose.default(p, 4 * per_expert) == dequantized.LARGE
    monkeypatch.setattr(dense, "has_wgmma", lambda: True)
    default = choose.default(p, 4 * per_expert)
    assert (default.path, default.pairs1, default.gemm1.rows) == ("dense", *tile)
    assert choose.why_not(p, default, 4 * per_expert) is None
    assert default in choose.worth_measuring(p, 4 * per_expert)


def test_long_walks_of_quantised_weights_are_raced_where_experts_have_a_thousand_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warp_specialized, "has_wgmma", lambda: True)
    p = MoeProblem(128, 128, 0, 8, 2048, 768, "nvfp4", device="cuda")
    groups = {n: {t.raster_group for t in choose.worth_measuring(p, n)} for n in (4096, 16384)}
    assert groups == {4096: {8}, 16384: {8, 16}}


@pytest.mark.parametrize(
    ("tactic", "why"),
    [
        (replace(warp(128, Tile(256, 1, 8, 7)), gemm2=Tile(256, 1, 8, 9)), "shared memory"),
        (
            replace(warp(128, Tile(128, 1, 4, 5)), gemm2=Tile(128, 1, 4, 6)),
            "shared memory",
        ),  # two a processor
        (warp(256, Tile(256, 1, 8, 2)), "sums than registers"),
        (warp(128, Tile(192, 1, 8, 2)), "64 or 128 rows"),
        (replace(warp(128, Tile(256, 1, 8, 7)), split_k=2), "2 parts of"),
    ],
)
def test_wide_tiles_that_do_not_fit_say_why(
    tactic: Tactic, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warp_specialized, "has_wgmma", lambda: True)
    p = MoeProblem(32, 32, 0, 8, 7168, 2048, "nvfp4")
    assert why in (choose.why_not(p, tactic, 1024) or "")


def test_steps_are_halved_until_they_divide() -> None:
    p = MoeProblem(8, 8, 0, 2, 576, 320, "nvfp4")  # 9 and 5 blocks
    fitted = choose.fitted(p, fused.tactic(8, Tile(64, 4, 4, 3), Tile(64, 2, 4, 3), split_k=2))
    assert (fitted.gemm1.k_blocks, fitted.gemm2.k_blocks, fitted.split_k) == (3, 1, 1)


def test_wide_codes_take_fewer_stages() -> None:
    p = MoeProblem(8, 8, 0, 2, 4096, 2048, "nvfp4")
    tile = warp(128, Tile(256, 4, 8, 7))
    assert choose.fitted(p, tile) == tile
    fitted = choose.fitted(replace(p, weight_format="fp8_block"), tile)
    assert 2 <= fitted.gemm1.stages < 7


@pytest.mark.parametrize(
    ("tactic", "why"),
    [
        (fused.tactic(8, Tile(64, 2, 4, 4), Tile(64, 2, 4, 4), split_k=2), "parts of a sum"),
        (fused.tactic(16, Tile(32, 2, 4, 4), Tile(64, 2, 4, 4)), "another order"),
        (fused.tactic(16, Tile(64, 2, 2, 4), Tile(64, 2, 4, 4)), "another order"),
        (fused.tactic(8, Tile(64, 2, 4, 4), Tile(64, 2, 4, 4)), "another order"),
    ],
    ids=["split columns", "32 rows", "two warps", "8 pairs"],
)
def test_batch_invariant_problems_have_one_order_of_sums(tactic: Tactic, why: str) -> None:
    p = MoeProblem(8, 8, 0, 2, 512, 256, "nvfp4", batch_invariant=True)
    assert why in (choose.why_not(p, tactic, 8) or "")
    for n in (1, 3, 40, 300, 5000):
        default = choose.default(p, n)
        assert default.split_k == 1
        assert choose.why_not(p, default, n) is None
        found = choose.candidates(p, n)
        assert default in found
        assert all(t.split_k == 1 and min(t.widths) >= 16 for t in found)


def test_older_files_name_their_tactics_otherwise() -> None:
    older = OlderTactic("wide", "sorted", "reduce", 144, (256, 4, 8, 7), (256, 4, 8, 7), ladder=2)
    assert older == warp(144, Tile(256, 4, 8, 7), "halves")
    with pytest.raises(ValueError, match="atomic"):
        OlderTactic("fused", "sorted", "atomic", 8, (64, 1, 4, 2), (64, 1, 4, 2))


def layers() -> dict[tuple[str, int], list[dict[str, Any]]]:
    """(model, tokens) -> what was measured of it, the newest record."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for name in ("h100-kernels.json", "h100-few-tokens.json", "h100-tactics.json"):
        record: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in json.loads((RESULTS / name).read_text())["layers"]:
            if row["format"] == "nvfp4" and row.get("tactic"):
                record.setdefault((row["model"], row["tokens"]), []).append(row)
        found |= record
    return found


def measured(model: str, num_tokens: int) -> tuple[MoeProblem, dict[Tactic, float]]:
    """(problem, tactic -> µs) as recorded on an H100."""
    experts, top_k, hidden, inter = SIZES[model]
    times = {}
    for row in layers()[model, num_tokens]:
        t = row["tactic"]
        times[OlderTactic(**t)] = row["us"]
    return MoeProblem(experts, experts, 0, top_k, hidden, inter, "nvfp4", device="cuda"), times


def few_on_h200(model: str, num_tokens: int, batch_invariant: bool) -> dict[Tactic, float]:
    """tactic -> µs as recorded on an H200 under uniform routing."""
    rows = json.loads((RESULTS / "h200-few-tokens.json").read_text())["layers"]
    wanted = {"model": model, "tokens": num_tokens, "routing": "uniform", "batch_invariant": batch_invariant}
    found = [row for row in rows if wanted.items() <= row.items()]
    tiles = [{name: Tile(*row["tactic"][name]) for name in ("gemm1", "gemm2")} for row in found]
    return {Tactic(**row["tactic"] | tile): row["us"] for row, tile in zip(found, tiles, strict=True)}


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("model", SIZES)
def test_the_default_of_batch_invariant_problems_is_near_the_measured_best(
    model: str, num_tokens: int
) -> None:
    experts, top_k, hidden, inter = SIZES[model]
    problem = MoeProblem(experts, experts, 0, top_k, hidden, inter, "nvfp4", device="cuda", deterministic=True,
                         batch_invariant=True)  # fmt: skip
    times = few_on_h200(model, num_tokens, True)
    default = choose.default(problem, num_tokens)
    assert default in choose.candidates(problem, num_tokens)
    assert times[default] <= 1.015 * min(times.values())


@pytest.mark.parametrize(("model", "num_tokens"), sorted(layers()))
def test_one_as_fast_as_the_measured_best_is_a_candidate_and_the_default_is_near_it(
    model: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warp_specialized, "has_wgmma", lambda: True)
    problem, times = measured(model, num_tokens)
    best = min(times, key=lambda t: times[t])
    candidates = set(choose.candidates(problem, num_tokens))
    assert any(times[t] <= 1.01 * times[best] for t in candidates & set(times))
    default = choose.default(problem, num_tokens)
    if num_tokens <= 64:  # the default is among the measured ones, and no worse than the spread between runs
        if default not in times:
            times = few_on_h200(model, num_tokens, False)
        assert times[default] <= 1.015 * min(times.values())
    elif default in times:
        assert times[default] <= 1.03 * times[best]
