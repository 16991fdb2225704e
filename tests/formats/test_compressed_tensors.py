"""Against compressed-tensors, which vLLM and llm-compressor use: the same codes and scales.

The only difference in values: it divides by weight_global_scale, we multiply by its rounded reciprocal, so
values agree to 2 units in the last place (and exactly where the global scale is a power of two).
"""

from __future__ import annotations

import pytest
import torch

from moestro.formats import MXFP4, NVFP4, e2m1

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

NVFP4_ARGS = QuantizationArgs(
    num_bits=4,
    type="float",
    strategy="tensor_group",
    group_size=16,
    symmetric=True,
    scale_dtype=torch.float8_e4m3fn,
    zp_dtype=torch.float8_e4m3fn,
)
MXFP4_ARGS = QuantizationArgs(
    num_bits=4,
    type="float",
    strategy="group",
    group_size=32,
    symmetric=True,
    scale_dtype=torch.uint8,
    zp_dtype=torch.uint8,
)


def weights(rows: int, columns: int) -> torch.Tensor:
    """Rows of very different size, zeros among them, so that scales go down to subnormal ones and to zero."""
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    dense *= torch.logspace(-7, 2, rows).unsqueeze(-1)
    dense[rows // 2, : columns // 2] = 0
    return dense


def theirs(
    dense: torch.Tensor, args: QuantizationArgs, global_scale: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """(packed, scale, values) as compressed-tensors makes them."""
    blocks = dense.unflatten(-1, (-1, args.group_size))
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=global_scale)
    codes = quantize(dense, scale, None, args, global_scale=global_scale)
    values = dequantize(codes, scale, None, args, global_scale=global_scale, dtype=torch.float32)
    return pack_fp4_to_uint8(codes.bfloat16()), scale.float(), values


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("shape", [(9, 64), (64, 256)])
def test_nvfp4_has_the_same_codes_scales_and_values(shape: tuple[int, int], power_of_two: bool) -> None:
    dense = weights(*shape)
    divisor = generate_gparam(dense.min(), dense.max())  # [1]
    if power_of_two:
        divisor = torch.exp2(torch.log2(divisor).floor())
    packed, scale, values = theirs(dense, NVFP4_ARGS, divisor)
    ours = NVFP4.quantize(dense, 1 / divisor.squeeze())
    dead = (
        ours.scale.float() == 0
    )  # a block under every scale: theirs gets an arbitrary scale, values of 0 in both
    assert bool(dead.any())
    assert torch.equal(scale[~dead], ours.scale.float()[~dead])
    assert torch.equal(e2m1.unpack(packed) & 7, e2m1.unpack(ours.packed) & 7)
    torch.testing.assert_close(ours.dequantize(), values, rtol=0 if power_of_two else 3e-7, atol=0)
    read = NVFP4.from_compressed_tensors(packed, scale.to(torch.float8_e4m3fn), divisor)
    torch.testing.assert_close(read.dequantize(), values, rtol=0 if power_of_two else 3e-7, atol=0)


def test_our_own_global_scale_is_theirs_inverted() -> None:
    dense = weights(9, 64)
    divisor = generate_gparam(dense.min(), dense.max()).squeeze()
    torch.testing.assert_close(NVFP4.quantize(dense).global_scale, 1 / divisor, rtol=3e-7, atol=0)


def test_they_unpack_our_bytes_to_our_codes() -> None:
    q = NVFP4.quantize(weights(9, 64))
    assert torch.equal(unpack_fp4_from_uint8(q.packed, 9, 64).float(), e2m1.decode(q.packed))


def test_mxfp4_has_the_same_codes_and_scales() -> None:
    dense = weights(64, 256)
    dense = dense[
        (dense.unflatten(-1, (-1, 32)).abs().amax(-1) > 0).all(-1)
    ]  # of zeros, the scale is arbitrary
    packed, scale, values = theirs(dense, MXFP4_ARGS, None)
    ours = MXFP4.quantize(dense)
    assert torch.equal(packed, ours.packed)
    assert torch.equal(torch.log2(scale) + 127, ours.scale.float())
    assert torch.equal(values, ours.dequantize())
