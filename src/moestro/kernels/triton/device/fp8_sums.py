"""Sums of fp8_registers.py: products that stay in the tensor core for a span of columns, then are added in float32.

Hopper's FP8 products keep about 14 bits of the sums they add to, and lose more the more they add; but an addition into
float32 is an instruction for each 32 sums, and holds the next products up. A span of 512 columns takes a quarter of the
additions that 128 do, and the error of a layer is 0.6 % for 0.4 (docs/numerics.md). A consumer keeps both, sums and
products, so its tiles are at most 192 pairs for 64 rows.

A stage has two blocks of 128 columns: waiting for one, and giving it back, is three barriers of a consumer's threads, and
cost as much as decoding half a block. The last block of an odd number is a span of its own.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from moestro.kernels.triton.device.fp8 import fence_async_shared, mbarrier
from moestro.kernels.triton.device.fp8_operands import multiply, of_product
from moestro.kernels.triton.device.loops import following

warpgroup_mma_wait = hopper.warpgroup_mma_wait


@gluon.jit
def no_sums(W: gl.constexpr, W2: gl.constexpr):
    """Zeros for the sums of W pairs, and of the W2 pairs beyond."""
    if W2 > 0:
        return (
            gl.zeros([64, W], gl.float32, of_product(W)),
            gl.zeros([64, W2], gl.float32, of_product(W2)),
        )
    else:
        return (gl.zeros([64, W], gl.float32, of_product(W)),)


@gluon.jit
def _arrived(ring, stage, phase, TILE: gl.constexpr):
    """A stage, once it is there; cp.async, which writes gathered rows, is of another proxy than wgmma."""
    mbarrier.wait(ring.full.index(stage), phase)
    if TILE.gathers:
        fence_async_shared()


@gluon.jit
def _retired(part, a, RUNNING: gl.constexpr, W2: gl.constexpr):
    """Wait until no more than RUNNING blocks' products run; the operands a are what the one before those read."""
    if W2 > 0:
        one, two, _, _, _, _ = warpgroup_mma_wait(
            2 * RUNNING, deps=[part[0], part[1], a[0], a[1], a[2], a[3]]
        )
        return (one, two)
    else:
        one, _, _, _, _ = warpgroup_mma_wait(RUNNING, deps=[part[0], a[0], a[1], a[2], a[3]])
        return (one,)


@gluon.jit
def _retired_both(up, low, a, RUNNING: gl.constexpr, W2: gl.constexpr):
    """As `_retired`, of products of two strips of rows."""
    if W2 > 0:
        u, u2, v, v2, _, _, _, _ = warpgroup_mma_wait(
            2 * RUNNING, deps=[up[0], up[1], low[0], low[1], a[0], a[1], a[2], a[3]]
        )
        return (u, u2), (v, v2)
    else:
        u, v, _, _, _, _ = warpgroup_mma_wait(RUNNING, deps=[up[0], low[0], a[0], a[1], a[2], a[3]])
        return (u,), (v,)


@gluon.jit
def _added(acc, part, W2: gl.constexpr):
    if W2 > 0:
        return (acc[0] + part[0], acc[1] + part[1])
    else:
        return (acc[0] + part[0],)


