"""4-bit weights and e4m3 activations, decoded in registers: weights are a wgmma's A operand, pairs its B operand.

The structure is warp_specialized.py's: a producer copies codes, scales and rows of x into a ring, 128 columns a stage;
one or two consumers decode 64 rows of weights at a time into e4m3 registers and multiply. Nothing decoded passes
through shared memory, and the layout is fp8_decode.py's (fp8_layout.TritonFP4), whose arithmetic decodes here too.

A thread q of four owns columns 32 q .. 32 q + 31 of a block of 128: eight words and a pair of scales as they lie in
memory. A wgmma of 32 columns wants four columns 4 q and four 16 + 4 q of each row from it, so the columns of a block
are taken in another order: place 32 s + 16 h + 4 q + j is column 32 q + 8 s + 4 h + j. `quantize_fp8` writes x in
that order (Recipe.turned), a row as whole blocks.

As in fp8.py, each 128 columns are a product of their own, added in float32 registers, `piece` pairs at a time.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from moestro.kernels.triton.device.fp8 import async_copy, copy_async, fence_async_shared, mbarrier
from moestro.kernels.triton.device.fp8_decode import _table
from moestro.kernels.triton.device.loops import Ring, following
from moestro.kernels.triton.device.warp_specialized import (
    Call,
    Spot,
    _epilogue,
    _exit,
    _of_rows,
    _pairs,
    _results,
    _rows,
    _tile,
    _total,
    _zero,
    launch_next,
    wait_for_previous,
)

warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait
WHOLE, HALVES, QUARTERS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)  # what a tile of few pairs runs
# of 64 rows: eight words of rows lane / 4 and lane / 4 + 8 a thread, and their pairs of scales
CODES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 32],
    )
)
PAIRS_OF_SCALES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
)


class Grid(NamedTuple):
    """Constants of a tile."""

    rows: int  # of weights
    pairs: int  # a power of two
    extra: int  # pairs beyond that
    piece: int  # pairs of one product
    consumers: int
    turn: int  # stages that the producer fills in one go
    stages: int
    group: int  # tiles of pairs that walk the strips of rows together
    narrow: int
    overlap: bool  # operands are decoded while the ones before them are multiplied
    registers: int  # of a consumer's thread
    producer_registers: int


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
    """One tile: W pairs, `piece` at a time, and W2 more where that is not 0."""
    P: gl.constexpr = W if W < TILE.piece else TILE.piece
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 32])
    PARTS: gl.constexpr = TILE.rows // TILE.consumers // 64
    r = at.row + (gl.arange(0, 64, gl.SliceLayout(1, M)) + at.zero)
    upper = _of_rows(call, at.expert, r, HOW)
    blocks = gl.cdiv(call.size.columns, 128)
    acc = _nothing(W, W2, P, M)
    if PARTS == 1 and TILE.overlap:
        acc, stage, phase = _overlapped_64(ring, stage, phase, blocks, acc, ROW, W, W2, P, TILE.stages)
    elif PARTS == 1:
        acc, stage, phase = _sums_of_64(ring, stage, phase, blocks, acc, ROW, W, W2, P, TILE.stages)
    else:
        lower = _of_rows(call, at.expert, r + 64, HOW)
        below = _nothing(W, W2, P, M)
        if TILE.overlap:
            acc, below, stage, phase = _overlapped_128(
                ring, stage, phase, blocks, acc, below, ROW, W, W2, P, TILE.stages
            )
        else:
            acc, below, stage, phase = _sums_of_128(
                ring, stage, phase, blocks, acc, below, ROW, W, W2, P, TILE.stages
            )
        _write(below, lower, call, at, at.row + 64, HOW, W, W2, P, M)
    _write(acc, upper, call, at, at.row, HOW, W, W2, P, M)
    return stage, phase


@gluon.jit
def _nothing(W: gl.constexpr, W2: gl.constexpr, P: gl.constexpr, M: gl.constexpr):
    """Zeros for the sums of each piece, one after the other, and of the W2 pairs beyond."""
    acc = ()
    for _ in gl.static_range(W // P):
        acc = acc + (gl.zeros([64, P], gl.float32, M),)  # noqa: RUF005
    if W2 > 0:
        M2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W2, 32])
        acc = acc + (gl.zeros([64, W2], gl.float32, M2),)  # noqa: RUF005
    return acc


@gluon.jit
def _operand(ring, stage, ROW: gl.constexpr):
    """64 rows of the stage's weights as int32 [64, 32]: four e4m3 each, of columns 4 c .. 4 c + 3.

    As bytes they would be taken apart where a loop carries them.
    """
    w = ring.w.index(stage).slice(ROW, 64).load(CODES)
    s = ring.scales.index(stage).slice(ROW, 64).load(PAIRS_OF_SCALES).to(gl.int32)
    low, high = _table(s & 255)
    low2, high2 = _table((s >> 8) & 255)
    return gl.inline_asm_elementwise(
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
        [w, _of_words(low, low2), _of_words(high, high2)],
        dtype=gl.int32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _bytes(a):
    """`_operand` as e4m3 [64, 128], columns in their order of products; no instruction."""
    a0, a1, a2, a3 = gl.inline_asm_elementwise(
        "mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;",
        "=r,=r,=r,=r,r,r,r,r",
        [a],
        dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )
    a = gl.join(gl.join(a0, a2), gl.join(a1, a3))  # [64, 32, 2, 2]: four columns = 2 * third + last
    a = gl.permute(gl.reshape(a, [64, 4, 2, 4, 2, 2]), (0, 2, 4, 5, 1, 3))
    return gl.reshape(a, [64, 128]).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _of_words(even, odd):
    """[64, 4] of even and odd groups of 16 -> [64, 32]: for each word its group's."""
    both = gl.join(even, odd)
    both = gl.join(both, both)
    return gl.convert_layout(gl.reshape(gl.join(both, both), [64, 32]), CODES)


