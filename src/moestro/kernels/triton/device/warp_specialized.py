"""The product for many pairs of an expert on Hopper: weights are decoded while the tensor cores multiply.

In `fused.py` each step loads, decodes, multiplies and waits. Here (Gluon, Triton's language of explicit layouts)
groups of four warps share the work and meet at barriers in shared memory:

- a producer copies codes, scales and rows of x into a ring of STAGES buffers, and never waits for a copy;
- one or two consumers, of 64 or 128 rows of weights each, decode one part of a stage while the tensor core
  multiplies another (`loops.py`).

Programs are persistent: the producer is in the next tile while the consumers write the last one. A tile has up to
BN + EXTRA pairs, EXTRA with a ring of their own (operands are powers of two wide): where each expert has about 256,
a tile of 288 saves half of them a second one. As in `fused.py`, a tile of few pairs is narrower (by quarters of BN, or
by half; and by half of EXTRA beside 64).

A partition ends with `exit`. Falling out of it would lead back to Triton's dispatch loop, and then ptxas no
longer sees which registers setmaxnreg gives, and serialises every wgmma (C7512).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from moestro.kernels.triton.device import common
from moestro.kernels.triton.device.loops import Ring, following, mma_64, mma_64_pingpong, mma_128
from moestro.kernels.triton.device.share import _exit, _tile, _total, _zero

async_copy, mbarrier, fence_async_shared = hopper.async_copy, hopper.mbarrier, hopper.fence_async_shared
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # 3.9, 3.6
activate = gluon.jit(common.activate.fn)
wait_for_previous = gluon.jit(common.wait_for_previous.fn)
launch_next = gluon.jit(common.launch_next.fn)

TURNED = gl.constexpr(gl.BlockedLayout([8, 1], [4, 8], [1, 4], [0, 1]))  # 8 rows of weights a thread
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
    odd: bool  # the number of 64-column blocks is
    registers: int  # of a consumer's thread
    producer_registers: int


class Call(NamedTuple):
    """What all partitions know."""

    x: Any
    routing: Any
    stride: Any
    w: Any
    out: Any
    size: Any
    tiles: Any  # of pairs
    strips: Any  # of rows, times the parts of their columns
    blocks: Any  # of 64 kernel rows of an expert


class Spot(NamedTuple):
    """A tile of one consumer."""

    row: Any  # its first kernel row
    expert: Any
    start: Any  # its first place
    count: Any  # pairs from there to the end of the expert
    zero: Any


@gluon.jit(do_not_specialize=["stride"])
def wide_gemm(x, routing, stride, w, out, size, HOW: gl.constexpr, TILE: gl.constexpr, PDL: gl.constexpr):
    """As fused.moe_gemm with sorted pairs and quantised weights; out by place (stage 1) or by pair, not weighted.

    TILE: Grid.
    """
    STAGES: gl.constexpr = TILE.stages
    ROWS: gl.constexpr = TILE.rows
    PAIRS: gl.constexpr = TILE.pairs
    EXTRA: gl.constexpr = TILE.extra
    # 16 words of a row are 32 or 64 bytes: no two rows of a load meet in a bank
    WS: gl.constexpr = gl.SwizzledSharedLayout(8, 64 // HOW.word_bits, 2, [1, 0])
    xs = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES, PAIRS, 64], gl.NVMMASharedLayout(128, 16, 2))
    ws = gl.allocate_shared_memory(w.data.dtype.element_ty, [STAGES, ROWS, 16], WS)
    ss = gl.allocate_shared_memory(
        w.scales.dtype.element_ty, [STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    if EXTRA > 0:
        xe = gl.allocate_shared_memory(
            x.dtype.element_ty, [STAGES, EXTRA, 64], gl.NVMMASharedLayout(128, 16, 2)
        )
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
                gl.cdiv(row_blocks * 64, TILE.rows) * HOW.split_k, row_blocks)  # fmt: skip
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


@gluon.jit
def _produce(ring, call, HOW: gl.constexpr, TILE: gl.constexpr):
    """Fill the ring, tile after tile."""
    BN: gl.constexpr = TILE.pairs
    EXTRA: gl.constexpr = TILE.extra
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), _total(call, TILE.group), gl.num_programs(0)):
        m, e, start, count = _tile(call, tile, TILE.group)
        if TILE.turn > 1 and count > 0 and count <= BN // 2:
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
    """One tile, or its part of split_k equal ones of the columns; 64 columns a stage.

    Several stages a turn share the arithmetic of addresses; then rows that are not there are not masked out
    either: the last one is copied again.
    """
    BM: gl.constexpr = TILE.rows
    TURN: gl.constexpr = TILE.turn
    STAGES: gl.constexpr = TILE.stages
    EVEN: gl.constexpr = HOW.even
    S_STEP: gl.constexpr = 64 // HOW.scale_rows
    columns = call.size.columns
    XL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    PIECE: gl.constexpr = 128 // HOW.word_bits  # words of 16 bytes
    WL: gl.constexpr = gl.BlockedLayout([1, PIECE], [2 * PIECE, 16 // PIECE], [4, 1], [1, 0])
    i = gl.arange(0, W, gl.SliceLayout(1, XL))
    k = gl.arange(0, 64, gl.SliceLayout(0, XL))
    r = gl.arange(0, BM, gl.SliceLayout(1, WL))
    c = gl.arange(0, 16, gl.SliceLayout(0, WL))
    s = gl.arange(0, BM, gl.BlockedLayout([4 if HOW.scale_rows == 1 else 1], [32], [4], [0]))
    row_of_blocks = gl.cdiv(columns, 64)
    blocks = row_of_blocks // HOW.split_k
    begin = m % HOW.split_k * blocks
    m = m // HOW.split_k
    strip = e.to(gl.int64) * call.blocks
    strip_w = strip + gl.minimum(m * (BM // 64) + r // 64, call.blocks - 1)
    strip_s = strip + gl.minimum(m * (BM // 64) + s // 64, call.blocks - 1)
    x = call.x + begin * 64
    xp = x + _rows(call, start, count, i, HOW)[:, None] * columns + k[None, :]
    if W2 > 0:
        i2 = W + gl.arange(0, W2, gl.SliceLayout(1, XL))
        xp2 = x + _rows(call, start, count, i2, HOW)[:, None] * columns + k[None, :]
    wp = call.w.data + ((strip_w * row_of_blocks + begin) * 1024 + r % 64 * 16)[:, None] + c[None, :]
    sp = call.w.scales + (strip_s * row_of_blocks + begin) * S_STEP + s % 64 // HOW.scale_rows
    for first in range(0, blocks, TURN):
        for u in gl.static_range(TURN):
            if TURN == 1 or first + u < blocks:
                ahead = first if TURN == 1 else u
                mbarrier.wait(ring.empty.index(stage), phase)
                if EVEN and TURN > 1:
                    copy_async(ring.x.index(stage).slice(0, W), xp + ahead * 64)
                    if W2 > 0:
                        copy_async(ring.more_x.index(stage).slice(0, W2), xp2 + ahead * 64)
                else:
                    mask = (i < count)[:, None]
                    if not EVEN:
                        mask = mask & (k[None, :] < columns - (first + u) * 64)
                    copy_async(ring.x.index(stage).slice(0, W), xp + ahead * 64, mask)
                    if W2 > 0:
                        mask2 = (i2 < count)[:, None]
                        if not EVEN:
                            mask2 = mask2 & (k[None, :] < columns - (first + u) * 64)
                        copy_async(ring.more_x.index(stage).slice(0, W2), xp2 + ahead * 64, mask2)
                copy_async(ring.w.index(stage), wp + ahead * 1024)
                copy_async(ring.scales.index(stage), sp + ahead * S_STEP)
                async_copy.mbarrier_arrive(ring.full.index(stage), increment_count=False)
                stage, phase = following(stage, phase, STAGES)
        if TURN > 1:
            xp += TURN * 64
            if W2 > 0:
                xp2 += TURN * 64
            wp += TURN * 1024
            sp += TURN * S_STEP
    return stage, phase


@gluon.jit
def _rows(call, start, count, i, HOW: gl.constexpr):
    """Rows of x (int64) of a tile's columns i; beyond the last, the last again."""
    row = start + gl.minimum(i, count - 1)
    if HOW.stage == 1:
        row = gl.load(call.routing.sorted_pairs + row)
        row = row // call.size.top_k
    return row.to(gl.int64)