@gluon.jit
def sums_of_64(ring, stage, phase, blocks, ROW: gl.constexpr, W: gl.constexpr, W2: gl.constexpr,
               TILE: gl.constexpr):  # fmt: skip
    """Sums of 64 rows of weights from ROW on, over all stages of a tile.

    The tensor core works for the other consumer while this one begins a stage.
    """
    STAGES: gl.constexpr = TILE.span // 2
    acc = no_sums(W, W2)
    part = no_sums(W, W2)
    for first in range(0, blocks // 2, STAGES):
        for number in range(first, gl.minimum(first + STAGES, blocks // 2)):
            _arrived(ring, stage, phase, TILE)
            a, part = multiply(part, ring, 2 * stage, number > first, ROW, W, W2, TILE.powers)
            if not TILE.overlap:  # no registers for two blocks' operands
                part = _retired(part, a, 0, W2)
            b, part = multiply(part, ring, 2 * stage + 1, True, ROW, W, W2, TILE.powers)
            if TILE.overlap:
                part = _retired(part, a, 1, W2)
            part = _retired(part, b, 0, W2)
            mbarrier.arrive(ring.empty.index(stage))
            stage, phase = following(stage, phase, TILE.stages)
        acc = _added(acc, part, W2)
    if blocks % 2 == 1:
        _arrived(ring, stage, phase, TILE)
        a, part = multiply(part, ring, 2 * stage, False, ROW, W, W2, TILE.powers)
        part = _retired(part, a, 0, W2)
        mbarrier.arrive(ring.empty.index(stage))
        stage, phase = following(stage, phase, TILE.stages)
        acc = _added(acc, part, W2)
    return acc, stage, phase


@gluon.jit
def sums_of_128(ring, stage, phase, blocks, ROW: gl.constexpr, W: gl.constexpr, W2: gl.constexpr,
                TILE: gl.constexpr):  # fmt: skip
    """As `sums_of_64`, and of the 64 rows below: one half is decoded while the other is multiplied."""
    STAGES: gl.constexpr = TILE.span // 2
    acc = no_sums(W, W2)
    below = no_sums(W, W2)
    up = no_sums(W, W2)
    low = no_sums(W, W2)
    for first in range(0, blocks // 2, STAGES):
        _arrived(ring, stage, phase, TILE)
        a, up = multiply(up, ring, 2 * stage, False, ROW, W, W2, TILE.powers)
        b, low = multiply(low, ring, 2 * stage, False, ROW + 64, W, W2, TILE.powers)
        up, low, b = _second_block(up, low, a, b, ring, stage, ROW, W, W2, TILE)
        for _ in range(first + 1, gl.minimum(first + STAGES, blocks // 2)):
            after, turned = following(stage, phase, TILE.stages)
            _arrived(ring, after, turned, TILE)
            a, up = multiply(up, ring, 2 * after, True, ROW, W, W2, TILE.powers)
            up, low = _retired_both(up, low, b, 1, W2)
            mbarrier.arrive(ring.empty.index(stage))
            b, low = multiply(low, ring, 2 * after, True, ROW + 64, W, W2, TILE.powers)
            up, low, b = _second_block(up, low, a, b, ring, after, ROW, W, W2, TILE)
            stage = after
            phase = turned
        up, low = _retired_both(up, low, b, 0, W2)
        mbarrier.arrive(ring.empty.index(stage))
        acc = _added(acc, up, W2)
        below = _added(below, low, W2)
        stage, phase = following(stage, phase, TILE.stages)
    if blocks % 2 == 1:
        _arrived(ring, stage, phase, TILE)
        a, up = multiply(up, ring, 2 * stage, False, ROW, W, W2, TILE.powers)
        b, low = multiply(low, ring, 2 * stage, False, ROW + 64, W, W2, TILE.powers)
        up, low = _retired_both(up, low, a, 1, W2)
        up, low = _retired_both(up, low, b, 0, W2)
        mbarrier.arrive(ring.empty.index(stage))
        acc = _added(acc, up, W2)
        below = _added(below, low, W2)
        stage, phase = following(stage, phase, TILE.stages)
    return acc, below, stage, phase


@gluon.jit
def _second_block(up, low, a, b, ring, stage, ROW: gl.constexpr, W: gl.constexpr, W2: gl.constexpr,
                  TILE: gl.constexpr):  # fmt: skip
    """A stage's second block, after the first's operands a and b; all but its last product are retired."""
    up, low = _retired_both(up, low, a, 1, W2)
    a, up = multiply(up, ring, 2 * stage + 1, True, ROW, W, W2, TILE.powers)
    up, low = _retired_both(up, low, b, 1, W2)
    b, low = multiply(low, ring, 2 * stage + 1, True, ROW + 64, W, W2, TILE.powers)
    up, low = _retired_both(up, low, a, 1, W2)
    return up, low, b