@gluon.jit
def _product(a, ring, stage, FIRST: gl.constexpr, P: gl.constexpr):
    """Start a @ x of P pairs from FIRST on; those beyond the first part of the ring are in its second."""
    BN: gl.constexpr = ring.x.shape[1]
    M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 32])
    a = gl.convert_layout(_bytes(a), gl.DotOperandLayout(0, M, 4))
    if FIRST < BN:
        b = ring.x.index(stage).slice(FIRST, P).permute((1, 0))
    else:
        b = ring.more_x.index(stage).slice(FIRST - BN, P).permute((1, 0))
    return warpgroup_mma(a, b, gl.zeros([64, P], gl.float32, M), use_acc=False, is_async=True)


@gluon.jit
def _arrived(ring, stage, phase):
    """A stage, once it is there; cp.async, which wrote it, is of another proxy than wgmma."""
    mbarrier.wait(ring.full.index(stage), phase)
    fence_async_shared()


@gluon.jit
def _added(acc, a, ring, stage, W: gl.constexpr, W2: gl.constexpr, P: gl.constexpr):
    """Sums of all pieces, and a stage's products."""
    part = _product(a, ring, stage, 0, P)
    return _rest(acc, part, a, ring, stage, W, W2, P)


@gluon.jit
def _step(acc, a, ring, stage, after, phase, ROW: gl.constexpr, WAIT: gl.constexpr, W: gl.constexpr,
          W2: gl.constexpr, P: gl.constexpr):  # fmt: skip
    """`_added`, and the next operand, rows ROW of stage `after`, which is decoded while the first product runs."""
    part = _product(a, ring, stage, 0, P)
    if WAIT:
        _arrived(ring, after, phase)
    b = _operand(ring, after, ROW)
    return _rest(acc, part, a, ring, stage, W, W2, P), b


