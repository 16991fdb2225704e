"""FP8 activations on Hopper: rows to e4m3, weights to e4m3 once, and a grouped product of both.

`quantize_fp8` makes rows of e4m3 with a float32 scale for each row, or for each 128 columns of it (DeepSeek's recipe:
arXiv 2412.19437, §3.3). `expand_fp8` decodes 4-bit weights (fp8_layout.TritonFP4) to e4m3. `fp8_gemm` (Gluon) has
pairs as the 64-row A operand and weights as B, both in shared memory: a producer fills a ring (weights, and rows that
lie in order, through the tensor memory accelerator; gathered rows of x by cp.async), one or two groups of four warps
multiply 64 pairs each and share the weights.

Hopper's FP8 products keep about 14 bits of the sums they add to. So each 128 columns are a product of their own, added
in float32 registers (times the scales of that block, where the recipe has them); half a tile at a time, so that sums
and product fit into registers, while the other group's product keeps the tensor core busy.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from moestro.kernels.triton.device import common as device
from moestro.kernels.triton.device.common import launch_next, wait_for_previous
from moestro.kernels.triton.device.loops import following
from moestro.kernels.triton.device.warp_specialized import _exit, _tile, _total, _zero

async_copy, mbarrier, fence_async_shared = hopper.async_copy, hopper.mbarrier, hopper.fence_async_shared
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # 3.9, 3.6
tma_copy = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait
activate = gluon.jit(device.activate.fn)
wait_before = gluon.jit(device.wait_for_previous.fn)
launch_after = gluon.jit(device.launch_next.fn)

MOST = tl.constexpr(448.0)  # the largest e4m3
ROWS, BLOCKS = (
    tl.constexpr(0),
    tl.constexpr(1),
)  # a scale a row; one for each 128 columns (and 128 x 128 weights)
G_ROWS, G_BLOCKS, G_PLACES = (
    gl.constexpr(0),
    gl.constexpr(1),
    gl.constexpr(2),
)  # PLACES: a scale a row of sorted x
G_MOST = gl.constexpr(448.0)
# of 64 rows of 4-bit weights: a thread has eight words of a row, 32 weights, and their two scales
CODES = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))
PAIRS_OF_SCALES = gl.constexpr(
    gl.SliceLayout(
        2, gl.SliceLayout(3, gl.BlockedLayout([1, 1, 2, 4], [8, 4, 1, 1], [4, 1, 1, 1], [3, 2, 1, 0]))
    )
)
BYTES = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
WIDE_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@triton.jit
def quantize_fp8(
    x, ids, sorted_pairs, values, scales, columns,
    RECIPE: tl.constexpr, GATHER: tl.constexpr, K: tl.constexpr, OFFSET: tl.constexpr, L: tl.constexpr, B: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """values e4m3 [rows, columns] = x / scale; scales float32 [rows], or [rows, blocks of 128]; a program a row.

    scale = largest magnitude / 448, or 1 where all is zero; to the nearest e4m3, ties to even. GATHER: row r is that
    of the token of sorted_pairs[r], else row r of x. Without GATHER no pair is looked at; with it, places of pairs
    whose expert is not local stay as they are.
    """
    wait_for_previous(PDL)
    launch_next(PDL)
    to = tl.program_id(0).to(tl.int64)
    row = to
    width = columns
    if GATHER:
        pair = tl.load(sorted_pairs + to).to(tl.int64)
        e = tl.load(ids + pair)
        width = tl.where((e >= OFFSET) & (e < OFFSET + L), columns, 0)
        row = pair // K
    c = tl.arange(0, B)
    if RECIPE == ROWS:
        most = tl.zeros((B,), tl.float32)
        for first in range(0, width, B):
            v = tl.load(x + row * columns + first + c, first + c < columns, other=0.0).to(tl.float32)
            most = tl.maximum(most, tl.abs(v))
        largest = tl.max(most, 0)
        scale = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, MOST))
        tl.store(scales + to, scale)
        for first in range(0, width, B):
            v = tl.load(x + row * columns + first + c, first + c < columns, other=0.0).to(tl.float32)
            q = tl.div_rn(v, tl.zeros_like(v) + scale).to(tl.float8e4nv)
            tl.store(values + to * columns + first + c, q, first + c < columns)
    else:
        num_blocks = tl.cdiv(columns, 128)
        for first in range(0, width, B):
            v = tl.load(x + row * columns + first + c, first + c < columns, other=0.0).to(tl.float32)
            blocks = v.reshape(B // 128, 128)
            largest = tl.max(tl.abs(blocks), 1)
            scale = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, MOST + tl.zeros_like(largest)))
            q = tl.div_rn(blocks, scale[:, None] + tl.zeros_like(blocks)).reshape(B).to(tl.float8e4nv)
            tl.store(values + to * columns + first + c, q, first + c < columns)
            b = first // 128 + tl.arange(0, B // 128)
            tl.store(scales + to * num_blocks + b, scale, b < num_blocks)


@gluon.jit
def expand_fp8(
    words, scales, dense, num_blocks, columns, EVEN: gl.constexpr, COLS: gl.constexpr, PDL: gl.constexpr
):
    """dense e4m3 [strips * 64, columns]: decoded weights; a program does COLS blocks of one strip of 64 rows."""
    wait_before(PDL)
    launch_after(PDL)
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


@gluon.jit(do_not_specialize=["stride"])
def fp8_gemm(
    x, x_desc, x_scale, w_desc, w_scale, sorted_pairs, table, stride, bias, out, out_scale,
    rows, padded, columns, out_stride, K,
    STAGE: gl.constexpr, RECIPE: gl.constexpr, GATED: gl.constexpr, ACT: gl.constexpr, ALPHA: gl.constexpr,
    LIMIT: gl.constexpr, SHIFT: gl.constexpr, BIAS: gl.constexpr, QUANTIZE: gl.constexpr, EVEN: gl.constexpr,
    BN: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Tiles of 64 · GROUPS pairs and BN rows of weights e4m3 [L * padded, columns], in kernel row order where GATED.

    STAGE 1 reads x [N, columns] by token and writes out by place: e4m3 and out_scale where QUANTIZE, else bf16.
    STAGE 2 reads x by place (x_desc) and writes bf16 by pair, not weighted. RECIPE: what x_scale and w_scale are,
    (rows of x, kernel rows of w), or ([rows of x, blocks], [L, blocks of rows, blocks]).
    """
    BM: gl.constexpr = 64 * GROUPS
    GATHER: gl.constexpr = STAGE == 1
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BM, 128], gl.NVMMASharedLayout(128, 8, 2))
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BN, 128], gl.NVMMASharedLayout(128, 8, 2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=129 if GATHER else 1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    wait_before(PDL)
    launch_after(PDL)
    ring = (xs, ws, full, empty)
    shape = (table, stride, gl.load(table + 3 * stride), gl.cdiv(padded, BN), padded, rows, columns, K)
    source = (x, x_desc, w_desc, sorted_pairs)
    to = (sorted_pairs, x_scale, w_scale, bias, out, out_stride, out_scale)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        ring,
                        shape,
                        to,
                        (STAGE, RECIPE, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS, QUANTIZE),
                        0,
                        BN,
                        STAGES,
                        GROUP,
                    ),
                ),
                (_produce, (ring, shape, source, GATHER, EVEN, BM, BN, STAGES, GROUP)),
            ],
            [4],
            [PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        ring,
                        shape,
                        to,
                        (STAGE, RECIPE, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS, QUANTIZE),
                        0,
                        BN,
                        STAGES,
                        GROUP,
                    ),
                ),
                (
                    _consume,
                    (
                        ring,
                        shape,
                        to,
                        (STAGE, RECIPE, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS, QUANTIZE),
                        1,
                        BN,
                        STAGES,
                        GROUP,
                    ),
                ),
                (_produce, (ring, shape, source, GATHER, EVEN, BM, BN, STAGES, GROUP)),
            ],
            [4, 4],
            [REGISTERS, PRODUCER_REGISTERS],
        )


