"""How persistent programs share tiles out, and end: what all products in Gluon have in common.

A program takes every tile whose number is its own plus a multiple of their number. The table of tiles of pairs ends
with its smallest (sort.py), and every other round goes through the programs backwards. Tiles of pairs walk the strips
of rows in groups, which keeps both operands of a group in L2.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _exit(x):
    gl.inline_asm_elementwise("exit;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _zero(x):
    """0, but the compiler does not know: what is added to it is computed in this tile, not kept for all."""
    return 64 * gl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _total(call, GROUP: gl.constexpr):
    """Of tiles, rounded up to the same number for each program."""
    programs = gl.num_programs(0)
    return gl.cdiv(call.tiles * call.strips, programs) * programs


@gluon.jit
def _tile(call, number, GROUP: gl.constexpr):
    """(strip of rows, expert, first place, pairs up to the end of the expert; 0 where there is no tile).

    Every other round goes through the programs backwards: the table ends with its smallest tiles (sort.py), and those
    are for the programs that had the later, so the smaller ones of the round before.
    """
    programs = gl.num_programs(0)
    turn = number // programs
    back = (2 * turn + 1) * programs - 1 - number
    tile = number + turn % 2 * (back - number)
    walk = GROUP * call.strips
    group = tile // walk
    within = tile - group * walk
    wide = gl.maximum(gl.minimum(call.tiles - group * GROUP, GROUP), 1)  # the last group may be narrower
    t = group * GROUP + within % wide
    works = tile < call.tiles * call.strips
    table, stride = call.routing.table, call.stride
    start = gl.load(table + stride + t, works, other=0)
    end = gl.load(table + 2 * stride + t, works, other=0)
    return within // wide, gl.load(table + t, works, other=0), start, end - start
