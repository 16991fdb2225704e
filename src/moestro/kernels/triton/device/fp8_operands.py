"""Operands and sums of fp8_registers.py: 64 rows of 4-bit weights at a time, decoded into the registers that a wgmma reads.

A thread q of four owns columns 32 q .. 32 q + 31 of a block of 128: eight words and a pair of scales as they lie in
memory. A wgmma of 32 columns wants four columns 4 q and four 16 + 4 q of each row from it, so the columns of a block
are taken in another order: place 32 s + 16 h + 4 q + j is column 32 q + 8 s + 4 h + j. `quantize_fp8` writes x in
that order (Recipe.turned), a row as whole blocks. The arithmetic that decodes is fp8_decode.py's.

As in fp8.py, each 128 columns are a product of their own, added in float32 registers, in parts of 64 pairs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from moestro.kernels.triton.device.fp8 import fence_async_shared, mbarrier
from moestro.kernels.triton.device.loops import following

warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait
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


@gluon.constexpr_function
def of_part(pairs):
    """The layout of a product [64, pairs]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, pairs, 32])


@gluon.jit
def _operand(ring, stage, ROW: gl.constexpr):
    """64 rows of the stage's weights as int32 [64, 32]: four e4m3 each, of columns 4 c .. 4 c + 3.

    As bytes they would be taken apart where a loop carries them.
    """
    w = ring.w.index(stage).slice(ROW, 64).load(CODES)
    s = ring.scales.index(stage).slice(ROW, 64).load(PAIRS_OF_SCALES).to(gl.int32)
    low, high, low2, high2 = _tables(s)
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
def _tables(s):
    """fp8_decode._table of both scales of a pair, of two rows at once: 24 instructions where that takes 42.

    A byte's low three bits are its mantissa, of which 1 to 5 times 1.5 is 5 more in the byte, and 0, 6 and 7 are 4 more:
    those are m + 7 >= 8 and m + 2 < 8. A `prmt` by 8 + i gives the sign of byte i, which is 0.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 w, m, n, x;
        prmt.b32 w, $8, $9, 0x5410;
        and.b32 m, w, 0x07070707; add.u32 n, m, 0x02020202; add.u32 m, m, 0x07070707;
        lop3.b32 m, m, n, 0x08080808, 0x20; shr.u32 m, m, 3; add.u32 x, w, m;
        prmt.b32 $0, w, x, 0x4008; prmt.b32 $2, w, x, 0x4040; prmt.b32 $4, w, x, 0x5119; prmt.b32 $6, w, x, 0x5151;
        prmt.b32 $1, w, x, 0x622A; prmt.b32 $3, w, x, 0x6262; prmt.b32 $5, w, x, 0x733B; prmt.b32 $7, w, x, 0x7373;
        add.u32 $0, $0, 0x03fff800; add.u32 $1, $1, 0x03fff800; add.u32 $4, $4, 0x03fff800; add.u32 $5, $5, 0x03fff800;
        add.u32 $2, $2, 0x14100c08; add.u32 $3, $3, 0x14100c08; add.u32 $6, $6, 0x14100c08; add.u32 $7, $7, 0x14100c08;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
        [s],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=2,
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
def _product(a, ring, stage, over, never, FIRST: gl.constexpr, P: gl.constexpr):
    """Start a @ x of P pairs from FIRST on; those beyond the first part of the ring are in its second.

    over: an added product whose registers this one writes: a condition that only we know to be false keeps ptxas from
    starting it in registers of its own before that one is added, which cost 32 registers more and spilt in the loop.
    """
    BN: gl.constexpr = ring.x.shape[1]
    M: gl.constexpr = of_part(P)
    a = gl.convert_layout(_bytes(a), gl.DotOperandLayout(0, M, 4))
    if FIRST < BN:
        b = ring.x.index(stage).slice(FIRST, P).permute((1, 0))
    else:
        b = ring.more_x.index(stage).slice(FIRST - BN, P).permute((1, 0))
    if over is None:
        return warpgroup_mma(a, b, gl.zeros([64, P], gl.float32, M), use_acc=False, is_async=True)
    else:
        return warpgroup_mma(a, b, over, use_acc=never, is_async=True)


@gluon.jit
def _arrived(ring, stage, phase):
    """A stage, once it is there; cp.async, which wrote it, is of another proxy than wgmma."""
    mbarrier.wait(ring.full.index(stage), phase)
    fence_async_shared()


# --- sums -------------------------------------------------------------------------------------------------------------
# A block is multiplied in parts of PART pairs. Where there are several, two products are under way: while one's results are
# added, the tensor core works on the other. A part of 64 pairs is 32 registers and 128 cycles of it. The next operand is
# decoded beside a block's last part, when the others' registers are free again.


@gluon.jit
def no_sums(W: gl.constexpr, W2: gl.constexpr, PART: gl.constexpr):
    """Zeros for the sums of each part of W pairs, one after the other, and of the W2 pairs beyond."""
    P: gl.constexpr = W if W < PART else PART
    acc = ()
    for _ in gl.static_range(W // P):
        acc = acc + (gl.zeros([64, P], gl.float32, of_part(P)),)  # type: ignore[assignment]  # noqa: RUF005
    if W2 > 0:
        acc = acc + (gl.zeros([64, W2], gl.float32, of_part(W2)),)  # type: ignore[assignment]  # noqa: RUF005
    return acc


@gluon.jit
def _started(acc, a, ring, stage, never, spare, W: gl.constexpr, W2: gl.constexpr, PART: gl.constexpr):
    """(sums of all parts but the last, the parts before it, the last, which is under way).

    spare: added parts of the rows above, in whose place the first ones are written.
    """
    P: gl.constexpr = W if W < PART else PART
    part = _product(a, ring, stage, spare[0] if len(spare) > 0 else None, never, 0, P)
    sums = ()
    added = ()
    for i in gl.static_range(1, W // P):
        if P > 64:  # registers for one product at a time
            part = warpgroup_mma_wait(0, deps=[part])
            sums = sums + (acc[i - 1] + part,)  # type: ignore[assignment]  # noqa: RUF005
            part = _product(a, ring, stage, part, never, i * P, P)
        else:
            over = added[i - 2] if i > 1 else spare[1] if len(spare) > 1 else None
            later = _product(a, ring, stage, over, never, i * P, P)
            part = warpgroup_mma_wait(1, deps=[part])
            sums = sums + (acc[i - 1] + part,)  # type: ignore[assignment]  # noqa: RUF005
            added = added + (part,)  # type: ignore[assignment]  # noqa: RUF005
            part = later
    if W2 > 0:
        over = spare[1] if len(spare) > 1 and W == P else added[W // P - 2] if W > P and W2 == P else None
        later = _product(a, ring, stage, over, never, W, W2)
        part = warpgroup_mma_wait(1, deps=[part])
        sums = sums + (acc[W // P - 1] + part,)  # type: ignore[assignment]  # noqa: RUF005
        added = added + (part,)  # type: ignore[assignment]  # noqa: RUF005
        part = later
    return sums, added, part


@gluon.jit
def _ended(acc, sums, part, a, W: gl.constexpr, W2: gl.constexpr, PART: gl.constexpr):
    """(all sums, the last part), once nothing reads the operand any more."""
    P: gl.constexpr = W if W < PART else PART
    LAST: gl.constexpr = W // P - 1 + (1 if W2 > 0 else 0)
    part, a = warpgroup_mma_wait(0, deps=[part, a])
    return sums + (acc[LAST] + part,), part  # noqa: RUF005


@gluon.jit
def _with_below(
    acc, a, ring, stage, never, ROW: gl.constexpr, W: gl.constexpr, W2: gl.constexpr, TILE: gl.constexpr
):
    """(`_ended`'s sums, the operand of rows ROW, the parts to write over)."""
    sums, added, part = _started(acc, a, ring, stage, never, (), W, W2, TILE.part)
    b = _operand(ring, stage, ROW)
    acc, part = _ended(acc, sums, part, a, W, W2, TILE.part)
    return acc, b, added + (part,)  # noqa: RUF005


@gluon.jit
def _last(acc, a, ring, stage, never, spare, W: gl.constexpr, W2: gl.constexpr, TILE: gl.constexpr):
    """A stage's last products added; then it is empty."""
    sums, _, part = _started(acc, a, ring, stage, never, spare, W, W2, TILE.part)
    acc, _ = _ended(acc, sums, part, a, W, W2, TILE.part)
    mbarrier.arrive(ring.empty.index(stage))
    return acc


@gluon.jit
def sums_of_64(ring, stage, phase, blocks, never, acc, ROW: gl.constexpr, W: gl.constexpr, W2: gl.constexpr,
               TILE: gl.constexpr):  # fmt: skip
    """Sums of 64 rows of weights from ROW on, over all stages of a tile."""
    for _ in range(blocks):
        _arrived(ring, stage, phase)
        a = _operand(ring, stage, ROW)
        acc = _last(acc, a, ring, stage, never, (), W, W2, TILE)
        stage, phase = following(stage, phase, TILE.stages)
    return acc, stage, phase


@gluon.jit
def sums_of_128(ring, stage, phase, blocks, never, acc, below, ROW: gl.constexpr,
                W: gl.constexpr, W2: gl.constexpr, TILE: gl.constexpr):  # fmt: skip
    """As `sums_of_64`, and of the 64 rows below."""
    for _ in range(blocks):
        _arrived(ring, stage, phase)
        a = _operand(ring, stage, ROW)
        acc, b, spare = _with_below(acc, a, ring, stage, never, ROW + 64, W, W2, TILE)
        below = _last(below, b, ring, stage, never, spare, W, W2, TILE)
        stage, phase = following(stage, phase, TILE.stages)
    return acc, below, stage, phase


@gluon.jit
def overlapped(ring, stage, phase, blocks, never, acc, below, ROW: gl.constexpr,
               W: gl.constexpr, W2: gl.constexpr, TILE: gl.constexpr):  # fmt: skip
    """`sums_of_128`, where the next stage's operand is decoded ahead, beside the last part."""
    _arrived(ring, stage, phase)
    a = _operand(ring, stage, ROW)
    for _ in range(1, blocks):
        acc, b, spare = _with_below(acc, a, ring, stage, never, ROW + 64, W, W2, TILE)
        after, turned = following(stage, phase, TILE.stages)
        sums, _, part = _started(below, b, ring, stage, never, spare, W, W2, TILE.part)
        _arrived(ring, after, turned)
        a = _operand(ring, after, ROW)
        below, _ = _ended(below, sums, part, b, W, W2, TILE.part)
        mbarrier.arrive(ring.empty.index(stage))
        stage = after
        phase = turned
    acc, b, spare = _with_below(acc, a, ring, stage, never, ROW + 64, W, W2, TILE)
    below = _last(below, b, ring, stage, never, spare, W, W2, TILE)
    stage, phase = following(stage, phase, TILE.stages)
    return acc, below, stage, phase
