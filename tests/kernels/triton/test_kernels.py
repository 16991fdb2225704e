"""Every kernel against the float32 reference, in Triton's interpreter (on the device where there is one)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moestro.errors import BackendError
from moestro.formats import BF16, NVFP4
from moestro.kernels.activations import Activation, GeGLUTanh, ReLU2, SwiGLU
from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import Tactic, TritonRunner, plan
from moestro.moe import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-2  # of the relative norm; the interpreter rounds to bfloat16 towards zero
SMALL = (64, 1, 4, 2)
TACTICS = {
    "few": Tactic("fused", "direct", "reduce", 8, SMALL, SMALL),
    "sorted": Tactic("fused", "sorted", "reduce", 16, SMALL, (32, 1, 2, 2)),
    "split": Tactic("fused", "sorted", "reduce", 8, SMALL, SMALL, split=2),
    "narrowing": Tactic("fused", "sorted", "reduce", 64, (128, 1, 4, 2), SMALL, ladder=1, tokens2=128),
    "atomic": Tactic("fused", "sorted", "atomic", 16, SMALL, SMALL, group=4),
    "few_chained": Tactic("chain", "direct", "reduce", 8, SMALL, SMALL, split=2, ahead=1),
    "chained": Tactic("chain", "sorted", "reduce", 64, SMALL, (32, 1, 4, 2), ladder=1),
    "dense": Tactic("dense", "sorted", "reduce", 16, (64, 1, 4, 2), (128, 1, 4, 2), tokens2=32),
    "dense_atomic": Tactic("dense", "sorted", "atomic", 32, (64, 1, 4, 2), (64, 1, 4, 2), persistent=1),
}


def make(
    sizes: tuple[int, int, int, int], fmt: str, act: Activation | None = None, biases: bool = False,
    input_format: str | None = None, foreign: int = 0, deterministic: bool = False, seed: int = 0,
) -> tuple[TritonRunner, Any]:  # fmt: skip
    """(runner, the same experts as they were before they were repacked)."""
    experts, top_k, hidden, inter = sizes
    act = act or SwiGLU()
    torch.manual_seed(seed)
    rows = inter * (2 if act.gated else 1)
    gate_up, down = torch.randn(experts, rows, hidden) * 0.1, torch.randn(experts, hidden, inter) * 0.1
    pair: tuple[Any, Any]
    if fmt == "nvfp4":
        pair = (NVFP4.quantize(gate_up, row_groups=2 if act.gated else None), NVFP4.quantize(down))
    else:
        pair = (BF16(gate_up.bfloat16()), BF16(down.bfloat16()))
    rest = {
        "gate_up_bias": torch.randn(experts, rows).to(DEVICE) if biases else None,
        "down_bias": torch.randn(experts, hidden).to(DEVICE) if biases else None,
        "gate_up_input_scale": None,
        "down_input_scale": None,
    }
    plain = SimpleNamespace(gate_up=pair[0].to(DEVICE), down=pair[1].to(DEVICE), **rest)
    p = MoeProblem(experts + 2 * foreign, experts, foreign, top_k, hidden, inter, fmt, act, input_format,
                   torch.bfloat16, DEVICE, deterministic)  # fmt: skip
    gate_up, down = TritonRunner.prepare(p, plain)
    return TritonRunner(p, SimpleNamespace(gate_up=gate_up, down=down, **rest)), plain


def inputs_of(runner: TritonRunner, n: int) -> list[torch.Tensor]:
    p = runner.problem
    x = torch.randn(n, p.hidden_size).bfloat16()
    ids = (
        torch.stack([torch.randperm(p.num_experts)[: p.top_k] for _ in range(n)])
        if n
        else torch.zeros(0, p.top_k)
    )
    out = torch.full((n, p.hidden_size), torch.nan).bfloat16()
    return [t.to(DEVICE) for t in (x, ids.int(), torch.rand(n, p.top_k), out)]


def poisoned(runner: TritonRunner, n: int, tactic: Any) -> None:
    """A workspace of NaN: nothing may be read that the call did not write."""
    size = runner.workspace_bytes(n, tactic)
    runner.use_workspace(torch.full((size,), 0xFF, dtype=torch.uint8, device=DEVICE))


def error(runner: TritonRunner, plain: Any, inputs: list[torch.Tensor], tactic: Any) -> float:
    p = runner.problem
    poisoned(runner, len(inputs[1]), tactic)
    runner.forward(inputs, tactic)
    truth = reference.fused_moe(*inputs[:3], plain, activation=p.activation, input_format=p.input_format,
                                expert_offset=p.expert_offset)  # fmt: skip
    return float((inputs[3].float() - truth).norm() / truth.norm())


@pytest.mark.parametrize("fmt", ["nvfp4", "bf16"])
@pytest.mark.parametrize("name", TACTICS)
def test_every_way_matches_the_reference_on_odd_sizes(name: str, fmt: str) -> None:
    """Ragged experts, biases, experts of other ranks, an id that no rank has, an expert without pairs."""
    runner, plain = make((4, 2, 144, 80), fmt, biases=True, foreign=1)
    inputs = inputs_of(runner, 11 if name.startswith("few") else 90)
    inputs[1][inputs[1] == 2] = 3  # nobody comes to local expert 1
    inputs[1][0] = torch.tensor([-7, 1 << 30])
    assert error(runner, plain, inputs, TACTICS[name]) < TOLERANCE


@pytest.mark.parametrize(
    "act", [SwiGLU(1.702, 7.0, 1.0), GeGLUTanh(), ReLU2()], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("name", ["few", "dense"])
def test_activations(name: str, act: Activation) -> None:
    for fmt in ("nvfp4", "bf16"):
        runner, plain = make((3, 2, 64, 48), fmt, act)
        inputs = inputs_of(runner, 7)
        inputs[0] *= 8  # far enough for the clamps
        assert error(runner, plain, inputs, TACTICS[name]) < TOLERANCE


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_the_default_tactic(num_tokens: int) -> None:
    runner, plain = make((4, 2, 128, 64), "nvfp4")
    assert error(runner, plain, inputs_of(runner, num_tokens), -1) < TOLERANCE


def test_one_token_takes_three_launches_and_no_sorting() -> None:
    runner, _ = make((4, 2, 128, 64), "nvfp4")
    names = [launch.kernel.__name__ for launch in runner.plan(inputs_of(runner, 1))]
    assert names == ["moe_gemm", "moe_gemm", "reduce_pairs"]


def test_a_chain_that_broke_off_does_not_spoil_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tiles were counted, but nobody cleared the counters: the next would not wait for anything."""
    runner, plain = make((4, 2, 128, 64), "nvfp4")
    inputs, tactic = inputs_of(runner, 5), TACTICS["chained"]
    run = plan.Launch.run

    def breaks(launch: plan.Launch) -> None:
        if launch.kernel.__name__ == "reduce_pairs":
            raise RuntimeError("out of memory")
        run(launch)

    monkeypatch.setattr(plan.Launch, "run", breaks)
    with pytest.raises(RuntimeError, match="memory"):
        error(runner, plain, inputs, tactic)
    monkeypatch.undo()
    assert not runner._done.any()
    assert error(runner, plain, inputs, tactic) < TOLERANCE
    assert not runner._done.any()


