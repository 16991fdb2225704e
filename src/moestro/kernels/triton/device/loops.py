"""The loops of `warp_specialized.py`'s consumers: decode into registers, multiply from them, let the stage go.

`mma_64_pingpong` keeps 64 rows of sums and two sets of A registers that take turns along the columns; `mma_128` keeps
128 rows, each half with its own; `mma_64` 64 rows and one set. A wgmma reads its A registers while it runs, and
nothing in the code that follows says so: `_retire` waits for the older product, and takes what that one read, so that
those registers are not given away before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from moestro.kernels.triton.device import decode

mbarrier, fence_async_shared = hopper.mbarrier, hopper.fence_async_shared
warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait
planes = gluon.jit(decode.planes.fn)


class Ring(NamedTuple):
    """Buffers in shared memory that the producer fills and the consumers empty, [STAGES, ...]."""

    x: Any
    w: Any
    scales: Any
    full: Any  # barriers
    empty: Any
    more_x: Any  # rows of x beyond the power of two


@gluon.jit
def following(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wrap = (stage == STAGES).to(gl.int32)
    return stage - wrap * STAGES, phase ^ wrap


@gluon.jit
def _decode(ring, stage, FORMAT: gl.constexpr, ROW: gl.constexpr, M: gl.constexpr):
    """64 rows of the stage's weights as an A operand, bfloat16 [64, 64]."""
    A: gl.constexpr = gl.DotOperandLayout(0, M, 2)
    w = ring.w.index(stage).slice(ROW, 64).load(A)
    s = ring.scales.index(stage).slice(ROW, 64).load(gl.SliceLayout(1, A))
    a0, a1, a2, a3 = planes(w, gl.expand_dims(s, 1), FORMAT)
    a = gl.join(gl.join(a0, a2), gl.join(a1, a3))
    return gl.convert_layout(gl.reshape(gl.permute(a, (0, 2, 3, 1)), [64, 64]), A)


@gluon.jit
def _multiply(a, ring, stage, acc, acc2, M2: gl.constexpr, W: gl.constexpr, W2: gl.constexpr):
    """Start acc += a @ x, and return while it runs. Columns beyond the first part of the ring are in its second."""
    BN: gl.constexpr = ring.x.shape[1]
    xs = ring.x.index(stage)
    acc = warpgroup_mma(a, xs.slice(0, W).permute((1, 0)), acc, is_async=True)
    if W2 > 0:
        a2 = gl.convert_layout(a, gl.DotOperandLayout(0, M2, 2))
        if W == BN:
            acc2 = warpgroup_mma(
                a2, ring.more_x.index(stage).slice(0, W2).permute((1, 0)), acc2, is_async=True
            )
        else:
            acc2 = warpgroup_mma(a2, xs.slice(W, W2).permute((1, 0)), acc2, is_async=True)
    return acc, acc2


@gluon.jit
def _step(ring, stage, phase, acc, acc2, FORMAT: gl.constexpr, ROW: gl.constexpr, M: gl.constexpr, M2: gl.constexpr,
          W: gl.constexpr, W2: gl.constexpr):  # fmt: skip
    """Wait for a stage, decode 64 rows of it, start their product; the A registers are busy until `_retire`.

    PTX counts cp.async, which wrote the stage, to another proxy than wgmma, so a fence stands between (0 to 2 %).
    """
    mbarrier.wait(ring.full.index(stage), phase)
    fence_async_shared()
    a = _decode(ring, stage, FORMAT, ROW, M)
    acc, acc2 = _multiply(a, ring, stage, acc, acc2, M2, W, W2)
    return a, acc, acc2


@gluon.jit
def _retire(acc, acc2, a, RUNNING: gl.constexpr, W2: gl.constexpr):
    """Wait until no more than RUNNING products run; a is what the one before those read."""
    if W2 > 0:
        acc, acc2, a = warpgroup_mma_wait(2 * RUNNING, deps=[acc, acc2, a])
    else:
        acc, a = warpgroup_mma_wait(RUNNING, deps=[acc, a])
    return acc, acc2, a


@gluon.jit
def _retire_both(acc, acc2, accb, accb2, a, RUNNING: gl.constexpr, W2: gl.constexpr):
    if W2 > 0:
        acc, acc2, accb, accb2, a = warpgroup_mma_wait(2 * RUNNING, deps=[acc, acc2, accb, accb2, a])
    else:
        acc, accb, a = warpgroup_mma_wait(RUNNING, deps=[acc, accb, a])
    return acc, acc2, accb, accb2, a


