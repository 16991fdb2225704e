"""The producer of fp8_registers.py: codes, scales and rows of x into the ring, with as few instructions as it takes.

Consumers are held up by the length of their own chains of instructions, and a producer's share their schedulers
(docs/kernels.md, "What limits FP8 products"). So the tensor memory accelerator copies what lies in order, a box for one
instruction, and cp.async only the rows that are gathered.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moestro.kernels.triton.device.fp8 import async_copy, copy_async, mbarrier, tma_copy
from moestro.kernels.triton.device.loops import following
from moestro.kernels.triton.device.share import _exit, _tile, _total
from moestro.kernels.triton.device.warp_specialized import WHOLE, _rows

shared = gl.shared_memory_descriptor
reinterpret = getattr(shared, "reinterpret", None) or shared._reinterpret  # 3.9, 3.6
PAIRED = gl.constexpr(gl.NVMMASharedLayout(0, 16, 3))  # of scales: strips of 32 times two rows


class Boxes(NamedTuple):
    """What the tensor memory accelerator copies, as descriptors."""

    codes: Any  # strips of 64 rows, rows and columns of a strip: [L * Rb, Cb * 64, 32]
    scales: Any  # [L * Rb, Cb * 32, 8]: two rows together
    x: Any  # by place, as many rows as a tile has pairs; anything where x is gathered
    piece: Any  # of a tile that is half full, and beyond that power of two


@gluon.jit
def produce(ring, call, HOW: gl.constexpr, TILE: gl.constexpr):
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
    """One tile of W + W2 pairs, two blocks of 128 columns a stage."""
    if TILE.gathers:
        return _gather(ring, call, m, e, start, count, stage, phase, HOW, TILE, W, W2)
    else:
        return _copy(ring, call, m, e, start, stage, phase, TILE, W, W2)


@gluon.jit
def _copy_codes(ring, call, m, e, b, full, at, TILE: gl.constexpr):
    """Strips of 64 rows; those beyond an expert's are another's or zeros, and their products are not written."""
    strips = ring.w.index(at).reshape([TILE.rows // 64, 64, 32])
    tma_copy(call.boxes.codes, [e * call.blocks + m * (TILE.rows // 64), b * 64, 0], full, strips)


@gluon.jit
def _copy_scales(ring, call, m, e, b, full, at, TILE: gl.constexpr):
    """As `_copy_codes`: a row of a box has 16 bytes at least, which are two rows of scales."""
    STRIPS: gl.constexpr = TILE.rows // 64
    to = reinterpret(ring.scales.index(at), gl.int16, [STRIPS, 32, 8], PAIRED)
    tma_copy(call.boxes.scales, [e * call.blocks + m * STRIPS, b * 32, 0], full, to)


@gluon.jit
def _expect(full, first, blocks, BYTES: gl.constexpr):
    """BYTES for each block of a stage: two, but for the last of an odd number."""
    if first + 1 < blocks:
        mbarrier.expect(full, 2 * BYTES)
    else:
        mbarrier.expect(full, BYTES)


@gluon.jit
def _copy(ring, call, m, e, start, stage, phase, TILE: gl.constexpr, W: gl.constexpr, W2: gl.constexpr):
    """Rows of x that lie in order: those behind a tile's last are another's or zeros, and their products not written."""
    PIECE: gl.constexpr = call.boxes.piece.block_shape[0]
    blocks = gl.cdiv(call.size.columns, 128)
    for first in range(0, blocks, 2):
        full = ring.full.index(stage)
        mbarrier.wait(ring.empty.index(stage), phase)
        _expect(full, first, blocks, TILE.rows * 72 + (W + W2) * 128)
        for u in gl.static_range(2):
            if u == 0 or first + u < blocks:
                b = first + u
                at = 2 * stage + u
                _copy_codes(ring, call, m, e, b, full, at, TILE)
                _copy_scales(ring, call, m, e, b, full, at, TILE)
                if W == TILE.pairs:
                    tma_copy(call.boxes.x, [start, b * 128], full, ring.x.index(at))
                else:
                    for p in gl.static_range(W // PIECE):
                        to = ring.x.index(at).slice(p * PIECE, PIECE)
                        tma_copy(call.boxes.piece, [start + p * PIECE, b * 128], full, to)
                for p in gl.static_range(W2 // PIECE):
                    to = ring.more_x.index(at).slice(p * PIECE, PIECE)
                    tma_copy(call.boxes.piece, [start + W + p * PIECE, b * 128], full, to)
        stage, phase = following(stage, phase, TILE.stages)
    return stage, phase


@gluon.jit
def _gather(ring, call, m, e, start, count, stage, phase, HOW: gl.constexpr, TILE: gl.constexpr, W: gl.constexpr,
            W2: gl.constexpr):  # fmt: skip
    """Rows of x that are not there are the last one, copied again.

    An address takes one instruction. Scales go by cp.async: as a second box, which four warps would ask for, they take 8 to
    23 instructions more.
    """
    XL: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    blocks = gl.cdiv(call.size.columns, 128)
    rows = _rows(call, start, count, gl.arange(0, W, gl.SliceLayout(1, XL)), HOW).to(gl.int32) * blocks
    if W2 > 0:
        i = W + gl.arange(0, W2, gl.SliceLayout(1, XL))
        rows2 = _rows(call, start, count, i, HOW).to(gl.int32) * blocks
    x = call.x.data + gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, XL)), 0)
    s = _first_scales(call, m, e, blocks, TILE.rows)
    for first in range(0, blocks, 2):
        full = ring.full.index(stage)
        mbarrier.wait(ring.empty.index(stage), phase)
        _expect(full, first, blocks, TILE.rows * 64)
        for u in gl.static_range(2):
            if u == 0 or first + u < blocks:
                at = 2 * stage + u
                _copy_codes(ring, call, m, e, first + u, full, at, TILE)
                copy_async(ring.x.index(at).slice(0, W), x + u * 128 + _bytes(rows))
                if W2 > 0:
                    copy_async(ring.more_x.index(at).slice(0, W2), x + u * 128 + _bytes(rows2))
                copy_async(ring.scales.index(at), s + u * 256)
        async_copy.mbarrier_arrive(full, increment_count=False)
        stage, phase = following(stage, phase, TILE.stages)
        x += 256
        s += 512
    return stage, phase


@gluon.jit
def _bytes(rows):
    """From the first row of x to others, [rows, 1]; rows: the rows times blocks of a row, 32 bits each.

    With the addition to an address one instruction, where a shift takes two. It is volatile as LLVM would else compute them
    before the loop: 64 bits each, which is more than a thread's registers hold.
    """
    found = gl.inline_asm_elementwise(
        "mul.wide.u32 $0, $1, 128;", "=l,r", [rows], dtype=gl.int64, is_pure=False, pack=1
    )
    return gl.expand_dims(gl.multiple_of(found, [128]), 1)


@gluon.jit
def _first_scales(call, m, e, blocks, ROWS: gl.constexpr):
    """Addresses [ROWS, 4] of a tile's first block; rows beyond the expert's are those of its last 64."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    r = gl.arange(0, ROWS, gl.SliceLayout(1, L))
    strip = gl.minimum(m * (ROWS // 64) + r // 64, call.blocks - 1)
    within = strip * (blocks * 256) + r % 64 * 4
    first = call.w.scales + e.to(gl.int64) * call.blocks * blocks * 256
    return first + within[:, None] + gl.arange(0, 4, gl.SliceLayout(0, L))[None, :]