@gluon.jit
def _consume(ring, call, WG: gl.constexpr, HOW: gl.constexpr, TILE: gl.constexpr):
    """Multiply and write the rows of this group, tile after tile."""
    BN: gl.constexpr = TILE.pairs
    EXTRA: gl.constexpr = TILE.extra
    Q: gl.constexpr = BN // 4
    PARTS: gl.constexpr = TILE.rows // TILE.consumers // 64
    ROW: gl.constexpr = WG * PARTS * 64
    stage = 0
    phase = 0
    m, e, start, count = _tile(call, gl.program_id(0), TILE.group)
    for tile in range(gl.program_id(0), _total(call, TILE.group), gl.num_programs(0)):
        later = _tile(call, tile + gl.num_programs(0), TILE.group)
        at = Spot(m // HOW.split_k * TILE.rows + ROW, e, start, count, _zero(count))
        part = m % HOW.split_k
        if count > 0:
            if TILE.narrow == QUARTERS and count <= Q:
                stage, phase = _run(ring, call, at, part, stage, phase, HOW, TILE, ROW, Q, 0)
            elif TILE.narrow != WHOLE and count <= 2 * Q:
                stage, phase = _run(ring, call, at, part, stage, phase, HOW, TILE, ROW, 2 * Q, 0)
            elif TILE.narrow == QUARTERS and count <= 3 * Q:
                stage, phase = _run(ring, call, at, part, stage, phase, HOW, TILE, ROW, 2 * Q, Q)
            elif EXTRA > 16 and BN < 128 and count > BN and count <= BN + EXTRA // 2:
                stage, phase = _run(ring, call, at, part, stage, phase, HOW, TILE, ROW, BN, EXTRA // 2)
            elif EXTRA > 0 and count > BN:
                stage, phase = _run(ring, call, at, part, stage, phase, HOW, TILE, ROW, BN, EXTRA)
            else:
                stage, phase = _run(ring, call, at, part, stage, phase, HOW, TILE, ROW, BN, 0)
        m, e, start, count = later
    _exit(stage)


@gluon.jit
def _run(ring, call, at, part, stage, phase, HOW: gl.constexpr, TILE: gl.constexpr, ROW: gl.constexpr,
         W: gl.constexpr, W2: gl.constexpr):  # fmt: skip
    """One tile: W columns, and W2 more where that is not 0 (operands are powers of two wide)."""
    PARTS: gl.constexpr = TILE.rows // TILE.consumers // 64
    STAGES: gl.constexpr = TILE.stages
    FORMAT: gl.constexpr = HOW.format
    HAS2: gl.constexpr = W2 > 0
    V2: gl.constexpr = W2 if HAS2 else 16
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W, 16])
    M2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V2, 16])
    r = at.row + (gl.arange(0, 64, gl.SliceLayout(1, M)) + at.zero)
    upper = _of_part(_of_rows(call, at.expert, r, HOW), part, HOW)
    pairs = _row_of_part(_pairs(call, at, HOW, 0, W), part, HOW)
    pairs2 = _row_of_part(_pairs(call, at, HOW, W, V2), part, HOW)
    blocks = gl.cdiv(call.size.columns, 64) // HOW.split_k
    if PARTS == 1 and W + W2 > 256:
        acc, acc2, stage, phase = mma_64(ring, stage, phase, blocks, FORMAT, ROW, M, M2, W, W2, V2, STAGES)
    elif PARTS == 1:
        acc, acc2, stage, phase = mma_64_pingpong(ring, stage, phase, blocks, FORMAT, ROW, TILE.odd, M, M2, W,
                                                  W2, V2, STAGES)  # fmt: skip
    else:
        lower = _of_part(_of_rows(call, at.expert, r + 64, HOW), part, HOW)
        acc, acc2, accb, accb2, stage, phase = mma_128(ring, stage, phase, blocks, FORMAT, ROW, M, M2, W, W2,
                                                       V2, STAGES)  # fmt: skip
        _epilogue(accb, lower, call, at, at.row + 64, pairs, HOW, W, M)
        if HAS2:
            _epilogue(accb2, lower, call, at, at.row + 64, pairs2, HOW, W2, M2)
    _epilogue(acc, upper, call, at, at.row, pairs, HOW, W, M)
    if HAS2:
        _epilogue(acc2, upper, call, at, at.row, pairs2, HOW, W2, M2)
    return stage, phase


