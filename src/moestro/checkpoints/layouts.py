"""How checkpoints lay out experts: one row a layout, and nothing that is not in a row is read.

A projection (gate, up, down) of an expert is a module with a few tensors, `experts.3.up_proj.weight_scale`; their
suffixes and dtypes tell its layout. Stacked checkpoints have one tensor for all experts, `experts.down_proj_blocks`.
A new layout is a new row: its pieces, what they make, and where its maker puts gate and up.

Sources: compressed-tensors 0.20 (NVFP4PackedCompressor, MXFP4PackedCompressor), int4.py's, NVIDIA ModelOpt 0.47
(export/quant_utils.py), DeepSeek-V3's and -V4's inference code, gpt-oss' checkpoints, Transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from moestro.checkpoints import int4
from moestro.checkpoints.scales import check_block_scales, check_global_scale
from moestro.errors import FormatError, MoestroError
from moestro.formats import BF16, MXFP4, MXFP8, NVFP4, FormatTensor, FP8Block
from moestro.formats.fp8_block import BLOCK
from moestro.formats.mxfp4 import decode_e8m0

E4M3, E8M0, U8 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8
F32, FLOATS = torch.float32, (torch.bfloat16, torch.float16, torch.float32)
I32, INTS = torch.int32, (torch.int32, torch.int64)

Make = Callable[..., FormatTensor]


@dataclass(frozen=True)
class Layout:
    """A row: the tensors that a projection must have, by suffix and dtype, and what they become."""

    name: str
    pieces: dict[str, tuple[torch.dtype, ...]]  # in the order of make's arguments
    make: Make
    side: frozenset[str] = field(
        default_factory=frozenset
    )  # suffixes that may stand beside them, see side.py

    def fits(self, found: dict[str, torch.dtype]) -> bool:
        """Whether a projection with these suffixes and dtypes has this layout."""
        return all(found.get(suffix) in dtypes for suffix, dtypes in self.pieces.items()) and (
            set(found) <= {*self.pieces, *self.side}
        )

    def read(self, where: str, tensors: dict[str, torch.Tensor]) -> FormatTensor:
        """The projection `where` from its tensors by suffix. FormatError that names what does not fit."""
        for suffix, dtypes in self.pieces.items():
            if tensors[suffix].dtype not in dtypes:
                raise FormatError(
                    f"{where}.{suffix} must be {' or '.join(map(str, dtypes))} for {self.name}, "
                    f"got {tensors[suffix].dtype}"
                )
            if suffix in BLOCK_SCALES:
                values = tensors[next(iter(self.pieces))]
                codes = values if values.dtype == U8 else None
                check_block_scales(f"{where}.{suffix}", tensors[suffix], codes)
            elif suffix in GLOBAL_SCALES:
                check_global_scale(f"{where}.{suffix}", tensors[suffix])
        try:
            return self.make(*(tensors[suffix] for suffix in self.pieces))
        except MoestroError as error:
            shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in self.pieces)
            raise FormatError(f"{where} ({shapes}) is no {self.name}: {error}") from error


BLOCK_SCALES = {"weight_scale", "weight_scale_inv", "scale", "scales", "scale_inv"}
GLOBAL_SCALES = {"weight_scale_2", "weight_global_scale"}
CALIBRATED = frozenset({"bias", "input_scale", "pre_quant_scale"})


def as_u8(scale: torch.Tensor) -> torch.Tensor:
    """e8m0 as its bytes."""
    return scale.view(U8) if scale.dtype == E8M0 else scale


def fp8(weight: torch.Tensor, scale: torch.Tensor) -> FormatTensor:
    """e4m3 with scales whose shape says what they cover: 1 x 32, 32 x 32, 128 x 128, or the whole tensor.

    Power-of-two scales (e8m0) per 32 are MXFP8; all others become FP8Block, exactly.
    """
    *lead, rows, columns = weight.shape
    scale = (
        scale.squeeze(-1).squeeze(-2) if scale.ndim == weight.ndim + 2 else scale
    )  # ModelOpt's [R, 1, C, 1]
    blocks = (*lead, -(-rows // BLOCK), -(-columns // BLOCK))
    powers = scale.dtype in (E8M0, U8)
    if powers and scale.shape == (*lead, rows, columns // 32):
        return MXFP8(weight, as_u8(scale))
    values = decode_e8m0(as_u8(scale)) if powers else scale.float()
    if values.shape == blocks:
        return FP8Block(weight, values.contiguous())
    if powers and scale.shape == (*lead, -(-rows // 32), columns // 32):
        return MXFP8.from_blocks(weight, as_u8(scale))
    if values.shape in (tuple(lead), (*lead, 1), (*lead, 1, 1)) or values.numel() == 1:
        return FP8Block(weight, values.reshape(*lead, 1, 1).expand(blocks).contiguous())
    raise FormatError(
        f"scales of e4m3 weights {list(weight.shape)} must cover 128 x 128, the whole tensor, or with powers of "
        f"two (e8m0) 1 x 32 or 32 x 32, got {scale.dtype} {list(scale.shape)}"
    )


def fp4_of_deepseek(weight: torch.Tensor, scale: torch.Tensor) -> FormatTensor:
    """DeepSeek-V4's FP4 experts: e2m1 pairs in int8 with an e8m0 scale per 32 columns."""
    return MXFP4(weight.view(U8), as_u8(scale))


