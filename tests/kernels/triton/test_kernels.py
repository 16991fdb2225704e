"""Every kernel against the float32 reference, in Triton's interpreter (on the device where there is one)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moestro.errors import BackendError
from moestro.formats import BF16, INT4, MXFP4, MXFP8, NVFP4, FP8Block
from moestro.kernels.activations import Activation, ClampedSilu, GeGLUTanh, ReLU2, SoftcapSwiGLU, SwiGLU
from moestro.kernels.problem import MoeProblem
from moestro.kernels.triton import Tactic, Tile, TritonRunner, call, choose
from moestro.kernels.triton.paths import chain, fused
from moestro.moe import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-2  # of the relative norm; the interpreter rounds to bfloat16 towards zero
SMALL = Tile(64, 1, 4, 2)
TACTICS = {
    "few": fused.tactic(8, SMALL, SMALL, "direct"),
    "sorted": fused.tactic(16, SMALL, Tile(32, 1, 2, 2)),
    "split": fused.tactic(8, SMALL, SMALL, split_k=2),
    "narrowing": fused.tactic(64, Tile(128, 1, 4, 2), SMALL, narrow="quarters", pairs2=128),
    "few_chained": chain.tactic(8, SMALL, "direct", split_k=2, prefetch_kib=2),
    "chained": Tactic("chain", "sorted", 64, SMALL, Tile(32, 1, 4, 2), "quarters"),
    "dequantized": Tactic("dequantized", "sorted", 16, SMALL, Tile(128, 1, 4, 2), pairs2=32),
}
SIZES = dict.fromkeys(("mxfp4", "mxfp8", "int4"), (4, 2, 160, 96))  # whose columns are multiples of 32
DECODED = ("mxfp4", "mxfp8", "fp8_block", "int4")  # whose decoders are all that is new of them


def make(
    sizes: tuple[int, int, int, int], fmt: str, act: Activation | None = None, biases: bool = False,
    input_format: str | None = None, foreign: int = 0, deterministic: bool = False, seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
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
    elif fmt == "bf16":
        pair = (BF16(gate_up.to(dtype)), BF16(down.to(dtype)))
    elif fmt == "int4":  # with zero points, and scales that are no bfloat16
        pair = tuple(INT4.quantize(t + 0.05, symmetric=False, dtype=torch.float16) for t in (gate_up, down))
    else:
        made = {"mxfp4": MXFP4, "mxfp8": MXFP8, "fp8_block": FP8Block}[fmt]
        pair = (made.quantize(gate_up), made.quantize(down))
    rest = {
        "gate_up_bias": torch.randn(experts, rows).to(DEVICE) if biases else None,
        "down_bias": torch.randn(experts, hidden).to(DEVICE) if biases else None,
        "gate_up_input_scale": None,
        "down_input_scale": None,
    }
    plain = SimpleNamespace(gate_up=pair[0].to(DEVICE), down=pair[1].to(DEVICE), **rest)
    p = MoeProblem(experts + 2 * foreign, experts, foreign, top_k, hidden, inter, fmt, act, input_format,
                   dtype, DEVICE, deterministic, weight_dtype=dtype if fmt == "bf16" else None)  # fmt: skip
    gate_up, down = TritonRunner.prepare(p, plain)
    return TritonRunner(p, SimpleNamespace(gate_up=gate_up, down=down, **rest)), plain


def inputs_of(runner: TritonRunner, n: int) -> list[torch.Tensor]:
    p = runner.problem
    x = torch.randn(n, p.hidden_size).to(p.dtype)
    ids = (
        torch.stack([torch.randperm(p.num_experts)[: p.top_k] for _ in range(n)])
        if n
        else torch.zeros(0, p.top_k)
    )
    out = torch.full((n, p.hidden_size), torch.nan, dtype=p.dtype)
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


@pytest.mark.parametrize(
    ("name", "fmt"),
    [
        *((name, fmt) for name in TACTICS for fmt in ("nvfp4", "bf16")),
        *((name, fmt) for name in ("few_chained", "narrowing", "dequantized") for fmt in DECODED),
    ],
)
def test_every_way_matches_the_reference_on_odd_sizes(name: str, fmt: str) -> None:
    """Ragged experts, biases, experts of other ranks, an id that no rank has, an expert without pairs."""
    runner, plain = make(SIZES.get(fmt, (4, 2, 144, 80)), fmt, biases=True, foreign=1)
    inputs = inputs_of(runner, 11 if name.startswith("few") else 90)
    inputs[1][inputs[1] == 2] = 3  # nobody comes to local expert 1
    inputs[1][0] = torch.tensor([-7, 1 << 30])
    assert error(runner, plain, inputs, TACTICS[name]) < TOLERANCE


@pytest.mark.parametrize(
    "act",
    [SwiGLU(1.702, 7.0, 1.0), GeGLUTanh(), ReLU2(), ClampedSilu(2.0), SoftcapSwiGLU(3.0, 5.0)],
    ids=lambda a: type(a).__name__,
)
@pytest.mark.parametrize("name", ["few", "dequantized"])
def test_activations(name: str, act: Activation) -> None:
    for fmt in ("nvfp4", "bf16"):
        runner, plain = make((3, 2, 64, 48), fmt, act)
        inputs = inputs_of(runner, 7)
        inputs[0] *= 8  # far enough for the clamps
        assert error(runner, plain, inputs, TACTICS[name]) < TOLERANCE


@pytest.mark.parametrize("invariant", [False, True], ids=["", "batch-invariant"])
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_the_default_tactic(num_tokens: int, invariant: bool) -> None:
    runner, plain = make((4, 2, 128, 64), "nvfp4", biases=invariant)
    runner.problem = replace(runner.problem, batch_invariant=invariant)
    assert error(runner, plain, inputs_of(runner, num_tokens), -1) < TOLERANCE


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_steps_of_three_blocks(num_tokens: int) -> None:
    """gpt-oss's layer in small: 2880 columns are 45 blocks; MXFP4, biases, clamps."""
    runner, plain = make((4, 2, 192, 192), "mxfp4", SwiGLU(1.702, 7.0, 1.0), biases=True)
    assert choose.default(runner.problem, num_tokens).gemm1.k_blocks == 3
    assert error(runner, plain, inputs_of(runner, num_tokens), -1) < TOLERANCE


