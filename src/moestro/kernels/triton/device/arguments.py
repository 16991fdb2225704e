"""What the kernels take, in groups with field names: tensors and sizes of a call, and constants of a kernel.

Triton specialises every integer in a group, whatever `do_not_specialize` says: so a group holds only what is the same
in all calls of a layer, and what changes with the number of tokens is an argument of its own. No field may have a
name that Triton's tuple has itself (`values`, `type`).
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Rows(NamedTuple):
    """What a product multiplies with the weights: [rows, columns], and float32 [rows] scales or None."""

    data: Any
    scale: Any


class Routing(NamedTuple):
    """Pairs and their experts; `sorted_pairs` and `table` (sort.py) are anything where pairs are not sorted."""

    ids: Any  # int32 [N, K], global
    weights: Any  # float32 [N, K]
    sorted_pairs: Any  # int32 [P]
    table: Any  # int32 [3 * stride + 1]


class Weights(NamedTuple):
    """One product's weights in a layout of layout.py, or dense (data alone); bias float [L, rows] or None."""

    data: Any
    scales: Any
    row_scale: Any  # float32 [L, kernel rows]
    bias: Any


class Size(NamedTuple):
    """One product: rows and columns of the checkpoint's matrix, elements from row to row of its result, experts."""

    rows: Any
    columns: Any
    out_stride: Any
    offset: Any  # the first local expert
    experts: Any  # L
    top_k: Any


class Both(NamedTuple):
    """Something of the first and of the second product."""

    first: Any
    second: Any


class Product(NamedTuple):
    """Constants of a product: what is computed."""

    stage: int  # 1: x to the intermediate; 2: the intermediate to the pairs' results
    format: int  # of the weights, decode.py
    scale_rows: int  # rows of a block that share a scale
    word_bits: int
    even: bool  # columns are whole blocks of 64
    gated: bool
    act: int  # activations, common.py
    alpha: float
    limit: float | None
    shift: float
    by_pair: bool  # stage 1 reads a row of x for each pair, not for each token
    weighted: bool  # stage 2 multiplies by the routing weight
    split_k: int  # programs that share a tile's columns


class Schedule(NamedTuple):
    """Constants of a product: how a tile is computed."""

    rows: int  # of weights
    pairs: int
    narrow: bool  # a tile of few pairs runs a narrower loop
    k_blocks: int  # of 64 columns a step
    stages: int
    overlap: bool  # the products of a step run together
    route: int  # fused.py
    search: int  # at least the number of pairs, where every program finds its own
    group: int  # slots of pairs that walk the strips of rows together
    prefetch: int  # of a chain: bytes of weights that a waiting tile asks into L2


class Spot(NamedTuple):
    """Where a tile is: its expert, strip of rows, part of the columns, first pair, number of pairs."""

    expert: Any
    strip: Any
    part: Any
    place: Any
    count: Any


class Signal(NamedTuple):
    """Of a chain: the counter of a slot's finished first tiles, and how many there are."""

    counter: Any
    wanted: Any