@gluon.jit
def _produce(ring, shape, source, GATHER: gl.constexpr, EVEN: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
             STAGES: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """Fill the ring, 128 columns a stage, tile after tile."""
    xs, ws, full, empty = ring
    x, x_desc, w_desc, sorted_pairs = source
    XL: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    i = gl.arange(0, BM, gl.SliceLayout(1, XL))
    k = gl.arange(0, 128, gl.SliceLayout(0, XL))
    columns = shape[6]
    blocks = gl.cdiv(columns, 128)
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), _total(shape, GROUP), gl.num_programs(0)):
        m, e, start, count = _tile(shape, tile, GROUP)
        if count > 0:
            w_row = e * shape[4] + m * BN
            if GATHER:
                token = gl.load(sorted_pairs + start + gl.minimum(i, count - 1)) // shape[7]
                xp = x + token.to(gl.int64)[:, None] * columns + k[None, :]
            for b in range(blocks):
                mbarrier.wait(empty.index(stage), phase)
                if GATHER:
                    mbarrier.expect(full.index(stage), BN * 128)
                else:
                    mbarrier.expect(full.index(stage), (BN + BM) * 128)
                tma_copy(w_desc, [w_row, b * 128], full.index(stage), ws.index(stage))
                if GATHER:
                    if EVEN:
                        copy_async(xs.index(stage), xp)
                    else:
                        copy_async(xs.index(stage), xp, (k < columns - b * 128)[None, :])
                    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
                    xp += 128
                else:
                    tma_copy(x_desc, [start, b * 128], full.index(stage), xs.index(stage))
                stage, phase = following(stage, phase, STAGES)
    _exit(stage)