def test_one_token_takes_three_launches_and_no_sorting() -> None:
    runner, _ = make((4, 2, 128, 64), "nvfp4")
    names = [launch.kernel.__name__ for launch in runner.plan(inputs_of(runner, 1))]
    assert names == ["moe_gemm", "moe_gemm", "sum_pairs"]


def test_a_chain_that_broke_off_does_not_spoil_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tiles were counted, but nobody cleared the counters: the next would not wait for anything."""
    runner, plain = make((4, 2, 128, 64), "nvfp4")
    inputs, tactic = inputs_of(runner, 5), TACTICS["chained"]
    run = call.Launch.run

    def breaks(launch: call.Launch) -> None:
        if launch.kernel.__name__ == "sum_pairs":
            raise RuntimeError("out of memory")
        run(launch)

    monkeypatch.setattr(call.Launch, "run", breaks)
    with pytest.raises(RuntimeError, match="memory"):
        error(runner, plain, inputs, tactic)
    monkeypatch.undo()
    assert not runner._counters.here().any()
    assert error(runner, plain, inputs, tactic) < TOLERANCE
    assert not runner._counters.here().any()


def test_no_tokens_is_no_work() -> None:
    runner, _ = make((4, 2, 128, 64), "nvfp4")
    inputs = inputs_of(runner, 0)
    assert runner.plan(inputs) == []
    assert runner.forward(inputs).shape == (0, 128)


def test_tokens_whose_experts_are_all_elsewhere_come_out_as_zeros() -> None:
    runner, _ = make((4, 2, 128, 64), "nvfp4", foreign=3)
    for name in ("few", "sorted", "chained"):
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


@pytest.mark.parametrize("name", ["sorted", "dequantized"])
def test_batch_invariant_results_of_pairs_are_rounded_alike_whatever_their_number(name: str) -> None:
    """And the routing weights are applied where pairs are summed: by every path."""
    runner, plain = make((4, 2, 144, 80), "nvfp4", biases=True)
    runner.problem = replace(runner.problem, batch_invariant=True)
    tactic = replace(TACTICS[name], gemm2=Tile(64, 1, 4, 2))
    for n in (2, 40):
        runner.use_workspace(None)
        last = runner.plan(inputs_of(runner, n), tactic)[-1]
        assert last.args[0].dtype == torch.bfloat16
        assert last.args[2] is not None
        assert error(runner, plain, inputs_of(runner, n), tactic) < TOLERANCE


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


@pytest.mark.parametrize("foreign", [0, 1])
@pytest.mark.parametrize(
    ("scales", "fmt"),
    [("dynamic", "nvfp4"), ("calibrated", "nvfp4"), ("per expert", "nvfp4"), ("dynamic", "mxfp4")],
)
def test_w4a4_numerics(scales: str, fmt: str, foreign: int) -> None:
    """x and the intermediate through NVFP4, as quantised and dequantised in float32; also beside other ranks' pairs."""
    runner, plain = make(SIZES.get(fmt, (4, 2, 144, 80)), fmt, input_format="nvfp4", foreign=foreign)
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
    with pytest.raises(BackendError, match="do not divide"):
        runner.forward(inputs, replace(TACTICS["sorted"], gemm1=Tile(64, 4, 4, 2)))
    with pytest.raises(BackendError, match="must be -1 or"):
        runner.forward(inputs, "fast")


@pytest.mark.parametrize(
    ("name", "fmt"), [("few_chained", "nvfp4"), ("sorted", "fp8_block"), ("dequantized", "bf16")]
)
def test_float16_activations(name: str, fmt: str) -> None:
    """Dense weights in float16 are multiplied in float16; x becomes bfloat16 where weights are decoded to that."""
    runner, plain = make(SIZES.get(fmt, (4, 2, 144, 80)), fmt, biases=True, dtype=torch.float16)
    inputs = inputs_of(runner, 11)
    assert error(runner, plain, inputs, TACTICS[name]) < TOLERANCE
    assert inputs[3].dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"weight_format": "int3"}, "int3"),
        ({"input_format": "int8"}, "int8 activations"),
        ({"activation": torch.nn.SiLU()}, "SiLU"),
        ({"weight_format": "bf16", "weight_dtype": torch.float32}, "float32"),
    ],
    ids=str,
)
def test_a_problem_that_it_cannot_run_is_refused_with_its_reason(change: dict[str, Any], why: str) -> None:
    runner, _ = make((4, 2, 128, 64), "nvfp4")
    assert TritonRunner._unsupported(runner.problem) is None
    assert why in (TritonRunner._unsupported(replace(runner.problem, **change)) or "")


def test_weights_must_be_repacked_first() -> None:
    runner, plain = make((4, 2, 128, 64), "nvfp4")
    with pytest.raises(BackendError, match="prepare"):
        TritonRunner(runner.problem, plain)


def test_weights_with_strides_are_refused_where_nobody_made_them_contiguous() -> None:
    runner, plain = make((4, 2, 128, 64), "bf16")
    plain.gate_up = BF16(plain.gate_up.data.mT.contiguous().mT)
    with pytest.raises(BackendError, match="contiguous"):
        TritonRunner(runner.problem, plain)
