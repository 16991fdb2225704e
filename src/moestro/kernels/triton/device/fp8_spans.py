"""Sums of fp8_registers.py that stay in the tensor core for a span of several blocks of 128 columns, then go to float32.

Hopper's FP8 products keep about 14 bits of the sums they add to, and lose more the more they add; but an addition into
float32 is an instruction for each 32 sums, which costs the tensor core a cycle. A span of 4 blocks is a quarter of the
additions (docs/numerics.md has the errors). A consumer keeps both, sums and product, so its tiles are at most 192 pairs
for 64 rows.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from moestro.kernels.triton.device.fp8 import mbarrier
from moestro.kernels.triton.device.fp8_operands import (
    CODES,
    PAIRS_OF_SCALES,
    _arrived,
    _tables,
    no_sums,
    of_part,
)
from moestro.kernels.triton.device.loops import following

warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait


# --- operands of 32 columns: while the tensor core multiplies one, the next is decoded --------------------------------------


@gluon.jit
def _words(ring, stage, ROW: gl.constexpr):
    """(codes of 64 rows of a stage, int16 [64, 8] for each wgmma of 32 columns; tables of their groups of 16)."""
    w = ring.w.index(stage).slice(ROW, 64).load(CODES)
    s = ring.scales.index(stage).slice(ROW, 64).load(PAIRS_OF_SCALES).to(gl.int32)
    by_two = gl.permute(gl.reshape(w, [64, 4, 2, 2, 2]), (0, 1, 4, 2, 3))  # columns 8 q + 4 h + 2 i + j: q, j, h, i
    even, odd = gl.split(by_two)
    w0, w2 = gl.split(even)
    w1, w3 = gl.split(odd)
    w0, w1, w2, w3 = (
        gl.reshape(w0, [64, 8]),
        gl.reshape(w1, [64, 8]),
        gl.reshape(w2, [64, 8]),
        gl.reshape(w3, [64, 8]),
    )
    return w0, w1, w2, w3, _tables(s)


@gluon.jit
def _decoded(w, low, high):
    """int16 [64, 8] of codes, int32 [64, 4] tables -> int32 [64, 8], see `_bytes`."""
    L: gl.constexpr = w.type.layout
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 m, n;
        and.b32 m, $2, 0x77777777; shr.u32 n, m, 16;
        prmt.b32 $0, $3, $5, m; prmt.b32 $1, $3, $5, n; shl.b32 n, $2, 4;
        lop3.b32 $0, $2, 0x80808080, $0, 0xEA; lop3.b32 $1, n, 0x80808080, $1, 0xEA;
        }""",
        "=&r,=&r,r,r,r,r,r",
        [w, _of_words(low, L), _of_words(high, L)],
        dtype=gl.int32,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _bytes(a):
    """`_decoded` as e4m3 [64, 32], columns in their order of products; no instruction.

    A thread has four registers: words 0 and 1 of a row, and of the row 8 below. Each is taken for four elements' bytes.
    """
    a = gl.permute(gl.reshape(a, [4, 2, 8, 4, 2]), (0, 2, 3, 1, 4))
    a0, a1, a2, a3 = gl.inline_asm_elementwise(
        "mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;",
        "=r,=r,=r,=r,r,r,r,r",
        [gl.reshape(a, [128, 4])],
        dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )
    a = gl.join(gl.join(a0, a2), gl.join(a1, a3))  # [128, 4, 2, 2]: byte, row / 8, word
    a = gl.permute(gl.reshape(a, [4, 8, 4, 4, 2, 2]), (0, 4, 1, 5, 2, 3))
    return gl.reshape(a, [64, 32]).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _of_words(table, L: gl.constexpr):
    """[64, 4] -> [64, 8]: for each four codes of a wgmma's columns their group's table."""
    return gl.convert_layout(gl.reshape(gl.join(table, table), [64, 8]), L)


