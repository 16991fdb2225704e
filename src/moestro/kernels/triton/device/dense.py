"""Dense weights for many pairs of an expert on Hopper: both operands go from memory to the tensor cores through rings.

As in `warp_specialized.py` (whose tiles, walk and narrower tiles these are) rows of weights are the A operand and pairs
the B operand, programs are persistent, and groups of four warps share the work. Nothing is decoded here:

- the producer asks the tensor memory accelerator for blocks of weights, and of x where its rows lie in order (the
  second product's, by place); the first product's rows of x are gathered by cp.async;
- one or two consumers of 64 or 128 rows each multiply out of shared memory, one stage behind the one they issue. Their
  epilogues overlap: while one writes, the other has the tensor cores for as many stages as the ring holds.

With a gate, 8 rows of gate and the matching 8 of up alternate in shared memory, as layout.py has them in memory for
quantised weights: the block that is copied has four dimensions, [rows / 16, gate or up, 8, columns].
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from moestro.kernels.triton.device.loops import following
from moestro.kernels.triton.device.share import _exit, _tile, _total, _zero
from moestro.kernels.triton.device.warp_specialized import (
    HALVES,
    QUARTERS,
    TURNED,
    WHOLE,
    Spot,
    _pairs,
    _rows,
    activate,
    async_copy,
    copy_async,
    fence_async_shared,
    launch_next,
    mbarrier,
    wait_for_previous,
)

tma_copy = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared  # 3.9, 3.6
warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait
__all__ = ["HALVES", "QUARTERS", "WHOLE", "Grid", "dense_wide_gemm"]


class Grid(NamedTuple):
    """Constants of a tile."""

    rows: int  # of weights
    pairs: int  # a power of two
    extra: int  # pairs beyond that
    piece: int  # pairs that the tensor memory accelerator copies at once
    consumers: int
    turn: int  # stages that the producer fills in one go, where it gathers
    stages: int
    group: int  # tiles of pairs that walk the strips of rows together
    narrow: int
    registers: int  # of a consumer's thread
    producer_registers: int


class Call(NamedTuple):
    """What all partitions know."""

    x: Any
    x_desc: Any
    w_desc: Any
    routing: Any
    stride: Any
    w: Any
    out: Any
    size: Any
    tiles: Any  # of pairs
    strips: Any  # of rows


class Ring(NamedTuple):
    """Buffers in shared memory, [STAGES, ...], and their barriers."""

    x: Any
    more_x: Any  # rows of x beyond the power of two
    w: Any
    full: Any
    empty: Any


@gluon.jit(do_not_specialize=["stride"])
def dense_wide_gemm(x, x_desc, w_desc, routing, stride, w, out, size, HOW: gl.constexpr, TILE: gl.constexpr,
                    PDL: gl.constexpr):  # fmt: skip
    """As warp_specialized.wide_gemm, with dense weights; out by place (stage 1) or by pair, not weighted.

    w_desc: the weights [L * rows, columns], or [.., gate or up, 8, columns]; x_desc: x by place (stage 2). TILE: Grid.
    """
    ring = _ring(x.dtype.element_ty, HOW, TILE)
    fence_async_shared()
    wait_for_previous(PDL)
    launch_next(PDL)
    call = Call(x, x_desc, w_desc, routing, stride, w, out, size, gl.load(routing.table + 3 * stride),
                gl.cdiv(size.rows, TILE.rows))  # fmt: skip
    REGISTERS: gl.constexpr = TILE.registers
    PRODUCER: gl.constexpr = TILE.producer_registers
    if TILE.consumers == 1:
        gl.warp_specialize([(_consume, (ring, call, 0, HOW, TILE)), (_produce, (ring, call, HOW, TILE))],
                           [4], [PRODUCER])  # fmt: skip
    else:
        gl.warp_specialize([(_consume, (ring, call, 0, HOW, TILE)), (_consume, (ring, call, 1, HOW, TILE)),
                            (_produce, (ring, call, HOW, TILE))], [4, 4], [REGISTERS, PRODUCER])  # fmt: skip


@gluon.jit
def _ring(dtype: gl.constexpr, HOW: gl.constexpr, TILE: gl.constexpr):
    """Shared memory, its barriers waiting for nothing yet."""
    STAGES: gl.constexpr = TILE.stages
    X: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    xs = gl.allocate_shared_memory(dtype, [STAGES, TILE.pairs, 64], X)
    xe = xs
    if TILE.extra > 0:
        xe = gl.allocate_shared_memory(dtype, [STAGES, TILE.extra, 64], X)
    if HOW.gated:
        ws = gl.allocate_shared_memory(dtype, [STAGES, TILE.rows // 16, 2, 8, 64], WIDE)
    else:
        ws = gl.allocate_shared_memory(dtype, [STAGES, TILE.rows, 64], X)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=129 if HOW.stage == 1 else 1)  # threads that gather, and one
        mbarrier.init(empty.index(i), count=TILE.consumers)
    return Ring(xs, xe, ws, full, empty)


@gluon.jit
def _produce(ring, call, HOW: gl.constexpr, TILE: gl.constexpr):
    """Fill the ring, tile after tile."""
    BN: gl.constexpr = TILE.pairs
    EXTRA: gl.constexpr = TILE.extra
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), _total(call, TILE.group), gl.num_programs(0)):
        m, e, start, count = _tile(call, tile, TILE.group)
        if TILE.narrow != WHOLE and count > 0 and count <= BN // 2:
            stage, phase = _fill(ring, call, m, e, start, count, stage, phase, HOW, TILE, BN // 2, 0)
        elif EXTRA > 16 and BN < 128 and count > BN and count <= BN + EXTRA // 2:
            stage, phase = _fill(ring, call, m, e, start, count, stage, phase, HOW, TILE, BN, EXTRA // 2)
        elif EXTRA > 0 and count > BN:
            stage, phase = _fill(ring, call, m, e, start, count, stage, phase, HOW, TILE, BN, EXTRA)
        elif count > 0:
            stage, phase = _fill(ring, call, m, e, start, count, stage, phase, HOW, TILE, BN, 0)
    _exit(stage)


@gluon.jit
def _fill(ring, call, m, e, start, count, stage, phase, HOW: gl.constexpr, TILE: gl.constexpr, W: gl.constexpr,
          W2: gl.constexpr):  # fmt: skip
    """One tile of W + W2 pairs, 64 columns a stage."""
    if HOW.stage == 1:
        return _gather(ring, call, m, e, start, count, stage, phase, HOW, TILE, W, W2)
    else:
        return _copy(ring, call, m, e, start, stage, phase, HOW, TILE, W, W2)


@gluon.jit
def _copy_weights(ring, call, m, e, b, stage, HOW: gl.constexpr, TILE: gl.constexpr):
    """Rows of the m-th strip and 64 columns; rows beyond the expert's are others' or zeros, and are not written."""
    full, to = ring.full.index(stage), ring.w.index(stage)
    if HOW.gated:
        at = e * (call.size.rows // 8) + m * (TILE.rows // 16)
        tma_copy(call.w_desc, [at, 0, 0, b * 64], full, to)
    else:
        tma_copy(call.w_desc, [e * call.size.rows + m * TILE.rows, b * 64], full, to)


@gluon.jit
def _copy(ring, call, m, e, start, stage, phase, HOW: gl.constexpr, TILE: gl.constexpr, W: gl.constexpr,
          W2: gl.constexpr):  # fmt: skip
    """Rows of x that lie in order: those of another expert behind the last do no harm."""
    PIECE: gl.constexpr = TILE.piece
    for b in range(gl.cdiv(call.size.columns, 64)):
        full = ring.full.index(stage)
        mbarrier.wait(ring.empty.index(stage), phase)
        mbarrier.expect(full, (TILE.rows + W + W2) * 128)
        _copy_weights(ring, call, m, e, b, stage, HOW, TILE)
        for p in gl.static_range(W // PIECE):
            to = ring.x.index(stage).slice(p * PIECE, PIECE)
            tma_copy(call.x_desc, [start + p * PIECE, b * 64], full, to)
        for p in gl.static_range(W2 // PIECE):
            to = ring.more_x.index(stage).slice(p * PIECE, PIECE)
            tma_copy(call.x_desc, [start + W + p * PIECE, b * 64], full, to)
        stage, phase = following(stage, phase, TILE.stages)
    return stage, phase


@gluon.jit
def _gather(ring, call, m, e, start, count, stage, phase, HOW: gl.constexpr, TILE: gl.constexpr, W: gl.constexpr,
            W2: gl.constexpr):  # fmt: skip
    """Rows of x that are gathered; beyond the expert's last the last again.

    Several stages a turn share the arithmetic of addresses (as in warp_specialized._fill).
    """
    TURN: gl.constexpr = TILE.turn
    columns = call.size.columns // 8 * 8  # which tells the compiler that 16 bytes may be copied at once
    XL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    i = gl.arange(0, W, gl.SliceLayout(1, XL))
    k = gl.arange(0, 64, gl.SliceLayout(0, XL))
    xp = call.x + _rows(call, start, count, i, HOW)[:, None] * columns + k[None, :]
    if W2 > 0:
        i2 = W + gl.arange(0, W2, gl.SliceLayout(1, XL))
        xp2 = call.x + _rows(call, start, count, i2, HOW)[:, None] * columns + k[None, :]
    blocks = gl.cdiv(columns, 64)
    for first in range(0, blocks, TURN):
        for u in gl.static_range(TURN):
            if TURN == 1 or first + u < blocks:
                b = first + u
                mbarrier.wait(ring.empty.index(stage), phase)
                mbarrier.expect(ring.full.index(stage), TILE.rows * 128)
                _copy_weights(ring, call, m, e, b, stage, HOW, TILE)
                if HOW.even:
                    copy_async(ring.x.index(stage).slice(0, W), xp + u * 64)
                    if W2 > 0:
                        copy_async(ring.more_x.index(stage).slice(0, W2), xp2 + u * 64)
                else:
                    there = (k < columns - b * 64)[None, :]
                    copy_async(ring.x.index(stage).slice(0, W), xp + u * 64, there)
                    if W2 > 0:
                        copy_async(ring.more_x.index(stage).slice(0, W2), xp2 + u * 64, there)
                async_copy.mbarrier_arrive(ring.full.index(stage), increment_count=False)
                stage, phase = following(stage, phase, TILE.stages)
        xp += TURN * 64
        if W2 > 0:
            xp2 += TURN * 64
    return stage, phase


@gluon.jit
def _consume(ring, call, WG: gl.constexpr, HOW: gl.constexpr, TILE: gl.constexpr):
    """Multiply and write the rows of this group, tile after tile."""
    BN: gl.constexpr = TILE.pairs
    EXTRA: gl.constexpr = TILE.extra
    Q: gl.constexpr = BN // 4
    ROW: gl.constexpr = WG * (TILE.rows // TILE.consumers)
    stage = 0
    phase = 0
    m, e, start, count = _tile(call, gl.program_id(0), TILE.group)
    for tile in range(gl.program_id(0), _total(call, TILE.group), gl.num_programs(0)):
        later = _tile(call, tile + gl.num_programs(0), TILE.group)
        at = Spot(m * TILE.rows + ROW, e, start, count, _zero(count))
        if count > 0:
            if TILE.narrow == QUARTERS and count <= Q:
                stage, phase = _run(ring, call, at, stage, phase, HOW, TILE, ROW, Q, 0)
            elif TILE.narrow != WHOLE and count <= 2 * Q:
                stage, phase = _run(ring, call, at, stage, phase, HOW, TILE, ROW, 2 * Q, 0)
            elif TILE.narrow == QUARTERS and count <= 3 * Q:
                stage, phase = _run(ring, call, at, stage, phase, HOW, TILE, ROW, 2 * Q, Q)
            elif EXTRA > 16 and BN < 128 and count > BN and count <= BN + EXTRA // 2:
                stage, phase = _run(ring, call, at, stage, phase, HOW, TILE, ROW, BN, EXTRA // 2)
            elif EXTRA > 0 and count > BN:
                stage, phase = _run(ring, call, at, stage, phase, HOW, TILE, ROW, BN, EXTRA)
            else:
                stage, phase = _run(ring, call, at, stage, phase, HOW, TILE, ROW, BN, 0)
        m, e, start, count = later
    _exit(stage)


@gluon.jit
def _run(ring, call, at, stage, phase, HOW: gl.constexpr, TILE: gl.constexpr, ROW: gl.constexpr,
         W: gl.constexpr, W2: gl.constexpr):  # fmt: skip
    """One tile: W columns, and W2 more where that is not 0; 64 rows, and 64 more where a consumer has them."""
    PARTS: gl.constexpr = TILE.rows // TILE.consumers // 64
    V2: gl.constexpr = W2 if W2 > 0 else 16
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W, 16])
    M2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V2, 16])
    r = at.row + (gl.arange(0, 64, gl.SliceLayout(1, M)) + at.zero)
    bias = _bias(call, at.expert, r, HOW)
    if HOW.stage == 2:  # asked for before the loop, as biases are
        pairs, pairs2 = _pairs(call, at, HOW, 0, W), _pairs(call, at, HOW, W, V2)
    sums = _nothing(W, V2, W if PARTS == 2 else 16, V2 if PARTS == 2 else 16)
    sums = _multiply(ring, stage, phase, sums, HOW, ROW, PARTS, W, W2)
    sums = _retire(sums, 1, PARTS, W2)
    last = stage
    stage, phase = following(stage, phase, TILE.stages)
    for _ in range(1, gl.cdiv(call.size.columns, 64)):
        sums = _multiply(ring, stage, phase, sums, HOW, ROW, PARTS, W, W2)
        sums = _retire(sums, 1, PARTS, W2)
        mbarrier.arrive(ring.empty.index(last))
        last = stage
        stage, phase = following(stage, phase, TILE.stages)
    acc, acc2, accb, accb2 = _retire(sums, 0, PARTS, W2)
    mbarrier.arrive(ring.empty.index(last))
    if HOW.stage == 1:  # places are counted: while the loop runs there are no registers for them
        pairs, pairs2 = _pairs(call, at, HOW, 0, W), _pairs(call, at, HOW, W, V2)
    if PARTS == 2:
        lower = _bias(call, at.expert, r + 64, HOW)
        _epilogue(accb, lower, call, at, at.row + 64, pairs, HOW, W, M)
        if W2 > 0:
            _epilogue(accb2, lower, call, at, at.row + 64, pairs2, HOW, W2, M2)
    _epilogue(acc, bias, call, at, at.row, pairs, HOW, W, M)
    if W2 > 0:
        _epilogue(acc2, bias, call, at, at.row, pairs2, HOW, W2, M2)
    return stage, phase


@gluon.jit
def _nothing(W: gl.constexpr, W2: gl.constexpr, WB: gl.constexpr, WB2: gl.constexpr):
    """The sums of a tile before its first product: upper rows, and lower; 16 columns stand for what is not there."""
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W, 16])
    M2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W2, 16])
    MB: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WB, 16])
    MB2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WB2, 16])
    return (gl.zeros([64, W], gl.float32, M), gl.zeros([64, W2], gl.float32, M2),
            gl.zeros([64, WB], gl.float32, MB), gl.zeros([64, WB2], gl.float32, MB2))  # fmt: skip


@gluon.jit
def _multiply(ring, stage, phase, sums, HOW: gl.constexpr, ROW: gl.constexpr, PARTS: gl.constexpr, W: gl.constexpr,
              W2: gl.constexpr):  # fmt: skip
    """Wait for a stage and start its products.

    PTX counts cp.async, which wrote gathered rows, to another proxy than wgmma, so a fence stands between.
    """
    acc, acc2, accb, accb2 = sums
    mbarrier.wait(ring.full.index(stage), phase)
    if HOW.stage == 1:
        fence_async_shared()
    ws = ring.w.index(stage)
    if HOW.gated:
        ws = ws.reshape([ring.w.shape[1] * 16, 64])
    xs = ring.x.index(stage)
    upper = ws.slice(ROW, 64)
    b = xs.slice(0, W).permute((1, 0))
    acc = warpgroup_mma(upper, b, acc, is_async=True)
    if W2 > 0:
        if W == ring.x.shape[1]:
            b2 = ring.more_x.index(stage).slice(0, W2).permute((1, 0))
        else:
            b2 = xs.slice(W, W2).permute((1, 0))
        acc2 = warpgroup_mma(upper, b2, acc2, is_async=True)
    if PARTS == 2:
        lower = ws.slice(ROW + 64, 64)
        accb = warpgroup_mma(lower, b, accb, is_async=True)
        if W2 > 0:
            accb2 = warpgroup_mma(lower, b2, accb2, is_async=True)
    return acc, acc2, accb, accb2


@gluon.jit
def _retire(sums, RUNNING: gl.constexpr, PARTS: gl.constexpr, W2: gl.constexpr):
    """Wait until the products of no more than RUNNING stages run."""
    acc, acc2, accb, accb2 = sums
    if PARTS == 2 and W2 > 0:
        acc, acc2, accb, accb2 = warpgroup_mma_wait(4 * RUNNING, deps=[acc, acc2, accb, accb2])
    elif PARTS == 2:
        acc, accb = warpgroup_mma_wait(2 * RUNNING, deps=[acc, accb])
    elif W2 > 0:
        acc, acc2 = warpgroup_mma_wait(2 * RUNNING, deps=[acc, acc2])
    else:
        acc = warpgroup_mma_wait(RUNNING, deps=[acc])
    return acc, acc2, accb, accb2


@gluon.jit
def _bias(call, e, r, HOW: gl.constexpr):
    """Of kernel rows r, or anything: asked for before the loop, which hides its way from memory."""
    if call.w.bias is not None:
        rows = call.size.rows
        if HOW.gated:
            j = r // 16 * 8 + r % 8
            real = j < rows // 2
            j = gl.where(r % 16 < 8, j, rows // 2 + j)
        else:
            j = r
            real = r < rows
        return gl.load(call.w.bias + e * rows + j, real, other=0.0).to(gl.float32)
    else:
        return r


@gluon.jit
def _epilogue(acc, bias, call, at, row, pairs, HOW: gl.constexpr, W: gl.constexpr, M: gl.constexpr):
    """Bias, the activation of the first product, and out."""
    out = call.out
    if call.w.bias is not None:
        acc += gl.expand_dims(gl.convert_layout(bias, gl.SliceLayout(1, M)), 1)
    if HOW.gated:
        gate, up = gl.split(gl.permute(gl.reshape(acc, [4, 2, 8, W]), (0, 2, 3, 1)))
        acc = gl.reshape(activate(gate, up, HOW), [32, W])
        j = row // 2 + (gl.arange(0, 32, gl.SliceLayout(1, TURNED)) + at.zero)
        real = j < call.size.rows // 2
    else:
        if HOW.stage == 1:
            acc = activate(acc, acc, HOW)
        j = row + (gl.arange(0, 64, gl.SliceLayout(1, TURNED)) + at.zero)
        real = j < call.size.rows
    v = gl.convert_layout(acc.to(out.dtype.element_ty), TURNED)
    to_row = pairs.to(gl.int64) * call.size.out_stride
    gl.store(out + to_row[None, :] + j[:, None], v, (pairs >= 0)[None, :] & real[:, None])
