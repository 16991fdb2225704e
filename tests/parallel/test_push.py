"""The kernels that move rows between GPUs, in Triton's interpreter: two ranks' buffers in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moestro import reference
from moestro.parallel.placement import Placement
from moestro.parallel.symmetric import Buffers, Symmetric, _why_not_here, pull, push, unpack
from moestro.parallel.ways import Routes

pytest.importorskip("triton")
import parallel_cases as cases

CPU = torch.device("cpu")
MAPS = {"contiguous": None, "replicas": [[0, 1], [0], [1], [0, 1], [1], [0], [1], [0]]}


def buffers_of(size: int, bound: int, hidden: int, top_k: int, fp8: bool = False) -> list[Buffers]:
    """Every rank's buffers, as each of them sees the others'."""
    count = size * bound
    made = [
        {
            "rows": torch.full((count * hidden,), torch.nan).to(
                torch.float8_e4m3fn if fp8 else torch.float32
            ),
            "ids": torch.full((count * top_k,), 99, dtype=torch.int32),
            "weights": torch.full((count * (top_k + fp8),), torch.nan),
            "results": torch.full((count * hidden,), torch.nan),
        }
        for _ in range(size)
    ]
    addresses = {name: torch.tensor([of[name].data_ptr() for of in made]) for name in made[0]}
    return [Buffers(tensors, addresses) for tensors in made]


@pytest.mark.parametrize("kind", list(MAPS))
@pytest.mark.parametrize("counts", [(3, 3), (5, 0)])
@pytest.mark.parametrize("fp8", [False, True])
def test_rows_go_to_who_needs_them_and_sums_come_back(kind: str, counts: tuple[int, int], fp8: bool) -> None:
    w, bound = cases.weights_of_all(), max(counts)
    placement = Placement.of(MAPS[kind], cases.E, 2) if MAPS[kind] else Placement.contiguous(cases.E, 2)
    routes = [Routes(placement, rank, CPU) for rank in range(2)]
    buffers = buffers_of(2, bound, cases.H, cases.K, fp8)
    calls = [cases.tokens_of(rank, counts[rank], "uniform") for rank in range(2)]
    for rank, (x, ids, weights) in enumerate(calls):
        push(buffers[rank], routes[rank], x, ids, weights, bound, fp8)
    gate_up, down = w.dequantize()
    for rank in range(2):
        of = buffers[rank].tensors
        ids = of["ids"].view(2 * bound, cases.K)
        slots = list(placement.slots(rank))
        offset = slots[0] if routes[rank].contiguous else 0
        shard = cases.ExpertWeights.from_dense(gate_up[slots], down[slots], "bf16")
        needed = (ids >= 0).any(-1)
        rows, pair_weights = of["rows"].view(2 * bound, -1), of["weights"].view(2 * bound, -1)
        if fp8:
            rows, pair_weights = unpack(rows, ids, pair_weights, torch.float32)
        rows = rows[needed]
        assert rows.isfinite().all()
        results = of["results"].view(2 * bound, -1)
        results[needed] = reference.fused_moe(
            rows, ids[needed], pair_weights[needed].nan_to_num(), shard, expert_offset=offset
        )
    for rank, (x, ids, weights) in enumerate(calls):
        out = torch.empty_like(x)
        pull(buffers[rank], routes[rank], ids, out, bound)
        # Triton's interpreter rounds to e4m3 worse than GPUs do: 8.5 % of normal values instead of 2.6 %.
        limit = 0.12 if fp8 else cases.TIGHT
        assert cases.error_of(out, reference.fused_moe(x, ids, weights, w)) < limit


@pytest.mark.parametrize("capability", ["90", "100"])
def test_the_kernels_compile_for_gpus(capability: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_push.py")
    done = subprocess.run(
        [sys.executable, str(script), capability],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "pull_sums",
        "push_rows",
        "push_rows",
        "unpack_rows",
    ]


class OneOf:
    """Peers whose other rank says something else of symmetric memory."""

    size = 2

    def __init__(self, other: list[str]) -> None:
        self.link, self._other = self, other

    def exchange(self, step: str, mine: list[str]) -> list[list[str]]:
        return [["", mine[1]], [self._other[0], self._other[1] or mine[1]]]


def test_symmetric_memory_is_used_by_all_ranks_or_none() -> None:
    device = torch.device("cpu")
    assert Symmetric.why_not(OneOf(["", ""]), device, "bf16") is None  # type: ignore[arg-type]
    assert Symmetric.why_not(OneOf(["no Triton", ""]), device, "bf16") == "rank 1: no Triton"  # type: ignore[arg-type]
    assert Symmetric.why_not(OneOf(["", "elsewhere"]), device, "bf16") == "the ranks are on 2 hosts"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "why"), [("0", "=0"), ("false", "must be 0 or 1, got 'false'"), ("1", "GPUs")]
)
def test_the_switch_is_0_or_1(value: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESTRO_SYMMETRIC_MEMORY", value)
    assert why in _why_not_here(torch.device("cuda:0"), 1 << 20)
