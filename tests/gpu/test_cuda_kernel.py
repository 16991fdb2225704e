"""A kernel in CUDA C++ on a GPU: words, maps, shared memory, threads, streams and graphs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from moestro.kernels.triton import cuda, nvrtc
from moestro.kernels.triton.call import Launch

HERE = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HERE, reason="needs a Hopper GPU")]
ROWS, BOX = 40, 24  # the last box hangs over by eight rows
SOURCE = r"""
typedef unsigned int u32;
typedef unsigned char u8;
struct alignas(64) Map { unsigned long long words[16]; };
struct Params { u8* out; const int* add; long long more; };

extern "C" __global__ void move(const __grid_constant__ Params p, const __grid_constant__ Map map) {
  extern __shared__ __align__(1024) u8 box[];
  u32 to = (u32)__cvta_generic_to_shared(box), bar = to + BOX * 128;
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(BOX * 128) : "memory");
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(to), "l"(&map), "r"(0), "r"(BOX * (int)blockIdx.x), "r"(bar) : "memory");
  }
  asm volatile(
      "{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0;\n@!p bra AGAIN;\n}"
      ::"r"(bar) : "memory");
  int add = (p.add ? *p.add : 0) + (int)p.more;
  for (int i = threadIdx.x; i < BOX * 128; i += blockDim.x) {
    int row = i / 128, column = i % 128;
    p.out[BOX * 128 * blockIdx.x + i] = box[row * 128 + (((column / 16) ^ (row & 7)) * 16) + column % 16] + add;
  }
}
"""
MOVE = cuda.CudaKernel(
    "move",
    ("out", "add", "more", "rows"),
    lambda BOX: cuda.Variant(f"#define BOX {BOX}\n{SOURCE}", 256, 100 << 10),
)


def launch(rows: torch.Tensor, out: torch.Tensor, add: torch.Tensor | None, more: int) -> Any:
    args = (out, add, more, cuda.boxes(rows, (BOX, 128)))
    return Launch(MOVE, (2,), args, {"BOX": BOX, "launch_pdl": True, "PDL": True}).run()


def tensors(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator("cuda").manual_seed(seed)
    rows = torch.randint(0, 100, (ROWS, 128), dtype=torch.uint8, device="cuda", generator=draw)
    return rows, torch.full((2 * BOX, 128), 255, dtype=torch.uint8, device="cuda"), torch.tensor([seed], device="cuda",
                                                                                              dtype=torch.int32)  # fmt: skip


def wanted(rows: torch.Tensor, add: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, 2 * BOX - ROWS)) + add


def test_the_compiler_that_torch_brings_is_found() -> None:
    assert nvrtc.why_missing() is None


def test_words_and_maps_arrive_and_rows_beyond_the_end_are_zero() -> None:
    rows, out, add = tensors(7)
    launch(rows, out, None, 5)
    assert torch.equal(out, wanted(rows, 5))
    launch(rows, out, add, -3)
    assert torch.equal(out, wanted(rows, 4))


def test_each_waits_for_the_one_ahead_of_it() -> None:
    rows, out, _ = tensors(1)
    source, total = rows, 0
    for more in range(1, 60):
        launch(source, out, None, more % 2)
        source, out, total = out[:ROWS], torch.empty_like(out), total + more % 2
    assert torch.equal(source, rows + total)


def test_threads_with_streams_of_their_own() -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(100):
                rows, out, add = tensors(seed)
                launch(rows, out, add, turn)
                if not torch.equal(out, wanted(rows, seed + turn)):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_thread_that_has_touched_no_gpu_can_launch() -> None:
    rows, out, add = tensors(3)
    compiled, failed = launch(rows, out, None, 0), []
    args = (out, add, 9, cuda.boxes(rows, (BOX, 128)))

    def work() -> None:
        try:
            compiled.run(2, 1, 1, 0, compiled.function, compiled.packed_metadata, None, None, None, *args)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert failed == []
    assert torch.equal(out, wanted(rows, 12))


def test_a_graph_repeats_it_also_where_it_is_loaded_while_that_is_captured() -> None:
    rows, out, add = tensors(2)
    MOVE._compiled.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(rows, out, add, 1)
        launch(out[:ROWS], out, None, 1)
    for value in (4, 8):
        add.fill_(value)
        graph.replay()
        assert torch.equal(out, wanted(wanted(rows, value + 1)[:ROWS], 1))