def test_no_tokens_is_no_work() -> None:
    runner, _ = make((4, 2, 128, 64), "nvfp4")
    inputs = inputs_of(runner, 0)
    assert runner.plan(inputs) == []
    assert runner.forward(inputs).shape == (0, 128)


def test_tokens_whose_experts_are_all_elsewhere_come_out_as_zeros() -> None:
    runner, _ = make((4, 2, 128, 64), "nvfp4", foreign=3)
    for name in ("few", "sorted", "atomic", "chained"):
        inputs = inputs_of(runner, 5)
        inputs[1].fill_(0)
        poisoned(runner, 5, TACTICS[name])
        runner.forward(inputs, TACTICS[name])
        assert torch.equal(inputs[3], torch.zeros_like(inputs[3]))


def test_many_pairs_are_sorted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from moestro.kernels.triton.device import sort

    monkeypatch.setattr(sort, "CHUNK", 32)
    runner, plain = make((5, 2, 64, 32), "nvfp4", foreign=1)
    inputs = inputs_of(runner, 70)
    names = [launch.kernel.__name__ for launch in runner.plan(inputs, TACTICS["sorted"])]
    assert names[:2] == ["count", "place"]
    assert error(runner, plain, inputs, TACTICS["sorted"]) < TOLERANCE


