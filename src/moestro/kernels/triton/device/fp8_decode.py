"""4-bit weights on FP8 tensor cores: decoded to e4m3 once (`expand_fp8`), or beside the products (`fp4_fp8_gemm`).

Weights are in fp8_layout.TritonFP4's layout: nibbles of magnitudes are what `prmt` selects bytes by. Two registers hold
the eight products of a group's scale with e2m1, already rounded to e4m3; they follow from the scale's byte by integer
arithmetic, and four selections and four ors of signs decode sixteen weights: 10 to 13 instructions for 8 weights,
everything counted, and no memory but the codes.

In `fp4_fp8_gemm` one or two groups of four warps decode from a ring of codes into the ring that the products read; they
set the pace where an expert has fewer than about 256 pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from moestro.kernels.triton.device.fp8 import (
    Call,
    Ring,
    async_copy,
    copy_async,
    fence_async_shared,
    mbarrier,
    tma_copy,
    write_block,
)
from moestro.kernels.triton.device.loops import following
from moestro.kernels.triton.device.share import _exit, _tile, _total, _zero
from moestro.kernels.triton.device.warp_specialized import launch_next, wait_for_previous

warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait
# of 64 rows of 4-bit weights: a thread has eight words of a row, 32 weights, and their two scales
CODES = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))
PAIRS_OF_SCALES = gl.constexpr(
    gl.SliceLayout(
        2, gl.SliceLayout(3, gl.BlockedLayout([1, 1, 2, 4], [8, 4, 1, 1], [4, 1, 1, 1], [3, 2, 1, 0]))
    )
)
BYTES = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
COPIED_SCALES = gl.constexpr(gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0]))


class Raw(NamedTuple):
    """Buffers of codes and scales, [RAW, rows, ...], and the barriers that say they have arrived."""

    codes: Any
    scales: Any
    arrived: Any


@gluon.jit
def expand_fp8(
    words, scales, dense, num_blocks, columns, EVEN: gl.constexpr, COLS: gl.constexpr, PDL: gl.constexpr
):
    """dense e4m3 [strips * 64, columns]: decoded weights; a program does COLS blocks of one strip of 64 rows."""
    wait_for_previous(PDL)
    launch_next(PDL)
    strip = gl.program_id(0).to(gl.int64)
    r = gl.arange(0, 64, gl.SliceLayout(1, CODES))
    c = gl.arange(0, 32, gl.SliceLayout(0, CODES))
    rs = gl.arange(0, 64, gl.SliceLayout(1, PAIRS_OF_SCALES))
    cs = gl.arange(0, 4, gl.SliceLayout(0, PAIRS_OF_SCALES))
    ro = gl.arange(0, 64, gl.SliceLayout(1, BYTES))
    co = gl.arange(0, 128, gl.SliceLayout(0, BYTES))
    for i in gl.static_range(COLS):
        b = gl.program_id(1) * COLS + i
        if b < num_blocks:
            at = strip * num_blocks + b
            w = gl.load(words + at * 2048 + r[:, None] * 32 + c[None, :])
            s = gl.load(scales + at * 256 + rs[:, None] * 4 + cs[None, :])
            a = gl.convert_layout(_decode(w, s), BYTES)
            to = dense + (strip * 64 + ro)[:, None] * columns + b * 128 + co[None, :]
            if EVEN:
                gl.store(to, a)
            else:
                gl.store(to, a, (b * 128 + co < columns)[None, :])


@gluon.jit
def _table(b):
    """A scale's e4m3 byte -> its products with 0, .5, 1, 1.5, and with 2, 3, 4, 6, rounded to e4m3, four bytes each.

    A power of two is 8 in the byte; times 1.5 it is 4 or 5 more by the mantissa (ties to even).
    """
    h = b + 4 + ((0x3E >> (b & 7)) & 1)
    y = b + h * 256
    return y * 65536 + b * 256 - 2048, y * 65537 + 0x10100808


@gluon.jit
def _decode(w, pairs):
    """int16 [64, 32] codes and [64, 4] scales of 32 columns, int16 pairs or uint8 (layouts CODES, PAIRS_OF_SCALES)
    -> e4m3 [64, 128].
    """
    s = pairs.to(gl.int32)
    low, high = _table(s & 255)
    low2 = low
    high2 = high
    if pairs.dtype == gl.int16:
        low2, high2 = _table((s >> 8) & 255)
    low = _spread(low, low2)
    high = _spread(high, high2)
    a0, a1, a2, a3 = gl.inline_asm_elementwise(
        """{
        .reg .b32 m, n;
        and.b32 m, $4, 0x77777777; shr.u32 n, m, 16;
        prmt.b32 $0, $6, $10, m; prmt.b32 $1, $6, $10, n; shl.b32 n, $4, 4;
        lop3.b32 $0, $4, 0x80808080, $0, 0xEA; lop3.b32 $1, n, 0x80808080, $1, 0xEA;
        and.b32 m, $5, 0x77777777; shr.u32 n, m, 16;
        prmt.b32 $2, $6, $10, m; prmt.b32 $3, $6, $10, n; shl.b32 n, $5, 4;
        lop3.b32 $2, $5, 0x80808080, $2, 0xEA; lop3.b32 $3, n, 0x80808080, $3, 0xEA;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r",
        [w, low, high],
        dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )
    a = gl.join(gl.join(a0, a2), gl.join(a1, a3))  # [64, 32, 2, 2]: four columns = 2 * third + last
    a = gl.permute(gl.reshape(a, [64, 8, 4, 2, 2]), (0, 1, 3, 4, 2))
    return gl.reshape(a, [64, 128]).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _spread(even, odd):
    """[64, 4] of even and odd groups of 16 -> [64, 32]: for each word its group's."""
    both = gl.expand_dims(gl.join(even, odd), 3)  # [64, 4, 2, 1]
    L: gl.constexpr = both.type.layout
    wide = both + gl.zeros([64, 4, 2, 4], gl.int32, L)
    return gl.convert_layout(gl.reshape(wide, [64, 32]), CODES)


