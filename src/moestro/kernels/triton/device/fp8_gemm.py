"""The grouped product of e4m3 rows with e4m3 weights: FP8 checkpoints, or 4-bit weights that were decoded once.

A producer fills a ring, 128 columns a stage: weights, and rows that lie in order, through the tensor memory accelerator,
gathered rows of x by cp.async. Two groups multiply (fp8.py says how sums are kept); programs are persistent. Weights have
a scale a row, or for each 128 x 128 (DeepSeek-V3's recipe, arXiv 2412.19437 §3.3: there x has one for each 128 columns,
and both are multiplied into each product before it is added).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from moestro.kernels.triton.device.fp8 import (
    BLOCKS,
    Call,
    Ring,
    async_copy,
    copy_async,
    fence_async_shared,
    finished,
    mbarrier,
    quantized,
    tma_copy,
    write,
    write_block,
)
from moestro.kernels.triton.device.loops import following
from moestro.kernels.triton.device.share import _exit, _tile, _total, _zero
from moestro.kernels.triton.device.warp_specialized import launch_next, wait_for_previous

warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait


@gluon.jit(do_not_specialize=["stride"])
def fp8_gemm(x, x_desc, routing, stride, w, w_desc, padded, out, size, HOW: gl.constexpr, TILE: gl.constexpr,
             PDL: gl.constexpr):  # fmt: skip
    """Tiles of 128 pairs and 256 rows of weights e4m3 [L * padded, columns], in kernel row order where gated.

    Stage 1 reads x [N, columns] by token and writes out by place: e4m3 and out.scale where there is one, else as out is.
    Stage 2 reads x by place (x_desc) and writes by pair, not weighted. TILE: fp8.Grid.
    """
    GATHER: gl.constexpr = HOW.stage == 1
    BM: gl.constexpr = 64 * TILE.groups
    STAGES: gl.constexpr = TILE.stages
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BM, 128], gl.NVMMASharedLayout(128, 8, 2))
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 256, 128], gl.NVMMASharedLayout(128, 8, 2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=129 if GATHER else 1)
        mbarrier.init(empty.index(i), count=TILE.groups)
    fence_async_shared()
    wait_for_previous(PDL)
    launch_next(PDL)
    ring = Ring(xs, ws, full, empty)
    call = Call(x, x_desc, routing, stride, w, w_desc, out, size, padded, gl.load(routing.table + 3 * stride),
                gl.cdiv(padded, 256))  # fmt: skip
    REGISTERS: gl.constexpr = TILE.registers
    PRODUCER: gl.constexpr = TILE.producer_registers
    if TILE.groups == 1:
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
    GATHER: gl.constexpr = HOW.stage == 1
    BM: gl.constexpr = 64 * TILE.groups
    STAGES: gl.constexpr = TILE.stages
    XL: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    i = gl.arange(0, BM, gl.SliceLayout(1, XL))
    k = gl.arange(0, 128, gl.SliceLayout(0, XL))
    columns = call.size.columns
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), _total(call, TILE.group), gl.num_programs(0)):
        m, e, start, count = _tile(call, tile, TILE.group)
        if count > 0:
            if GATHER:
                pair = gl.load(call.routing.sorted_pairs + start + gl.minimum(i, count - 1))
                token = (pair // call.size.top_k).to(gl.int64)
                xp = call.x.data + token[:, None] * columns + k[None, :]
            for b in range(gl.cdiv(columns, 128)):
                mbarrier.wait(ring.empty.index(stage), phase)
                if GATHER:
                    mbarrier.expect(ring.full.index(stage), 256 * 128)
                else:
                    mbarrier.expect(ring.full.index(stage), (256 + BM) * 128)
                tma_copy(
                    call.w_desc,
                    [e * call.padded + m * 256, b * 128],
                    ring.full.index(stage),
                    ring.w.index(stage),
                )
                if GATHER:
                    if TILE.even:
                        copy_async(ring.x.index(stage), xp)
                    else:
                        copy_async(ring.x.index(stage), xp, (k < columns - b * 128)[None, :])
                    async_copy.mbarrier_arrive(ring.full.index(stage), increment_count=False)
                    xp += 128
                else:
                    tma_copy(call.x_desc, [start, b * 128], ring.full.index(stage), ring.x.index(stage))
                stage, phase = following(stage, phase, STAGES)
    _exit(stage)


@gluon.jit
def _consume(ring, call, WG: gl.constexpr, HOW: gl.constexpr, TILE: gl.constexpr):
    """Multiply and write 64 pairs of each tile."""
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    stage = 0
    phase = 0
    m, e, start, count = _tile(call, gl.program_id(0), TILE.group)
    for tile in range(gl.program_id(0), _total(call, TILE.group), gl.num_programs(0)):
        later = _tile(call, tile + gl.num_programs(0), TILE.group)
        if count > 0:
            place = start + WG * 64 + gl.arange(0, 64, gl.SliceLayout(1, M)) + _zero(count)
            there = place < start + count
            if TILE.recipe == BLOCKS:
                acc, acc2, stage, phase = _sums_of_blocks(
                    ring, call, m, e, place, there, stage, phase, WG, HOW, TILE, M
                )
            else:
                acc, acc2, stage, phase = _sums(ring, call, stage, phase, WG, HOW, TILE, M)
            if call.out.scale is not None:
                _write_quantized(acc, acc2, call, m, e, place, there, HOW, TILE, M)
            else:
                write_block(acc, call, e, m * 256, place, there, HOW, TILE, M)
                write_block(acc2, call, e, m * 256 + 128, place, there, HOW, TILE, M)
        m, e, start, count = later
    _exit(stage)


@gluon.jit
def _arrived(ring, stage, phase, HOW: gl.constexpr):
    """A stage, once it is there; PTX counts cp.async, which wrote gathered rows, to another proxy than wgmma."""
    mbarrier.wait(ring.full.index(stage), phase)
    if HOW.stage == 1:
        fence_async_shared()


@gluon.jit
def _half(ring, stage, none, WG: gl.constexpr, HALF: gl.constexpr):
    """The product of a group's 64 pairs and 128 rows of weights."""
    a = ring.x.index(stage).slice(WG * 64, 64)
    b = ring.w.index(stage).slice(HALF * 128, 128).permute((1, 0))
    part = warpgroup_mma(a, b, none, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=[part])