@gluon.jit
def _piece(a, ring, stage, part, go_on, K: gl.constexpr, FIRST: gl.constexpr, P: gl.constexpr):
    """Start part + a @ x of P pairs from FIRST on and 32 columns from K on; where go_on is false, part starts anew."""
    BN: gl.constexpr = ring.x.shape[1]
    a = gl.convert_layout(_bytes(a), gl.DotOperandLayout(0, of_part(P), 4))
    if FIRST < BN:
        x = ring.x.index(stage).slice(FIRST, P)
    else:
        x = ring.more_x.index(stage).slice(FIRST - BN, P)
    return warpgroup_mma(a, x.slice(K, 32, dim=1).permute((1, 0)), part, use_acc=go_on, is_async=True)


@gluon.jit
def _more(part, a, ring, stage, go_on, K: gl.constexpr, W: gl.constexpr, W2: gl.constexpr):
    """`_piece` of W pairs, and of W2 beyond."""
    if W2 > 0:
        return (
            _piece(a, ring, stage, part[0], go_on, K, 0, W),
            _piece(a, ring, stage, part[1], go_on, K, W, W2),
        )
    else:
        return (_piece(a, ring, stage, part[0], go_on, K, 0, W),)


@gluon.jit
def _step(part, ring, stage, go_on, ROW: gl.constexpr, W: gl.constexpr, W2: gl.constexpr):
    """Decode 64 rows of a stage and start their product. -> (its four operands, busy until `_retired`; part)."""
    w0, w1, w2, w3, tables = _words(ring, stage, ROW)
    low, high, low2, high2 = tables
    a = _decoded(w0, low, high)
    part = _more(part, a, ring, stage, go_on, 0, W, W2)
    b = _decoded(w1, low, high)
    part = _more(part, b, ring, stage, True, 32, W, W2)
    c = _decoded(w2, low2, high2)
    part = _more(part, c, ring, stage, True, 64, W, W2)
    d = _decoded(w3, low2, high2)
    part = _more(part, d, ring, stage, True, 96, W, W2)
    return (a, b, c, d), part


@gluon.jit
def _retired(part, a, W2: gl.constexpr):
    """Wait for the product that reads the operands a."""
    if W2 > 0:
        one, two, _, _, _, _ = warpgroup_mma_wait(0, deps=[part[0], part[1], a[0], a[1], a[2], a[3]])
        return (one, two)
    else:
        one, _, _, _, _ = warpgroup_mma_wait(0, deps=[part[0], a[0], a[1], a[2], a[3]])
        return (one,)


@gluon.jit
def _retired_after(part, a, W2: gl.constexpr):
    """Wait for the product that reads the operands a, and leave the one after it running."""
    if W2 > 0:
        one, two, _, _, _, _ = warpgroup_mma_wait(8, deps=[part[0], part[1], a[0], a[1], a[2], a[3]])
        return (one, two)
    else:
        one, _, _, _, _ = warpgroup_mma_wait(4, deps=[part[0], a[0], a[1], a[2], a[3]])
        return (one,)


@gluon.jit
def _retired_both(up, low, a, RUNNING: gl.constexpr, W2: gl.constexpr):
    """Wait until no more than RUNNING products run; the operands a are what the one before those read."""
    if W2 > 0:
        u, u2, v, v2, _, _, _, _ = warpgroup_mma_wait(
            8 * RUNNING, deps=[up[0], up[1], low[0], low[1], a[0], a[1], a[2], a[3]]
        )
        return (u, u2), (v, v2)
    else:
        u, v, _, _, _, _ = warpgroup_mma_wait(4 * RUNNING, deps=[up[0], low[0], a[0], a[1], a[2], a[3]])
        return (u,), (v,)


@gluon.jit
def _added(acc, part, W2: gl.constexpr):
    if W2 > 0:
        return (acc[0] + part[0], acc[1] + part[1])
    else:
        return (acc[0] + part[0],)


# --- sums of all stages of a tile -----------------------------------------------------------------------------------------
# A stage has two blocks of 128 columns. The last of an odd number is a span of its own.