@gluon.jit(do_not_specialize=["stride"])
def fp4_fp8_gemm(
    x_desc, x_scale, words, scales, w_scale, sorted_pairs, table, stride, bias, out,
    rows, padded, columns, out_stride, K,
    STAGE: gl.constexpr, GATED: gl.constexpr, ACT: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    SHIFT: gl.constexpr, BIAS: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr, PARTS: gl.constexpr,
    DECODERS: gl.constexpr, STAGES: gl.constexpr, RAW: gl.constexpr, GROUP: gl.constexpr, REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As fp8_gemm with a scale a row, but 4-bit weights (fp8_layout.TritonFP4) are decoded on their way: DECODERS groups
    of four warps copy codes and scales into a ring of RAW buffers, and decode them into the ring that the products
    read. A group multiplies 64 · PARTS pairs, with BN rows of weights (128 where PARTS is 2). x by place in both products.
    """
    BM: gl.constexpr = 64 * GROUPS * PARTS
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BM, 128], gl.NVMMASharedLayout(128, 8, 2))
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BN, 128], gl.NVMMASharedLayout(128, 8, 2))
    cs = gl.allocate_shared_memory(gl.int16, [RAW, BN, 32], gl.SwizzledSharedLayout(8, 1, 1, [1, 0]))
    ss = gl.allocate_shared_memory(gl.int16, [RAW, BN, 4], gl.SwizzledSharedLayout(4, 1, 1, [1, 0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [RAW, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + DECODERS)  # rows of x, and decoded weights
        mbarrier.init(empty.index(i), count=GROUPS)
    for i in gl.static_range(RAW):
        mbarrier.init(arrived.index(i), count=128 * DECODERS)
    fence_async_shared()
    wait_before(PDL)
    launch_after(PDL)
    ring = (xs, ws, full, empty)
    raw = (cs, ss, arrived)
    shape = (table, stride, gl.load(table + 3 * stride), gl.cdiv(padded, BN), padded, rows, columns, K)
    source = (x_desc, words, scales)
    to = (sorted_pairs, x_scale, w_scale, bias, out, out_stride, out)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_multiply_all, (ring, shape, to, (STAGE, G_PLACES, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS),
                                 0, BN, PARTS, STAGES, GROUP)),
                (_decode_all, (ring, raw, shape, source, 0, BM, BN, DECODERS, STAGES, RAW, GROUP)),
                (_decode_all, (ring, raw, shape, source, 1, BM, BN, DECODERS, STAGES, RAW, GROUP)),
            ],
            [4, 4],
            [PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    elif DECODERS == 1:
        gl.warp_specialize(
            [
                (_multiply_all, (ring, shape, to, (STAGE, G_PLACES, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS),
                                 0, BN, PARTS, STAGES, GROUP)),
                (_multiply_all, (ring, shape, to, (STAGE, G_PLACES, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS),
                                 1, BN, PARTS, STAGES, GROUP)),
                (_decode_all, (ring, raw, shape, source, 0, BM, BN, DECODERS, STAGES, RAW, GROUP)),
            ],
            [4, 4],
            [REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply_all, (ring, shape, to, (STAGE, G_PLACES, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS),
                                 0, BN, PARTS, STAGES, GROUP)),
                (_multiply_all, (ring, shape, to, (STAGE, G_PLACES, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS),
                                 1, BN, PARTS, STAGES, GROUP)),
                (_decode_all, (ring, raw, shape, source, 0, BM, BN, DECODERS, STAGES, RAW, GROUP)),
                (_decode_all, (ring, raw, shape, source, 1, BM, BN, DECODERS, STAGES, RAW, GROUP)),
            ],
            [4, 4, 4],
            [REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


@gluon.jit
def _multiply_all(ring, shape, to, how, WG: gl.constexpr, BN: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
                  GROUP: gl.constexpr):  # fmt: skip
    """As _consume, with decoded weights: two blocks of sums, 64 pairs x 128 rows each, or one."""
    TWO: gl.constexpr = PARTS == 2 or BN == 256
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    stage = 0
    phase = 0
    m, e, start, count = _tile(shape, gl.program_id(0), GROUP)
    for tile in range(gl.program_id(0), _total(shape, GROUP), gl.num_programs(0)):
        later = _tile(shape, tile + gl.num_programs(0), GROUP)
        if count > 0:
            place = start + WG * 64 * PARTS + gl.arange(0, 64, gl.SliceLayout(1, M)) + _zero(count)
            acc = gl.zeros([64, 128], gl.float32, M)
            acc2 = gl.zeros([64, 128 if TWO else 16], gl.float32, M)
            none = gl.zeros([64, 128], gl.float32, M)
            for _ in range(gl.cdiv(shape[6], 128)):
                mbarrier.wait(ring[2].index(stage), phase)
                fence_async_shared()
                a = ring[0].index(stage).slice(WG * 64 * PARTS, 64)
                b = ring[1].index(stage).slice(0, 128).permute((1, 0))
                part = warpgroup_mma(a, b, none, use_acc=False, is_async=True)
                part = warpgroup_mma_wait(0, deps=[part])
                if not TWO:
                    mbarrier.arrive(ring[3].index(stage))
                acc += part
                if TWO:
                    if PARTS == 2:
                        a = ring[0].index(stage).slice(WG * 64 * PARTS + 64, 64)
                    else:
                        b = ring[1].index(stage).slice(128, 128).permute((1, 0))
                    part = warpgroup_mma(a, b, none, use_acc=False, is_async=True)
                    part = warpgroup_mma_wait(0, deps=[part])
                    mbarrier.arrive(ring[3].index(stage))
                    acc2 += part
                stage, phase = following(stage, phase, STAGES)
            _write_block(acc, 0, shape, to, how, m, e, place, place < start + count, M, BN)
            if PARTS == 2:
                _write_block(acc2, 0, shape, to, how, m, e, place + 64, place + 64 < start + count, M, BN)
            elif TWO:
                _write_block(acc2, 128, shape, to, how, m, e, place, place < start + count, M, BN)
        m, e, start, count = later
    _exit(stage)


@gluon.jit
def _write_block(
    acc, FIRST: gl.constexpr, shape, to, how, m, e, place, there, M: gl.constexpr, BN: gl.constexpr
):
    """64 pairs x 128 kernel rows from m · BN + FIRST on: scales, bias, activation, out."""
    acc *= gl.expand_dims(gl.load(to[1] + place, there, other=0.0), 1)
    v = _finished(acc, FIRST, shape, to, how, m, e, M, BN, 128)
    pairs = place if how[0] == 1 else gl.load(to[0] + place, there, other=0)
    first = (m * BN + FIRST) // 2 if how[2] else m * BN + FIRST
    _store(v, first, shape, to, how, pairs, there, 64 if how[2] else 128)


@gluon.jit
def _ask(raw, wp, sp, slot, there, FIRST: gl.constexpr, MINE: gl.constexpr):
    """Copy the codes and scales of one stage."""
    if there:
        copy_async(raw[0].index(slot).slice(FIRST, MINE), wp)
        copy_async(raw[1].index(slot).slice(FIRST, MINE), sp)
        async_copy.mbarrier_arrive(raw[2].index(slot), increment_count=False)


@gluon.jit
def _decode_all(ring, raw, shape, source, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DECODERS: gl.constexpr,
                STAGES: gl.constexpr, RAW: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """Ask RAW stages ahead, decode this group's rows, hand over; the first group asks for x. Tile after tile."""
    xs, ws, full, empty = ring
    MINE: gl.constexpr = BN // DECODERS
    FIRST: gl.constexpr = D * MINE
    SL: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    blocks = gl.cdiv(shape[6], 128)
    strips = shape[4] // 64
    r = FIRST + gl.arange(0, MINE, gl.SliceLayout(1, CODES))
    c = gl.arange(0, 32, gl.SliceLayout(0, CODES))
    rs = FIRST + gl.arange(0, MINE, gl.SliceLayout(1, SL))
    cs = gl.arange(0, 4, gl.SliceLayout(0, SL))
    stage = 0
    phase = 1
    slot = 0
    turn = 0
    for tile in range(gl.program_id(0), _total(shape, GROUP), gl.num_programs(0)):
        m, e, start, count = _tile(shape, tile, GROUP)
        if count > 0:
            strip = e.to(gl.int64) * strips + gl.minimum(m * (BN // 64) + r // 64, strips - 1)
            wp = source[1] + (strip * (blocks * 2048) + r % 64 * 32)[:, None] + c[None, :]
            strip_s = e.to(gl.int64) * strips + gl.minimum(m * (BN // 64) + rs // 64, strips - 1)
            sp = source[2] + (strip_s * (blocks * 256) + rs % 64 * 4)[:, None] + cs[None, :]
            ahead = slot
            for b in gl.static_range(RAW - 1):
                _ask(raw, wp + b * 2048, sp + b * 256, ahead, b < blocks, FIRST, MINE)
                ahead = gl.where(ahead + 1 == RAW, 0, ahead + 1)
            for b in range(blocks):
                # the slot that was decoded last; `slot` ends a tile where the next one begins
                _ask(
                    raw,
                    wp + (b + RAW - 1) * 2048,
                    sp + (b + RAW - 1) * 256,
                    ahead,
                    b + RAW - 1 < blocks,
                    FIRST,
                    MINE,
                )
                ahead = gl.where(ahead + 1 == RAW, 0, ahead + 1)
                mbarrier.wait(empty.index(stage), phase)
                if D == 0:
                    mbarrier.expect(full.index(stage), BM * 128)
                    tma_copy(source[0], [start, b * 128], full.index(stage), xs.index(stage))
                mbarrier.wait(raw[2].index(slot), turn)
                for s in gl.static_range(MINE // 64):
                    w = raw[0].index(slot).slice(FIRST + s * 64, 64).load(CODES)
                    pairs = raw[1].index(slot).slice(FIRST + s * 64, 64).load(PAIRS_OF_SCALES)
                    ws.index(stage).slice(FIRST + s * 64, 64).store(_decode(w, pairs))
                fence_async_shared()
                mbarrier.arrive(full.index(stage))
                stage, phase = following(stage, phase, STAGES)
                slot, turn = following(slot, turn, RAW)
    _exit(stage)


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
    """int16 [64, 32] codes and int16 [64, 4] pairs of scales (layouts CODES, PAIRS_OF_SCALES) -> e4m3 [64, 128]."""
    s = pairs.to(gl.int32)
    low, high = _table(s & 255)
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
    a = gl.join(gl.join(a0, a2), gl.join(a1, a3))  # [64, 32, 2, 2]: plane = 2 * third + last
    a = gl.permute(gl.reshape(a, [64, 8, 4, 2, 2]), (0, 1, 3, 4, 2))
    return gl.reshape(a, [64, 128]).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _spread(even, odd):
    """[64, 4] of even and odd groups of 16 -> [64, 32]: for each word its group's."""
    both = gl.expand_dims(gl.join(even, odd), 3)  # [64, 4, 2, 1]
    L: gl.constexpr = both.type.layout
    wide = both + gl.zeros([64, 4, 2, 4], gl.int32, L)
    return gl.convert_layout(gl.reshape(wide, [64, 32]), CODES)


@gluon.jit
def _consume(ring, shape, to, how, WG: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
             GROUP: gl.constexpr):  # fmt: skip
    """Multiply and write 64 pairs of each tile."""
    HALF: gl.constexpr = BN // 2
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    stage = 0
    phase = 0
    m, e, start, count = _tile(shape, gl.program_id(0), GROUP)
    for tile in range(gl.program_id(0), _total(shape, GROUP), gl.num_programs(0)):
        later = _tile(shape, tile + gl.num_programs(0), GROUP)
        if count > 0:
            place = start + WG * 64 + gl.arange(0, 64, gl.SliceLayout(1, M)) + _zero(count)
            there = place < start + count
            if how[1] == G_BLOCKS:
                acc, acc2, stage, phase = _sums_of_blocks(ring, shape, to, how, m, e, place, there, stage, phase, WG,
                                                          M, BN, STAGES)  # fmt: skip
            else:
                acc, acc2, stage, phase = _sums(ring, shape, stage, phase, WG, M, BN, STAGES)
            _write(acc, acc2, shape, to, how, m, e, place, there, M, BN)
        m, e, start, count = later
    _exit(stage)


@gluon.jit
def _sums(ring, shape, stage, phase, WG: gl.constexpr, M: gl.constexpr, BN: gl.constexpr,
          STAGES: gl.constexpr):  # fmt: skip
    HALF: gl.constexpr = BN // 2
    acc = gl.zeros([64, HALF], gl.float32, M)
    acc2 = gl.zeros([64, HALF], gl.float32, M)
    none = gl.zeros([64, HALF], gl.float32, M)
    for _ in range(gl.cdiv(shape[6], 128)):
        mbarrier.wait(ring[2].index(stage), phase)
        fence_async_shared()
        a = ring[0].index(stage).slice(WG * 64, 64)
        part = warpgroup_mma(
            a, ring[1].index(stage).slice(0, HALF).permute((1, 0)), none, use_acc=False, is_async=True
        )
        part = warpgroup_mma_wait(0, deps=[part])
        acc += part
        part = warpgroup_mma(a, ring[1].index(stage).slice(HALF, HALF).permute((1, 0)), none, use_acc=False,
                             is_async=True)  # fmt: skip
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(ring[3].index(stage))
        acc2 += part
        stage, phase = following(stage, phase, STAGES)
    return acc, acc2, stage, phase


@gluon.jit
def _sums_of_blocks(ring, shape, to, how, m, e, place, there, stage, phase, WG: gl.constexpr, M: gl.constexpr,
                    BN: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Sums of products, each times its row's and its weights' scale. With a gate, of gate and up rows by turns."""
    HALF: gl.constexpr = BN // 2
    GATED: gl.constexpr = how[2]
    acc = gl.zeros([64, HALF], gl.float32, M)
    acc2 = gl.zeros([64, HALF], gl.float32, M)
    none = gl.zeros([64, HALF], gl.float32, M)
    blocks = gl.cdiv(shape[6], 128)
    row_blocks = gl.cdiv(shape[5], 128)
    x_row = gl.load(to[0] + place, there, other=0) // shape[7] if how[0] == 1 else place
    xp = to[1] + x_row.to(gl.int64) * blocks
    if GATED:  # BN kernel rows are BN / 2 of gate and as many of up
        first = m * HALF // 128
        second = row_blocks // 2 + first
    else:
        first = m * BN // 128
        second = gl.minimum((m * BN + HALF) // 128, row_blocks - 1)
    wp = to[2] + (e * row_blocks + first) * blocks
    wp2 = to[2] + (e * row_blocks + second) * blocks
    s = gl.load(xp, there, other=0.0)
    s1 = gl.load(wp)
    s2 = gl.load(wp2)
    for b in range(blocks):
        after = gl.minimum(b + 1, blocks - 1)
        later = gl.load(xp + after, there, other=0.0)
        later1 = gl.load(wp + after)
        later2 = gl.load(wp2 + after)
        mbarrier.wait(ring[2].index(stage), phase)
        fence_async_shared()
        a = ring[0].index(stage).slice(WG * 64, 64)
        part = warpgroup_mma(
            a, ring[1].index(stage).slice(0, HALF).permute((1, 0)), none, use_acc=False, is_async=True
        )
        part = warpgroup_mma_wait(0, deps=[part])
        acc += _scaled(part, s * s1, s * s2 if GATED else s * s1, GATED, HALF, M)
        part = warpgroup_mma(a, ring[1].index(stage).slice(HALF, HALF).permute((1, 0)), none, use_acc=False,
                             is_async=True)  # fmt: skip
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(ring[3].index(stage))
        acc2 += _scaled(part, s * s1 if GATED else s * s2, s * s2, GATED, HALF, M)
        s, s1, s2 = later, later1, later2
        stage, phase = following(stage, phase, STAGES)
    return acc, acc2, stage, phase


@gluon.jit
def _scaled(part, one, other, GATED: gl.constexpr, W: gl.constexpr, M: gl.constexpr):
    """part [64, W] times a scale of each row: one for the columns of gate, another for those of up."""
    if GATED:
        c = gl.arange(0, W, gl.SliceLayout(0, M))
        up = gl.expand_dims((c // 8) % 2 == 1, 0)
        return part * gl.where(up, gl.expand_dims(other, 1), gl.expand_dims(one, 1))
    else:
        return part * gl.expand_dims(one, 1)


@gluon.jit
def _write(acc, acc2, shape, to, how, m, e, place, there, M: gl.constexpr, BN: gl.constexpr):
    """Scales, bias, the activation of the first product, and out."""
    HALF: gl.constexpr = BN // 2
    if how[1] != G_BLOCKS:
        x_row = place
        if how[0] == 1 and how[1] == G_ROWS:
            x_row = gl.load(to[0] + place, there, other=0) // shape[7]
        s = gl.expand_dims(gl.load(to[1] + x_row, there, other=0.0), 1)
        acc *= s
        acc2 *= s
    v = _finished(acc, 0, shape, to, how, m, e, M, BN, HALF)
    v2 = _finished(acc2, HALF, shape, to, how, m, e, M, BN, HALF)
    W: gl.constexpr = HALF // 2 if how[2] else HALF
    pairs = place if how[0] == 1 else gl.load(to[0] + place, there, other=0)
    if how[8]:  # a scale for each 128 columns: with a gate, both halves are one
        most, most2 = gl.max(gl.abs(v), 1), gl.max(gl.abs(v2), 1)
        if how[2]:
            most = gl.maximum(most, most2)
            v = _quantized(v, most, m, place, there, to, gl.cdiv(shape[5] // 2, 128))
            v2 = _quantized(v2, most, m, place, there, to, gl.cdiv(shape[5] // 2, 128))
        else:
            v = _quantized(v, most, 2 * m, place, there, to, gl.cdiv(shape[5], 128))
            v2 = _quantized(v2, most2, 2 * m + 1, place, there & (m * BN + HALF < shape[5]), to,
                            gl.cdiv(shape[5], 128))  # fmt: skip
    first = m * (HALF if how[2] else BN)
    _store(v, first, shape, to, how, pairs, there, W)
    _store(v2, first + W, shape, to, how, pairs, there, W)


@gluon.jit
def _quantized(v, most, block, place, there, to, blocks):
    """v over its scale, which is written."""
    S: gl.constexpr = v.type.layout
    scale = gl.where(most == 0.0, 1.0, most / G_MOST)
    row = gl.convert_layout(place, gl.SliceLayout(1, S))
    ok = gl.convert_layout(there, gl.SliceLayout(1, S))
    gl.store(to[6] + row.to(gl.int64) * blocks + block, scale, ok)
    return v * gl.expand_dims(1.0 / scale, 1)


@gluon.jit
def _finished(acc, FIRST: gl.constexpr, shape, to, how, m, e, M: gl.constexpr, BN: gl.constexpr,
              W: gl.constexpr):  # fmt: skip
    """acc of kernel rows m · BN + FIRST on -> results of the product."""
    GATED: gl.constexpr = how[2]
    rows, padded = shape[5], shape[4]
    r = m * BN + FIRST + gl.arange(0, W, gl.SliceLayout(0, M))
    if GATED:
        j = r // 16 * 8 + r % 8
        real = j < rows // 2
        j = gl.where(r % 16 < 8, j, rows // 2 + j)
    else:
        j = r
        real = r < rows
    if how[1] != G_BLOCKS:
        acc *= gl.expand_dims(gl.load(to[2] + e.to(gl.int64) * padded + r, real, other=0.0), 0)
    if how[7]:
        acc += gl.expand_dims(gl.load(to[3] + e * rows + j, real, other=0.0).to(gl.float32), 0)
    if GATED:
        gate, up = gl.split(gl.permute(gl.reshape(acc, [64, W // 16, 2, 8]), (0, 1, 3, 2)))
        acc = gl.reshape(activate(gate, up, how[3], how[4], how[5], how[6]), [64, W // 2])
    elif how[0] == 1:
        acc = activate(acc, acc, how[3], how[4], how[5], how[6])
    return acc


@gluon.jit
def _store(v, first, shape, to, how, pairs, there, W: gl.constexpr):
    out = to[4]
    v = gl.convert_layout(v.to(out.dtype.element_ty), WIDE_ROWS)
    row = gl.convert_layout(pairs, gl.SliceLayout(1, WIDE_ROWS))
    ok = gl.convert_layout(there, gl.SliceLayout(1, WIDE_ROWS))
    j = first + gl.arange(0, W, gl.SliceLayout(0, WIDE_ROWS))
    real = j < (shape[5] // 2 if how[2] else shape[5])
    gl.store(out + row.to(gl.int64)[:, None] * to[5] + j[None, :], v, ok[:, None] & real[None, :])