@gluon.jit
def _sums(ring, call, stage, phase, WG: gl.constexpr, HOW: gl.constexpr, TILE: gl.constexpr, M: gl.constexpr):
    STAGES: gl.constexpr = TILE.stages
    acc = gl.zeros([64, 128], gl.float32, M)
    acc2 = gl.zeros([64, 128], gl.float32, M)
    none = gl.zeros([64, 128], gl.float32, M)
    for _ in range(gl.cdiv(call.size.columns, 128)):
        _arrived(ring, stage, phase, HOW)
        acc += _half(ring, stage, none, WG, 0)
        part = _half(ring, stage, none, WG, 1)
        mbarrier.arrive(ring.empty.index(stage))
        acc2 += part
        stage, phase = following(stage, phase, STAGES)
    return acc, acc2, stage, phase


@gluon.jit
def _sums_of_blocks(ring, call, m, e, place, there, stage, phase, WG: gl.constexpr, HOW: gl.constexpr,
                    TILE: gl.constexpr, M: gl.constexpr):  # fmt: skip
    """Sums of products, each times its row's and its weights' scale. With a gate, 8 columns are gate and 8 up."""
    STAGES: gl.constexpr = TILE.stages
    acc = gl.zeros([64, 128], gl.float32, M)
    acc2 = gl.zeros([64, 128], gl.float32, M)
    none = gl.zeros([64, 128], gl.float32, M)
    blocks = gl.cdiv(call.size.columns, 128)
    row_blocks = gl.cdiv(call.size.rows, 128)
    row = place
    if HOW.stage == 1:
        row = gl.load(call.routing.sorted_pairs + place, there, other=0) // call.size.top_k
    if HOW.gated:  # 256 kernel rows are 128 of gate and 128 of up
        first = m
        second = row_blocks // 2 + m
    else:
        first = 2 * m
        second = gl.minimum(2 * m + 1, row_blocks - 1)
    xp = call.x.scale + row.to(gl.int64) * blocks
    wp = call.w.scales + (e * row_blocks + first) * blocks
    wp2 = call.w.scales + (e * row_blocks + second) * blocks
    s, s1, s2 = gl.load(xp, there, other=0.0), gl.load(wp), gl.load(wp2)
    for b in range(blocks):
        after = gl.minimum(b + 1, blocks - 1)
        later, later1, later2 = (
            gl.load(xp + after, there, other=0.0),
            gl.load(wp + after),
            gl.load(wp2 + after),
        )
        _arrived(ring, stage, phase, HOW)
        acc += _times(_half(ring, stage, none, WG, 0), s * s1, s * s2, HOW.gated, M)
        part = _half(ring, stage, none, WG, 1)
        mbarrier.arrive(ring.empty.index(stage))
        if HOW.gated:
            acc2 += _times(part, s * s1, s * s2, HOW.gated, M)
        else:
            acc2 += _times(part, s * s2, s * s2, HOW.gated, M)
        s, s1, s2 = later, later1, later2
        stage, phase = following(stage, phase, STAGES)
    return acc, acc2, stage, phase


@gluon.jit
def _times(part, one, other, GATED: gl.constexpr, M: gl.constexpr):
    """part [64, 128] times a scale of each row: one for the columns of gate, the other for those of up."""
    if GATED:
        up = gl.expand_dims((gl.arange(0, 128, gl.SliceLayout(0, M)) // 8) % 2 == 1, 0)
        return part * gl.where(up, gl.expand_dims(other, 1), gl.expand_dims(one, 1))
    else:
        return part * gl.expand_dims(one, 1)


@gluon.jit
def _write_quantized(
    acc, acc2, call, m, e, place, there, HOW: gl.constexpr, TILE: gl.constexpr, M: gl.constexpr
):
    """The intermediate in e4m3, with a scale for each row's 128 columns: with a gate, both halves are one such block."""
    v = finished(acc, call, e, m * 256, HOW, TILE, M)
    v2 = finished(acc2, call, e, m * 256 + 128, HOW, TILE, M)
    most, most2 = gl.max(gl.abs(v), 1), gl.max(gl.abs(v2), 1)
    if HOW.gated:
        most = gl.maximum(most, most2)
        v = quantized(v, most, call, m, place, there, HOW)
        v2 = quantized(v2, most, call, m, place, there, HOW)
        write(v, call, m * 128, place, there, HOW, 64)
        write(v2, call, m * 128 + 64, place, there, HOW, 64)
    else:
        v = quantized(v, most, call, 2 * m, place, there, HOW)
        v2 = quantized(v2, most2, call, 2 * m + 1, place, there & (m * 256 + 128 < call.size.rows), HOW)
        write(v, call, m * 256, place, there, HOW, 128)
        write(v2, call, m * 256 + 128, place, there, HOW, 128)
