"""Argument checks that the formats share; each raises an error of ours."""

from __future__ import annotations

import torch

from moestro.errors import DeviceError, DTypeError, FormatError, ShapeError

DENSE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def require_tensor(name: str, value: object) -> None:
    """DTypeError unless `value` is a torch.Tensor."""
    if not isinstance(value, torch.Tensor):
        raise DTypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def require_dtype(name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    """DTypeError unless `tensor` is a tensor of one of the `allowed` dtypes."""
    require_tensor(name, tensor)
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise DTypeError(f"{name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")


def require_float_dtype(dtype: torch.dtype) -> None:
    """DTypeError unless `dtype` is one that dense values come in."""
    if dtype not in DENSE_DTYPES:
        raise DTypeError(f"dtype must be bfloat16, float16, float32 or float64, got {dtype}")


def require_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...], why: str) -> None:
    """ShapeError unless `tensor` has exactly the `expected` shape."""
    if tuple(tensor.shape) != expected:
        raise ShapeError(f"{name} must have shape {list(expected)} ({why}), got {list(tensor.shape)}")


def require_one_device(**tensors: torch.Tensor) -> None:
    """DeviceError unless all tensors are on the device of the first."""
    (first, at), *others = ((name, tensor.device) for name, tensor in tensors.items())
    for name, device in others:
        if device != at:
            raise DeviceError(f"{name} must be on {at}, where {first} is, got {device}")


def require_mx(name: str, values: torch.Tensor, scale: torch.Tensor, block: int, per_item: int = 1) -> None:
    """Check the pieces of an MX format: values [..., R, C / per_item], and one e8m0 scale (uint8) per `block` of C."""
    require_dtype("scale", scale, torch.uint8)
    require_one_device(**{name: values, "scale": scale})
    *outer, items = values.shape or (0,)
    if len(outer) < 1 or items * per_item % block:
        columns = "C" if per_item == 1 else f"C/{per_item}"
        raise ShapeError(
            f"{name} must have shape [..., R, {columns}], C divisible by {block}, got {list(values.shape)}"
        )
    require_shape("scale", scale, (*outer, items * per_item // block), f"one per {block} columns")


def require_dense(name: str, dense: torch.Tensor, block: int = 1) -> None:
    """Check that `dense` can be quantised: floating point [..., R, C] with C a multiple of `block`."""
    require_dtype(name, dense, *DENSE_DTYPES)
    if dense.ndim < 2:
        raise ShapeError(f"{name} must have at least 2 dimensions [..., R, C], got {list(dense.shape)}")
    if dense.shape[-1] % block:
        raise ShapeError(
            f"{name} must have a last dimension divisible by {block} (one scale per {block} columns), "
            f"got {list(dense.shape)}"
        )


def require_finite(name: str, dense: torch.Tensor, amax: torch.Tensor, format: str) -> None:
    """FormatError if `amax`, the largest magnitudes of `dense`, are not all finite. Waits for the device."""
    if bool(torch.isfinite(amax).all()):
        return
    nans, infs, first = 0, 0, None
    for i, matrix in enumerate(dense.flatten(0, -3) if dense.ndim > 2 else dense[None]):
        bad = ~torch.isfinite(matrix.float())  # float64 beyond float32 counts as infinite here
        if bool(bad.any()):
            nans += int(torch.isnan(matrix).sum())
            infs += int(bad.sum()) - int(torch.isnan(matrix).sum())
            first = first or (*_unravel(i, dense.shape[:-2]), *bad.nonzero()[0].tolist())
    raise FormatError(
        f"{name} must be finite (in float32) for {format}, which holds neither infinities nor NaN; "
        f"got {infs} infinite and {nans} NaN values, the first at {list(first or ())} of {list(dense.shape)}"
    )


def require_scale(
    name: str, scale: torch.Tensor, *, zero: bool = False, at: str = "expert", start: int = 0
) -> None:
    """FormatError unless every scale is finite and positive (zero: or 0), naming the first that is not.

    at: what the first dimension counts; start: its first.

    For scales that come from outside, once: it waits for the device. A tensor without values passes.
    """
    if scale.is_meta or torch.compiler.is_compiling():
        return
    values = scale.float()
    bad = ~(torch.isfinite(values) & ((values >= 0) if zero else (values > 0)))
    if not bool(bad.any()):
        return
    first = bad.nonzero()[0].tolist()
    place = f" at {at} {start + first[0]}" if first else ""
    place += f", {first[1:]}" if len(first) > 1 else ""
    wanted = "finite and not negative" if zero else "finite and positive"
    raise FormatError(f"{name} must be {wanted}, got {float(values[tuple(first)])}{place}")


def require_block_scales(name: str, scale: torch.Tensor, start: int = 0) -> None:
    """The same of e4m3 block scales [E, ...], of which 0 is one: no NaN, nothing negative. Reads bytes, expert by expert."""
    if scale.is_meta or not scale.numel() or torch.compiler.is_compiling():
        return
    codes = scale.view(torch.uint8)
    bad = torch.stack([(((c & 0x7F) == 0x7F) | (c > 0x80)).any() for c in codes])
    if bool(bad.any()):
        raise FormatError(
            f"{name} must be finite and not negative, got a NaN or a negative block scale at expert "
            f"{start + int(bad.nonzero()[0])}"
        )


def require_e8m0_scales(name: str, scale: torch.Tensor, start: int = 0) -> None:
    """FormatError unless none of these e8m0 block scales [E, ...] is NaN, which is their code 255."""
    if scale.is_meta or not scale.numel() or torch.compiler.is_compiling():
        return
    bad = torch.stack([(codes == 255).any() for codes in scale])
    if bool(bad.any()):
        raise FormatError(
            f"{name} must be finite, got a NaN block scale (e8m0 255) at expert {start + int(bad.nonzero()[0])}"
        )


def _unravel(index: int, shape: torch.Size) -> tuple[int, ...]:
    out: list[int] = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        out.append(rest)
    return tuple(reversed(out))