@gluon.jit
def _of_part(of_rows, part, HOW: gl.constexpr):
    """(scale, bias) of rows for a part of their columns: the first adds the bias."""
    scale, shift = of_rows
    if HOW.split_k > 1:
        shift *= 1 - gl.minimum(part, 1)
    return scale, shift


@gluon.jit
def _row_of_part(pairs, part, HOW: gl.constexpr):
    """Rows of out for pairs; -1 stays."""
    if HOW.split_k > 1:
        pairs = gl.where(pairs >= 0, pairs * HOW.split_k + part, -1)
    return pairs


@gluon.jit
def _of_rows(call, e, r, HOW: gl.constexpr):
    """(scale, bias) of kernel rows r: asked for before the loop, which hides their way from memory."""
    rows = call.size.rows
    if HOW.gated:
        j = r // 16 * 8 + r % 8
        real = j < rows // 2
        j = gl.where(r % 16 < 8, j, rows // 2 + j)
        padded = gl.cdiv(rows // 2, 32) * 64
    else:
        j = r
        real = r < rows
        padded = gl.cdiv(rows, 64) * 64
    scale = gl.load(call.w.row_scale + e.to(gl.int64) * padded + r, real, other=0.0)
    if call.w.bias is not None:
        return scale, gl.load(call.w.bias + e * rows + j, real, other=0.0).to(gl.float32)
    else:
        return scale, scale


@gluon.jit
def _pairs(call, at, HOW: gl.constexpr, FIRST: gl.constexpr, W: gl.constexpr):
    """Rows of out of W columns from FIRST, as threads will write them; -1 where there is none."""
    i = gl.arange(0, W, gl.SliceLayout(0, TURNED)) + at.zero + FIRST
    if HOW.stage == 1:  # writes by place
        return gl.where(i < at.count, at.start + i, -1)
    else:
        return gl.load(call.routing.sorted_pairs + at.start + i, i < at.count, other=-1)


@gluon.jit
def _results(acc, of_rows, call, HOW: gl.constexpr, W: gl.constexpr, M: gl.constexpr):
    """Sums [64, W] -> scales, bias, the activation of the first product: [32, W] with a gate."""
    scale, shift = of_rows
    scale = gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, M)), 1)
    if call.w.bias is not None:  # rounded as fused.epilogue does
        acc = gl.fma(acc, scale, gl.expand_dims(gl.convert_layout(shift, gl.SliceLayout(1, M)), 1))
    else:
        acc *= scale
    if HOW.gated:
        gate, up = gl.split(gl.permute(gl.reshape(acc, [4, 2, 8, W]), (0, 2, 3, 1)))
        acc = gl.reshape(activate(gate, up, HOW), [32, W])
    elif HOW.stage == 1:
        acc = activate(acc, acc, HOW)
    return acc


@gluon.jit
def _epilogue(acc, of_rows, call, at, row, pairs, HOW: gl.constexpr, W: gl.constexpr, M: gl.constexpr):
    """Scales, bias, the activation of the first product, and out."""
    out = call.out
    acc = _results(acc, of_rows, call, HOW, W, M)
    if HOW.gated:
        j = row // 2 + (gl.arange(0, 32, gl.SliceLayout(1, TURNED)) + at.zero)
        real = j < call.size.rows // 2
    else:
        j = row + (gl.arange(0, 64, gl.SliceLayout(1, TURNED)) + at.zero)
        real = j < call.size.rows
    v = gl.convert_layout(acc.to(out.dtype.element_ty), TURNED)
    to_row = pairs.to(gl.int64) * call.size.out_stride
    gl.store(out + to_row[None, :] + j[:, None], v, (pairs >= 0)[None, :] & real[:, None])
