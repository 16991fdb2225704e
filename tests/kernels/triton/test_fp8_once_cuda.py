"""FP8 blocks in CUDA C++: on the CPU (cuda_machine.py) against their reference; deliberate mistakes."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import cuda_machine
from cuda_layers import TOLERANCE, Layer, Start, error, misplaced, name, on_machines
from cuda_machine import MachineError

from moestro.errors import BackendError
from moestro.kernels.activations import Activation, ClampedSilu, GeGLUTanh, ReLU2, SoftcapSwiGLU, SwiGLU
from moestro.kernels.triton.paths import fp8_once_cuda as path
from moestro.kernels.triton.tactic import Tactic

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU itself: tests/gpu"),
    pytest.mark.skipif(cuda_machine.why_missing() is not None, reason=str(cuda_machine.why_missing())),
]

TILES = path.TABLE["fp8"]
ALONE, SHARES_X = TILES
PLAIN, RELU2 = SwiGLU(), ReLU2()


@pytest.fixture
def on_machine(monkeypatch: pytest.MonkeyPatch) -> Start:
    return on_machines(path, monkeypatch)


def layer_of(
    *sizes: int,
    act: Activation = PLAIN,
    biases: torch.dtype | None = None,
    foreign: int = 0,
) -> Layer:
    dtype = torch.float16 if biases == torch.float16 else torch.bfloat16
    return Layer(*sizes, fmt="fp8_block", act=act, biases=biases, foreign=foreign, dtype=dtype)


# --- right ---------------------------------------------------------------------------------------------------------------
# (hidden, intermediate): 1 to 13 blocks of columns, odd ones; strips beyond the last, halves of one; rows of a last block
LAYERS = [
    ((304, 128), ClampedSilu(2.0), None),
    ((256, 256), SwiGLU(1.702, 7.0, 1.0), torch.bfloat16),
    ((1040, 384), SoftcapSwiGLU(3.0, 5.0), torch.float32),
    ((320, 400), RELU2, torch.float16),
    ((160, 96), RELU2, None),
    ((1584, 128), GeGLUTanh(), torch.bfloat16),
]


@pytest.mark.parametrize("tile", TILES, ids=name)
@pytest.mark.parametrize(
    ("sizes", "act", "biases"), LAYERS, ids=[f"{c[0]}-{type(c[1]).__name__}" for c in LAYERS]
)
def test_products_match_the_reference_on_odd_sizes(
    tile: Tactic,
    sizes: tuple[int, int],
    act: Activation,
    biases: torch.dtype | None,
    on_machine: Start,
) -> None:
    """Ragged experts, biases, experts of other ranks, an id that no rank has, an expert without pairs."""
    on_machine(tile.pairs1 + tile.gemm1.rows)
    layer = layer_of(4, 2, *sizes, act=act, biases=biases, foreign=1)
    for tokens in (1, 37, 300):
        inputs = layer.ragged(tokens)
        assert error(layer.run(inputs, tile), layer.truth(inputs)) < TOLERANCE


@pytest.mark.parametrize("tile", TILES, ids=name)
def test_the_order_in_which_threads_run_changes_no_bit(tile: Tactic, on_machine: Start) -> None:
    layer = layer_of(3, 2, 784, 128)
    layer.check_orders(210, tile, on_machine)


@pytest.mark.parametrize(("experts", "by_size"), [(path.MANY_EXPERTS, False), (path.MANY_EXPERTS - 1, True)])
def test_tiles_of_many_experts_are_in_the_experts_order(
    experts: int, by_size: bool, on_machine: Start
) -> None:
    """Of the experts that this rank has."""
    on_machine(0)
    layer = layer_of(experts, 2, 144, 128, foreign=3)
    plan = layer.runner.plan(layer.inputs(5), TILES[0])
    assert [launch.meta["BY_SIZE"] for launch in plan if launch.kernel.__name__ == "place"] == [by_size]


def test_all_tiles_give_the_same_bits(on_machine: Start) -> None:
    on_machine(1)
    layer = layer_of(3, 2, 784, 384)
    inputs = layer.inputs(210)
    first, *rest = [layer.run(inputs, tile) for tile in TILES]
    assert all(torch.equal(other, first) for other in rest)


def test_x_that_lies_at_an_odd_address_is_read_otherwise_and_gives_the_same_bits(on_machine: Start) -> None:
    on_machine(2)
    layer = layer_of(3, 2, 320, 128)
    inputs = layer.inputs(40)
    aligned = layer.run(inputs, ALONE)
    inputs[0] = misplaced(inputs[0], 1)
    assert torch.equal(layer.run(inputs, ALONE), aligned)


def test_weights_that_cannot_be_copied_16_bytes_at_a_time_are_an_error_that_says_so(
    on_machine: Start,
) -> None:
    on_machine(2)
    layer = layer_of(3, 2, 320, 128)
    experts = layer.runner._experts
    experts.down = replace(experts.down, words=misplaced(experts.down.words, 2))
    with pytest.raises(BackendError, match="copies 16 bytes at a time, weights lie at 0x"):
        layer.runner.plan(layer.inputs(4), ALONE)


def test_scales_of_weights_may_lie_at_any_multiple_of_four_bytes(on_machine: Start) -> None:
    on_machine(2)
    layer = layer_of(3, 2, 320, 128)
    inputs = layer.inputs(40)
    aligned = layer.run(inputs, ALONE)
    experts = layer.runner._experts
    experts.down = replace(experts.down, scales=misplaced(experts.down.scales, 1))
    assert torch.equal(layer.run(inputs, ALONE), aligned)


# --- wrong ---------------------------------------------------------------------------------------------------------------
class Mutant(NamedTuple):
    """A kernel that is wrong: its text, what stands there instead, what the machine must say of it."""

    old: str
    new: str
    tile: Tactic
    said: str = ""


MUTANTS = {
    "a stage is given back before its products are waited for": Mutant(
        "  Mma<HALF>::wait(v.part);\n  give_back(ring, s);", "  give_back(ring, s);\n  Mma<HALF>::wait(v.part);", ALONE),
    "a stage is given back twice": Mutant(
        "P::HALVES - 1>(now);\n", "P::HALVES - 1>(now);\n  give_back(ring, s);\n", ALONE, "counts fewer|deadlock|error"),
    "sums are added while their products run": Mutant(
        "    Mma<HALF>::wait(v.part);\n    v.template", "    v.template", ALONE),
    "a half goes on from the other": Mutant("part, x, w, false);", "part, x, w, true);", ALONE),
    "a tile's first stage is read before it is there": Mutant(
        "  wait(ring.full, uses.parity(0));\n  now.read", "  now.read", ALONE),
    "a stage is read before it is there": Mutant("    wait(ring.full + 8 * after, uses.parity(after));\n", "", ALONE),
    "a stage's use is forgotten": Mutant("  uses.add(s);\n", "", ALONE, "counts fewer"),
    "scales of weights are the block's before": Mutant("of_w + 8 * (b + 1)", "of_w + 8 * b", ALONE),
    "scales are the stage's before": Mutant("now = next;", "", ALONE),
    "a stage is filled before it is empty": Mutant(
        "    wait(ring.empty + 8 * stage, uses.parity(stage) ^ 1);\n    __syncwarp();", "    __syncwarp();", ALONE),
    "the producer waits for a phase that never ends": Mutant(
        "uses.parity(stage) ^ 1);\n    __syncwarp();", "uses.parity(stage));\n    __syncwarp();", ALONE, "deadlock"),
    "the phase of a slot never turns": Mutant("slot = 0, phase ^= 1;", "slot = 0;", ALONE),
    "a slot is told of before it is copied": Mutant(
        "  arrive_when_copied(bar);\n  if (thread == 0) {", "  arrive(bar);\n  if (thread == 0) {", ALONE),
    "rows of the second group are not expected": Mutant("groups * X_GROUP + W_STAGE", "X_GROUP + W_STAGE", ALONE),
    "rows that do not come are expected": Mutant(
        "groups * X_GROUP + W_STAGE", "GROUPS * X_GROUP + W_STAGE", ALONE, "deadlock.*8192 bytes"),
    "the registers are not fenced": Mutant("    begin_products();\n", "", ALONE, "without a fence"),
    "columns of x are another product's": Mutant("part, x + 2, w + 2", "part, x + 4, w + 2", ALONE),
    "the second group has the first one's rows": Mutant(
        "GROUP == ANY ? 0 : GROUP * X_GROUP", "0", ALONE),
    "the second half is the first": Mutant("v.multiply(x, w + W_HALF);", "v.multiply(x, w);", ALONE),
    "gate has up's scale": Mutant("s[0][0] = x0 * w0", "s[0][0] = x0 * w1", ALONE),
    "rows 8 to 15 have the scales of the others": Mutant("s[k / 2][", "s[0][", ALONE),
    "scales of x of other blocks": Mutant("b / FOUR * FOUR, t.start", "0, t.start", ALONE),
    "the scale of x is another block's": Mutant("(b + 1) % FOUR * 4", "b % FOUR * 4", ALONE),
    "scales of weights of another expert": Mutant("(t.expert * SCALE_ROWS + scale_row", "(scale_row", ALONE),
    "pairs of another tile": Mutant("p.sorted_pairs + t.start + i", "p.sorted_pairs + i", ALONE),
    "the scale of the intermediate is another place's": Mutant(
        "p.out_scale[to * p", "p.out_scale[(t.start + place) * p", ALONE),
    "the intermediate's scale is of fewer columns": Mutant(
        "    most[row] = fmaxf(most[row], __shfl_xor_sync(0xffffffffu, most[row], 2));\n", "", ALONE),
    "lanes exchange the other half": Mutant("odd ? r : other, bit", "odd ? other : r, bit", ALONE),
    "results are read before they are turned": Mutant(
        "  __syncwarp();\n#pragma unroll\n  for (int n", "#pragma unroll\n  for (int n", ALONE),
    "later results are read before they are turned": Mutant(
        "r[i][2], r[i][3]);\n    __syncwarp();", "r[i][2], r[i][3]);", ALONE),
    "eighths of turned results are exchanged otherwise": Mutant(
        "(((lane / 16 + k) ^ to) & 7)", "((lane / 16 + k) & 7)", ALONE),
    "the second half of a tile of few pairs is the first": Mutant("v.first_half() * W_HALF", "0", ALONE),
    "few pairs are the second group's": Mutant("COUNT == 2 ? group_of_thread() * 64 : 0", "group_of_thread() * 64", ALONE),
    "a group does not know the other's largest": Mutant(
        "if constexpr (OTHERS) join", "if constexpr (false) join", ALONE),
    "the other's largest is not there yet": Mutant(
        "most[row]);\n  meet_threads<GROUPS * 128>();", "most[row]);", ALONE),
    "a warp turns its results where another does": Mutant("threadIdx.x / 32 * TURNED", "threadIdx.x / 64 * TURNED", ALONE),
    "scales are copied from where the accelerator does not read": Mutant(
        "b / FOUR * FOUR, t.start", "b, t.start", ALONE, "multiple of 16 bytes"),
    "the scale of a place is another's": Mutant("OF_SCALES + FOUR * 4 * place", "OF_SCALES + FOUR * 4 * (place / 2)", ALONE),
    "both blocks copy the same rows of x": Mutant("else if (g == rank) copy_box_to(", "else copy_box_to(", SHARES_X),
    "rows of x go to one block": Mutant(
        "b * 128, t.start + 64 * g, bar, 3);", "b * 128, t.start + 64 * g, bar, 1);", SHARES_X, "deadlock"),
    "both blocks have the same strip": Mutant("CLUSTER * t.strip + rank", "CLUSTER * t.strip", SHARES_X),
    "a stage is given back to one block": Mutant(
        "if (lane < CLUSTER) arrive_at(bar, lane);", "if (lane < CLUSTER) arrive_at(bar, 0);", SHARES_X),
    "a stage is empty once its own block has given it back": Mutant(
        "init(ring.empty + 8 * i, CLUSTER * GROUPS * 4);", "init(ring.empty + 8 * i, GROUPS * 4);", SHARES_X),
    "the other block's barriers are not there yet": Mutant(
        "  if (CLUSTER > 1) meet_cluster();\n  wait_for_previous();", "  wait_for_previous();", SHARES_X),
    "a block ends before the other's copies and arrivals": Mutant(
        "  if (CLUSTER > 1) sync_cluster();  // the other's", "  // the other's", SHARES_X, "ended"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=list(MUTANTS))
def test_the_machine_notices_a_kernel_that_is_wrong(mutant: Mutant, on_machine: Start) -> None:
    """By a message, or NaN and wrong numbers, in one of a few orders of its threads."""
    layer = layer_of(3, 2, 1296, 384)
    inputs = layer.inputs(170)  # tiles of 128 and 42 pairs, or 170, and of 85 each
    inputs[1][:, 0], inputs[1][:, 1] = 0, torch.arange(170) % 2 + 1
    truth = layer.truth(inputs)

    def noticed(seed: int) -> str:
        on_machine(seed, (mutant.old, mutant.new))
        try:
            wrong = error(layer.run(inputs, mutant.tile), truth)
        except MachineError as raised:
            return str(raised)
        return "" if wrong < TOLERANCE else f"an error of {wrong}"

    said = next((text for text in map(noticed, range(8)) if text), None)
    assert said is not None
    assert re.search(mutant.said, said)