def test_sums_in_a_fixed_order_repeat_bit_for_bit() -> None:
    runner, _ = make((4, 2, 128, 64), "nvfp4", deterministic=True)
    inputs = inputs_of(runner, 21)
    first = runner.forward(inputs, TACTICS["sorted"]).clone()
    assert torch.equal(first, runner.forward(inputs, TACTICS["sorted"]))


def test_the_order_of_pairs_does_not_change_the_sums() -> None:
    runner, _ = make((4, 2, 128, 64), "nvfp4")
    inputs = inputs_of(runner, 21)
    first = runner.forward(inputs, TACTICS["sorted"]).clone()
    swapped = [inputs[0].flip(0), inputs[1].flip(0), inputs[2].flip(0), torch.empty_like(inputs[3])]
    assert torch.equal(first, runner.forward(swapped, TACTICS["sorted"]).flip(0))


@pytest.mark.parametrize("scales", ["dynamic", "calibrated", "per expert"])
def test_w4a4_numerics(scales: str) -> None:
    """x and the intermediate through NVFP4, as quantised and dequantised in float32."""
    runner, plain = make((4, 2, 144, 80), "nvfp4", input_format="nvfp4")
    for experts in (plain, runner._experts):
        if scales != "dynamic":
            shape = () if scales == "calibrated" else (4,)
            experts.gate_up_input_scale = torch.full(shape, 0.0015, device=DEVICE)
            experts.down_input_scale = torch.full(shape, 0.0004, device=DEVICE)
            if shape:
                experts.gate_up_input_scale *= torch.tensor([1.0, 2.0, 0.5, 1.5], device=DEVICE)
    for name in ("few", "sorted"):
        assert error(runner, plain, inputs_of(runner, 9), TACTICS[name]) < TOLERANCE


def test_activations_that_come_quantised() -> None:
    runner, plain = make((4, 2, 144, 80), "nvfp4", input_format="nvfp4")
    x, ids, weights, out = inputs_of(runner, 6)
    q = NVFP4.quantize_rows(x)
    runner.forward([q.packed, ids, weights, out, q.scale, q.global_scale], TACTICS["sorted"])
    truth = reference.fused_moe(q, ids, weights, plain, input_format="nvfp4")
    assert float((out.float() - truth).norm() / truth.norm()) < TOLERANCE


def test_a_tactic_that_does_not_fit_is_refused_with_its_reason() -> None:
    runner, _ = make((4, 2, 128, 64), "nvfp4", deterministic=True)
    inputs = inputs_of(runner, 65)
    with pytest.raises(BackendError, match="at most 64 pairs"):
        runner.forward(inputs, TACTICS["few"])
    with pytest.raises(BackendError, match="not repeatable"):
        runner.forward(inputs, TACTICS["atomic"])
    with pytest.raises(BackendError, match="do not divide"):
        runner.forward(inputs, replace(TACTICS["sorted"], first=(64, 4, 4, 2)))
    with pytest.raises(BackendError, match="must be -1 or"):
        runner.forward(inputs, "fast")


def test_weights_must_be_repacked_first() -> None:
    runner, plain = make((4, 2, 128, 64), "nvfp4")
    with pytest.raises(BackendError, match="prepare"):
        TritonRunner(runner.problem, plain)
