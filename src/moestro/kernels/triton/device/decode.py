"""Weights decoded in registers: a block of 64 columns of codes and their scales -> bfloat16.

One function for all formats, `planes`; layout.py says how the bits came to lie so. In a row of a block, word c holds
the codes of columns c, c + 16, c + 32 and c + 48, the four *planes*; the four planes of a word are what a thread of a
tensor core's A fragment wants.

Every decoder works in Triton's interpreter too, where inline PTX cannot run: there, and nowhere else, the same bits
are taken apart with Triton's own operations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moestro.kernels.triton.device.common import PTX

BF16, NVFP4, MXFP4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MXFP8, FP8_BLOCK, INT4 = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)


@triton.jit
def planes(w, s, FORMAT: tl.constexpr):
    """Words [R, 16] and scales [R, 1] -> 4 bfloat16 [R, 16]; row scales are left to the epilogue.

    NVFP4: int16 of four e2m1, int32 of four scale codes: e2m1 · scale · 2^-8.
    MXFP4: int16 of four e2m1, int32 of two bfloat16 (scale · 2^126, of planes 0, 1 and of 2, 3): e2m1 · scale.
    MXFP8: int32 of four e4m3, int32 of two bfloat16 (scale · 2^120): e4m3 · scale.
    FP8_BLOCK: int32 of four e4m3, int64 of two pairs of bfloat16, of planes 0, 1 and of 2, 3; a pair's sum is
    scale · 2^120: e4m3 · scale, rounded once.
    INT4: int16 of four codes, int64 of two bfloat16 scales (of planes 0, 1 and of 2, 3) and two bfloat16 of
    -(128 + zero): (code - zero) · scale, rounded once.
    """
    if FORMAT == NVFP4:
        # two scales a register: a bfloat16 product reads either half of it twice
        s01, s23 = tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            prmt.b32 t, $2, 0, 0x4140; mad.lo.u32 $0, t, 16, 0x75807580;
            prmt.b32 t, $2, 0, 0x4342; mad.lo.u32 $1, t, 16, 0x75807580;
            }""",
            "=r,=r,r",
            [s],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, s; .reg .b16 lo, hi;
            mov.b32 {lo, hi}, $5; mov.b32 s, {lo, lo};
            and.b32 t, $4, 0x81C081C0; mul.rn.bf16x2 $0, t, s;
            mov.b32 s, {hi, hi};
            shl.b32 t, $4, 3; and.b32 t, t, 0x81C081C0; mul.rn.bf16x2 $1, t, s;
            mov.b32 {lo, hi}, $7; mov.b32 s, {lo, lo};
            shl.b32 t, $4, 6; and.b32 t, t, 0x81C081C0; mul.rn.bf16x2 $2, t, s;
            mov.b32 s, {hi, hi};
            shl.b32 t, $4, 1; and.b32 t, t, 0x80008000;
            shr.b32 u, $4, 4; lop3.b32 t, u, 0x00C000C0, t, 0xEA;
            shr.b32 u, $4, 5; lop3.b32 t, u, 0x01000100, t, 0xEA;
            mul.rn.bf16x2 $3, t, s;
            }""",
            "=r,=r,=r,=r,r,r,r,r,r",
            [w, s01, s23],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif FORMAT == MXFP4:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, s; .reg .b16 lo, hi;
            mov.b32 {lo, hi}, $5; mov.b32 s, {lo, lo};
            and.b32 t, $4, 0x81C081C0; mul.rn.bf16x2 $0, t, s;
            shl.b32 t, $4, 3; and.b32 t, t, 0x81C081C0; mul.rn.bf16x2 $1, t, s;
            mov.b32 s, {hi, hi};
            shl.b32 t, $4, 6; and.b32 t, t, 0x81C081C0; mul.rn.bf16x2 $2, t, s;
            shl.b32 t, $4, 1; and.b32 t, t, 0x80008000;
            shr.b32 u, $4, 4; lop3.b32 t, u, 0x00C000C0, t, 0xEA;
            shr.b32 u, $4, 5; lop3.b32 t, u, 0x01000100, t, 0xEA;
            mul.rn.bf16x2 $3, t, s;
            }""",
            "=r,=r,=r,=r,r,r,r",
            [w, s],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif FORMAT == MXFP8:
        # a plane's two bytes go to the upper halves of a register; then sign to 15, the rest to 10..4: e4m3 · 2^-120
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, s; .reg .b16 lo, hi;
            mov.b32 {lo, hi}, $6; mov.b32 s, {lo, lo};
            prmt.b32 t, $4, $5, 0x4400; shr.b32 u, t, 4; and.b32 u, u, 0x07F007F0;
            lop3.b32 t, t, 0x80008000, u, 0xEA; mul.rn.bf16x2 $0, t, s;
            prmt.b32 t, $4, $5, 0x5511; shr.b32 u, t, 4; and.b32 u, u, 0x07F007F0;
            lop3.b32 t, t, 0x80008000, u, 0xEA; mul.rn.bf16x2 $1, t, s;
            mov.b32 s, {hi, hi};
            prmt.b32 t, $4, $5, 0x6622; shr.b32 u, t, 4; and.b32 u, u, 0x07F007F0;
            lop3.b32 t, t, 0x80008000, u, 0xEA; mul.rn.bf16x2 $2, t, s;
            prmt.b32 t, $4, $5, 0x7733; shr.b32 u, t, 4; and.b32 u, u, 0x07F007F0;
            lop3.b32 t, t, 0x80008000, u, 0xEA; mul.rn.bf16x2 $3, t, s;
            }""",
            "=r,=r,=r,=r,r,r,r,r",
            [w, s],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif FORMAT == INT4:
        # a code in the mantissa of 128 is 128 + code, which the sum with -(128 + zero) makes code - zero, exactly
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, s, z, m, one; .reg .b16 s0, s1, z0, z1;
            mov.b32 m, 0x43004300; mov.b32 one, 0x3F803F80;
            mov.b32 {s0, s1}, $5; mov.b32 {z0, z1}, $7; mov.b32 s, {s0, s0}; mov.b32 z, {z0, z0};
            lop3.b32 t, $4, 0x000F000F, m, 0xEA; fma.rn.bf16x2 t, t, one, z; mul.rn.bf16x2 $0, t, s;
            shr.b32 u, $4, 4;
            lop3.b32 t, u, 0x000F000F, m, 0xEA; fma.rn.bf16x2 t, t, one, z; mul.rn.bf16x2 $1, t, s;
            mov.b32 s, {s1, s1}; mov.b32 z, {z1, z1};
            shr.b32 u, $4, 8;
            lop3.b32 t, u, 0x000F000F, m, 0xEA; fma.rn.bf16x2 t, t, one, z; mul.rn.bf16x2 $2, t, s;
            shr.b32 u, $4, 12;
            lop3.b32 t, u, 0x000F000F, m, 0xEA; fma.rn.bf16x2 t, t, one, z; mul.rn.bf16x2 $3, t, s;
            }""",
            "=r,=r,=r,=r,r,r,r,r,r",
            [w, s.to(tl.int32), (s >> 32).to(tl.int32)],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        # the same, and a scale of two parts
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, v, a, b; .reg .b16 h, l;
            mov.b32 {h, l}, $6; mov.b32 a, {h, h}; mov.b32 b, {l, l};
            prmt.b32 t, $4, $5, 0x4400; shr.b32 u, t, 4; and.b32 u, u, 0x07F007F0;
            lop3.b32 t, t, 0x80008000, u, 0xEA; mul.rn.bf16x2 v, t, b; fma.rn.bf16x2 $0, t, a, v;
            prmt.b32 t, $4, $5, 0x5511; shr.b32 u, t, 4; and.b32 u, u, 0x07F007F0;
            lop3.b32 t, t, 0x80008000, u, 0xEA; mul.rn.bf16x2 v, t, b; fma.rn.bf16x2 $1, t, a, v;
            mov.b32 {h, l}, $8; mov.b32 a, {h, h}; mov.b32 b, {l, l};
            prmt.b32 t, $4, $5, 0x6622; shr.b32 u, t, 4; and.b32 u, u, 0x07F007F0;
            lop3.b32 t, t, 0x80008000, u, 0xEA; mul.rn.bf16x2 v, t, b; fma.rn.bf16x2 $2, t, a, v;
            prmt.b32 t, $4, $5, 0x7733; shr.b32 u, t, 4; and.b32 u, u, 0x07F007F0;
            lop3.b32 t, t, 0x80008000, u, 0xEA; mul.rn.bf16x2 v, t, b; fma.rn.bf16x2 $3, t, a, v;
            }""",
            "=r,=r,=r,=r,r,r,r,r,r,r",
            [w, s.to(tl.int32), (s >> 32).to(tl.int32)],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def decode_block(w, scales, FORMAT: tl.constexpr):
    """Words [BM, 16] and scales [BM] -> bfloat16 [BM, 64], columns in order."""
    s = scales[:, None]
    if PTX:
        a0, a1, a2, a3 = planes(w, s, FORMAT)
    else:
        a0, a1, a2, a3 = _plain_planes(w, s, FORMAT)
    a = tl.join(tl.join(a0, a2), tl.join(a1, a3))  # [BM, 16, 2, 2]: plane = 2 * third + last
    return a.permute(0, 2, 3, 1).reshape(w.shape[0], 64)


@triton.jit
def _plain_planes(w, s, FORMAT: tl.constexpr):
    """`planes` without PTX."""
    if FORMAT == FP8_BLOCK:
        s01, s23 = s.to(tl.int32), (s >> 32).to(tl.int32)
        return (
            _plain_byte(w, s01),
            _plain_byte(w >> 8, s01),
            _plain_byte(w >> 16, s23),
            _plain_byte(w >> 24, s23),
        )
    elif FORMAT == MXFP8:
        s01, s23 = s & 0xFFFF, (s >> 16) & 0xFFFF
        return (
            _plain_byte(w, s01),
            _plain_byte(w >> 8, s01),
            _plain_byte(w >> 16, s23),
            _plain_byte(w >> 24, s23),
        )
    elif FORMAT == INT4:
        u, scale, zero = w.to(tl.int32) & 0xFFFF, s.to(tl.int32), (s >> 32).to(tl.int32)
        return (
            _plain_integer(u, scale, zero),
            _plain_integer(u >> 4, scale, zero),
            _plain_integer(u >> 8, scale >> 16, zero >> 16),
            _plain_integer(u >> 12, scale >> 16, zero >> 16),
        )
    else:
        u = w.to(tl.int32) & 0xFFFF
        last = ((u << 1) & 0x8000) | ((u >> 4) & 0xC0) | ((u >> 5) & 0x100)
        return (
            _plain_plane(u, _plain_scale(s, 0, FORMAT)),
            _plain_plane(u << 3, _plain_scale(s, 1, FORMAT)),
            _plain_plane(u << 6, _plain_scale(s, 2, FORMAT)),
            _plain_plane(last, _plain_scale(s, 3, FORMAT)),
        )


@triton.jit
def _plain_scale(s, PLANE: tl.constexpr, FORMAT: tl.constexpr):
    """Bits of the bfloat16 that a plane's e2m1 are multiplied by."""
    if FORMAT == NVFP4:
        return ((s >> (8 * PLANE)) & 255) * 16 + 0x7580
    else:
        return s >> (16 * (PLANE // 2))


@triton.jit
def _plain_plane(bits, scale):
    """Bits of e2m1 · 2^-126 and of a scale, both bfloat16 -> their product."""
    value = ((bits & 0x81C0) << 16).to(tl.float32, bitcast=True)
    return (value * (scale << 16).to(tl.float32, bitcast=True)).to(tl.bfloat16)


@triton.jit
def _plain_byte(w, scale):
    """e4m3 in the low byte of w, a scale as the sum of two bfloat16 -> their product."""
    bits = ((w & 0x80) << 8) | ((w & 0x7F) << 4)
    value = (bits << 16).to(tl.float32, bitcast=True)
    high = (scale << 16).to(tl.float32, bitcast=True)
    low = (scale & -65536).to(tl.float32, bitcast=True)
    exact = (value * high + value * low).to(tl.int32, bitcast=True)
    nearest = (exact + 0x7FFF + ((exact >> 16) & 1)) & -65536  # the interpreter would round towards zero
    return nearest.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _plain_integer(u, scale, zero):
    """The code in the low nibble of u, bits of a scale and of -(128 + zero) -> (code - zero) · scale."""
    integer = (u & 15).to(tl.float32) + 128 + ((zero & 0xFFFF) << 16).to(tl.float32, bitcast=True)
    exact = (integer * ((scale & 0xFFFF) << 16).to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    nearest = (exact + 0x7FFF + ((exact >> 16) & 1)) & -65536
    return nearest.to(tl.float32, bitcast=True).to(tl.bfloat16)
