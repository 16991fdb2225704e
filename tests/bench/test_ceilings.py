"""Ceilings that hold: no share of them is above 105 %, whatever the instruction set; peers that fall back are marked."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moestro.bench import cpu_ceilings, roofline
from moestro.bench import run as runs
from moestro.bench.layers import LayerSource, make_case
from moestro.bench.measure import Plan
from moestro.bench.models import MoeShape, from_sizes
from moestro.bench.peers import transformers_peers
from moestro.bench.roofline import Ceilings, Work, measure_ceilings
from moestro.bench.timing import timer_for
from moestro.kernels.cpu import core
from moestro.routing import Uniform


def available() -> tuple[str, ...]:
    return core.available_isas() if core.why_no_core() is None else ()


def spec_of(shape: MoeShape, **rest: object) -> runs.BenchSpec:
    plan = Plan(min_rounds=3, max_rounds=3, seconds=0.0)
    return runs.BenchSpec(shape, (1, 16), Uniform(), plan=plan, peers=("eager",), **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("isa", available())
def test_no_share_of_the_bench_is_above_105_percent(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(core.ISA_VARIABLE, isa)
    spec = spec_of(from_sizes("8,2,512,256"), formats=("nvfp4", "bf16"))
    result = runs.run(spec, timer_for("cpu"), "test")
    assert {row.contender for row in result.rows} >= {"moestro nvfp4", "moestro bf16"}
    assert all(0 < row.roofline <= roofline.MOST for row in result.rows)
    assert all(row.facts["arithmetic"] in core.ARITHMETICS for row in result.rows if row.ours)


def test_a_share_that_cannot_be_is_an_error_of_the_bench(
    tiny: MoeShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "measure_ceilings", lambda _: Ceilings(1.0, 1.0, "bfloat16"))
    result = runs.run(spec_of(tiny), timer_for("cpu"), "test")
    assert result.rows == []
    assert {entry["contender"] for entry in result.failed} >= {"moestro nvfp4", "transformers eager"}
    assert all("%, which cannot be" in entry["reason"] for entry in result.failed)


def test_ceilings_measured_too_low_are_measured_again(
    tiny: MoeShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([Ceilings(1.0, 1.0, "bfloat16")] * 2 + [Ceilings(1e15, 1e18, "bfloat16")] * 9)
    monkeypatch.setattr(roofline, "measure_ceilings", lambda _: next(found))
    result = runs.run(spec_of(tiny), timer_for("cpu"), "test")
    assert result.failed == []
    assert result.ceilings["bytes_per_s"] == 1e15


def test_products_are_held_against_the_rate_of_their_arithmetic() -> None:
    ceilings = Ceilings(1e30, 100.0, "bfloat16", {"int8": 400.0})
    work = Work(0, 800, 0, 0, 0)
    assert ceilings.seconds(work, "int8") == 2.0
    assert ceilings.seconds(work, "float32") == ceilings.seconds(work) == 8.0
    raised = ceilings.raised(Ceilings(1.0, 50.0, "float32", {"int8": 300.0, "int16": 200.0}))
    assert raised == Ceilings(1e30, 100.0, "bfloat16", {"int8": 400.0, "int16": 200.0})


def test_a_cpu_multiplies_as_fast_as_torch_says_it_does() -> None:
    square = torch.randn(512, 512)
    torch_rate = cpu_ceilings._best(lambda: square @ square, 2 * 512**3)
    assert measure_ceilings("cpu").flops_per_s > 0.5 * torch_rate


@pytest.mark.parametrize("isa", available())
def test_every_instruction_set_has_the_rate_of_its_kernels_arithmetic(isa: str) -> None:
    wanted = {"amx": "bf16", "avx512": "bf16", "amx_emulated": None}.get(isa, "float32")
    rates = cpu_ceilings.arithmetic_rates(isa)
    assert wanted is None or rates[wanted] > 1e8
    if isa in ("avx2", "avx_vnni"):
        assert min(rates["int16"], rates["int8"]) > 1e8


def test_peers_that_fall_back_are_marked_and_float32_takes_part(
    tiny: MoeShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(tiny, 3, Uniform())
    monkeypatch.setattr(
        cpu_ceilings, "fallback", lambda _: "torch has no bfloat16 kernels for this processor"
    )
    peers = transformers_peers([LayerSource(tiny)], ("eager", "grouped_mm"))
    assert [peer.name for peer in peers] == [
        *("transformers eager", "transformers grouped_mm"),
        *("transformers eager float32", "transformers grouped_mm float32"),
    ]
    assert ["fallback" in peer.facts(case) for peer in peers] == [True, True, False, False]
    outputs = [peer.calls(case)[0]().float() for peer in peers]
    assert all(float((y - outputs[2]).norm() / outputs[2].norm()) < 0.01 for y in outputs)
    monkeypatch.setattr(cpu_ceilings, "fallback", lambda _: None)
    assert len(transformers_peers([LayerSource(tiny)], ("eager", "grouped_mm"))) == 2


def test_a_budget_of_time_ends_the_rounds_before_their_number_does() -> None:
    plan = Plan(min_rounds=7, seconds=1.0)
    assert not plan.enough(2, 100.0, 4)
    assert not plan.enough(3, 11.0, 4)
    assert plan.enough(3, 13.0, 4)
    assert not plan.enough(7, 3.9, 4)
    assert plan.enough(7, 4.1, 4)
    assert plan.too_slow(10.1, 0.1)
    assert not plan.too_slow(60.0, 7.0)
    assert dataclasses.replace(plan, seconds=0.1).too_slow(1.1, 0.01)
    assert not dataclasses.replace(plan, seconds=0.0).too_slow(0.9, 0.001), "a hiccup at a tiny size"
