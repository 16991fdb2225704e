"""Public layers on packed weights run as the reference does: in Triton's interpreter, on a pretended chip."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", minversion="3.8")  # whose interpreter has dot_scaled

import cuda_machine
import gluon_machine
from chips import pretend, taken
from test_packed_layers import Kind, name

from moestro import ExpertWeights, FusedMoE, formats, fused_moe, reference
from moestro.bench import checkup
from moestro.formats import MXFP4, MXFP8, NVFP4, FP8Block
from moestro.formats.base import CHECKPOINT
from moestro.kernels.triton import nvrtc
from moestro.kernels.triton.device import fp8_gemm
from moestro.kernels.triton.fp8_layout import TritonE4M3
from moestro.kernels.triton.paths import by_place, fp8_cuda, fp8_once_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a chip of another capability is here")
E, K = 3, 2
TOLERANCE = 1e-2  # of the relative norm; the interpreter rounds to bfloat16 towards zero
# its rounding to e4m3 loses the carry where a mantissa is rounded up to a power of two: test_fp8_mx.py is exact there
FP8_TOLERANCE = 0.1


def sizes_of(format: str) -> tuple[int, int]:
    """(H, I), no multiples of the kernels' blocks."""
    return (96, 32) if formats.get(format).block == 32 else (80, 48)


def interpreted(chip: str) -> list[Kind]:
    found = dict.fromkeys([*taken(chip, 96, 32, wgmma=False), *taken(chip, 80, 48, wgmma=False)])
    if chip == "hopper":
        return [Kind(chip, *kind) for kind in found]
    own = (("nvfp4", "nvfp4"), ("mxfp4", "fp8"), ("mxfp8", "fp8"))  # the others run Hopper's kernels
    return [Kind(chip, *kind) for kind in found if kind[:2] in own]


KINDS = [*interpreted("hopper"), *interpreted("sm_100")]


def weights_of(kind: Kind, *, strided: bool = False, sizes: tuple[int, int] | None = None) -> ExpertWeights:
    gen = torch.Generator().manual_seed(0)
    hidden, inter = sizes or sizes_of(kind.format)

    def made(*shape: int, scale: float = 0.1) -> torch.Tensor:
        dense = torch.randn(shape[:-2] + shape[:-3:-1] if strided else shape, generator=gen) * scale
        return dense.mT if strided else dense

    return ExpertWeights.from_dense(
        made(E, 2 * inter, hidden).to(kind.dtype),
        made(E, hidden, inter).to(kind.dtype),
        kind.format,
        gate_up_bias=made(E, 2 * inter, scale=1.0),
        down_bias=made(E, hidden, scale=1.0),
    )


