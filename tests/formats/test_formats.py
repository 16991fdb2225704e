"""What holds for every format: the protocol, moving pieces about, and errors on bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moestro.errors as errors
from moestro import formats
from moestro.formats import BF16, MXFP4, NVFP4, FormatTensor, FP8Block, pieces

ALL = [pytest.param(cls, id=name) for name, cls in formats.FORMATS.items()]
QUANTISED = [cls for cls in formats.FORMATS.values() if cls is not BF16]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a: Any, b: Any) -> bool:
    pairs = zip(a.pieces, b.pieces, strict=True)
    return all(torch.equal(p.view(torch.uint8), q.view(torch.uint8)) for p, q in pairs)


def test_get_finds_formats_by_name_and_names_the_nearest() -> None:
    assert [formats.get(name) for name in ("bf16", "nvfp4", "mxfp4", "fp8_block")] == [
        BF16,
        NVFP4,
        MXFP4,
        FP8Block,
    ]
    with pytest.raises(errors.FormatError, match="did you mean 'nvfp4'"):
        formats.get("nvpf4")


@pytest.mark.parametrize("cls", ALL)
def test_every_format_keeps_the_protocol(cls: Any) -> None:
    dense = randn(3, 40, 96)
    q = cls.quantize(dense)
    assert isinstance(q, FormatTensor)
    assert (q.format, q.layout, q.shape, q.device) == (cls.format, "checkpoint", (3, 40, 96), dense.device)
    assert q.nbytes == sum(piece.numel() * piece.element_size() for piece in q.pieces)
    assert q.to_checkpoint() is q
    assert q.to("cpu") is q
    assert formats.get(q.format) is cls
    back = q.dequantize()
    assert back.dtype == torch.float32
    assert (back - dense).norm() <= {
        "bf16": 0,
        "nvfp4": 0.11,
        "mxfp4": 0.13,
        "mxfp8": 0.04,
        "fp8_block": 0.04,
        "int4": 0.11,
    }[cls.format] * dense.norm()
    with pytest.raises(AttributeError):
        q.packed = None


@pytest.mark.parametrize("cls", ALL)
def test_experts_are_views_and_stacking_them_gives_the_whole(cls: Any) -> None:
    q = cls.quantize(randn(4, 5, 64))
    one = q.expert(2)
    assert torch.equal(q.dequantize()[2], one.dequantize())
    assert one.pieces[0].untyped_storage().data_ptr() == q.pieces[0].untyped_storage().data_ptr()
    assert same(q, cls.stack([q.expert(i) for i in range(4)]))
    assert same(q, cls.cat_experts([q.experts(0, 1), q.experts(1, 1), q.experts(1, 4)]))
    for bad in (-1, 4):
        with pytest.raises(errors.ShapeError, match="within \\[0, 4\\)"):
            q.expert(bad)
    with pytest.raises(errors.ShapeError, match=r"\[E, R, C\]"):
        one.expert(0)


@pytest.mark.parametrize("cls", ALL)
def test_gate_and_up_join_along_the_rows(cls: Any) -> None:
    gate, up = cls.quantize(randn(2, 128, 64)), cls.quantize(9 * randn(2, 128, 64, seed=1))
    both = cls.cat_rows([gate, up])
    assert both.shape == (2, 256, 64)
    assert torch.equal(torch.cat((gate.dequantize(), up.dequantize()), dim=1), both.dequantize())


@pytest.mark.parametrize("cls", ALL)
def test_parts_that_differ_are_refused(cls: Any) -> None:
    a, b = cls.quantize(randn(8, 64)), cls.quantize(randn(8, 128))
    for join in (cls.stack, cls.cat_rows):
        with pytest.raises(errors.ShapeError, match=r"parts\[1\]"):
            join([a, b])
        with pytest.raises(errors.ShapeError, match="at least one"):
            join([])
    with pytest.raises(errors.ShapeError, match=r"parts\[0\] must be a tensor \[E, R, C\]"):
        cls.cat_experts([a])


def test_fp8_blocks_join_only_at_block_edges() -> None:
    a = FP8Block.quantize(randn(100, 64))
    with pytest.raises(errors.ShapeError, match="divisible by 128"):
        FP8Block.cat_rows([a, a])


def test_row_groups_do_not_nest() -> None:
    grouped = NVFP4.quantize(randn(4, 32), row_groups=2)
    with pytest.raises(errors.ShapeError, match="one per matrix"):
        NVFP4.cat_rows([grouped, grouped])


class LargestOutput(TorchDispatchMode):
    """Records the most elements that any operation made new."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in before:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("cls", QUANTISED)
