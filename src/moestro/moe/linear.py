"""A Linear layer whose weight is packed: y = x W^T + b in one of our formats, in place of torch.nn.Linear.

On a CPU it runs on the experts' core, with any number of tokens; elsewhere, and for what the core does not run, the
weight is dequantised for each call and torch multiplies, which is said once. Values are those of the dequantised
weight, summed in float32. The weight is frozen: x (and the bias) get gradients, the weight none.
"""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import torch

from moestro import formats
from moestro.errors import BackendError, DTypeError, FormatError, ShapeError
from moestro.formats import BF16, FormatTensor
from moestro.kernels.cpu import layout
from moestro.kernels.cpu import linear as cpu
from moestro.kernels.portable.quantize import through
from moestro.kernels.problem import INPUT_FORMATS, MoeProblem
from moestro.moe import keyed, linear_op
from moestro.moe.frozen import FrozenWeight
from moestro.moe.workspace import shared

log = logging.getLogger("moestro")
BACKENDS = ("auto", "cpu", "portable")
PREFIX = "moestro."  # of packed tensors in a state dict
SIDE = ("input_scale", "pre_scale")
OWN = ("_runners", "_workspace", keyed.KEY)  # of a module, not of its copies


class PackedLinear(torch.nn.Linear):
    """torch.nn.Linear with a packed weight.

    weight: a format tensor [R, C], or torch's own weight as formats.BF16. bias: [R] or None. dtype: what `weight`
    dequantises to. input_format: None, or what x is quantised to first (not for dense weights); input_scale: its
    calibrated global scale ("nvfp4"). pre_scale: [C], what x is multiplied by first (AWQ). backend: "auto", "cpu"
    (BackendError where it cannot run) or "portable".
    """

    def __init__(
        self,
        weight: FormatTensor,
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        input_format: str | None = None,
        input_scale: torch.Tensor | None = None,
        pre_scale: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        torch.nn.Module.__init__(self)
        if len(weight.shape) != 2:
            raise ShapeError(f"weight must be [R, C], got {list(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ShapeError(f"bias must be [{self.out_features}], got {list(bias.shape)}")
        if pre_scale is not None and tuple(pre_scale.shape) != (self.in_features,):
            raise ShapeError(f"pre_scale must be [{self.in_features}], got {list(pre_scale.shape)}")
        if input_format is not None and input_format not in INPUT_FORMATS:
            raise FormatError(
                f"input_format must be None or one of {sorted(INPUT_FORMATS)}, got {input_format!r}"
            )
        if backend not in BACKENDS:
            raise BackendError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        given = bias if isinstance(bias, torch.nn.Parameter) or bias is None else frozen(bias)
        self.register_parameter("bias", given)
        self.dtype, self.input_format, self.backend = dtype, input_format, backend
        self.input_scale, self.pre_scale = input_scale, pre_scale
        self._hold(weight)

    # --- what is held ---
    def _hold(self, weight: FormatTensor) -> None:
        """Bring the weight into the layout that it runs in."""
        source = BF16(weight.data.detach()) if isinstance(weight, BF16) else weight
        dense = source.data.dtype if isinstance(source, BF16) else None
        native = self.input_format if self.input_format == "int8" else None
        reason = self._why_not(source, dense, native)
        if reason and native:
            native, reason = None, self._why_not(source, dense, None)  # quantised here, and back
        if reason and self.backend == "cpu":
            raise BackendError(reason)
        if reason and self.backend == "auto":
            say_once(source.format, reason)
        self.format = source.format
        if dense is not None:
            self.dtype = dense
        self._native = native
        self._packed = source if reason else cpu.pack(source)
        self._workspace = None if reason else shared(source.device)
        self._runners: dict[tuple[torch.dtype, bool], cpu.CpuLinear] = {}  # by x's dtype and whether biasless

    def _why_not(self, source: FormatTensor, dense: torch.dtype | None, native: str | None) -> str | None:
        if self.backend == "portable":
            return "the portable backend was asked for"
        if source.device.type != "cpu":
            return f"the cpu backend runs on the CPU, not on {source.device}"
        return cpu.why_not(source.format, dense, native)

    @property
    def on(self) -> str:
        """The backend that runs it: "cpu" or "portable"."""
        return "cpu" if isinstance(self._packed, layout.Panels) else "portable"

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self._packed.nbytes

    def unpacked(self) -> FormatTensor:
        """The weight in the checkpoint layout [R, C]."""
        if isinstance(self._packed, layout.Panels):
            return cpu.unpack(self._packed, self.out_features, self.in_features)
        return self._packed

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense values [R, C] that x is multiplied by, with pre_scale in them."""
        dense = self.unpacked().dequantize(
            torch.float32 if self.pre_scale is not None else dtype or self.dtype
        )
        return dense if self.pre_scale is None else (dense * self.pre_scale).to(dtype or self.dtype)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The dequantised values in `dtype`, made anew; writing to them is an error, since nobody would see it."""
        return FrozenWeight.of(self.dequantize())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise BackendError(
                f"the weight of this Linear is packed ({self.format}) and cannot be replaced: put a "
                "torch.nn.Linear with the new weight in its place"
            )
        super().__setattr__(name, value)

    # --- the call ---
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., R] of x [..., C], in x's dtype."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and self._wants_gradient(x)):
            return linear_op.call(self, x, self.bias)
        return self.product(x)

    def _wants_gradient(self, x: torch.Tensor) -> bool:
        bias = self._parameters["bias"]
        return x.requires_grad or (bias is not None and bias.requires_grad)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The call without gradients."""
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"x must be [..., {self.in_features}], got {list(x.shape)}")
        dtype = x.dtype
        if self.pre_scale is not None:
            x = (x.float() * self.pre_scale).to(dtype)
        if self.input_format is not None and self._native is None and self.format != "bf16":
            x = through(self._problem(dtype), x, self._scale())
        if self._workspace is None or not x.is_cpu:
            return self._portable(x).to(dtype)
        bias = self._parameters["bias"]
        runner = self._runners.get((x.dtype, bias is None)) or self._bind(x.dtype, bias is not None)
        y = runner(x if x.is_contiguous() else x.contiguous(), self._workspace, bias)
        return y if y.dtype == dtype else y.to(dtype)

    def _bind(self, dtype: torch.dtype, biased: bool) -> cpu.CpuLinear:
        assert isinstance(self._packed, layout.Panels)
        made = cpu.CpuLinear(self._packed, self.out_features, self.in_features, biased, dtype, self._native)
        self._runners[dtype, not biased] = made
        return made

    def _portable(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            raise DTypeError(f"x must be floating point, got {x.dtype}")
        bias = None if self.bias is None else self.bias.to(x.dtype)
        dense = self.unpacked().dequantize(x.dtype)
        return torch.nn.functional.linear(x, dense, bias)

    def _problem(self, dtype: torch.dtype) -> MoeProblem:
        """What says how x is quantised."""
        return MoeProblem(
            num_experts=1,
            num_local_experts=1,
            expert_offset=0,
            top_k=1,
            hidden_size=self.in_features,
            intermediate_size=self.out_features,
            weight_format=self.format,
            dtype=dtype,
            input_format=self.input_format,
        )

    def _scale(self) -> torch.Tensor | None:
        return self.input_scale if self.input_format == "nvfp4" else None

    # --- moving, copying, saving ---
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        here = self._packed.device
        there = fn(torch.empty(0, dtype=self.dtype, device=here))
        for name in SIDE:
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.to(there.device))
        if there.device != here:
            self._hold(self.unpacked().to(there.device))
        if self.format != "bf16" and there.dtype.is_floating_point:
            self.dtype = there.dtype
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in OWN:
            state.pop(name, None)
        return {**state, "_packed": self.unpacked()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        weight = state.pop("_packed")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._hold(weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        """A copy with a bias of its own; the packed weight is never written, and shared."""
        made = type(self).__new__(type(self))
        memo |= {id(self): made, id(self._packed): self._packed}
        kept = {n: v for n, v in self.__dict__.items() if n not in OWN}
        made.__dict__.update({n: copy.deepcopy(v, memo) for n, v in kept.items()})
        made.__dict__.update(_runners={}, _workspace=self._workspace)
        return made

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        source = self.unpacked()
        if isinstance(source, BF16):
            destination[f"{prefix}weight"] = source.data
        else:
            for piece in type(source).piece_names:  # type: ignore[attr-defined]
                destination[f"{prefix}{PREFIX}{source.format}.{piece}"] = getattr(source, piece)
        for name in SIDE:
            if (value := getattr(self, name)) is not None:
                destination[f"{prefix}{PREFIX}{name}"] = value

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, meta: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        mine = {k.removeprefix(prefix + PREFIX): k for k in list(state) if k.startswith(prefix + PREFIX)}
        parts = {name: state.pop(key) for name, key in mine.items()}
        dense = state.pop(f"{prefix}weight", None)
        pieces = {name: value for name, value in parts.items() if name not in SIDE}
        weight = _from_state(pieces) if pieces else None if dense is None else BF16(dense)
        if weight is not None and weight.shape != (self.out_features, self.in_features):
            errors.append(
                f"{prefix}weight must be {[self.out_features, self.in_features]}, got {list(weight.shape)}"
            )
        elif weight is not None:
            self.input_scale, self.pre_scale = parts.get("input_scale"), parts.get("pre_scale")
            self._hold(weight.to(self._packed.device))
        elif strict:
            missing.append(f"{prefix}weight")
        super()._load_from_state_dict(state, prefix, meta, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        """As torch's, with the format and where it runs."""
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, "
            f"{self.format} on {self.on}"
        )


def frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    """A parameter that wants no gradient."""
    return torch.nn.Parameter(tensor, requires_grad=False)


def _from_state(pieces: dict[str, torch.Tensor]) -> FormatTensor:
    name = next(iter(pieces)).partition(".")[0]
    made: Any = formats.get(name)
    weight: FormatTensor = made(*(pieces[f"{name}.{piece}"] for piece in made.piece_names))
    return weight


@functools.cache
def say_once(format: str, reason: str) -> None:
    """That Linear layers of a format are dequantised for each call, and why."""
    log.warning(
        "Linear layers in %s are dequantised for every call, and multiplied by torch: %s", format, reason
    )