@gluon.jit(do_not_specialize=["stride"])
def fp4_fp8_gemm(x, x_desc, routing, stride, w, padded, out, size, HOW: gl.constexpr, TILE: gl.constexpr,
                 PDL: gl.constexpr):  # fmt: skip
    """Tiles of 64 · groups · parts pairs and TILE.rows rows of weights in TritonFP4's layout; x by place in both products,
    with a scale a row; out by place (stage 1) or by pair, not weighted. TILE: fp8.Grid.
    """
    BM: gl.constexpr = 64 * TILE.groups * TILE.parts
    STAGES: gl.constexpr = TILE.stages
    RAW: gl.constexpr = TILE.raw
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BM, 128], gl.NVMMASharedLayout(128, 8, 2))
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TILE.rows, 128], gl.NVMMASharedLayout(128, 8, 2))
    cs = gl.allocate_shared_memory(gl.int16, [RAW, TILE.rows, 32], gl.SwizzledSharedLayout(8, 1, 1, [1, 0]))
    ss = gl.allocate_shared_memory(
        w.scales.dtype.element_ty, [RAW, TILE.rows, 4], gl.SwizzledSharedLayout(4, 1, 1, [1, 0])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [RAW, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + TILE.decoders)  # rows of x, and decoded weights
        mbarrier.init(empty.index(i), count=TILE.groups)
    for i in gl.static_range(RAW):
        mbarrier.init(arrived.index(i), count=128 * TILE.decoders)
    fence_async_shared()
    wait_for_previous(PDL)
    launch_next(PDL)
    ring, raw = Ring(xs, ws, full, empty), Raw(cs, ss, arrived)
    call = Call(x, x_desc, routing, stride, w, None, out, size, padded, gl.load(routing.table + 3 * stride),
                gl.cdiv(padded, TILE.rows))  # fmt: skip
    REGISTERS: gl.constexpr = TILE.registers
    PRODUCER: gl.constexpr = TILE.producer_registers
    if TILE.groups == 1:
        gl.warp_specialize(
            [
                (_multiply, (ring, call, 0, HOW, TILE)),
                (_decode_all, (ring, raw, call, 0, TILE)),
                (_decode_all, (ring, raw, call, 1, TILE)),
            ],
            [4, 4],
            [PRODUCER, PRODUCER],
        )
    elif TILE.decoders == 1:
        gl.warp_specialize(
            [
                (_multiply, (ring, call, 0, HOW, TILE)),
                (_multiply, (ring, call, 1, HOW, TILE)),
                (_decode_all, (ring, raw, call, 0, TILE)),
            ],
            [4, 4],
            [REGISTERS, PRODUCER],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (ring, call, 0, HOW, TILE)),
                (_multiply, (ring, call, 1, HOW, TILE)),
                (_decode_all, (ring, raw, call, 0, TILE)),
                (_decode_all, (ring, raw, call, 1, TILE)),
            ],
            [4, 4, 4],
            [REGISTERS, PRODUCER, PRODUCER],
        )


