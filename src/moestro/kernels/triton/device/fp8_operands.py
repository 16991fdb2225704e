"""Operands of fp8_registers.py: 64 rows of 4-bit weights, decoded into the registers of wgmmas.

A thread q of four owns columns 32 q .. 32 q + 31 of a block of 128: eight words and a pair of scales as they lie in
memory. A wgmma of 32 columns wants four columns 4 q and four 16 + 4 q of each row from it, so the columns of a block
are taken in another order: place 32 s + 16 h + 4 q + j is column 32 q + 8 s + 4 h + j. `quantize_fp8` writes x in
that order (Recipe.turned), a row as whole blocks. So wgmma s takes word s of a row. The four of a block are one product:
its address is worked out once, 10 to 16 instructions less a block than for four. The arithmetic is fp8_decode.py's.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

warpgroup_mma = hopper.warpgroup_mma
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
def of_product(pairs):
    """The layout of a product [64, pairs]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, pairs, 32])


@gluon.jit
def multiply(
    part, ring, at, go_on, ROW: gl.constexpr, W: gl.constexpr, W2: gl.constexpr, POWERS: gl.constexpr
):
    """Decode 64 rows of block `at` of the ring and start part + their product with W pairs, and W2 beyond.

    Where go_on is false, part starts anew. -> (the operands, busy until their product is waited for; part).
    POWERS: scales are powers of two that 32 columns share.
    """
    w = ring.w.index(at).slice(ROW, 64).load(CODES)
    s = ring.scales.index(at).slice(ROW, 64).load(PAIRS_OF_SCALES).to(gl.int32)
    if POWERS:
        low, high, low2, high2 = _tables_of_powers(s)
    else:
        low, high, low2, high2 = _tables(s)
    w0, w1, w2, w3 = _words(w)
    a = (
        _decoded(w0, low, high),
        _decoded(w1, low, high),
        _decoded(w2, low2, high2),
        _decoded(w3, low2, high2),
    )
    return a, _started(part, _joined(a), ring, at, go_on, W, W2)


@gluon.jit
def _words(w):
    """Codes of a block, int16 [64, 32] -> [64, 8] for each 32 columns of the product."""
    by_two = gl.permute(
        gl.reshape(w, [64, 4, 2, 2, 2]), (0, 1, 4, 2, 3)
    )  # q, s / 2, s % 2, h -> q, h, s / 2, s % 2
    even, odd = gl.split(by_two)
    w0, w2 = gl.split(even)
    w1, w3 = gl.split(odd)
    return (
        gl.reshape(w0, [64, 8]),
        gl.reshape(w1, [64, 8]),
        gl.reshape(w2, [64, 8]),
        gl.reshape(w3, [64, 8]),
    )


@gluon.jit
def _tables_of_powers(s):
    """`_tables` of powers of two that 32 columns share, MXFP4's: 2 instructions a row.

    Half a power of two is 8 less in its byte, and 1, 1.5, 2, 3, 4 and 6 times it are 0, 4, 8, 12, 16 and 20 more.
    """
    low, high = gl.inline_asm_elementwise(
        "mad.lo.u32 $0, $2, 0x01000100, 0x03fff800; mad.lo.u32 $1, $2, 0x00010001, 0x14100c08;",
        "=&r,=r,r",
        [s],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    return low, high, low, high


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
def _decoded(w, low, high):
    """int16 [64, 8] of codes, int32 [64, 4] tables -> int32 [64, 8], four e4m3 each; see `_bytes`.

    As bytes they would be taken apart where a loop carries them.
    """
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
def _of_words(table, L: gl.constexpr):
    """[64, 4] -> [64, 8]: for each four codes of a wgmma's columns their group's table."""
    return gl.convert_layout(gl.reshape(gl.join(table, table), [64, 8]), L)


@gluon.jit
def _joined(a):
    """`_decoded` four times, as e4m3 [64, 128] in the order of products; no instruction."""
    even = gl.join(_bytes(a[0]), _bytes(a[1]))  # [64, 32, 2]: place, s % 2
    odd = gl.join(_bytes(a[2]), _bytes(a[3]))
    return gl.reshape(gl.permute(gl.join(even, odd), (0, 3, 2, 1)), [64, 128])


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
def _started(part, a, ring, at, go_on, W: gl.constexpr, W2: gl.constexpr):
    """Start part + a @ x of a block."""
    if W2 > 0:
        return (
            _product(part[0], a, ring, at, go_on, 0, W),
            _product(part[1], a, ring, at, go_on, W, W2),
        )
    else:
        return (_product(part[0], a, ring, at, go_on, 0, W),)


@gluon.jit
def _product(part, a, ring, at, go_on, FIRST: gl.constexpr, P: gl.constexpr):
    """Of P pairs from FIRST on; those beyond the first part of the ring are in its second."""
    BN: gl.constexpr = ring.x.shape[1]
    a = gl.convert_layout(a, gl.DotOperandLayout(0, of_product(P), 4))
    if FIRST < BN:
        x = ring.x.index(at).slice(FIRST, P)
    else:
        x = ring.more_x.index(at).slice(FIRST - BN, P)
    return warpgroup_mma(a, x.permute((1, 0)), part, use_acc=go_on, is_async=True)