def test_quantising_many_experts_never_holds_them_in_float32(
    cls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest new tensor is the result itself, whatever the number of experts."""
    dense = randn(8, 256, 128)
    monkeypatch.setattr(pieces, "CPU_CHUNK", 128 * 128)
    with LargestOutput() as seen:
        q = cls.quantize(dense)
    assert seen.elements == max(piece.numel() for piece in q.pieces)
    with LargestOutput() as seen:
        q.dequantize(torch.bfloat16)
    assert seen.elements == dense.numel()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("cls", QUANTISED)
def test_what_is_not_finite_is_refused_with_its_place(cls: Any, bad: float) -> None:
    dense = randn(2, 3, 5, 32)
    dense[1, 0, 4, 7] = bad
    dense[1, 2, 0, 0] = bad
    count = "0 infinite and 2 NaN" if bad != torch.inf else "2 infinite and 0 NaN"
    with pytest.raises(errors.FormatError, match=rf"{count}.*first at \[1, 0, 4, 7\]"):
        cls.quantize(dense)
    with pytest.raises(errors.FormatError, match=r"1 infinite .*\[0, 1\]"):
        cls.quantize(
            torch.tensor([[0.0, 1e300] * 64], dtype=torch.float64)[:, :32]
            * torch.tensor([0.0, 1.0] + [0.0] * 30)
        )


@pytest.mark.parametrize(
    ("cls", "dense", "error", "message"),
    [
        (NVFP4, torch.zeros(2, 24), errors.ShapeError, "divisible by 16"),
        (MXFP4, torch.zeros(2, 48), errors.ShapeError, "divisible by 32"),
        (NVFP4, torch.zeros(32), errors.ShapeError, "at least 2 dimensions"),
        (FP8Block, torch.zeros(32), errors.ShapeError, "at least 2 dimensions"),
        (BF16, torch.zeros(32), errors.ShapeError, "at least 2 dimensions"),
        (NVFP4, torch.zeros(2, 32, dtype=torch.int32), errors.DTypeError, "got int32"),
        (BF16, torch.zeros(2, 32, dtype=torch.float64), errors.DTypeError, "got float64"),
        (MXFP4, [[0.0]], errors.DTypeError, "got list"),
    ],
)
def test_what_cannot_be_quantised_is_refused(
    cls: Any, dense: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cls.quantize(dense)


def test_a_global_scale_that_does_not_fit_is_refused() -> None:
    dense = randn(2, 6, 32)
    for scale, error, message in [
        (torch.ones(3), errors.ShapeError, r"\[2\], or \[2, 'G'\]"),
        (torch.ones(2, 4), errors.ShapeError, "dividing the 6 rows"),
        (torch.ones(2, 0), errors.ShapeError, "dividing"),
        (torch.ones(2, dtype=torch.float64), errors.DTypeError, "float64"),
        (torch.ones(2, device="meta"), errors.DeviceError, "got meta"),
        (torch.tensor([1.0, 0.0]), errors.FormatError, "positive and finite"),
        (torch.tensor([1.0, torch.inf]), errors.FormatError, "positive and finite"),
    ]:
        with pytest.raises(error, match=message):
            NVFP4.quantize(dense, scale)
    with pytest.raises(errors.ShapeError, match="row_groups must divide the 6 rows"):
        NVFP4.quantize(dense, row_groups=4)
    with pytest.raises(errors.ShapeError, match="row_groups must be left out"):
        NVFP4.quantize(dense, torch.ones(2), row_groups=2)
    with pytest.raises(errors.ShapeError, match=r"\[N, H\]"):
        NVFP4.quantize_rows(dense)


def test_pieces_that_do_not_fit_together_are_refused() -> None:
    nv, mx, fp8 = (cls.quantize(randn(2, 6, 64)) for cls in (NVFP4, MXFP4, FP8Block))
    cases: list[tuple[Any, tuple[Any, ...], type[Exception], str]] = [
        (NVFP4, (nv.packed.int(), nv.scale, nv.global_scale), errors.DTypeError, "packed must be uint8"),
        (
            NVFP4,
            (nv.packed, nv.scale.float(), nv.global_scale),
            errors.DTypeError,
            "scale must be float8_e4m3fn",
        ),
        (
            NVFP4,
            (nv.packed, nv.scale, nv.global_scale.half()),
            errors.DTypeError,
            "global_scale must be float32",
        ),
        (NVFP4, (nv.packed[..., :4], nv.scale, nv.global_scale), errors.ShapeError, "C divisible by 16"),
        (
            NVFP4,
            (nv.packed, nv.scale[..., :2], nv.global_scale),
            errors.ShapeError,
            r"scale must have shape \[2, 6, 4\]",
        ),
        (
            NVFP4,
            (nv.packed, nv.scale, nv.global_scale[:1]),
            errors.ShapeError,
            "global_scale must have shape",
        ),
        (
            NVFP4,
            (nv.packed, nv.scale.to("meta"), nv.global_scale),
            errors.DeviceError,
            "scale must be on cpu",
        ),
        (MXFP4, (mx.packed, mx.scale.float()), errors.DTypeError, "scale must be uint8"),
        (MXFP4, (mx.packed, mx.scale[:1]), errors.ShapeError, r"\[2, 6, 2\]"),
        (FP8Block, (fp8.data, fp8.scale_inv[:, :0]), errors.ShapeError, r"\[2, 1, 1\]"),
        (FP8Block, (fp8.data.float(), fp8.scale_inv), errors.DTypeError, "data must be float8_e4m3fn"),
        (BF16, ([1.0],), errors.DTypeError, "got list"),
    ]
    for cls, args, error, message in cases:
        with pytest.raises(error, match=message):
            cls(*args)
    with pytest.raises(errors.ShapeError, match=r"C/32, 16"):
        MXFP4.from_gpt_oss(mx.packed, mx.scale)


@pytest.mark.parametrize("cls", ALL)
def test_dequantise_refuses_an_out_that_does_not_fit(cls: Any) -> None:
    q = cls.quantize(randn(4, 32))
    with pytest.raises(errors.DTypeError, match="dtype must be"):
        q.dequantize(torch.int8)
    with pytest.raises(errors.DTypeError, match="out must be bfloat16"):
        q.dequantize(torch.bfloat16, out=torch.empty(4, 32))
    with pytest.raises(errors.ShapeError, match=r"out must have shape \[4, 32\]"):
        q.dequantize(out=torch.empty(32, 4))
    with pytest.raises(errors.ShapeError, match="contiguous"):
        q.dequantize(out=torch.empty(32, 4).T)
    with pytest.raises(errors.DeviceError, match="out must be on cpu"):
        q.dequantize(out=torch.empty(4, 32, device="meta"))
