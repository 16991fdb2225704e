"""What the kernels share on the device: products, activations, waiting for each other.

Every function works in Triton's interpreter too, where inline PTX cannot run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moestro.kernels.activations import Code

INTERPRETED: bool = triton.knobs.runtime.interpret
PTX = tl.constexpr(not INTERPRETED)
SWIGLU, GEGLU_TANH, RELU2, CLAMPED_SILU, SOFTCAP_SWIGLU = (tl.constexpr(code.value) for code in Code)
ACTIVATIONS = frozenset(Code)  # that `activate` has


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """With programmatic launch: nothing that an earlier kernel wrote may be read before this."""
    if PDL:
        gdc_wait()


@triton.jit
def launch_next(PDL: tl.constexpr):
    """With programmatic launch: the next kernel's programs may take the places that this one leaves.

    After wait_for_previous, but for kernels whose next one knows: what the kernel before this one wrote is then visible
    to the next one from its start, and it need wait only for what this one writes.
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
def wait_for_products(acc):
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
def dense_rows(r, rows, GATED: tl.constexpr):
    """(checkpoint row of kernel row r (8 of gate, 8 of up, alternating), whether there is one): layout.row_order."""
    if GATED:
        j = (r // 16) * 8 + r % 8
        return tl.where(r % 16 < 8, j, rows // 2 + j), j < rows // 2
    else:
        return r, r < rows


@triton.jit
def row_blocks(rows, GATED: tl.constexpr):
    """Blocks of 64 kernel rows of one expert."""
    return tl.cdiv(rows // 2, 32) if GATED else tl.cdiv(rows, 64)


@triton.jit
def activate(gate, up, HOW: tl.constexpr):
    """float32 -> float32, as moestro.kernels.activations; without a gate, up is not used. HOW: a Product."""
    if HOW.act == SWIGLU:
        if HOW.limit is not None:
            gate = tl.minimum(gate, HOW.limit)
            up = tl.minimum(tl.maximum(up, -HOW.limit), HOW.limit)
        return gate / (1.0 + tl.exp(-HOW.alpha * gate)) * (up + HOW.shift)
    elif HOW.act == GEGLU_TANH:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-2.0 * inner)) * up  # 0.5 (1 + tanh u) = sigmoid(2u)
    elif HOW.act == RELU2:
        positive = tl.maximum(gate, 0.0)
        return positive * positive
    elif HOW.act == CLAMPED_SILU:
        act = tl.minimum(gate / (1.0 + tl.exp(-gate)), HOW.limit)
        return act * tl.minimum(tl.maximum(up, -HOW.limit), HOW.limit)
    else:  # tanh(v / c) · c = c - 2 c / (1 + exp(2 v / c)), with a c each for gate and up
        gate_cap = HOW.alpha - 2.0 * HOW.alpha / (1.0 + tl.exp(2.0 / HOW.alpha * gate))
        up_cap = HOW.limit - 2.0 * HOW.limit / (1.0 + tl.exp(2.0 / HOW.limit * up))
        return gate_cap / (1.0 + tl.exp(-gate)) * up_cap
