"""What the kernels share on the device: weights decoded in registers, activations, programmatic launch.

Every function works in Triton's interpreter too, where inline PTX cannot run: there, and nowhere else, the
same bits are taken apart with Triton's own operations.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED: bool = triton.knobs.runtime.interpret
PTX = tl.constexpr(not INTERPRETED)
BF16, NVFP4 = tl.constexpr(0), tl.constexpr(1)  # weight formats
SWIGLU, GEGLU_TANH, RELU2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """With programmatic launch: nothing that an earlier kernel wrote may be read before this."""
    if PDL:
        gdc_wait()


@triton.jit
def launch_next(PDL: tl.constexpr):
    """With programmatic launch: the next kernel's programs may take the places that this one leaves.

    Always after wait_for_previous: what the kernel before this one wrote is then visible to the next one from
    its start, and it need wait only for what this one writes.
    """
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_count(counter, wanted, weights, weights_size, scales, scales_size):
    """Until int32 `counter` has reached `wanted`; all that was written before it did is visible then.

    One thread looks, and rarely: hundreds of programs wait at once, and one that asked all the time slowed
    the memory that the others stream. Meanwhile L2 fetches `weights` and `scales` (addresses of 16 bytes'
    alignment, sizes in bytes, multiples of 16), if the sizes are not 0.
    """
    if PTX:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p, q; .reg .b32 t;
            mov.u32 t, %tid.x; setp.ne.u32 p, t, 0; @p bra DONE;
            ld.acquire.gpu.global.u32 t, [$1]; setp.ge.s32 q, t, $2; @q bra DONE;
            setp.eq.u32 p, $4, 0; @p bra LOOK;
            cp.async.bulk.prefetch.L2.global [$3], $4; cp.async.bulk.prefetch.L2.global [$5], $6;
            LOOK: nanosleep.u32 100;
            ld.relaxed.gpu.global.u32 t, [$1]; setp.lt.s32 q, t, $2; @q bra LOOK;
            fence.acq_rel.gpu;
            DONE: mov.b32 $0, 0;
            }""",
            "=r,l,r,l,r,l,r",
            [
                counter.to(tl.int64, bitcast=True), wanted, weights.to(tl.int64, bitcast=True), weights_size,
                scales.to(tl.int64, bitcast=True), scales_size,
            ],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.debug_barrier()
    else:
        while tl.atomic_add(counter, 0, sem="acquire") < wanted:
            pass


@triton.jit
def dot(a, b, acc):
    """acc + a @ b; the interpreter multiplies bfloat16 as if they were integers, so there in float32."""
    if PTX:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)


@triton.jit
def settle(acc):
    """acc, once the tensor core is done with it.

    A wgmma reads its A registers while it runs. Triton 3.6 lets one run on into the next step of a loop,
    which then decodes new weights into them (seen on an H100: NaN where a tile was 128 wide with eight
    warps, one in several runs). A use of the sum that is no product makes it wait; the move itself costs
    nothing.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return acc


@triton.jit
def unpack_scales(word):
    """int32 of 4 scale codes -> 4 int32, each a pair of equal bfloat16: scale · 2^118."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t;
        prmt.b32 t, $4, 0, 0x4040; mad.lo.u32 $0, t, 16, 0x75807580;
        prmt.b32 t, $4, 0, 0x4141; mad.lo.u32 $1, t, 16, 0x75807580;
        prmt.b32 t, $4, 0, 0x4242; mad.lo.u32 $2, t, 16, 0x75807580;
        prmt.b32 t, $4, 0, 0x4343; mad.lo.u32 $3, t, 16, 0x75807580;
        }""",
        "=r,=r,=r,=r,r",
        [word],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def unpack_words(w, s0, s1, s2, s3):
    """Words (int16) and their 4 scales (pairs, as above) -> 4 bfloat16: e2m1 · scale · 2^-8."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t, u;
        and.b32 t, $4, 0x81C081C0; mul.rn.bf16x2 $0, t, $5;
        shl.b32 t, $4, 3; and.b32 t, t, 0x81C081C0; mul.rn.bf16x2 $1, t, $7;
        shl.b32 t, $4, 6; and.b32 t, t, 0x81C081C0; mul.rn.bf16x2 $2, t, $9;
        shl.b32 t, $4, 1; and.b32 t, t, 0x80008000;
        shr.b32 u, $4, 4; lop3.b32 t, u, 0x00C000C0, t, 0xEA;
        shr.b32 u, $4, 5; lop3.b32 t, u, 0x01000100, t, 0xEA;
        mul.rn.bf16x2 $3, t, $11;
        }""",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
        [w, s0, s1, s2, s3],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def unpack_scale_pairs(word):
    """int32 of 4 scale codes -> 2 int32, each two bfloat16: scale · 2^118 of columns 0 and 16, 32 and 48."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t;
        prmt.b32 t, $2, 0, 0x4140; mad.lo.u32 $0, t, 16, 0x75807580;
        prmt.b32 t, $2, 0, 0x4342; mad.lo.u32 $1, t, 16, 0x75807580;
        }""",
        "=r,=r,r",
        [word],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def unpack_words_of_pairs(w, s01, s23):
    """unpack_words, with the scales two in a register: a bfloat16 product reads either half of it twice."""
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


@triton.jit
def _plain_plane(bits, code):
    """Bits of a bfloat16 (value · 2^-126) and a scale code -> bfloat16: e2m1 · scale · 2^-8."""
    value = ((bits & 0x81C0) << 16).to(tl.float32, bitcast=True)
    scale = ((code * 16 + 0x7580) << 16).to(tl.float32, bitcast=True)
    return (value * scale).to(tl.bfloat16)


@triton.jit
def decode_block(w, scale_word):
    """int16 [BM, 16] words and int32 [BM] scales -> bfloat16 [BM, 64], columns in order: e2m1 · scale ·
    2^-8."""
    s = scale_word[:, None]
    if PTX:
        s01, s23 = unpack_scale_pairs(s)
        a0, a1, a2, a3 = unpack_words_of_pairs(w, s01, s23)
    else:
        u = w.to(tl.int32) & 0xFFFF
        a0 = _plain_plane(u, s & 255)
        a1 = _plain_plane(u << 3, (s >> 8) & 255)
        a2 = _plain_plane(u << 6, (s >> 16) & 255)
        last = ((u << 1) & 0x8000) | ((u >> 4) & 0xC0) | ((u >> 5) & 0x100)
        a3 = _plain_plane(last, (s >> 24) & 255)
    a = tl.join(tl.join(a0, a2), tl.join(a1, a3))  # [BM, 16, 2, 2]: plane = 2 * third + last
    return a.permute(0, 2, 3, 1).reshape(w.shape[0], 64)


@triton.jit
def activate(gate, up, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """float32 -> float32, as moestro.kernels.activations; without a gate, up is not used."""
    if ACT == SWIGLU:
        if LIMIT is not None:
            gate = tl.minimum(gate, LIMIT)
            up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + SHIFT)
    elif ACT == GEGLU_TANH:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-2.0 * inner)) * up  # 0.5 (1 + tanh u) = sigmoid(2u)
    else:
        positive = tl.maximum(gate, 0.0)
        return positive * positive