def call(
    num_tokens: int, kind: Kind, hidden: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For the middle rank of three: nobody comes to its expert 1, half the pairs are other ranks'."""
    gen = torch.Generator().manual_seed(2)
    ids = torch.rand(num_tokens, 3 * E, generator=gen).argsort(-1)[:, :K].int()
    ids[:, 0] = ids[:, 0] % 2 * 2 + E
    ids[ids == E + 1] = -7
    x = torch.randn(num_tokens, hidden or sizes_of(kind.format)[0], generator=gen).to(kind.dtype)
    return x, ids.contiguous(), torch.rand(num_tokens, K, generator=gen)


def error(y: torch.Tensor, w: ExpertWeights, kind: Kind, num_tokens: int) -> float:
    truth = reference.fused_moe(
        *call(num_tokens, kind, w.hidden_size), w, input_format=kind.input_format, expert_offset=E
    )
    return float((y.float() - truth).norm() / truth.norm())


def tolerance(kind: Kind) -> float:
    return FP8_TOLERANCE if kind.input_format == "fp8" else TOLERANCE


def options_of(kind: Kind) -> dict[str, Any]:
    return {"backend": "triton", "input_format": kind.input_format, "expert_offset": E, "num_experts": 3 * E}


@pytest.fixture(autouse=True)
def on_chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = request.node.callspec.params.get("kind") if hasattr(request.node, "callspec") else None
    pretend(monkeypatch, kind.chip if kind else "hopper", wgmma=False)


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_a_layer_on_packed_weights_is_the_reference_on_the_checkpoints(kind: Kind) -> None:
    """Odd sizes, biases, an expert without tokens, experts of other ranks; one token, and more."""
    w = weights_of(kind)
    layer = FusedMoE(w, K, 16, dtype=kind.dtype, **options_of(kind))
    half, quantised = kind.dtype == torch.float16, kind.input_format is not None
    for num_tokens in (1,) if half else (9,) if quantised else (1, 9):
        y = layer(*call(num_tokens, kind))
        assert y.dtype == kind.dtype
        assert error(y, w, kind, num_tokens) < tolerance(kind)


@pytest.mark.parametrize(
    ("format", "dtype", "sizes", "invariant"),
    [
        ("nvfp4", torch.bfloat16, (160, 96), False),
        ("mxfp4", torch.float16, (160, 96), False),
        ("fp8_block", torch.bfloat16, (144, 128), False),
        ("fp8_block", torch.bfloat16, (144, 128), True),
    ],
    ids=str,
)
def test_a_layer_of_fp8_products_is_the_reference(
    format: str, dtype: torch.dtype, sizes: tuple[int, int], invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hopper's, which the interpreter does not know, on gluon_machine.py and cuda_machine.py."""
    pretend(monkeypatch, "hopper")
    monkeypatch.setattr(fp8_gemm, "fp8_gemm", gluon_machine.GluonMachine(fp8_gemm.fp8_gemm, 1, {}))
    monkeypatch.setattr(nvrtc, "why_missing", lambda: None)
    for module, kernels in (
        (fp8_cuda, ["PRODUCT"]),
        (fp8_once_cuda, ["PRODUCT"]),
        (by_place, ["INVERT", "SPREAD"]),
    ):
        monkeypatch.setattr(module, "source", cuda_machine.source)
        for one in kernels:
            monkeypatch.setattr(module, one, cuda_machine.CudaMachine(getattr(module, one), 1))
    kind = Kind("hopper", format, "fp8", dtype)
    w = weights_of(kind, sizes=sizes)
    layer = FusedMoE(w, K, 16, dtype=dtype, batch_invariant=invariant, **options_of(kind))
    for num_tokens in (1, 9):
        y = layer(*call(num_tokens, kind, sizes[0]))
        assert y.dtype == dtype
        assert error(y, w, kind, num_tokens) < FP8_TOLERANCE


STRIDED = [
    Kind("hopper", "bf16", None, torch.bfloat16),
    Kind("hopper", "nvfp4", None, torch.bfloat16),
    Kind("sm_100", "nvfp4", "nvfp4", torch.bfloat16),
]


@pytest.mark.parametrize("kind", STRIDED, ids=name)
def test_transposed_weights_and_biases_are_read_as_they_stand(kind: Kind) -> None:
    """The kernels read no strides: a layer holds contiguous copies, and fused_moe makes them once."""
    w = weights_of(kind, strided=True)
    assert not any(t.is_contiguous() for t in (w.gate_up_bias, w.down_bias) if t is not None)
    layer = FusedMoE(w, K, 16, **options_of(kind))
    assert all(t.is_contiguous() for t in layer.weights.tensors)
    assert error(fused_moe(*call(2, kind), w, **options_of(kind)), w, kind, 2) < TOLERANCE
    assert error(layer(*call(2, kind)), w, kind, 2) < TOLERANCE
    assert w.gate_up_bias is not None
    w.gate_up_bias.add_(1.0)  # a copied tensor that is written is copied again
    assert error(layer(*call(2, kind)), w, kind, 2) < TOLERANCE


def transposed(q: Any) -> Any:
    return type(q)(*(p.mT.contiguous().mT if p.ndim > 2 else p for p in q.pieces))


@pytest.mark.parametrize("made", [NVFP4, MXFP4, MXFP8, FP8Block])
def test_pieces_in_any_order_of_memory_are_packed_alike(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where kernels take the checkpoint's own."""
    gen = torch.Generator().manual_seed(0)
    plain = ExpertWeights(
        *(made.quantize(torch.randn(s, generator=gen)) for s in ((2, 256, 160), (2, 160, 128)))
    )
    strided = plain.with_tensors(transposed(plain.gate_up), transposed(plain.down))
    for chip in ("hopper", "sm_100"):
        pretend(monkeypatch, chip)
        for fmt, input_format, dtype in taken(chip, 160, 128):
            if fmt == plain.format and dtype == torch.bfloat16:
                a, b = (w.prepare("triton", input_format=input_format) for w in (plain, strided))
                assert a.layout == b.layout
                assert torch.equal(a.gate_up.dequantize(), b.gate_up.dequantize())
                for part in (b.gate_up, b.down):
                    read = [part.words, part.scales] if b.layout != CHECKPOINT else part.pieces  # type: ignore[attr-defined]
                    assert all(t.is_contiguous() for t in read)
                own = (chip, fmt, input_format) == ("hopper", "fp8_block", "fp8")
                assert isinstance(b.gate_up, TritonE4M3) == own


def test_the_doctor_gives_every_kind_that_is_taken_to_this_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for chip in ("hopper", "sm_100"):
        pretend(monkeypatch, chip)
        found = checkup._first_choices("cuda")
        kinds = list(taken(chip, 2048, 768))
        assert kinds
        for fmt, by_x in found.items():
            for what, options in checkup.ACTIVATIONS.items():
                dtype = options.get("dtype", torch.bfloat16)
                mine = (fmt, options.get("input_format"), dtype) in kinds
                half = (
                    fmt == "bf16" and dtype == torch.float16
                )  # of bf16 weights, which x in float16 does not fit
                assert (by_x[what] == "triton") == mine or half
