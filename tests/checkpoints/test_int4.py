"""INT4 checkpoints: compressed-tensors by its own library, AWQ and GPTQ by the packing of their code, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moestro
from moestro.checkpoints import Experts, Safetensors
from moestro.checkpoints.int4 import from_awq, from_compressed_tensors, from_gptq, to_compressed_tensors
from moestro.checkpoints.scheme import parse
from moestro.errors import DTypeError, FormatError, ShapeError
from moestro.formats import INT4

E, H, I, P = 3, 256, 128, "model.layers.0.mlp.experts"  # noqa: E741
SIZES = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(codes: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
    """[A, 8 B] codes to int32 [A, B], nibble i from column order[i]: AutoAWQ's and AutoGPTQ's loops."""
    out = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for i, column in enumerate(order or range(8)):
        out |= codes[:, column::8].long() << 4 * i
    return (out & 0xFFFFFFFF).where(out < 2**31, (out & 0xFFFFFFFF) - 2**32).to(torch.int32)


def drawn(r: int, c: int, group: int, g: torch.Generator, low: int = 0, high: int = 16) -> Any:
    codes = torch.randint(0, 16, (r, c), generator=g)
    scale = (torch.rand(r, c // group, generator=g) + 0.1).half()
    zero = torch.randint(low, high, (r, c // group), generator=g)
    wide = [t.repeat_interleave(group, 1) for t in (zero, scale.float())]
    return codes, scale, zero, (codes - wide[0]).float() * wide[1]


def awq(r: int, c: int, g: torch.Generator, group: int = 128) -> Any:
    codes, scale, zero, dense = drawn(r, c, group, g)
    pieces = {
        "qweight": words(codes.T, ORDER),
        "qzeros": words(zero.T, ORDER),
        "scales": scale.T.contiguous(),
    }
    return pieces, dense


def gptq(r: int, c: int, g: torch.Generator, group: int = 128) -> Any:
    codes, scale, zero, dense = drawn(r, c, group, g, 1, 17)
    pieces = {
        "qweight": words(codes).T.contiguous(),
        "qzeros": words((zero - 1).T),
        "scales": scale.T.contiguous(),
        "g_idx": (torch.arange(c) // group).int(),
    }
    return pieces, dense


def compressed(group: int, symmetric: bool, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What compressed-tensors itself writes and reads."""
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    strategy = {"strategy": "group", "group_size": group}
    weights = library.quantization.QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, **strategy)
    scheme = library.quantization.QuantizationScheme(targets=["Linear"], weights=weights)

    def make(r: int, c: int, g: torch.Generator) -> Any:
        dense = torch.randn(r, c, generator=g).to(dtype) + 0.3
        groups = dense.view(r, c // group, group)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), weights)
        state = {"weight": dense, "weight_scale": scale, "weight_zero_point": zero}
        packed = PackedQuantizationCompressor.compress(state, scheme)
        truth = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
        if symmetric:
            packed.pop("weight_zero_point", None)
        return packed, truth

    return make


LAYOUTS = {
    "AWQ int4": awq,
    "AWQ int4, g32": lambda r, c, g: awq(r, c, g, 32),
    "GPTQ int4": gptq,
    "GPTQ int4, g32": lambda r, c, g: gptq(r, c, g, 32),
    "compressed-tensors pack-quantized int4": compressed(32, True),
    "compressed-tensors pack-quantized int4, g128": compressed(128, True),
    "compressed-tensors pack-quantized int4, asymmetric": compressed(32, False),
    "compressed-tensors pack-quantized int4, asymmetric, g128": compressed(128, False, torch.float16),
}


def checkpoint(make: Any) -> tuple[dict[str, torch.Tensor], dict[Any, torch.Tensor]]:
    g, tensors, dense = torch.Generator().manual_seed(0), {}, {}
    for e in range(E):
        for name, (r, c) in SIZES.items():
            pieces, dense[e, name] = make(r, c, g)
            tensors |= {f"{P}.{e}.{name}.{suffix}": piece for suffix, piece in pieces.items()}
    return tensors, dense


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_stands_for_the_producers_values(tmp_path: Path, layout: str) -> None:
    tensors, dense = checkpoint(LAYOUTS[layout])
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    experts = Experts(Safetensors(tmp_path), P)
    assert layout.startswith(experts.layout)
    w = moestro.ExpertWeights.from_experts(experts, "portable")
    assert w.format == "int4"
    dtype = dense[0, "up_proj"].dtype  # compressed-tensors rounds to the scales' dtype
    gate_up, down = w.dequantize(dtype)
    for e in range(E):
        assert torch.equal(gate_up[e], torch.cat([dense[e, "gate_proj"], dense[e, "up_proj"]]))
        assert torch.equal(down[e], dense[e, "down_proj"])
    [layer] = moestro.checkpoints.inspect(tmp_path).layers
    assert (layer.format, layer.layout) == ("int4", experts.layout)


@pytest.mark.parametrize("group", [32, 128, 256])  # 256: one group a row
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_reads_what_is_written_bit_for_bit(group: int, symmetric: bool) -> None:
    g = torch.Generator().manual_seed(1)
    q = INT4.quantize(torch.randn(44, 256, generator=g) + 0.2, group, symmetric=symmetric)
    pieces = to_compressed_tensors(q)
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    strategy = {"strategy": "group", "group_size": group}
    weights = library.quantization.QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, **strategy)
    scheme = library.quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    theirs = PackedQuantizationCompressor.decompress(pieces, scheme)["weight"]
    assert torch.equal(theirs, q.dequantize(torch.bfloat16))