@gluon.jit
def _rest(acc, part, a, ring, stage, W: gl.constexpr, W2: gl.constexpr, P: gl.constexpr):
    """Sums of all pieces, the first of whose products runs: `part`."""
    part, a = warpgroup_mma_wait(0, deps=[part, a])
    more = (acc[0] + part,)
    for i in gl.static_range(1, W // P):
        part = _product(a, ring, stage, i * P, P)
        part, a = warpgroup_mma_wait(0, deps=[part, a])
        more = more + (acc[i] + part,)  # noqa: RUF005
    if W2 > 0:
        part = _product(a, ring, stage, W, W2)
        part, a = warpgroup_mma_wait(0, deps=[part, a])
        more = more + (acc[W // P] + part,)  # noqa: RUF005
    return more


@gluon.jit
def _sums_of_64(ring, stage, phase, blocks, acc, ROW: gl.constexpr, W: gl.constexpr, W2: gl.constexpr,
                P: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    for _ in range(blocks):
        _arrived(ring, stage, phase)
        a = _operand(ring, stage, ROW)
        acc = _added(acc, a, ring, stage, W, W2, P)
        mbarrier.arrive(ring.empty.index(stage))
        stage, phase = following(stage, phase, STAGES)
    return acc, stage, phase


@gluon.jit
def _sums_of_128(ring, stage, phase, blocks, acc, below, ROW: gl.constexpr, W: gl.constexpr, W2: gl.constexpr,
                 P: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    for _ in range(blocks):
        _arrived(ring, stage, phase)
        a = _operand(ring, stage, ROW)
        acc = _added(acc, a, ring, stage, W, W2, P)
        a = _operand(ring, stage, ROW + 64)
        below = _added(below, a, ring, stage, W, W2, P)
        mbarrier.arrive(ring.empty.index(stage))
        stage, phase = following(stage, phase, STAGES)
    return acc, below, stage, phase


@gluon.jit
def _overlapped_64(ring, stage, phase, blocks, acc, ROW: gl.constexpr, W: gl.constexpr, W2: gl.constexpr,
                   P: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """`_sums_of_64`, where each operand is decoded while the one before it is multiplied; two take turns."""
    _arrived(ring, stage, phase)
    a = _operand(ring, stage, ROW)
    for _ in range((blocks - 1) // 2):
        after, turned = following(stage, phase, STAGES)
        acc, b = _step(acc, a, ring, stage, after, turned, ROW, True, W, W2, P)
        mbarrier.arrive(ring.empty.index(stage))
        stage, phase = following(after, turned, STAGES)
        acc, a = _step(acc, b, ring, after, stage, phase, ROW, True, W, W2, P)
        mbarrier.arrive(ring.empty.index(after))
    if blocks % 2 == 0:
        after, turned = following(stage, phase, STAGES)
        acc, a = _step(acc, a, ring, stage, after, turned, ROW, True, W, W2, P)
        mbarrier.arrive(ring.empty.index(stage))
        stage = after
        phase = turned
    acc = _added(acc, a, ring, stage, W, W2, P)
    mbarrier.arrive(ring.empty.index(stage))
    stage, phase = following(stage, phase, STAGES)
    return acc, stage, phase


@gluon.jit
def _overlapped_128(ring, stage, phase, blocks, acc, below, ROW: gl.constexpr, W: gl.constexpr, W2: gl.constexpr,
                    P: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """`_sums_of_128`, where each operand is decoded while the one before it is multiplied."""
    _arrived(ring, stage, phase)
    a = _operand(ring, stage, ROW)
    for _ in range(1, blocks):
        acc, b = _step(acc, a, ring, stage, stage, phase, ROW + 64, False, W, W2, P)
        after, turned = following(stage, phase, STAGES)
        below, a = _step(below, b, ring, stage, after, turned, ROW, True, W, W2, P)
        mbarrier.arrive(ring.empty.index(stage))
        stage = after
        phase = turned
    acc, b = _step(acc, a, ring, stage, stage, phase, ROW + 64, False, W, W2, P)
    below = _added(below, b, ring, stage, W, W2, P)
    mbarrier.arrive(ring.empty.index(stage))
    stage, phase = following(stage, phase, STAGES)
    return acc, below, stage, phase


# --- the end of a tile ------------------------------------------------------------------------------------------------


@gluon.jit
def _write(acc, of_rows, call, at, row, HOW: gl.constexpr, W: gl.constexpr, W2: gl.constexpr, P: gl.constexpr,
           M: gl.constexpr):  # fmt: skip
    """All pieces of 64 rows, times the scales of their rows of x, to out."""
    for i in gl.static_range(W // P):
        _write_piece(acc[i], of_rows, call, at, row, HOW, i * P, P, M)
    if W2 > 0:
        M2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W2, 32])
        _write_piece(acc[W // P], of_rows, call, at, row, HOW, W, W2, M2)


@gluon.jit
def _write_piece(acc, of_rows, call, at, row, HOW: gl.constexpr, FIRST: gl.constexpr, P: gl.constexpr,
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