@gluon.jit
def spans_of_64(ring, stage, phase, blocks, acc, ROW: gl.constexpr, W: gl.constexpr, W2: gl.constexpr,
                TILE: gl.constexpr):  # fmt: skip
    """Sums of 64 rows of weights from ROW on. The tensor core works for the other consumer while this one begins a stage."""
    STAGES: gl.constexpr = TILE.span // 2
    part = no_sums(W, W2, TILE.part)
    for first in range(0, blocks // 2, STAGES):
        for number in range(first, gl.minimum(first + STAGES, blocks // 2)):
            _arrived(ring, stage, phase)
            a, part = _step(part, ring, 2 * stage, number > first, ROW, W, W2)
            if not TILE.overlap:  # no registers for two operands
                part = _retired(part, a, W2)
            b, part = _step(part, ring, 2 * stage + 1, True, ROW, W, W2)
            if TILE.overlap:
                part = _retired_after(part, a, W2)
            part = _retired(part, b, W2)
            mbarrier.arrive(ring.empty.index(stage))
            stage, phase = following(stage, phase, TILE.stages)
        acc = _added(acc, part, W2)
    if blocks % 2 == 1:
        _arrived(ring, stage, phase)
        a, part = _step(part, ring, 2 * stage, False, ROW, W, W2)
        part = _retired(part, a, W2)
        mbarrier.arrive(ring.empty.index(stage))
        stage, phase = following(stage, phase, TILE.stages)
        acc = _added(acc, part, W2)
    return acc, stage, phase


@gluon.jit
def spans_of_128(ring, stage, phase, blocks, acc, below, ROW: gl.constexpr, W: gl.constexpr, W2: gl.constexpr,
                 TILE: gl.constexpr):  # fmt: skip
    """As `spans_of_64`, and of the 64 rows below: one half is decoded while the other is multiplied."""
    STAGES: gl.constexpr = TILE.span // 2
    up = no_sums(W, W2, TILE.part)
    low = no_sums(W, W2, TILE.part)
    for first in range(0, blocks // 2, STAGES):
        _arrived(ring, stage, phase)
        a, up = _step(up, ring, 2 * stage, False, ROW, W, W2)
        b, low = _step(low, ring, 2 * stage, False, ROW + 64, W, W2)
        up, low, b = _second_block(up, low, a, b, ring, stage, ROW, W, W2)
        for _ in range(first + 1, gl.minimum(first + STAGES, blocks // 2)):
            after, turned = following(stage, phase, TILE.stages)
            _arrived(ring, after, turned)
            a, up = _step(up, ring, 2 * after, True, ROW, W, W2)
            up, low = _retired_both(up, low, b, 1, W2)
            mbarrier.arrive(ring.empty.index(stage))
            b, low = _step(low, ring, 2 * after, True, ROW + 64, W, W2)
            up, low, b = _second_block(up, low, a, b, ring, after, ROW, W, W2)
            stage = after
            phase = turned
        up, low = _retired_both(up, low, b, 0, W2)
        mbarrier.arrive(ring.empty.index(stage))
        acc = _added(acc, up, W2)
        below = _added(below, low, W2)
        stage, phase = following(stage, phase, TILE.stages)
    if blocks % 2 == 1:
        _arrived(ring, stage, phase)
        a, up = _step(up, ring, 2 * stage, False, ROW, W, W2)
        b, low = _step(low, ring, 2 * stage, False, ROW + 64, W, W2)
        up, low = _retired_both(up, low, a, 1, W2)
        up, low = _retired_both(up, low, b, 0, W2)
        mbarrier.arrive(ring.empty.index(stage))
        acc = _added(acc, up, W2)
        below = _added(below, low, W2)
        stage, phase = following(stage, phase, TILE.stages)
    return acc, below, stage, phase


@gluon.jit
def _second_block(up, low, a, b, ring, stage, ROW: gl.constexpr, W: gl.constexpr, W2: gl.constexpr):
    """A stage's second block, after the first's operands a and b; all but its last product are retired."""
    up, low = _retired_both(up, low, a, 1, W2)
    a, up = _step(up, ring, 2 * stage + 1, True, ROW, W, W2)
    up, low = _retired_both(up, low, b, 1, W2)
    b, low = _step(low, ring, 2 * stage + 1, True, ROW + 64, W, W2)
    up, low = _retired_both(up, low, a, 1, W2)
    return up, low, b
