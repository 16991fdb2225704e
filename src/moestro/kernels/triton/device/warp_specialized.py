"""The product for many pairs of an expert on Hopper: weights are decoded while the tensor cores multiply.

In `gemm.py` each step loads, decodes, multiplies and waits. Here (Gluon, Triton's language of explicit layouts)
groups of four warps share the work and meet at barriers in shared memory:

- a producer copies codes, scales and rows of x into a ring of STAGES buffers, and never waits for a copy;
- one or two consumers, of 64 or 128 rows of weights each, decode one part of a stage while the tensor core
  multiplies another (`loops.py`).

Programs are persistent: the producer is in the next tile while the consumers write the last one. A tile has up to
BN + EXTRA pairs, EXTRA with a ring of their own (operands are powers of two wide): where each expert has about 256,
a tile of 288 saves half of them a second one. As in `gemm.py`, a tile of few pairs is narrower (LADDER 1: by quarters
of BN, 2: by half; and by half of EXTRA beside 64).

A partition ends with `exit`. Falling out of it would lead back to Triton's dispatch loop, and then ptxas no
longer sees which registers setmaxnreg gives, and serialises every wgmma (C7512).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from moestro.kernels.triton.device import common as device
from moestro.kernels.triton.device.loops import alone, following, one, two

async_copy, mbarrier, fence_async_shared = hopper.async_copy, hopper.mbarrier, hopper.fence_async_shared
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # 3.9, 3.6
activate = gluon.jit(device.activate.fn)
wait_for_previous = gluon.jit(device.wait_for_previous.fn)
launch_next = gluon.jit(device.launch_next.fn)

TURNED = gl.constexpr(gl.BlockedLayout([8, 1], [4, 8], [1, 4], [0, 1]))  # 8 rows of weights a thread


@gluon.jit(do_not_specialize=["stride"])
def wide_gemm(
    x, sorted_pairs, table, stride, w, w_scales, row_scale, bias, out,
    rows, columns, out_stride, K,
    STAGE: gl.constexpr, GATED: gl.constexpr, ACT: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    SHIFT: gl.constexpr, BIAS: gl.constexpr, EVEN: gl.constexpr, ODD: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, EXTRA: gl.constexpr, GROUPS: gl.constexpr, TURN: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, LADDER: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As gemm.moe_gemm with sorted pairs and NVFP4 weights; out by place (STAGE 1) or by pair, not weighted.

    ODD: the number of 64-column blocks is. GROUP tiles of pairs walk the strips of BM rows together.
    """
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, 64], gl.NVMMASharedLayout(128, 16, 2))
    ws = gl.allocate_shared_memory(gl.int16, [STAGES, BM, 16], gl.SwizzledSharedLayout(8, 4, 2, [1, 0]))
    ss = gl.allocate_shared_memory(gl.int32, [STAGES, BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if EXTRA > 0:
        xe = gl.allocate_shared_memory(gl.bfloat16, [STAGES, EXTRA, 64], gl.NVMMASharedLayout(128, 16, 2))
    else:
        xe = xs
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    wait_for_previous(PDL)
    launch_next(PDL)
    ring = (xs, ws, ss, full, empty, xe)
    row_blocks = gl.cdiv(rows // 2, 32) if GATED else gl.cdiv(rows, 64)
    shape = (table, stride, gl.load(table + 3 * stride), gl.cdiv(row_blocks * 64, BM), row_blocks, rows,
             columns, K)  # fmt: skip
    source = (x, w, w_scales, sorted_pairs)
    to = (sorted_pairs, row_scale, bias, out, out_stride)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_consume, (ring, shape, to, (STAGE, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS), 0, ODD, BM, BN,
                            EXTRA, GROUPS, STAGES, GROUP, LADDER)),
                (_produce, (ring, shape, source, STAGE, EVEN, BM, BN, EXTRA, TURN, STAGES, GROUP)),
            ],
            [4],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (ring, shape, to, (STAGE, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS), 0, ODD, BM, BN,
                            EXTRA, GROUPS, STAGES, GROUP, LADDER)),
                (_consume, (ring, shape, to, (STAGE, GATED, ACT, ALPHA, LIMIT, SHIFT, BIAS), 1, ODD, BM, BN,
                            EXTRA, GROUPS, STAGES, GROUP, LADDER)),
                (_produce, (ring, shape, source, STAGE, EVEN, BM, BN, EXTRA, TURN, STAGES, GROUP)),
            ],
            [4, 4],
            [REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


@gluon.jit
def _exit(x):
    gl.inline_asm_elementwise("exit;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _zero(x):
    """0, but the compiler does not know: what is added to it is computed in this tile, not kept for all."""
    return 64 * gl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _total(shape, GROUP: gl.constexpr):
    return gl.cdiv(shape[2], GROUP) * GROUP * shape[3]


@gluon.jit
def _tile(shape, tile, GROUP: gl.constexpr):
    """(strip of rows, expert, first place, pairs up to the end of the expert; 0 where there is no tile)."""
    table, stride, tiles, strips = shape[0], shape[1], shape[2], shape[3]
    walk = GROUP * strips
    t = tile // walk * GROUP + tile % GROUP
    works = t < tiles
    start = gl.load(table + stride + t, works, other=0)
    end = gl.load(table + 2 * stride + t, works, other=0)
    return tile % walk // GROUP, gl.load(table + t, works, other=0), start, end - start


@gluon.jit
def _produce(ring, shape, source, STAGE: gl.constexpr, EVEN: gl.constexpr,
             BM: gl.constexpr, BN: gl.constexpr, EXTRA: gl.constexpr, TURN: gl.constexpr,
             STAGES: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """Fill the ring, tile after tile."""
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), _total(shape, GROUP), gl.num_programs(0)):
        m, e, start, count = _tile(shape, tile, GROUP)
        if TURN > 1 and count > 0 and count <= BN // 2:
            stage, phase = _fill(ring, shape, source, m, e, start, count, stage, phase, STAGE,
                                 EVEN, BM, BN // 2, 0, TURN, STAGES)  # fmt: skip
        elif EXTRA > 16 and BN < 128 and count > BN and count <= BN + EXTRA // 2:
            stage, phase = _fill(ring, shape, source, m, e, start, count, stage, phase, STAGE,
                                 EVEN, BM, BN, EXTRA // 2, TURN, STAGES)  # fmt: skip
        elif EXTRA > 0 and count > BN:
            stage, phase = _fill(ring, shape, source, m, e, start, count, stage, phase, STAGE,
                                 EVEN, BM, BN, EXTRA, TURN, STAGES)  # fmt: skip
        elif count > 0:
            stage, phase = _fill(ring, shape, source, m, e, start, count, stage, phase, STAGE,
                                 EVEN, BM, BN, 0, TURN, STAGES)  # fmt: skip
    _exit(stage)


@gluon.jit
def _fill(ring, shape, source, m, e, start, count, stage, phase, STAGE: gl.constexpr,
          EVEN: gl.constexpr, BM: gl.constexpr, W: gl.constexpr, W2: gl.constexpr, TURN: gl.constexpr,
          STAGES: gl.constexpr):  # fmt: skip
    """One tile, 64 columns a stage.

    Several stages a TURN share the arithmetic of addresses; then rows that are not there are not masked out
    either: the last one is copied again.
    """
    xs, ws, ss, full, empty, xe = ring
    x, w, w_scales = source[0], source[1], source[2]
    row_blocks, columns = shape[4], shape[6]
    XL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    WL: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    i = gl.arange(0, W, gl.SliceLayout(1, XL))
    k = gl.arange(0, 64, gl.SliceLayout(0, XL))
    r = gl.arange(0, BM, gl.SliceLayout(1, WL))
    c = gl.arange(0, 16, gl.SliceLayout(0, WL))
    s = gl.arange(0, BM, gl.BlockedLayout([4], [32], [4], [0]))
    blocks = gl.cdiv(columns, 64)
    strip = e.to(gl.int64) * row_blocks
    strip_w = strip + gl.minimum(m * (BM // 64) + r // 64, row_blocks - 1)
    strip_s = strip + gl.minimum(m * (BM // 64) + s // 64, row_blocks - 1)
    xp = x + _rows(source, shape, start, count, i, STAGE)[:, None] * columns + k[None, :]
    if W2 > 0:
        i2 = W + gl.arange(0, W2, gl.SliceLayout(1, XL))
        xp2 = x + _rows(source, shape, start, count, i2, STAGE)[:, None] * columns + k[None, :]
    wp = w + (strip_w * (blocks * 1024) + r % 64 * 16)[:, None] + c[None, :]
    sp = w_scales + strip_s * (blocks * 64) + s % 64
    for first in range(0, blocks, TURN):
        for u in gl.static_range(TURN):
            if TURN == 1 or first + u < blocks:
                ahead = first if TURN == 1 else u
                mbarrier.wait(empty.index(stage), phase)
                if EVEN and TURN > 1:
                    copy_async(xs.index(stage).slice(0, W), xp + ahead * 64)
                    if W2 > 0:
                        copy_async(xe.index(stage).slice(0, W2), xp2 + ahead * 64)
                else:
                    mask = (i < count)[:, None]
                    if not EVEN:
                        mask = mask & (k[None, :] < columns - (first + u) * 64)
                    copy_async(xs.index(stage).slice(0, W), xp + ahead * 64, mask)
                    if W2 > 0:
                        mask2 = (i2 < count)[:, None]
                        if not EVEN:
                            mask2 = mask2 & (k[None, :] < columns - (first + u) * 64)
                        copy_async(xe.index(stage).slice(0, W2), xp2 + ahead * 64, mask2)
                copy_async(ws.index(stage), wp + ahead * 1024)
                copy_async(ss.index(stage), sp + ahead * 64)
                async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
                stage, phase = following(stage, phase, STAGES)
        if TURN > 1:
            xp += TURN * 64
            if W2 > 0:
                xp2 += TURN * 64
            wp += TURN * 1024
            sp += TURN * 64
    return stage, phase


@gluon.jit
def _rows(source, shape, start, count, i, STAGE: gl.constexpr):
    """Rows of x (int64) of a tile's columns i; beyond the last, the last again."""
    row = start + gl.minimum(i, count - 1)
    if STAGE == 1:
        row = gl.load(source[3] + row)
        row = row // shape[7]  # top_k
    return row.to(gl.int64)


@gluon.jit
def _consume(ring, shape, to, how, WG: gl.constexpr, ODD: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
             EXTRA: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
             LADDER: gl.constexpr):  # fmt: skip
    """Multiply and write the rows of this group, tile after tile."""
    Q: gl.constexpr = BN // 4
    PARTS: gl.constexpr = BM // GROUPS // 64
    ROW: gl.constexpr = WG * PARTS * 64
    stage = 0
    phase = 0
    m, e, start, count = _tile(shape, gl.program_id(0), GROUP)
    for tile in range(gl.program_id(0), _total(shape, GROUP), gl.num_programs(0)):
        later = _tile(shape, tile + gl.num_programs(0), GROUP)
        at = (m * BM + ROW, e, start, count, _zero(count))
        if count > 0:
            if LADDER == 1 and count <= Q:
                stage, phase = _run(ring, shape, to, how, at, stage, phase, ROW, ODD, PARTS, Q, 0, STAGES)
            elif LADDER > 0 and count <= 2 * Q:
                stage, phase = _run(ring, shape, to, how, at, stage, phase, ROW, ODD, PARTS, 2 * Q, 0, STAGES)
            elif LADDER == 1 and count <= 3 * Q:
                stage, phase = _run(ring, shape, to, how, at, stage, phase, ROW, ODD, PARTS, 2 * Q, Q, STAGES)
            elif EXTRA > 16 and BN < 128 and count > BN and count <= BN + EXTRA // 2:
                stage, phase = _run(
                    ring, shape, to, how, at, stage, phase, ROW, ODD, PARTS, BN, EXTRA // 2, STAGES
                )
            elif EXTRA > 0 and count > BN:
                stage, phase = _run(
                    ring, shape, to, how, at, stage, phase, ROW, ODD, PARTS, BN, EXTRA, STAGES
                )
            else:
                stage, phase = _run(ring, shape, to, how, at, stage, phase, ROW, ODD, PARTS, BN, 0, STAGES)
        m, e, start, count = later
    _exit(stage)


@gluon.jit
def _run(ring, shape, to, how, at, stage, phase, ROW: gl.constexpr, ODD: gl.constexpr, PARTS: gl.constexpr,
         W: gl.constexpr, W2: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """One tile: W columns, and W2 more where that is not 0 (operands are powers of two wide)."""
    HAS2: gl.constexpr = W2 > 0
    V2: gl.constexpr = W2 if HAS2 else 16
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W, 16])
    M2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V2, 16])
    r = at[0] + (gl.arange(0, 64, gl.SliceLayout(1, M)) + at[4])
    upper = _of_rows(to, how, at[1], r, shape[5])
    pairs = _pairs(to, how, at, 0, W)
    pairs2 = _pairs(to, how, at, W, V2)
    blocks = gl.cdiv(shape[6], 64)
    if PARTS == 1 and W + W2 > 256:
        acc, acc2, stage, phase = alone(ring, stage, phase, blocks, ROW, M, M2, W, W2, V2, STAGES)
    elif PARTS == 1:
        acc, acc2, stage, phase = one(ring, stage, phase, blocks, ROW, ODD, M, M2, W, W2, V2, STAGES)
    else:
        lower = _of_rows(to, how, at[1], r + 64, shape[5])
        acc, acc2, accb, accb2, stage, phase = two(ring, stage, phase, blocks, ROW, M, M2, W, W2, V2, STAGES)
        _finish(accb, lower, to, how, at[0] + 64, at, pairs, shape, W, M)
        if HAS2:
            _finish(accb2, lower, to, how, at[0] + 64, at, pairs2, shape, W2, M2)
    _finish(acc, upper, to, how, at[0], at, pairs, shape, W, M)
    if HAS2:
        _finish(acc2, upper, to, how, at[0], at, pairs2, shape, W2, M2)
    return stage, phase


@gluon.jit
def _of_rows(to, how, e, r, rows):
    """(scale, bias) of kernel rows r: asked for before the loop, which hides their way from memory."""
    if how[1]:  # gated
        j = r // 16 * 8 + r % 8
        real = j < rows // 2
        j = gl.where(r % 16 < 8, j, rows // 2 + j)
        padded = gl.cdiv(rows // 2, 32) * 64
    else:
        j = r
        real = r < rows
        padded = gl.cdiv(rows, 64) * 64
    scale = gl.load(to[1] + e.to(gl.int64) * padded + r, real, other=0.0)
    if how[6]:  # with biases
        return scale, gl.load(to[2] + e * rows + j, real, other=0.0).to(gl.float32)
    else:
        return scale, scale


@gluon.jit
def _pairs(to, how, at, FIRST: gl.constexpr, W: gl.constexpr):
    """Rows of out of W columns from FIRST, as threads will write them; -1 where there is none."""
    i = gl.arange(0, W, gl.SliceLayout(0, TURNED)) + at[4] + FIRST
    if how[0] == 1:  # the first product writes by place
        return gl.where(i < at[3], at[2] + i, -1)
    else:
        return gl.load(to[0] + at[2] + i, i < at[3], other=-1)


@gluon.jit
def _finish(acc, of_rows, to, how, row, at, pairs, shape, W: gl.constexpr, M: gl.constexpr):
    """Scales, bias, the activation of the first product, and out."""
    out, out_stride = to[3], to[4]
    STAGE: gl.constexpr = how[0]
    GATED: gl.constexpr = how[1]
    BIAS: gl.constexpr = how[6]
    scale, shift = of_rows
    acc *= gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, M)), 1)
    if BIAS:
        acc += gl.expand_dims(gl.convert_layout(shift, gl.SliceLayout(1, M)), 1)
    if GATED:
        gate, up = gl.split(gl.permute(gl.reshape(acc, [4, 2, 8, W]), (0, 2, 3, 1)))
        acc = gl.reshape(activate(gate, up, how[2], how[3], how[4], how[5]), [32, W])
        j = row // 2 + (gl.arange(0, 32, gl.SliceLayout(1, TURNED)) + at[4])
        real = j < shape[5] // 2
    else:
        if STAGE == 1:
            acc = activate(acc, acc, how[2], how[3], how[4], how[5])
        j = row + (gl.arange(0, 64, gl.SliceLayout(1, TURNED)) + at[4])
        real = j < shape[5]
    v = gl.convert_layout(acc.to(out.dtype.element_ty), TURNED)
    to_row = pairs.to(gl.int64) * out_stride
    gl.store(out + to_row[None, :] + j[:, None], v, (pairs >= 0)[None, :] & real[:, None])
