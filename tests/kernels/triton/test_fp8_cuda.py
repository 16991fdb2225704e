"""FP8 products in CUDA C++: on the CPU (cuda_machine.py) against their reference; deliberate mistakes."""

from __future__ import annotations

import math
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
from moestro.kernels.triton import cuda_source
from moestro.kernels.triton.device.arguments import Product
from moestro.kernels.triton.device.fp8 import Recipe
from moestro.kernels.triton.paths import fp8
from moestro.kernels.triton.paths import fp8_cuda as path
from moestro.kernels.triton.tactic import Tactic

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU itself: tests/gpu"),
    pytest.mark.skipif(cuda_machine.why_missing() is not None, reason=str(cuda_machine.why_missing())),
]

TILES = path.TABLE["fp8"]
GATHERED = next(t for t in TILES if (t.pairs1, t.gemm1.rows) == (32, 256))
BY_PLACE = next(t for t in TILES if t.pairs1 == 144)


@pytest.fixture
def on_machine(monkeypatch: pytest.MonkeyPatch) -> Start:
    return on_machines(path, monkeypatch)


# --- right ---------------------------------------------------------------------------------------------------------------
ACTIVATIONS = (SwiGLU(1.702, 7.0, 1.0), GeGLUTanh(), ReLU2(), ClampedSilu(2.0), SoftcapSwiGLU(3.0, 5.0))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (hidden, intermediate): blocks of 128 columns are 3 and 1, or 6 and 4: spans of 2 and 6, odd blocks, strips beyond the last
SHORT, LONG = {"nvfp4": (304, 112), "mxfp4": (320, 96)}, {"nvfp4": (704, 480), "mxfp4": (736, 480)}
ODD_SIZES = [
    (tile, fmt, SHORT if (i + j) % 2 == 0 else LONG, ACTIVATIONS[(i + 2 * j) % 5], DTYPES[(i + j) % 3])
    for i, tile in enumerate(TILES)
    for j, fmt in enumerate(("nvfp4", "mxfp4"))
]


@pytest.mark.parametrize(
    ("tile", "fmt", "sizes", "act", "biases"),
    ODD_SIZES,
    ids=[
        f"{name(c[0])}-{c[1]}-{'short' if c[2] is SHORT else 'long'}-{type(c[3]).__name__}" for c in ODD_SIZES
    ],
)
def test_products_match_the_reference_on_odd_sizes(
    tile: Tactic,
    fmt: str,
    sizes: dict[str, tuple[int, int]],
    act: Activation,
    biases: torch.dtype,
    on_machine: Start,
) -> None:
    """Ragged experts, biases, experts of other ranks, an id that no rank has, an expert without pairs."""
    on_machine(tile.pairs1 + tile.gemm1.rows)
    dtype = torch.float16 if biases == torch.float16 else torch.bfloat16
    layer = Layer(4, 2, *sizes[fmt], fmt=fmt, act=act, biases=biases, foreign=1, dtype=dtype)
    for tokens in (1, 37, 300):
        inputs = layer.ragged(tokens)
        assert error(layer.run(inputs, tile), layer.truth(inputs)) < TOLERANCE


@pytest.mark.parametrize("tile", [GATHERED, BY_PLACE], ids=name)
@pytest.mark.parametrize("sizes", [(2304, 96), (160, 1600)], ids=str)
def test_sums_of_many_spans(tile: Tactic, sizes: tuple[int, int], on_machine: Start) -> None:
    """18 blocks of 128 columns, three spans of 6, or 13, seven of 2: the ring goes round several times."""
    on_machine(1)
    layer = Layer(2, 2, *sizes)
    inputs = layer.inputs(20)
    assert error(layer.run(inputs, tile), layer.truth(inputs)) < TOLERANCE


@pytest.mark.parametrize("tile", [GATHERED, BY_PLACE], ids=name)
def test_the_order_in_which_threads_run_changes_no_bit(tile: Tactic, on_machine: Start) -> None:
    layer = Layer(3, 2, 384, 160, biases=torch.bfloat16)
    layer.check_orders(120, tile, on_machine)


@pytest.mark.parametrize("limit", [math.inf, 1e-50], ids=str)
def test_limits_beyond_float32_are_the_nearest_float32(limit: float, on_machine: Start) -> None:
    on_machine(2)
    layer = Layer(2, 2, 160, 96, act=ClampedSilu(limit))
    inputs = layer.inputs(9)
    found, truth = layer.run(inputs, GATHERED), layer.truth(inputs)
    assert error(found, truth) < TOLERANCE if limit > 1 else not found.any()
    assert cuda_source.definitions({"A": 1e39}).endswith("#define A __uint_as_float(0x7f800000u)\n")