@gluon.jit
def mma_64_pingpong(ring, stage, phase, blocks, FORMAT: gl.constexpr, ROW: gl.constexpr, ODD: gl.constexpr,
                    M: gl.constexpr, M2: gl.constexpr, W: gl.constexpr, W2: gl.constexpr, V2: gl.constexpr,
                    STAGES: gl.constexpr):  # fmt: skip
    """64 rows: the two sets of A registers take turns along the columns."""
    empty = ring.empty
    acc = gl.zeros([64, W], gl.float32, M)
    acc2 = gl.zeros([64, V2], gl.float32, M2)
    a, acc, acc2 = _step(ring, stage, phase, acc, acc2, FORMAT, ROW, M, M2, W, W2)
    acc, acc2, a = _retire(acc, acc2, a, 1, W2)
    last = stage
    stage, phase = following(stage, phase, STAGES)
    for _ in range((blocks - 1) // 2):
        b, acc, acc2 = _step(ring, stage, phase, acc, acc2, FORMAT, ROW, M, M2, W, W2)
        acc, acc2, a = _retire(acc, acc2, a, 1, W2)
        mbarrier.arrive(empty.index(last))
        last = stage
        stage, phase = following(stage, phase, STAGES)
        a, acc, acc2 = _step(ring, stage, phase, acc, acc2, FORMAT, ROW, M, M2, W, W2)
        acc, acc2, b = _retire(acc, acc2, b, 1, W2)
        mbarrier.arrive(empty.index(last))
        last = stage
        stage, phase = following(stage, phase, STAGES)
    if not ODD:
        b, acc, acc2 = _step(ring, stage, phase, acc, acc2, FORMAT, ROW, M, M2, W, W2)
        acc, acc2, a = _retire(acc, acc2, a, 1, W2)
        mbarrier.arrive(empty.index(last))
        last = stage
        stage, phase = following(stage, phase, STAGES)
        acc, acc2, b = _retire(acc, acc2, b, 0, W2)
    else:
        acc, acc2, a = _retire(acc, acc2, a, 0, W2)
    mbarrier.arrive(empty.index(last))
    return acc, acc2, stage, phase


@gluon.jit
def mma_64(ring, stage, phase, blocks, FORMAT: gl.constexpr, ROW: gl.constexpr,
           M: gl.constexpr, M2: gl.constexpr, W: gl.constexpr, W2: gl.constexpr, V2: gl.constexpr,
           STAGES: gl.constexpr):  # fmt: skip
    """64 rows of more than 256 sums, which leave room for one set of A registers: the tensor core works for the
    other consumer while this one decodes.
    """
    acc = gl.zeros([64, W], gl.float32, M)
    acc2 = gl.zeros([64, V2], gl.float32, M2)
    for _ in range(blocks):
        a, acc, acc2 = _step(ring, stage, phase, acc, acc2, FORMAT, ROW, M, M2, W, W2)
        acc, acc2, a = _retire(acc, acc2, a, 0, W2)
        mbarrier.arrive(ring.empty.index(stage))
        stage, phase = following(stage, phase, STAGES)
    return acc, acc2, stage, phase


@gluon.jit
def mma_128(ring, stage, phase, blocks, FORMAT: gl.constexpr, ROW: gl.constexpr,
            M: gl.constexpr, M2: gl.constexpr, W: gl.constexpr, W2: gl.constexpr, V2: gl.constexpr,
            STAGES: gl.constexpr):  # fmt: skip
    """128 rows: each half has its own A registers."""
    empty = ring.empty
    acc = gl.zeros([64, W], gl.float32, M)
    acc2 = gl.zeros([64, V2], gl.float32, M2)
    accb = gl.zeros([64, W], gl.float32, M)
    accb2 = gl.zeros([64, V2], gl.float32, M2)
    upper, acc, acc2 = _step(ring, stage, phase, acc, acc2, FORMAT, ROW, M, M2, W, W2)
    lower = _decode(ring, stage, FORMAT, ROW + 64, M)
    accb, accb2 = _multiply(lower, ring, stage, accb, accb2, M2, W, W2)
    acc, acc2, accb, accb2, upper = _retire_both(acc, acc2, accb, accb2, upper, 1, W2)
    last = stage
    stage, phase = following(stage, phase, STAGES)
    for _ in range(1, blocks):
        upper, acc, acc2 = _step(ring, stage, phase, acc, acc2, FORMAT, ROW, M, M2, W, W2)
        acc, acc2, accb, accb2, lower = _retire_both(acc, acc2, accb, accb2, lower, 1, W2)
        mbarrier.arrive(empty.index(last))
        lower = _decode(ring, stage, FORMAT, ROW + 64, M)
        accb, accb2 = _multiply(lower, ring, stage, accb, accb2, M2, W, W2)
        acc, acc2, accb, accb2, upper = _retire_both(acc, acc2, accb, accb2, upper, 1, W2)
        last = stage
        stage, phase = following(stage, phase, STAGES)
    acc, acc2, accb, accb2, lower = _retire_both(acc, acc2, accb, accb2, lower, 0, W2)
    mbarrier.arrive(empty.index(last))
    return acc, acc2, accb, accb2, stage, phase
