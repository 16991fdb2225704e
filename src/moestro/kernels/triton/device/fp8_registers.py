"""4-bit weights and e4m3 activations, decoded in registers: weights are a wgmma's A operand, pairs its B operand.

The structure is warp_specialized.py's: a producer copies codes, scales and rows of x into a ring, 128 columns a stage;
one or two consumers decode 64 rows of weights at a time into e4m3 registers and multiply. Nothing decoded passes
through shared memory, and the layout is fp8_decode.py's (fp8_layout.TritonFP4), whose arithmetic decodes here too.
How a thread decodes and what is added is in fp8_operands.py.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moestro.kernels.triton.device.fp8 import async_copy, copy_async, fence_async_shared, mbarrier
from moestro.kernels.triton.device.fp8_operands import (
    no_sums,
    of_part,
    overlapped,
    sums_of_64,
    sums_of_128,
)
from moestro.kernels.triton.device.fp8_spans import spans_of_64, spans_of_128
from moestro.kernels.triton.device.loops import Ring, following
from moestro.kernels.triton.device.share import _exit, _tile, _total, _zero
from moestro.kernels.triton.device.warp_specialized import (
    Call,
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
    turn: int  # stages that the producer fills in one go
    stages: int
    group: int  # tiles of pairs that walk the strips of rows together
    narrow: int
    overlap: bool  # operands are decoded while the ones before them are multiplied
    registers: int  # of a consumer's thread
    producer_registers: int
    part: int  # pairs of a product, at most
    span: int  # blocks of 128 columns that a product adds itself


@gluon.jit(do_not_specialize=["stride"])
def fp4_fp8_registers(
    x, routing, stride, w, out, size, HOW: gl.constexpr, TILE: gl.constexpr, PDL: gl.constexpr
):
    """As warp_specialized.wide_gemm; x: Rows of e4m3, by token (stage 1) or place, blocks of 128 columns turned, and
    a scale a row; weights in TritonFP4's layout. TILE: Grid.
    """
    STAGES: gl.constexpr = TILE.stages
    XS: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE.pairs, 128], XS)
    ws = gl.allocate_shared_memory(
        gl.int16, [STAGES, TILE.rows, 32], gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
    )
    ss = gl.allocate_shared_memory(gl.int16, [STAGES, TILE.rows, 4], gl.SwizzledSharedLayout(4, 1, 1, [1, 0]))
    if TILE.extra > 0:
        xe = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE.extra, 128], XS)
    else:
        xe = xs
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(empty.index(i), count=TILE.consumers)
    fence_async_shared()
    wait_for_previous(PDL)
    launch_next(PDL)
    ring = Ring(xs, ws, ss, full, empty, xe)
    row_blocks = gl.cdiv(size.rows // 2, 32) if HOW.gated else gl.cdiv(size.rows, 64)
    call = Call(x, routing, stride, w, out, size, gl.load(routing.table + 3 * stride),
                gl.cdiv(row_blocks * 64, TILE.rows), row_blocks)  # fmt: skip
    REGISTERS: gl.constexpr = TILE.registers
    PRODUCER: gl.constexpr = TILE.producer_registers
    if TILE.consumers == 1:
        gl.warp_specialize(
            [(_consume, (ring, call, 0, HOW, TILE)), (_produce, (ring, call, HOW, TILE))], [4], [PRODUCER]
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (ring, call, 0, HOW, TILE)),
                (_consume, (ring, call, 1, HOW, TILE)),
                (_produce, (ring, call, HOW, TILE)),
            ],
            [4, 4],
            [REGISTERS, PRODUCER],
        )


# --- the producer -----------------------------------------------------------------------------------------------------


@gluon.jit
def _produce(ring, call, HOW: gl.constexpr, TILE: gl.constexpr):
    """Fill the ring, tile after tile; of a tile that is at most half full, half of x."""
    BN: gl.constexpr = TILE.pairs
    EXTRA: gl.constexpr = TILE.extra
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), _total(call, TILE.group), gl.num_programs(0)):
        m, e, start, count = _tile(call, tile, TILE.group)
        if TILE.narrow != WHOLE and count > 0 and count <= BN // 2:
            stage, phase = _fill(ring, call, m, e, start, count, stage, phase, HOW, TILE, BN // 2, 0)
        elif EXTRA > 0 and count > BN:
            stage, phase = _fill(ring, call, m, e, start, count, stage, phase, HOW, TILE, BN, EXTRA)
        elif count > 0:
            stage, phase = _fill(ring, call, m, e, start, count, stage, phase, HOW, TILE, BN, 0)
    _exit(stage)


@gluon.jit
def _fill(ring, call, m, e, start, count, stage, phase, HOW: gl.constexpr, TILE: gl.constexpr, W: gl.constexpr,
          W2: gl.constexpr):  # fmt: skip
    """One tile, 128 columns a stage. Rows of x that are not there are the last one, copied again.

    What a thread keeps of its addresses are 32 bits each, in units that cannot overflow: registers are few here.
    """
    TURN: gl.constexpr = TILE.turn
    STAGES: gl.constexpr = TILE.stages
    XL: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    WL: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    SL: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    blocks = gl.cdiv(call.size.columns, 128)
    i = gl.arange(0, W, gl.SliceLayout(1, XL))
    rows = _rows(call, start, count, i, HOW).to(gl.int32) * blocks
    if W2 > 0:
        i2 = W + gl.arange(0, W2, gl.SliceLayout(1, XL))
        rows2 = _rows(call, start, count, i2, HOW).to(gl.int32) * blocks
    in_w = _strips(call, m, blocks, 32, TILE.rows, WL)
    in_s = _strips(call, m, blocks, 4, TILE.rows, SL)
    expert = e.to(gl.int64) * call.blocks * blocks
    for first in range(0, blocks, TURN):
        for u in gl.static_range(TURN):
            if TURN == 1 or first + u < blocks:
                mbarrier.wait(ring.empty.index(stage), phase)
                copy_async(ring.x.index(stage).slice(0, W), _of_x(call, rows, first + u, XL))
                if W2 > 0:
                    copy_async(ring.more_x.index(stage).slice(0, W2), _of_x(call, rows2, first + u, XL))
                block = expert + (first + u)
                copy_async(ring.w.index(stage), call.w.data + block * 2048 + in_w)
                copy_async(ring.scales.index(stage), call.w.scales + block * 256 + in_s)
                async_copy.mbarrier_arrive(ring.full.index(stage), increment_count=False)
                stage, phase = following(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _of_x(call, rows, block, L: gl.constexpr):
    """Addresses of 128 columns of rows of x; rows: the rows times blocks of a row."""
    k = gl.arange(0, 128, gl.SliceLayout(0, L))
    return call.x.data + (rows + block).to(gl.int64)[:, None] * 128 + k[None, :]


@gluon.jit
def _strips(call, m, blocks, WIDTH: gl.constexpr, ROWS: gl.constexpr, L: gl.constexpr):
    """Elements [ROWS, WIDTH] from an expert's first block to a tile's; rows beyond are those of the last 64."""
    r = gl.arange(0, ROWS, gl.SliceLayout(1, L))
    strip = gl.minimum(m * (ROWS // 64) + r // 64, call.blocks - 1)
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, L))
    return (strip * (blocks * (64 * WIDTH)) + r % 64 * WIDTH)[:, None] + c[None, :]


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
            if TILE.narrow == QUARTERS and count <= BN // 4:
                stage, phase = _run(ring, call, at, stage, phase, HOW, TILE, ROW, BN // 4, 0)
            elif TILE.narrow != WHOLE and count <= BN // 2:
                stage, phase = _run(ring, call, at, stage, phase, HOW, TILE, ROW, BN // 2, 0)
            elif TILE.narrow == QUARTERS and count <= BN // 4 * 3:
                stage, phase = _run(ring, call, at, stage, phase, HOW, TILE, ROW, BN // 2, BN // 4)
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
    P: gl.constexpr = W if W < TILE.part else TILE.part
    ROWS: gl.constexpr = TILE.rows // TILE.consumers
    r = at.row + (gl.arange(0, 64, gl.SliceLayout(1, of_part(P))) + at.zero)
    upper = _of_rows(call, at.expert, r, HOW)
    blocks = gl.cdiv(call.size.columns, 128)
    never = call.size.rows < 0
    acc = no_sums(W, W2, TILE.part)
    if ROWS == 64:
        if TILE.span == 1:
            acc, stage, phase = sums_of_64(ring, stage, phase, blocks, never, acc, ROW, W, W2, TILE)
        else:
            acc, stage, phase = spans_of_64(ring, stage, phase, blocks, acc, ROW, W, W2, TILE)
    else:
        lower = _of_rows(call, at.expert, r + 64, HOW)
        below = no_sums(W, W2, TILE.part)
        if TILE.span > 1:
            acc, below, stage, phase = spans_of_128(
                ring, stage, phase, blocks, acc, below, ROW, W, W2, TILE
            )
        elif TILE.overlap:
            acc, below, stage, phase = overlapped(
                ring, stage, phase, blocks, never, acc, below, ROW, W, W2, TILE
            )
        else:
            acc, below, stage, phase = sums_of_128(
                ring, stage, phase, blocks, never, acc, below, ROW, W, W2, TILE
            )
        _write(below, lower, call, at, at.row + 64, HOW, W, W2, TILE.part)
    _write(acc, upper, call, at, at.row, HOW, W, W2, TILE.part)
    return stage, phase


# --- the end of a tile ------------------------------------------------------------------------------------------------


@gluon.jit
def _write(
    acc, of_rows, call, at, row, HOW: gl.constexpr, W: gl.constexpr, W2: gl.constexpr, PART: gl.constexpr
):
    """All parts of 64 rows, times the scales of their rows of x, to out."""
    P: gl.constexpr = W if W < PART else PART
    for i in gl.static_range(W // P):
        _write_part(acc[i], of_rows, call, at, row, HOW, i * P, P, of_part(P))
    if W2 > 0:
        _write_part(acc[W // P], of_rows, call, at, row, HOW, W, W2, of_part(W2))


@gluon.jit
def _write_part(acc, of_rows, call, at, row, HOW: gl.constexpr, FIRST: gl.constexpr, P: gl.constexpr,
                M: gl.constexpr):  # fmt: skip
    i = gl.arange(0, P, gl.SliceLayout(0, M)) + at.zero + FIRST
    acc *= gl.expand_dims(gl.load(call.x.scale + _rows(call, at.start, at.count, i, HOW)), 0)
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