def test_x_that_lies_between_multiples_of_what_is_loaded_gives_the_same_bits(on_machine: Start) -> None:
    on_machine(2)
    layer = Layer(3, 2, 320, 96)
    inputs = layer.inputs(40)
    aligned = layer.run(inputs, BY_PLACE)
    inputs[0] = misplaced(inputs[0], 1)
    assert torch.equal(layer.run(inputs, BY_PLACE), aligned)


def test_weights_that_cannot_be_copied_16_bytes_at_a_time_are_an_error_that_says_so(
    on_machine: Start,
) -> None:
    on_machine(2)
    layer = Layer(3, 2, 320, 96)
    experts = layer.runner._experts
    experts.down = replace(experts.down, scales=misplaced(experts.down.scales, 2))
    with pytest.raises(BackendError, match="copies 16 bytes at a time, weights lie at 0x"):
        layer.runner.plan(layer.inputs(4), BY_PLACE)


def test_only_a_product_that_asks_for_weights_alone_before_it_waits_may_begin_early(
    on_machine: Start,
) -> None:
    """The second product, right behind what quantises its rows; every other launch waits before the next begins."""
    on_machine(0)
    layer = Layer(3, 2, 320, 96)

    def hows(tile: Tactic) -> list[object]:
        return [launch.meta.get("HOW") for launch in layer.runner.plan(layer.inputs(4), tile)]

    for tile in TILES:
        found = hows(tile)
        (early,) = (i for i, how in enumerate(found) if isinstance(how, Recipe) and how.early)
        after = found[early + 1]
        assert isinstance(after, Product)
        assert after.stage == 2
    for tile in fp8.TABLE["fp8"]:
        assert not any(how.early for how in hows(tile) if isinstance(how, Recipe))


# --- wrong ---------------------------------------------------------------------------------------------------------------
HAS_TWO = "return BLOCKS % 2 == 0 || b + 1 < BLOCKS;"


class Mutant(NamedTuple):
    """A kernel that is wrong: its text, what stands there instead, what the machine must say of it."""

    old: str
    new: str
    tile: Tactic
    said: str = ""
    sizes: tuple[int, int] = (1408, 416)


