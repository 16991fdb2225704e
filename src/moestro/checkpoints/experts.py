"""One layer's experts in a checkpoint, given one after the other as format tensors.

Layouts: compressed-tensors `nvfp4-pack-quantized` (weight_packed, weight_scale, weight_global_scale), NVIDIA
ModelOpt NVFP4 (weight, weight_scale, weight_scale_2) and unquantised weights, with an expert's projections as
modules of their own (gate_proj, up_proj, down_proj, or Mixtral's w1, w3, w2); and the stacked unquantised tensors of
Transformers 5 (gate_up_proj [E, 2I, H], down_proj [E, H, I]).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from moestro.errors import FormatError
from moestro.formats import BF16, NVFP4, FormatTensor

NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# the name that tells a layout -> (its tensors, how they become a format tensor)
LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[..., FormatTensor]]] = {
    "weight_packed": (
        ("weight_packed", "weight_scale", "weight_global_scale"),
        NVFP4.from_compressed_tensors,
    ),
    "weight_scale_2": (("weight", "weight_scale", "weight_scale_2"), NVFP4.from_modelopt),
    "weight": (("weight",), BF16),
}
# a calibrated scale of the input -> whether it divides
INPUT_SCALES = {"input_scale": False, "input_global_scale": True}


class Experts:
    """The experts under `prefix` ("model.layers.0.mlp.experts"): iterating gives (gate_up [2I, H], down [H, I]).

    tensors: by name, e.g. a Safetensors, which is told when an expert is done with. only: which experts, for
    one rank's share; all by default.

    Raises FormatError where no experts in a known layout are there, or tensors of one are missing.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], prefix: str, only: range | None = None) -> None:
        self._tensors, self._prefix = tensors, prefix
        self._stacked = f"{prefix}.gate_up_proj" in tensors
        self._names: tuple[str, str, str] = NAMES[0]
        self._layout = "weight"
        if not self._stacked:
            self._names, self._layout = self._recognise()
        count = self._count()
        self._only = range(count) if only is None else only
        if len(self._only) and not 0 <= min(self._only) <= max(self._only) < count:
            raise FormatError(f"only must be within the {count} experts of {prefix}, got {only}")

    def __len__(self) -> int:
        return len(self._only)

    def __iter__(self) -> Iterator[tuple[FormatTensor, FormatTensor]]:
        for e in self._only:
            parts = self._stacked_parts(e) if self._stacked else [self._part(e, name) for name in self._names]
            *gates, down = parts
            yield (gates[0] if len(gates) == 1 else type(gates[0]).cat_rows(gates)), down  # type: ignore[attr-defined]
            if done_with := getattr(self._tensors, "done_with", None):
                for part in parts:
                    done_with(value for value in vars(part).values() if isinstance(value, torch.Tensor))

    def input_scales(self) -> dict[str, torch.Tensor]:
        """gate_up_input_scale and down_input_scale [E] for ExpertWeights, where they were calibrated.

        Gate and up have the same input: where their scales differ, the larger one loses no range.
        """
        found: dict[str, torch.Tensor] = {}
        first = f"{self._prefix}.{self._only[0] if len(self._only) else 0}.{self._names[0]}"
        for name, divides in INPUT_SCALES.items():
            if self._stacked or f"{first}.{name}" not in self._tensors:
                continue
            gate, up, down = (
                torch.stack([self._tensor(f"{e}.{part}.{name}").float().reshape(()) for e in self._only])
                for part in self._names
            )
            gate, up, down = (1 / scale if divides else scale for scale in (gate, up, down))
            found = {"gate_up_input_scale": torch.maximum(gate, up), "down_input_scale": down}
        return found

    def _recognise(self) -> tuple[tuple[str, str, str], str]:
        for names in NAMES:
            for layout in LAYOUTS:
                if f"{self._prefix}.0.{names[0]}.{layout}" in self._tensors:
                    self._refuse_unknown(f"{self._prefix}.0.{names[0]}", layout)
                    return names, layout
        raise FormatError(
            f"prefix must lead to experts ({self._prefix}.0.gate_proj.weight, ...) in a known layout, "
            f"got {self._prefix!r}"
        )

    def _refuse_unknown(self, module: str, layout: str) -> None:
        """Quantised weights of another layout also have a `weight`."""
        if layout != "weight":
            return
        dtype = self._tensors[f"{module}.weight"].dtype
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise FormatError(f"{module}.weight must be bf16, fp16 or fp32 without scales, got {dtype}")

    def _count(self) -> int:
        if self._stacked:
            return int(self._tensors[f"{self._prefix}.gate_up_proj"].shape[0])
        count = 0
        while f"{self._prefix}.{count}.{self._names[0]}.{self._layout}" in self._tensors:
            count += 1
        return count

    def _tensor(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[f"{self._prefix}.{name}"]
        except KeyError:
            raise FormatError(f"the checkpoint has no {self._prefix}.{name}") from None

    def _part(self, expert: int, projection: str) -> FormatTensor:
        names, make = LAYOUTS[self._layout]
        return make(*(self._tensor(f"{expert}.{projection}.{name}") for name in names))

    def _stacked_parts(self, expert: int) -> list[FormatTensor]:
        return [BF16(self._tensor(name)[expert]) for name in ("gate_up_proj", "down_proj")]