NVFP4_SIDE = frozenset({*CALIBRATED, "input_global_scale"})
# One expert's projections as modules of their own. The first row that fits is the one.
MODULES: tuple[Layout, ...] = (
    Layout(
        "compressed-tensors nvfp4-pack-quantized",
        {"weight_packed": (U8,), "weight_scale": (E4M3,), "weight_global_scale": (F32,)},
        NVFP4.from_compressed_tensors,
        NVFP4_SIDE,
    ),
    Layout(
        "compressed-tensors mxfp4-pack-quantized",
        {"weight_packed": (U8,), "weight_scale": (U8, E8M0)},
        lambda packed, scale: MXFP4(packed, as_u8(scale)),
        CALIBRATED,
    ),
    Layout(
        "ModelOpt NVFP4",
        {"weight": (U8,), "weight_scale": (E4M3,), "weight_scale_2": (F32,)},
        NVFP4.from_modelopt,
        NVFP4_SIDE,
    ),
    Layout(
        "ModelOpt MXFP4",
        {"weight": (U8,), "weight_scale": (U8, E8M0)},
        lambda packed, scale: MXFP4(packed, as_u8(scale)),
        CALIBRATED,
    ),
    Layout("FP8", {"weight": (E4M3,), "weight_scale": (F32, torch.bfloat16, U8, E8M0)}, fp8, CALIBRATED),
    Layout(
        "DeepSeek FP8 block",
        {"weight": (E4M3,), "weight_scale_inv": (F32, torch.bfloat16, U8, E8M0)},
        fp8,
        frozenset({*CALIBRATED, "activation_scale"}),
    ),
    Layout("DeepSeek-V4 FP8", {"weight": (E4M3,), "scale": (F32, U8, E8M0)}, fp8, CALIBRATED),
    Layout("DeepSeek-V4 FP4", {"weight": (torch.int8, U8), "scale": (U8, E8M0)}, fp4_of_deepseek, CALIBRATED),
    Layout(
        "compressed-tensors pack-quantized int4",
        {"weight_packed": (I32,), "weight_scale": FLOATS, "weight_shape": INTS},
        int4.from_compressed_tensors,
        frozenset({"bias"}),
    ),
    Layout(
        "compressed-tensors pack-quantized int4, asymmetric",
        {"weight_packed": (I32,), "weight_scale": FLOATS, "weight_shape": INTS, "weight_zero_point": (I32,)},
        int4.from_compressed_tensors,
        frozenset({"bias"}),
    ),
    Layout(
        "GPTQ int4",
        {"qweight": (I32,), "qzeros": (I32,), "scales": FLOATS, "g_idx": (I32,)},
        int4.from_gptq,
        frozenset({"bias"}),
    ),
    Layout(
        "AWQ int4",
        {"qweight": (I32,), "qzeros": (I32,), "scales": FLOATS},
        int4.from_awq,
        frozenset({"bias"}),
    ),
    Layout("unquantised", {"weight": FLOATS}, BF16, frozenset({"bias"})),
)
# All experts in one tensor; the pieces' suffixes follow the projection's name, "" being the name itself.
STACKED: tuple[Layout, ...] = (
    Layout(
        "gpt-oss MXFP4",
        {"blocks": (U8,), "scales": (U8, E8M0)},
        lambda blocks, scales: MXFP4.from_gpt_oss(blocks, as_u8(scales)),
        frozenset({"bias"}),
    ),
    Layout(
        "Transformers FP8 block",
        {"": (E4M3,), "scale_inv": (F32, torch.bfloat16, U8, E8M0)},
        fp8,
        frozenset({"bias"}),
    ),
    Layout("unquantised", {"": FLOATS}, BF16, frozenset({"bias"})),
)


def recognise(where: str, found: dict[str, torch.dtype], rows: tuple[Layout, ...]) -> Layout:
    """The row of a projection with these suffixes and dtypes. FormatError that names what has no place."""
    for row in rows:
        if row.fits(found):
            return row
    near = [row for row in rows if all(found.get(s) in d for s, d in row.pieces.items())]
    joint = "_" if rows is STACKED else "."
    if near:
        extra = sorted(set(found) - {*near[0].pieces, *near[0].side})
        names = ", ".join(f"{where}{joint}{suffix}" for suffix in extra)
        raise FormatError(f"{names}: {near[0].name} has no place for it, and leaving it out would be wrong")
    raise FormatError(
        f"{where} has {_words(found)}: {_scheme(found)}, which moestro does not read; "
        f"it reads {', '.join(dict.fromkeys(row.name for row in rows))}"
    )


def _words(found: dict[str, torch.dtype]) -> str:
    return ", ".join(f"{s or 'weight'} ({str(d).removeprefix('torch.')})" for s, d in sorted(found.items()))


def _scheme(found: dict[str, torch.dtype]) -> str:
    """What such tensors are called, for an error."""
    dtype = found.get("weight_packed", found.get("weight", found.get("")))
    if dtype == torch.int32:
        return "an integer pack-quantized scheme"
    if "qweight" in found:
        return "an AWQ or GPTQ scheme"
    if dtype in (torch.int8,):
        return "an int8 scheme"
    if dtype == U8 and any("scale_2" in suffix or "global" in suffix for suffix in found):
        return "NVFP4 in a stacked or unknown form"
    if not any(suffix in found for suffix in ("weight", "weight_packed", "qweight", "blocks", "")):
        return "scales or biases without their weight"
    return "no scheme that is known"