MUTANTS = {
    "a stage is given back before its products are waited for": Mutant(
        "        wait_for_all_but_one();\n        if (s == 0 && b % 2 == 0) give_back(ring);",
        "        if (s == 0 && b % 2 == 0) give_back(ring);\n        wait_for_all_but_one();", BY_PLACE),
    "the last stage of a span is given back before its products are waited for": Mutant(
        "          add();\n          if (!first) give_back(ring);",
        "          if (!first) give_back(ring);\n          add();", BY_PLACE),
    "the last stage of a tile is given back before its products are waited for": Mutant(
        "  sums.add();\n  sums.give_back(ring);", "  sums.give_back(ring);\n  sums.add();", BY_PLACE),
    "a stage is given back twice": Mutant(
        "        last = at.stage;\n        at.next();", "        at.next();\n        last = at.stage;", BY_PLACE),
    "operands are overwritten while their products run": Mutant("        wait_for_all_but_one();\n", "", BY_PLACE),
    "one set of operands": Mutant("a[(b * PARTS + s) % 2]", "a[0]", BY_PLACE),
    "sums are added while their products run": Mutant("      Mma<W>::wait(part[s]);\n", "", GATHERED),
    "a span goes on from the one before": Mutant("b > 0);", "true);", GATHERED),
    "consumers wait for the wrong phase of a stage": Mutant(
        "wait(ring.full + 8 * at.stage, at.phase);", "wait(ring.full + 8 * at.stage, at.phase ^ 1);", BY_PLACE),
    "a stage is read before it is there": Mutant("        wait(ring.full + 8 * at.stage, at.phase);\n", "", BY_PLACE),
    "a stage is filled before it is empty": Mutant(
        "    wait(ring.empty + 8 * at.stage, at.phase);\n    if constexpr", "    if constexpr", BY_PLACE),
    "the producer waits for a phase that never ends": Mutant("Turn at = {0, 1};", "Turn at = {0, 0};", BY_PLACE, "deadlock"),
    "the phase of a stage never turns": Mutant("stage = 0, phase ^= 1;", "stage = 0;", BY_PLACE),
    "the phase of a slot never turns": Mutant("slot = 0, phase ^= 1;", "slot = 0;", GATHERED),
    "a slot too few": Mutant("/ STAGES_OF_TILE + 1;", "/ STAGES_OF_TILE;", GATHERED, sizes=(160, 1024)),
    "a tile is told of before the stage before it is empty": Mutant(
        "  wait(ring.empty + 8 * at.stage, at.phase);\n  tell", "  tell", GATHERED, sizes=(160, 1024)),
    "a slot is told of before it is copied": Mutant(
        "  arrive_when_copied(bar);\n  if (thread == 0) {", "  arrive(bar);\n  if (thread == 0) {", GATHERED),
    "the bytes of x are not expected": Mutant("(GATHER ? 0 : width * 128)", "0", BY_PLACE),
    "bytes are expected that do not come": Mutant(
        "(GATHER ? 0 : width * 128)", "width * 128", GATHERED, "deadlock.*8192 bytes"),
    "a stage is there before the rows gathered": Mutant(
        "      arrive_when_copied(bar);\n    }", "      arrive(bar);\n    }", GATHERED),
    "the proxies are not fenced": Mutant("        if (GATHER) fence_for_products();\n", "", GATHERED, "no fence between"),
    "the registers are not fenced": Mutant("  begin_products();\n", "", GATHERED, "without a fence"),
    "rows of x are swizzled otherwise": Mutant("(thread % 8 ^ thread / 8 % 8)", "(thread % 8)", GATHERED),
    "rows of x by place at half of their distance": Mutant("copy_box(to + i * 128,", "copy_box(to + i * 64,", BY_PLACE),
    "the same rows of x again": Mutant("t.start + i, bar", "t.start, bar", BY_PLACE),
    "the second block is the first": Mutant("stage + b % 2 * X_BLOCK", "stage", GATHERED),
    "a block beyond an odd number's last": Mutant(HAS_TWO, "return true;", GATHERED),
    "every second block is left out": Mutant(HAS_TWO, "return false;", GATHERED),
    "scales of the other row": Mutant("load2(s), load2(s + SCALES / 8)", "load2(s + SCALES / 8), load2(s)", GATHERED),
    "weights that were asked for early are asked for again": Mutant(
        "if (b >= 2 * ahead) copy_weights", "copy_weights", BY_PLACE),
    "weights of a later tile are taken for asked for": Mutant("    ahead = 0;\n", "", GATHERED),
    "weights asked for early are the first stage's": Mutant(
        "ring.full + 8 * i, 2 * i, W", "ring.full + 8 * i, 0, W", BY_PLACE),
    "one stage too few is asked for early": Mutant(
        "int i = 0; i < ahead; i++", "int i = 1; i < ahead; i++", GATHERED, "deadlock"),
    "the lower strip is the upper": Mutant("(2 * part + u) * CODES", "u * CODES", GATHERED),
    "row scales of the other strip": Mutant("(slot + OF_ROWS) + part * 64", "(slot + OF_ROWS)", GATHERED),
    "tables of the other row": Mutant("permute(w, x, 0x622A)", "permute(w, x, 0x4008)", GATHERED),
    "results are read before they are turned": Mutant("    __syncwarp();\n#pragma unroll", "#pragma unroll", GATHERED),
    "halves of turned results are exchanged": Mutant("((lane / 8 ^ lane / 4) & 1)", "(lane / 8 & 1)", GATHERED),
    "a warp turns its results where another does": Mutant("threadIdx.x / 32 * TURNS", "threadIdx.x / 64 * TURNS", GATHERED),
    "a width that is too narrow": Mutant("else if (count <= W)", "else if (count <= W + 8)", GATHERED),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=list(MUTANTS))
def test_the_machine_notices_a_kernel_that_is_wrong(mutant: Mutant, on_machine: Start) -> None:
    """By a message, or NaN and wrong numbers, in one of a few orders of its threads."""
    layer = Layer(3, 2, *mutant.sizes)
    inputs = layer.inputs(
        84
    )  # tiles of 84, or 2 x 32 and 20 pairs of the first expert, and of 42, or 32 and 10
    inputs[1][:, 0], inputs[1][:, 1] = 0, torch.arange(84) % 2 + 1
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