@gluon.jit
def _multiply(ring, call, WG: gl.constexpr, HOW: gl.constexpr, TILE: gl.constexpr):
    """Multiply and write this group's pairs of each tile: two blocks of sums, 64 pairs x 128 rows each, or one."""
    STAGES: gl.constexpr = TILE.stages
    PARTS: gl.constexpr = TILE.parts
    TWO: gl.constexpr = PARTS == 2 or TILE.rows == 256
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    stage = 0
    phase = 0
    m, e, start, count = _tile(call, gl.program_id(0), TILE.group)
    for tile in range(gl.program_id(0), _total(call, TILE.group), gl.num_programs(0)):
        later = _tile(call, tile + gl.num_programs(0), TILE.group)
        if count > 0:
            place = start + WG * 64 * PARTS + gl.arange(0, 64, gl.SliceLayout(1, M)) + _zero(count)
            acc = gl.zeros([64, 128], gl.float32, M)
            acc2 = gl.zeros([64, 128 if TWO else 16], gl.float32, M)
            none = gl.zeros([64, 128], gl.float32, M)
            for _ in range(gl.cdiv(call.size.columns, 128)):
                mbarrier.wait(ring.full.index(stage), phase)
                fence_async_shared()
                a = ring.x.index(stage).slice(WG * 64 * PARTS, 64)
                b = ring.w.index(stage).slice(0, 128).permute((1, 0))
                part = warpgroup_mma(a, b, none, use_acc=False, is_async=True)
                part = warpgroup_mma_wait(0, deps=[part])
                if not TWO:
                    mbarrier.arrive(ring.empty.index(stage))
                acc += part
                if TWO:
                    if PARTS == 2:
                        a = ring.x.index(stage).slice(WG * 64 * PARTS + 64, 64)
                    else:
                        b = ring.w.index(stage).slice(128, 128).permute((1, 0))
                    part = warpgroup_mma(a, b, none, use_acc=False, is_async=True)
                    part = warpgroup_mma_wait(0, deps=[part])
                    mbarrier.arrive(ring.empty.index(stage))
                    acc2 += part
                stage, phase = following(stage, phase, STAGES)
            first = m * TILE.rows
            write_block(acc, call, e, first, place, place < start + count, HOW, TILE, M)
            if PARTS == 2:
                write_block(acc2, call, e, first, place + 64, place + 64 < start + count, HOW, TILE, M)
            elif TWO:
                write_block(acc2, call, e, first + 128, place, place < start + count, HOW, TILE, M)
        m, e, start, count = later
    _exit(stage)


@gluon.jit
def _ask(raw, wp, sp, slot, there, FIRST: gl.constexpr, MINE: gl.constexpr):
    """Copy the codes and scales of one stage."""
    if there:
        copy_async(raw.codes.index(slot).slice(FIRST, MINE), wp)
        copy_async(raw.scales.index(slot).slice(FIRST, MINE), sp)
        async_copy.mbarrier_arrive(raw.arrived.index(slot), increment_count=False)


@gluon.jit
def _decode_all(ring, raw, call, D: gl.constexpr, TILE: gl.constexpr):
    """Ask RAW stages ahead, decode this group's rows, hand over; the first group asks for x. Tile after tile."""
    STAGES: gl.constexpr = TILE.stages
    RAW: gl.constexpr = TILE.raw
    MINE: gl.constexpr = TILE.rows // TILE.decoders
    FIRST: gl.constexpr = D * MINE
    BM: gl.constexpr = 64 * TILE.groups * TILE.parts
    blocks = gl.cdiv(call.size.columns, 128)
    strips = call.padded // 64
    r = FIRST + gl.arange(0, MINE, gl.SliceLayout(1, CODES))
    c = gl.arange(0, 32, gl.SliceLayout(0, CODES))
    rs = FIRST + gl.arange(0, MINE, gl.SliceLayout(1, COPIED_SCALES))
    cs = gl.arange(0, 4, gl.SliceLayout(0, COPIED_SCALES))
    stage = 0
    phase = 1
    slot = 0
    turn = 0
    for tile in range(gl.program_id(0), _total(call, TILE.group), gl.num_programs(0)):
        m, e, start, count = _tile(call, tile, TILE.group)
        if count > 0:
            strip = e.to(gl.int64) * strips + gl.minimum(m * (TILE.rows // 64) + r // 64, strips - 1)
            wp = call.w.data + (strip * (blocks * 2048) + r % 64 * 32)[:, None] + c[None, :]
            strip_s = e.to(gl.int64) * strips + gl.minimum(m * (TILE.rows // 64) + rs // 64, strips - 1)
            sp = call.w.scales + (strip_s * (blocks * 256) + rs % 64 * 4)[:, None] + cs[None, :]
            ahead = slot
            for b in gl.static_range(RAW - 1):
                _ask(raw, wp + b * 2048, sp + b * 256, ahead, b < blocks, FIRST, MINE)
                ahead = gl.where(ahead + 1 == RAW, 0, ahead + 1)
            for b in range(blocks):
                # into the slot that was decoded last; `slot` ends a tile where the next one begins
                later = b + RAW - 1
                _ask(raw, wp + later * 2048, sp + later * 256, ahead, later < blocks, FIRST, MINE)
                ahead = gl.where(ahead + 1 == RAW, 0, ahead + 1)
                mbarrier.wait(ring.empty.index(stage), phase)
                if D == 0:
                    mbarrier.expect(ring.full.index(stage), BM * 128)
                    tma_copy(call.x_desc, [start, b * 128], ring.full.index(stage), ring.x.index(stage))
                mbarrier.wait(raw.arrived.index(slot), turn)
                for s in gl.static_range(MINE // 64):
                    w = raw.codes.index(slot).slice(FIRST + s * 64, 64).load(CODES)
                    pairs = raw.scales.index(slot).slice(FIRST + s * 64, 64).load(PAIRS_OF_SCALES)
                    ring.w.index(stage).slice(FIRST + s * 64, 64).store(_decode(w, pairs))
                fence_async_shared()
                mbarrier.arrive(ring.full.index(stage))
                stage, phase = following(stage, phase, STAGES)
                slot, turn = following(slot, turn, RAW)
    _exit(stage)