def test_activation_order_is_refused_by_name() -> None:
    tensors, _ = checkpoint(gptq)
    name = f"{P}.1.up_proj.g_idx"
    tensors[name] = tensors[name][torch.randperm(H, generator=torch.Generator().manual_seed(0))]
    with pytest.raises(FormatError, match=r"1\.up_proj.*desc_act"):
        moestro.ExpertWeights.from_experts(Experts(tensors, P), "portable")
    tensors, _ = checkpoint(compressed(32, True))
    for e in range(E):
        for projection, (_, c) in SIZES.items():
            tensors[f"{P}.{e}.{projection}.weight_g_idx"] = torch.arange(c, dtype=torch.int32)
    with pytest.raises(FormatError, match="weight_g_idx"):
        Experts(tensors, P)


def test_eight_bits_are_refused() -> None:
    tensors, _ = checkpoint(compressed(32, True))
    name = f"{P}.0.gate_proj.weight_packed"
    tensors[name] = torch.cat([tensors[name]] * 2, 1)
    with pytest.raises(FormatError, match=r"0\.gate_proj.*which is 8 bits a weight"):
        moestro.ExpertWeights.from_experts(Experts(tensors, P), "portable")


COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
            "desc_act of gptq must be False",
        ),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "bits of gptq must be 4, got 8"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, "checkpoint_format of gptq"),
        (
            {"quant_method": "gptq", "bits": 4, "format": "gptq_v2"},
            "format of gptq must be 'gptq', got 'gptq_v2'",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version of awq must be 'gemm', got 'gemv'"),
        ({"quant_method": "awq", "bits": 4, "format": "gemv"}, "format of awq must be 'gemm', got 'gemv'"),
        (
            {**COMPRESSED, "transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
            "transform_config of compressed-tensors must have no config_groups, got u",
        ),
        (
            {**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config .*'dense', got 'sparse-24-bitmask'",
        ),
        (
            {**COMPRESSED, "config_groups": {"g": {"weights": {"num_bits": 8}}}},
            "num_bits of g must be 4 for pack-quantized, got 8",
        ),
        (
            {**COMPRESSED, "config_groups": {"g": {"weights": {"num_bits": 4, "actorder": "group"}}}},
            "actorder of g",
        ),
    ],
)
def test_configs_that_mean_something_else_are_refused(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        parse(raw)


def test_configs_that_are_read() -> None:
    assert "INT4" in str(parse({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "GEMM"}))
    assert "INT4" in str(parse({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}))
    kimi = {"weights": {"num_bits": 4, "group_size": 32, "type": "int", "symmetric": True, "actorder": None}}
    plain = {"transform_config": {}, "sparsity_config": {"format": "dense"}, "global_compression_ratio": 1.5}
    assert "pack-quantized" in str(parse({**COMPRESSED, **plain, "config_groups": {"group_0": kimi}}))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.int8])
@pytest.mark.parametrize(
    ("make", "read", "names"),
    [
        (gptq, from_gptq, ("qweight", "qzeros")),
        (awq, from_awq, ("qweight", "qzeros")),
        (None, from_compressed_tensors, ("packed", "zero")),
    ],
)
def test_words_of_another_type_are_refused(make: Any, read: Any, names: Any, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(5)
    if make is None:
        q = INT4.quantize(torch.randn(64, 256, generator=g), symmetric=False)
        pieces = to_compressed_tensors(q)
        pieces = {name: pieces[f"weight_{was}"] for name, was in
                  (("packed", "packed"), ("scale", "scale"), ("shape", "shape"), ("zero", "zero_point"))}  # fmt: skip
    else:
        pieces = make(64, 256, g)[0]
    read(**pieces)
    for name in names:
        with pytest.raises(DTypeError, match=f"{name}.* must be int32, got"):
            read(**{**pieces, name: pieces[name].to(dtype)})
        with pytest.raises(ShapeError, match=f"{name}.* must be a matrix"):
            read(**{**pieces, name: pieces[name][0]})


def test_a_weight_shape_of_one_size_is_refused() -> None:
    pieces = to_compressed_tensors(INT4.quantize(torch.randn(64, 256)))
    with pytest.raises(ShapeError, match="weight_shape must hold 2 sizes, got"):
        from_compressed_tensors(pieces["weight_packed"], pieces["weight_scale"], pieces["weight_shape"][:1])
