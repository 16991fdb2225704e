"""4-bit weights and e4m3 activations, decoded in registers: weights are a wgmma's A operand, pairs its B operand.

The structure is warp_specialized.py's: a producer (fp8_producer.py) copies codes, scales and rows of x into a ring, 256
columns a stage; one or two consumers decode 64 rows of weights at a time into e4m3 registers and multiply. Nothing decoded
passes through shared memory, and the layout is fp8_decode.py's (fp8_layout.TritonFP4), whose arithmetic decodes here too.
How a thread decodes is in fp8_operands.py, and what is added where in fp8_sums.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moestro.kernels.triton.device.fp8 import fence_async_shared, mbarrier
from moestro.kernels.triton.device.fp8_operands import of_product
from moestro.kernels.triton.device.fp8_producer import PAIRED, Boxes, produce, reinterpret
from moestro.kernels.triton.device.fp8_sums import sums_of_64, sums_of_128
from moestro.kernels.triton.device.loops import Ring
from moestro.kernels.triton.device.share import _exit, _tile, _total, _zero
from moestro.kernels.triton.device.warp_specialized import (
    Spot,
    _epilogue,
    _of_rows,
    _pairs,
    _results,
    _rows,
    launch_next,
    wait_for_previous,
)

WHOLE, HALVES, QUARTERS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)  # what a tile of few pairs runs


class Grid(NamedTuple):
    """Constants of a tile."""

    rows: int  # of weights
    pairs: int  # a power of two
    extra: int  # pairs beyond that
    consumers: int
    stages: int  # of two blocks of 128 columns
    group: int  # tiles of pairs that walk the strips of rows together
    narrow: int
    overlap: bool  # a block's operands are decoded while those of the one before are multiplied
    registers: int  # of a consumer's thread
    producer_registers: int
    span: int  # blocks of 128 columns that the tensor core adds, an even number
    gathers: bool  # x is by token, not by place
    powers: bool  # scales of weights are powers of two that 32 columns share


class Call(NamedTuple):
    """What all partitions know."""

    x: Any  # Rows
    boxes: Any
    routing: Any
    stride: Any
    w: Any  # Weights
    out: Any
    size: Any
    tiles: Any  # of pairs
    strips: Any  # of TILE.rows rows
    blocks: Any  # of 64 kernel rows of an expert


@gluon.jit(do_not_specialize=["stride"])
def fp4_fp8_registers(
    x, x_desc, piece_desc, routing, stride, w, codes_desc, scales_desc, out, size, HOW: gl.constexpr,
    TILE: gl.constexpr, PDL: gl.constexpr
):  # fmt: skip
    """As warp_specialized.wide_gemm; x: Rows of e4m3, by token (stage 1) or place, blocks of 128 columns turned, and
    a scale a row; weights in TritonFP4's layout; the descriptors: Boxes. TILE: Grid.
    """
    ring = _ring(TILE)
    fence_async_shared()
    wait_for_previous(PDL)
    launch_next(PDL)
    row_blocks = gl.cdiv(size.rows // 2, 32) if HOW.gated else gl.cdiv(size.rows, 64)
    boxes = Boxes(codes_desc, scales_desc, x_desc, piece_desc)
    call = Call(x, boxes, routing, stride, w, out, size, gl.load(routing.table + 3 * stride),
                gl.cdiv(row_blocks * 64, TILE.rows), row_blocks)  # fmt: skip
    if TILE.gathers:
        _with_four_producers(ring, call, HOW, TILE)
    else:
        _with_one_producer(ring, call, HOW, TILE)


@gluon.jit
def _ring(TILE: gl.constexpr):
    """Shared memory, its barriers waiting for nothing yet.

    Codes as the tensor memory accelerator writes them: 64 bytes a row, whose 16-byte pieces take turns with the row, which
    the operands' reads meet without conflicts. Scales are allocated as it writes them, too: aligned.
    """
    STAGES: gl.constexpr = TILE.stages
    XS: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    BLOCKS: gl.constexpr = 2 * STAGES
    xs = gl.allocate_shared_memory(gl.float8e4nv, [BLOCKS, TILE.pairs, 128], XS)
    ws = gl.allocate_shared_memory(gl.int16, [BLOCKS, TILE.rows, 32], gl.NVMMASharedLayout(64, 16, 2))
    ss = gl.allocate_shared_memory(gl.int16, [BLOCKS, TILE.rows // 64, 32, 8], PAIRED)
    ss = reinterpret(ss, gl.int16, [BLOCKS, TILE.rows, 4], gl.SwizzledSharedLayout(4, 1, 1, [1, 0]))
    xe = xs
    if TILE.extra > 0:
        xe = gl.allocate_shared_memory(gl.float8e4nv, [BLOCKS, TILE.extra, 128], XS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=129 if TILE.gathers else 1)  # threads that gather, and one
        mbarrier.init(empty.index(i), count=TILE.consumers)
    return Ring(xs, ws, ss, full, empty, xe)


@gluon.jit
def _with_four_producers(ring, call, HOW: gl.constexpr, TILE: gl.constexpr):
    """Consumers, and the four warps of a producer that gathers."""
    REGISTERS: gl.constexpr = TILE.registers
    PRODUCER: gl.constexpr = TILE.producer_registers
    if TILE.consumers == 1:
        gl.warp_specialize(
            [(_consume, (ring, call, 0, HOW, TILE)), (produce, (ring, call, HOW, TILE))], [4], [PRODUCER]
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (ring, call, 0, HOW, TILE)),
                (_consume, (ring, call, 1, HOW, TILE)),
                (produce, (ring, call, HOW, TILE)),
            ],
            [4, 4],
            [REGISTERS, PRODUCER],
        )


@gluon.jit
def _with_one_producer(ring, call, HOW: gl.constexpr, TILE: gl.constexpr):
    """Consumers, and a producer of one warp: the others' share of each loop would cost three of four schedulers as much.

    Registers are handed over four warps at a time: those that leave at once fill the four up, where Triton would add
    warps that wait for the others' return.
    """
    REGISTERS: gl.constexpr = TILE.registers
    PRODUCER: gl.constexpr = TILE.producer_registers
    if TILE.consumers == 1:
        gl.warp_specialize(
            [
                (_consume, (ring, call, 0, HOW, TILE)),
                (_exit, (0,)),
                (produce, (ring, call, HOW, TILE)),
                (_exit, (0,)),
            ],
            [2, 1, 1],
            [PRODUCER, PRODUCER, PRODUCER],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (ring, call, 0, HOW, TILE)),
                (_consume, (ring, call, 1, HOW, TILE)),
                (_exit, (0,)),
                (produce, (ring, call, HOW, TILE)),
                (_exit, (0,)),
            ],
            [4, 2, 1, 1],
            [REGISTERS, PRODUCER, PRODUCER, PRODUCER],
        )


# --- the consumers ----------------------------------------------------------------------------------------------------


@gluon.jit
def _consume(ring, call, WG: gl.constexpr, HOW: gl.constexpr, TILE: gl.constexpr):
    """Multiply and write the rows of this group, tile after tile."""
    BN: gl.constexpr = TILE.pairs
    EXTRA: gl.constexpr = TILE.extra
    ROW: gl.constexpr = WG * (TILE.rows // TILE.consumers)
    stage = 0
    phase = 0
    m, e, start, count = _tile(call, gl.program_id(0), TILE.group)
    for tile in range(gl.program_id(0), _total(call, TILE.group), gl.num_programs(0)):
        later = _tile(call, tile + gl.num_programs(0), TILE.group)
        at = Spot(m * TILE.rows + ROW, e, start, count, _zero(count))
        if count > 0:
            if TILE.narrow != WHOLE and count <= BN // 2:
                stage, phase = _run(ring, call, at, stage, phase, HOW, TILE, ROW, BN // 2, 0)
            elif EXTRA > 0 and count > BN:
                stage, phase = _run(ring, call, at, stage, phase, HOW, TILE, ROW, BN, EXTRA)
            else:
                stage, phase = _run(ring, call, at, stage, phase, HOW, TILE, ROW, BN, 0)
        m, e, start, count = later
    _exit(stage)


@gluon.jit
def _run(ring, call, at, stage, phase, HOW: gl.constexpr, TILE: gl.constexpr, ROW: gl.constexpr, W: gl.constexpr,
         W2: gl.constexpr):  # fmt: skip
    """One tile: W pairs, and W2 more where that is not 0."""
    ROWS: gl.constexpr = TILE.rows // TILE.consumers
    r = at.row + (gl.arange(0, 64, gl.SliceLayout(1, of_product(W))) + at.zero)
    upper = _of_rows(call, at.expert, r, HOW)
    blocks = gl.cdiv(call.size.columns, 128)
    if ROWS == 64:
        acc, stage, phase = sums_of_64(ring, stage, phase, blocks, ROW, W, W2, TILE)
    else:
        lower = _of_rows(call, at.expert, r + 64, HOW)
        acc, below, stage, phase = sums_of_128(ring, stage, phase, blocks, ROW, W, W2, TILE)
        _write(below, lower, call, at, at.row + 64, HOW, TILE, W, W2)
    _write(acc, upper, call, at, at.row, HOW, TILE, W, W2)
    return stage, phase


# --- the end of a tile ------------------------------------------------------------------------------------------------


@gluon.jit
def _write(acc, of_rows, call, at, row, HOW: gl.constexpr, TILE: gl.constexpr, W: gl.constexpr,
           W2: gl.constexpr):  # fmt: skip
    """All parts of 64 rows, times the scales of their rows of x, to out."""
    _write_part(acc[0], of_rows, call, at, row, HOW, TILE, 0, W)
    if W2 > 0:
        _write_part(acc[1], of_rows, call, at, row, HOW, TILE, W, W2)


@gluon.jit
def _write_part(acc, of_rows, call, at, row, HOW: gl.constexpr, TILE: gl.constexpr, FIRST: gl.constexpr,
                P: gl.constexpr):  # fmt: skip
    M: gl.constexpr = of_product(P)
    i = gl.arange(0, P, gl.SliceLayout(0, M)) + at.zero + FIRST
    if TILE.gathers:
        rows = _rows(call, at.start, at.count, i, HOW)
    else:
        rows = at.start + gl.minimum(i, at.count - 1)
    acc *= gl.expand_dims(gl.load(call.x.scale + rows), 0)
    if HOW.stage == 2:
        _epilogue(acc, of_rows, call, at, row, _pairs(call, at, HOW, FIRST, P), HOW, P, M)
    else:
        v = _results(acc, of_rows, call, HOW, P, M)
        _write_intermediate(v, call, at, row // 2 if HOW.gated else row, i, HOW)


@gluon.jit
def _write_intermediate(v, call, at, row, i, HOW: gl.constexpr):
    """float32 by place, from the registers where it is: eight lanes write 32 bytes."""
    S: gl.constexpr = v.type.layout
    j = row + (gl.arange(0, 32 if HOW.gated else 64, gl.SliceLayout(1, S)) + at.zero)
    real = j < (call.size.rows // 2 if HOW.gated else call.size.rows)
    i = gl.convert_layout(i, gl.SliceLayout(0, S))
    to = (at.start + i).to(gl.int64) * call.size.out_stride
    gl.store(call.out + to[None, :] + j[:, None], v, (i < at.count)[None, :] & real[:, None])
