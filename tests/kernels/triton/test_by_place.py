"""x by place (device/by_place.cu), as both paths in CUDA C++ take it: on the CPU (cuda_machine.py); deliberate mistakes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import cuda_machine
from cuda_layers import Layer, on_machines
from cuda_machine import MachineError
from fp8_rows import turned
from test_kernels import poisoned

from moestro.kernels.triton.paths import fp8_cuda, fp8_once_cuda
from moestro.kernels.triton.tactic import Tactic
from moestro.moe.reference import through

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU itself: tests/gpu"),
    pytest.mark.skipif(cuda_machine.why_missing() is not None, reason=str(cuda_machine.why_missing())),
]


class Way(NamedTuple):
    """A path, and a layer whose x it takes by place."""

    path: Any
    tactic: Tactic
    fmt: str
    inter: int


ROWS = Way(fp8_cuda, fp8_cuda.tactic(144, 128), "nvfp4", 32)  # a scale a row, columns turned
BLOCKS = Way(
    fp8_once_cuda, fp8_once_cuda.tactic(128, 256), "fp8_block", 128
)  # a scale for 128 columns, in order


def right(way: Way, hidden: int, foreign: int, dtype: torch.dtype) -> bool:
    """Whether x by place is what its reference is, bit by bit, and nothing else is written: of 50 tokens, a row of zeros,
    one whose scale is no normal number, experts of other ranks.
    """
    layer = Layer(4, 2, hidden, way.inter, fmt=way.fmt, foreign=foreign, dtype=dtype)
    inputs = layer.inputs(50)
    x, ids = inputs[:2]
    x[7] = 0
    x[8] *= 1e-38
    ids[9] = torch.tensor([-7, 1])
    poisoned(layer.runner, 50, way.tactic)
    launches = layer.runner.plan(inputs, way.tactic)
    (spread,) = (i for i, launch in enumerate(launches) if launch.kernel.__name__ == "spread")
    for launch in launches[: spread + 1]:
        launch.run()
    (_, _, _, data, scales, _), (pairs, *_) = launches[spread].args, launches[spread - 1].args
    e = ids.reshape(-1)[pairs.long()]
    here = (e >= foreign) & (e < foreign + 4)
    assert 0 < int((~here).sum()) < 60
    whole = torch.zeros(data.shape)
    whole[:, :hidden] = x.float()[pairs.long() // 2]
    if way is ROWS:
        found, wanted = data.float() * scales[:, None], through(whole, "fp8")[:, turned(hidden)]
    else:
        by_block = data.float().unflatten(1, (-1, 128)) * scales[:, : data.shape[1] // 128, None]
        found, wanted = by_block.flatten(1), through(whole, "fp8", fp8_columns=128)
    untouched = torch.all(data[~here].view(torch.uint8) == 0xFF)
    return bool(torch.equal(found[here], wanted[here]) and untouched)


@pytest.mark.parametrize("way", [ROWS, BLOCKS], ids=["rows", "blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("hidden", "foreign"), [(304, 1), (2320, 0)])
def test_x_by_place_is_what_the_reference_quantises(
    way: Way, dtype: torch.dtype, hidden: int, foreign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machines(way.path, monkeypatch)(3)
    assert right(way, hidden, foreign, dtype)


MUTANTS = [
    (ROWS, "of_warps[threadIdx.x / 32] = v;\n  __syncthreads();", "of_warps[threadIdx.x / 32] = v;"),
    (ROWS, "largest_of<32>(v)", "largest_of<16>(v)"),
    (ROWS, "32 * q + chunk", "16 * q + chunk"),
    (ROWS, "p.scales[to] = scale[0]", "p.scales[to + 1] = scale[0]"),
    (BLOCKS, "largest_of<8>(mine)", "largest_of<4>(mine)"),
    (BLOCKS, "to * p.scale_blocks + chunk / 8", "to * (CHUNKS / 8) + chunk / 8"),
    *(
        (way, old, new)
        for way in (ROWS, BLOCKS)
        for old, new in (
            ("most == 0.f ? 1.f", "most == 0.f ? 0.f"),
            ("1.1754943508222875e-38f", "0.f"),
            ("chunk < CHUNKS && column < COLUMNS", "chunk < CHUNKS"),
            ("token * TOP_K + k", "token * TOP_K"),
            ("  fence_for_products();\n", ""),
            ("  __syncthreads();\n#pragma", "#pragma"),
            ("  if (threadIdx.x == 0) wait_for_copies_out();\n", ""),
            ("to * CHUNKS * 16, row, CHUNKS * 16", "to * CHUNKS * 16, row, CHUNKS * 16 - 16"),
        )
    ),
]


@pytest.mark.parametrize(("way", "old", "new"), MUTANTS, ids=[f"{m[0].fmt}-{m[1][:24]!r}" for m in MUTANTS])
def test_wrong_rows_by_place_are_noticed(
    way: Way, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the numbers, or by the machine."""
    start = on_machines(way.path, monkeypatch)

    def passes(seed: int) -> bool:
        start(seed, (old, new), of="SPREAD")
        try:
            return right(way, 304, 0, torch.bfloat16)
        except MachineError:
            return False

    assert not all(map(passes, range(4)))
