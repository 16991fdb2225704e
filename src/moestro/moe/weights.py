"""The weights of a rank's experts: two format tensors, perhaps biases and calibrated input scales.

ExpertWeights is immutable and shared: any number of layers read one. `prepare` gives the same weights in a
backend's kernel layout; who wants one copy only keeps that one, for it still dequantises itself and unpacks.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, Self

import torch

from moestro import formats
from moestro.errors import BackendError, DeviceError, DTypeError, FormatError, ShapeError
from moestro.formats.base import CHECKPOINT, FormatTensor
from moestro.formats.checks import require_scale
from moestro.formats.pieces import Picklable, Pieces, from_picklable, to_picklable
from moestro.kernels import backends
from moestro.kernels.activations import Activation, resolve_activation
from moestro.kernels.problem import MoeProblem, dense_dtype
from moestro.moe import devices, flat
from moestro.moe.checks import check_input_format, checked_activation
from moestro.moe.expert_parts import (
    ExpertSource,
    OneExpert,
    Quantized,
    check_format_tensor,
    check_side,
    exactly,
    leaves,
    looked_at,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SIDE_TENSORS = (
    "gate_up_bias",
    "down_bias",
    "gate_up_input_scale",
    "down_input_scale",
    "gate_up_pre_scale",
    "up_has_down_pre_scale",
)


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertWeights:
    """Weights of L experts.

    gate_up: format tensor [L, 2I, H], gate rows first, then up rows ([L, I, H] for an activation without a
    gate).
    down: format tensor [L, H, I].
    gate_up_bias [L, 2I] (or [L, I]), down_bias [L, H]: bf16, fp16 or fp32; added in float32.
    gate_up_input_scale, down_input_scale: float32 [] or [L], the calibrated global scale of x and of the
    intermediate for input_format="nvfp4" (value = e2m1 · block scale · global scale); None: dynamic, per row.
    gate_up_pre_scale: float32 [H], multiplies x before everything else (AWQ's pre_quant_scale).
    up_has_down_pre_scale: whether the rows of up carry such a scale of down's input, which the activation must
    then pass on unchanged: it is linear in up.

    Raises ShapeError, DTypeError, DeviceError or FormatError for parts that do not belong together.
    """

    gate_up: FormatTensor
    down: FormatTensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    gate_up_input_scale: torch.Tensor | None = None
    down_input_scale: torch.Tensor | None = None
    gate_up_pre_scale: torch.Tensor | None = None
    up_has_down_pre_scale: bool = False
    # What follows is derived: the tensors for operators (see flat.py), and those that wanted a gradient when the
    # weights were made from them. given: the caller's own tensors, of which bf16 weights are views.
    tensors: list[torch.Tensor] = dataclasses.field(init=False, repr=False)
    spec: str = dataclasses.field(init=False, repr=False)
    origins: tuple[tuple[str, weakref.ref[torch.Tensor]], ...] = dataclasses.field(init=False, repr=False)
    given: tuple[weakref.ref[torch.Tensor], ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("gate_up", "down"):
            check_format_tensor(name, getattr(self, name))
        experts, rows, hidden = self.gate_up.shape
        if self.down.shape[:2] != (experts, hidden):
            raise ShapeError(
                f"down must be [L, H, I] with L={experts} and H={hidden} as in gate_up "
                f"{list(self.gate_up.shape)}, got {list(self.down.shape)}"
            )
        inter = self.down.shape[2]
        if rows not in (inter, 2 * inter):
            raise ShapeError(
                f"gate_up must have 2I={2 * inter} rows (or I={inter} without a gate), since down is "
                f"{list(self.down.shape)}, got {list(self.gate_up.shape)}"
            )
        if self.gate_up.format != self.down.format or self.gate_up.layout != self.down.layout:
            raise FormatError(
                f"down must have gate_up's format and layout, {self.gate_up.format!r} in "
                f"{self.gate_up.layout!r}, got {self.down.format!r} in {self.down.layout!r}"
            )
        if dense_dtype(self.gate_up) != dense_dtype(self.down):
            raise DTypeError(
                f"down must have gate_up's dtype {dense_dtype(self.gate_up)}, got {dense_dtype(self.down)}"
            )
        self._check_side_tensors(experts, rows, hidden)
        tensors, spec = flat.flatten(self)
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "spec", spec)
        flat.remember(tensors, spec, self)
        object.__setattr__(self, "origins", ())
        object.__setattr__(self, "given", ())
        for name, part in self._parts().items():
            self._note(name, *(part.pieces if hasattr(part, "pieces") else (part,)))

    def _note(self, name: str, *tensors: Any) -> None:
        """Remember tensors that want a gradient; of computed ones, which may be gone soon, what they came from."""
        wanting = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
        found = [(name, weakref.ref(leaf)) for t in wanting for leaf in leaves(t)]
        if found:
            object.__setattr__(self, "origins", (*self.origins, *found))

    def wanting_gradients(self) -> dict[str, torch.Tensor]:
        """The tensors that these weights are, or were made from, and that want a gradient now, by what they are."""
        if not self.origins:
            return {}
        held = ((name, reference()) for name, reference in self.origins)
        return {name: t for name, t in held if t is not None and t.requires_grad}

    def _check_side_tensors(self, experts: int, rows: int, hidden: int) -> None:
        check_side("gate_up_bias", self.gate_up_bias, [(experts, rows)], FLOATS)
        check_side("down_bias", self.down_bias, [(experts, hidden)], FLOATS)
        for name in ("gate_up_input_scale", "down_input_scale"):
            check_side(name, getattr(self, name), [(), (experts,)], (torch.float32,))
            if getattr(self, name) is not None:
                require_scale(name, getattr(self, name))
        check_side("gate_up_pre_scale", self.gate_up_pre_scale, [(hidden,)], (torch.float32,))
        if self.gate_up_pre_scale is not None:
            require_scale("gate_up_pre_scale", self.gate_up_pre_scale, at="channel")
        for name, value in self._parts().items():
            if value.device != self.device:
                raise DeviceError(f"{name} must be on {self.device}, where gate_up is, got {value.device}")
        for name in ("gate_up", "down"):
            if isinstance(
                tensor := getattr(self, name), Pieces
            ):  # those of a kernel layout were looked at before
                tensor.check_scales(name)

    @classmethod
    def from_dense(
        cls,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        format: str = "nvfp4",
        *,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        gate_up_input_scale: torch.Tensor | None = None,
        down_input_scale: torch.Tensor | None = None,
        backend: str | None = None,
        input_format: str | None = None,
    ) -> Self:
        """Quantise dense weights gate_up [L, 2I, H] and down [L, H, I].

        "bf16" keeps the tensors (bf16, fp16 or fp32) without a copy. backend: quantise each expert straight
        into this backend's kernel layout ("auto": the preferred one's), see `from_experts`; input_format: of the
        activations that this layout is for.
        Raises FormatError for an unknown format or values that it cannot hold, ShapeError for sizes that it
        cannot block, BackendError for a backend that cannot run them.
        """
        quantize = formats.get(format).quantize
        for name, dense in (("gate_up", gate_up), ("down", down)):
            if not isinstance(dense, torch.Tensor):
                raise DTypeError(f"{name} must be a torch.Tensor, got {type(dense).__name__}")
            if dense.ndim != 3:
                raise ShapeError(f"{name} must have 3 dimensions [L, rows, columns], got {list(dense.shape)}")
        side: dict[str, Any] = {
            "gate_up_bias": gate_up_bias,
            "down_bias": down_bias,
            "gate_up_input_scale": gate_up_input_scale,
            "down_input_scale": down_input_scale,
        }
        if backend is None:
            if input_format is not None:
                raise BackendError(
                    f"backend must be given where weights are packed for input_format={input_format!r}"
                )
            made = cls(quantize(gate_up.detach()), quantize(down.detach()), **side)
        elif len(gate_up) != len(down):
            raise ShapeError(f"down must have the {len(gate_up)} experts of gate_up, got {list(down.shape)}")
        else:
            experts = Quantized(quantize, gate_up.detach(), down.detach())
            made = cls.from_experts(experts, backend, input_format=input_format, **side)
        made._note("gate_up", gate_up)
        made._note("down", down)
        object.__setattr__(made, "given", (weakref.ref(gate_up), weakref.ref(down)))
        return made

    @classmethod
    def from_experts(
        cls,
        experts: ExpertSource,
        backend: str = backends.AUTO,
        *,
        dtype: torch.dtype = torch.bfloat16,
        input_format: str | None = None,
        **side: Any,
    ) -> Self:
        """Weights from one expert's (gate_up [2I, H], down [H, I]) after the other, in the checkpoint layout.

        Made in the kernel layout of `backend` ("auto": of the preferred one that can run them here for x of
        `dtype`, quantised to `input_format`): a backend that packs expert by expert, as the cpu backend does,
        never holds more than the result and one expert, wherever the experts come from
        (moestro.checkpoints.Experts maps them from files). Others get them whole. side: biases and input
        scales, as in ExpertWeights.

        Raises ShapeError or FormatError for experts that differ, BackendError for a backend that cannot.
        """
        side = {**getattr(experts, "side_tensors", dict)(), **side}
        if unknown := set(side) - set(SIDE_TENSORS):
            raise TypeError(f"from_experts takes {', '.join(SIDE_TENSORS)}, got {', '.join(sorted(unknown))}")
        first = next(iter(experts), None)
        if first is None:
            raise ShapeError("experts must hold at least one expert, got none")
        gate_up, down = first
        for name, value in (("gate_up", gate_up), ("down", down)):
            check_format_tensor(name, value, dimensions=2)
        gated = gate_up.shape[0] == 2 * down.shape[1]
        biases = (side.get("gate_up_bias"), side.get("down_bias"))
        problem = dataclasses.replace(
            MoeProblem.of(OneExpert(gate_up, down, *biases), top_k=1, dtype=dtype, input_format=input_format),
            num_experts=len(experts),
            num_local_experts=len(experts),
            activation=resolve_activation("silu" if gated else "relu2"),
        )
        with devices.on(gate_up.device):
            each = looked_at(exactly(len(experts), experts))
            made = backends.resolve(backend, problem)[0].prepare_each(problem, each)
        if made is not None:
            return cls(*made, **side)
        columns = zip(*looked_at(experts), strict=True)
        whole = (type(first[i]).stack(parts) for i, parts in enumerate(columns))  # type: ignore[attr-defined]
        wanted = {"activation": problem.activation, "input_format": input_format, "dtype": dtype}
        return cls(*whole, **side).prepare(backend, donate=True, **wanted)  # type: ignore[return-value,arg-type]

    @property
    def format(self) -> str:
        """The number format: "bf16", "nvfp4", "mxfp4", "fp8_block", "int4", ..."""
        return self.gate_up.format

    @property
    def layout(self) -> str:
        """ "checkpoint", or the kernel layout that prepare() made."""
        return self.gate_up.layout

    @property
    def dense_dtype(self) -> torch.dtype | None:
        """The dtype of unquantised weights (bf16, fp16, fp32); None for quantised ones."""
        return dense_dtype(self.gate_up)

    @property
    def num_experts(self) -> int:
        """L, the experts held here (all of the model's, or one rank's share)."""
        return self.gate_up.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.gate_up.shape[2]

    @property
    def intermediate_size(self) -> int:
        return self.down.shape[2]

    @property
    def gated(self) -> bool:
        """Whether gate_up has a gate half and an up half."""
        return self.gate_up.shape[1] == 2 * self.intermediate_size

    @property
    def biased(self) -> bool:
        return self.gate_up_bias is not None or self.down_bias is not None

    @property
    def nbytes(self) -> int:
        """Bytes of everything held: codes, scales, biases."""
        return sum(int(part.nbytes) for part in self._parts().values())

    @property
    def device(self) -> torch.device:
        return self.gate_up.device

    def to(self, device: torch.device | str) -> ExpertWeights:
        """The same weights on another device (self if they are there)."""
        if torch.device(device) == self.device:
            return self
        return self._replace({name: part.to(device) for name, part in self._parts().items()})

    def dequantize(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense (gate_up [L, 2I, H], down [L, H, I]), all experts at once."""
        return self.gate_up.dequantize(dtype), self.down.dequantize(dtype)

    def prepare(
        self,
        backend: str = backends.AUTO,
        *,
        activation: str | Activation = "silu",
        input_format: str | None = None,
        top_k: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        batch_invariant: bool = False,
        donate: bool = False,
    ) -> ExpertWeights:
        """The same weights in a backend's kernel layout (self if they are, or if it takes them as is).

        "auto": of the preferred backend that can run them on this machine. Drop the original to keep one, or
        donate it: then its memory may become the result's, and it must not be used again.
        Raises BackendError for a backend that is unknown or cannot run them, FormatError or ShapeError for an
        input_format or an activation that does not fit them.
        """
        check_input_format(
            input_format, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size
        )
        problem = MoeProblem.of(
            self,
            num_experts=max(top_k, self.num_experts),
            top_k=top_k,
            activation=checked_activation(activation, self.gate_up.shape, self.intermediate_size),
            input_format=input_format,
            dtype=dtype,
            deterministic=batch_invariant,
            batch_invariant=batch_invariant,
        )
        with devices.on(self.device):
            runner, made = backends.resolve(backend, problem)[0], self
            if self.layout == CHECKPOINT and self.num_experts:
                gate_up, down = runner.prepare(problem, self, donate=donate)
                if gate_up is not self.gate_up or down is not self.down:
                    made = self.with_tensors(gate_up, down)
            return made if runner.strided else made.contiguous()

    def contiguous(self) -> ExpertWeights:
        """The same weights in contiguous tensors (self if they are)."""
        parts = {name: p.contiguous() for name, p in self._parts().items() if hasattr(p, "contiguous")}
        changed = {name: part for name, part in parts.items() if part is not getattr(self, name)}
        return self._replace(changed) if changed else self

    def scaled_input(self, x: Any) -> Any:
        """x [N, H], times gate_up_pre_scale where there is one: in float32, rounded to x's dtype.

        Raises FormatError for quantised activations, which cannot be scaled any more.
        """
        if self.gate_up_pre_scale is None:
            return x
        if not isinstance(x, torch.Tensor):
            raise FormatError("x must not be quantised yet where the weights have a gate_up_pre_scale")
        if tuple(x.shape[1:]) != (self.hidden_size,):
            return x  # for the check of the call to refuse
        return (x.float() * self.gate_up_pre_scale).to(x.dtype)

    def unpacked(self) -> ExpertWeights:
        """The same weights in the checkpoint layout (self if they are)."""
        if self.layout == CHECKPOINT:
            return self
        return self._replace({"gate_up": self.gate_up.to_checkpoint(), "down": self.down.to_checkpoint()})

    def with_tensors(self, gate_up: FormatTensor, down: FormatTensor) -> ExpertWeights:
        """These weights in another layout: gate_up and down replaced, biases and input scales kept."""
        return self._replace({"gate_up": gate_up, "down": down})

    def _parts(self) -> dict[str, Any]:
        """Every tensor that there is, by field name."""
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.init)
        return {name: value for name, value in fields if value is not None and not isinstance(value, bool)}

    def _replace(self, parts: dict[str, Any]) -> ExpertWeights:
        made = dataclasses.replace(self, **parts)
        object.__setattr__(made, "origins", (*made.origins, *self.origins))
        return made

    def __reduce__(self) -> Any:
        """Copies and pickles are made of the tensors, in the layout that they have."""
        return _restored, ([to_picklable(tensor) for tensor in self.tensors], self.spec)

    def __repr__(self) -> str:
        sizes = f"num_experts={self.num_experts}, hidden_size={self.hidden_size}"
        return (
            f"ExpertWeights({self.format!r}, {sizes}, intermediate_size={self.intermediate_size}, "
            f"layout={self.layout!r}, device={str(self.device)!r})"
        )


def _restored(tensors: list[Picklable], spec: str) -> ExpertWeights:
    made: ExpertWeights = flat.unflatten([from_picklable(tensor) for tensor in tensors], spec)
    return made
