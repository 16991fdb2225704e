"""x by place, for paths whose producers copy rows of x in the order of their places (device/by_place.cu, places.cu)."""

from __future__ import annotations

import torch
import triton

from moestro.kernels.triton.call import Call
from moestro.kernels.triton.cuda import CudaKernel, Variant
from moestro.kernels.triton.cuda_source import source
from moestro.kernels.triton.device.arguments import Rows
from moestro.kernels.triton.fp8_layout import COLS

LOADED, CHUNK = 8, 16  # bytes of x at a time; columns of a thread at a time
READ = {  # dtype of x or a bias -> the type that is read, and what makes a float of it; x is not float32
    torch.bfloat16: ("u16", "bf16_to_float"),
    torch.float16: ("u16", "half_to_float"),
    torch.float32: ("float", ""),
}


def _invert() -> Variant:
    return Variant(source(["places.cu"], {}), 256, 0)


def threads_of_row(chunks: int) -> int:
    """Threads that quantise a row of chunks: as many turns as 256 would take, all alike."""
    turns = -(-chunks // 256)
    return -(-chunks // (32 * turns)) * 32


def _spread(
    COLUMNS: int, CHUNKS: int, TOP_K: int, OFFSET: int, EXPERTS: int, X: torch.dtype, TURNED: bool,
    BLOCK_SCALES: bool, ALIGNED: bool,
) -> Variant:  # fmt: skip
    threads = threads_of_row(CHUNKS)
    constants = {
        "COLUMNS": COLUMNS,
        "CHUNKS": CHUNKS,
        "TOP_K": TOP_K,
        "OFFSET": OFFSET,
        "EXPERTS": EXPERTS,
        "X": READ[X][1],
        "TURNED": TURNED,
        "BLOCK_SCALES": BLOCK_SCALES,
        "ALIGNED": ALIGNED,
        "THREADS": threads,
    }
    return Variant(source(["by_place.cu"], constants), threads, CHUNKS * CHUNK)


INVERT = CudaKernel("invert", ("sorted_pairs", "places", "pairs"), _invert)
SPREAD = CudaKernel("spread", ("x", "ids", "places", "data", "scales", "scale_blocks"), _spread)


def x_by_place(call: Call, turned: bool = False, blocks: bool = False) -> Rows:
    """x quantised by token, each row where its pairs are; data [places, whole blocks of 128 columns].

    turned: see device/fp8.Recipe; blocks: with scales float32 [places, blocks] of 128 columns, not [places] of rows.
    """
    p, s = call.p, call.s
    data, scale, places = s["x_values"], s["x_scale"], s["places"]
    call.add(INVERT, (triton.cdiv(call.pairs, 256),), s["sorted_pairs"], places, call.pairs)
    columns = triton.cdiv(p.hidden_size, COLS) * COLS
    call.add(
        SPREAD, (call.num_tokens,), call.x, call.ids, places, data, scale, scale.shape[1] if blocks else 0,
        COLUMNS=p.hidden_size, CHUNKS=columns // CHUNK, TOP_K=p.top_k, OFFSET=p.expert_offset,
        EXPERTS=p.num_local_experts, X=call.x.dtype, TURNED=turned, BLOCK_SCALES=blocks,
        ALIGNED=call.x.data_ptr() % LOADED == 0,
    )  # fmt: skip
    return Rows(data, scale)
