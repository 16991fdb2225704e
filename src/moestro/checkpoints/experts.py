"""One layer's experts in a checkpoint, given one after the other as format tensors.

The layouts are rows of layouts.py; names.py sorts the layer's tensors out, side.py reads what travels with the
weights. Whatever has no place is an error that names file, tensor, what was expected and what is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch

from moestro.checkpoints import side
from moestro.checkpoints.layouts import MODULES, STACKED, Layout, recognise
from moestro.checkpoints.names import Names, sort_out
from moestro.errors import FormatError, as_count
from moestro.formats import BF16, MXFP4, NVFP4, FormatTensor, FP8Block


class Experts:
    """The experts under `prefix` ("model.layers.0.mlp.experts"): iterating gives (gate_up [2I, H], down [H, I]).

    Without a gate it gives (up [I, H], down [H, I]).
    tensors: by name, e.g. a Safetensors, which is told when an expert is done with. only: which experts, for
    one rank's share; all by default. interleaved: whether stacked rows of gate and up alternate (gpt-oss) or
    gate's come first; by default as the layout's maker has them. num_experts: how many there must be.

    Raises FormatError where no experts in a known layout are there, or tensors of one are missing, unknown or
    senseless.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        prefix: str,
        only: range | None = None,
        *,
        interleaved: bool | None = None,
        num_experts: int | None = None,
    ) -> None:
        self._tensors, self._prefix = tensors, prefix
        self._names: Names = sort_out(tensors, prefix)
        self._rows = {projection: self._row(projection) for projection in self._names.projections}
        if len({(row.name) for row in self._rows.values()}) > 1:
            words = ", ".join(f"{p}: {row.name}" for p, row in self._rows.items())
            raise FormatError(f"the projections of {prefix} must have one layout, got {words}")
        count = self._stacked_count() if self._names.stacked else self._names.count
        if num_experts is not None and count != as_count("num_experts", num_experts, FormatError):
            raise FormatError(
                f"{prefix} must have {num_experts} experts as the model's config says, got {count}"
            )
        self._only = range(count) if only is None else only
        if len(self._only) and not 0 <= min(self._only) <= max(self._only) < count:
            raise FormatError(f"only must be within the {count} experts of {prefix}, got {only}")
        self._transposed = self._names.stacked and self._is_transposed()
        self._interleaved = self._default_interleaved() if interleaved is None else interleaved

    def __len__(self) -> int:
        return len(self._only)

    def __iter__(self) -> Iterator[tuple[FormatTensor, FormatTensor]]:
        for e in self._only:
            parts = [self._part(e, projection) for projection in self._names.projections]
            *gates, down = parts
            gate_up = gates[0] if len(gates) == 1 else self._joined(gates, e)
            yield self._with_down_scale(gate_up, e), down
            if done_with := getattr(self._tensors, "done_with", None):
                for projection in self._names.projections:  # what was read, not what was made of it
                    done_with(self._pieces(e, projection).values())

    @property
    def layout(self) -> str:
        """What the layout is called: "ModelOpt NVFP4", "gpt-oss MXFP4", "unquantised", ..."""
        return next(iter(self._rows.values())).name

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self._names.projections[0] != "up_proj"

    @property
    def nbytes(self) -> int:
        """Bytes of these experts' tensors in the checkpoint."""
        total = 0
        for key, pieces in self._names.pieces.items():
            if self._names.stacked or key[0] in self._only:
                total += sum(self._bytes(name) for name in pieces.values())
        count = self._shape(self._names.projections[0])[0] if self._names.stacked else len(self)
        return total * len(self) // max(1, count)

    @property
    def projections(self) -> tuple[str, ...]:
        """Their names in the checkpoint: gate, up, down; up, down without a gate; or the stacked tensors'."""
        return self._names.projections

    @property
    def stacked(self) -> bool:
        """Whether all experts are in one tensor each projection."""
        return self._names.stacked

    def main_tensor(self, expert: int, projection: str) -> str:
        """The name of the tensor that holds a projection's values."""
        key = projection if self._names.stacked else (expert, projection)
        return self._names.pieces[key][next(iter(self._rows[projection].pieces))]

    def projection(self, expert: int, projection: str) -> FormatTensor:
        """One projection [R, C] as it is stored (gate_up with gate rows first)."""
        return self._part(expert, projection)

    def dense(self, expert: int, projection: str) -> torch.Tensor:
        """[R, C] of one projection, AWQ's scale of its input multiplied in: what x is multiplied by.

        In its own dtype where it is not quantised, float32 otherwise.
        """
        part = self._part(expert, projection)
        values = part.data if isinstance(part, BF16) else part.dequantize(torch.float32)
        if (
            not self._names.stacked
            and (scale := self._find(expert, projection, "pre_quant_scale")) is not None
        ):
            name = f"{self._prefix}.{expert}.{projection}.pre_quant_scale"
            values = values * side.checked_pre_scale(scale, name)
        return values

    def input_scales(self) -> dict[str, torch.Tensor]:
        """gate_up_input_scale and down_input_scale [L] for ExpertWeights, where they were calibrated.

        Gate and up have the same input: where their scales differ, the larger one loses no range. An expert that
        calibration never reached (0) takes the largest of the others, with a CheckpointWarning.
        """
        if self._names.stacked or not self._is_nvfp4:
            return {}
        return side.input_scales(self._find, list(self._only), self._names.projections, self._prefix)

    def side_tensors(self) -> dict[str, Any]:
        """What ExpertWeights holds beside the weights: biases, input scales, AWQ's scales of input channels."""
        found: dict[str, Any] = {**self.biases(), **self.input_scales()}
        if (scale := self._input_pre_scale) is not None:
            found["gate_up_pre_scale"] = scale
        if self._down_is_scaled:
            found["up_has_down_pre_scale"] = True
        return found

    def not_used(self) -> list[str]:
        """Suffixes of tensors that are there and not used: static scales of FP8 activations."""
        suffixes = {suffix for pieces in self._names.pieces.values() for suffix in pieces}
        return sorted(suffixes & {"activation_scale", *(() if self._is_nvfp4 else side.INPUT_SCALES)})

    # --- tensors -------------------------------------------------------------------------------------
    def _get(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise FormatError(f"the checkpoint has no {name}") from None

    def _info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        if info := getattr(self._tensors, "info", None):
            return info(name)  # type: ignore[no-any-return]
        tensor = self._get(name)
        return tensor.dtype, tuple(tensor.shape)

    def _bytes(self, name: str) -> int:
        dtype, shape = self._info(name)
        return int(torch.Size(shape).numel()) * dtype.itemsize

    def _shape(self, projection: str) -> tuple[int, ...]:
        """Of the first piece of a stacked projection."""
        pieces = self._names.pieces[projection]
        return self._info(pieces[next(iter(self._rows[projection].pieces))])[1]

    def _stacked_count(self) -> int:
        """How many experts every stacked tensor has. FormatError where two disagree."""
        names = [
            name for projection in self._names.projections for name in self._names.pieces[projection].values()
        ]
        sizes = {name: shape[0] for name in names if (shape := self._info(name)[1])}
        first = self.main_tensor(0, self._names.projections[0])
        for name, size in sizes.items():
            if size != sizes[first]:
                raise FormatError(f"{name} must have the {sizes[first]} experts of {first}, got {size}")
        return sizes[first]

    def _find(self, expert: int, projection: str, suffix: str) -> torch.Tensor | None:
        name = self._names.pieces[expert, projection].get(suffix)
        return None if name is None else self._get(name)

    def _row(self, projection: str) -> Layout:
        stacked = self._names.stacked
        key = projection if stacked else (0, projection)
        where = f"{self._prefix}.{projection}" if stacked else f"{self._prefix}.0.{projection}"
        found = {suffix: self._info(name)[0] for suffix, name in self._names.pieces[key].items()}
        return recognise(where, found, STACKED if stacked else MODULES)

    @property
    def _is_nvfp4(self) -> bool:
        return "nvfp4" in self.layout.lower()

    # --- one expert ----------------------------------------------------------------------------------
    def _pieces(self, expert: int, projection: str) -> dict[str, torch.Tensor]:
        """A projection's tensors by suffix, as they are in the checkpoint."""
        stacked, suffixes = self._names.stacked, self._rows[projection].pieces
        names = self._names.pieces[projection if stacked else (expert, projection)]
        return {s: self._get(names[s])[expert] if stacked else self._get(names[s]) for s in suffixes}

    def _part(self, expert: int, projection: str) -> FormatTensor:
        row = self._rows[projection]
        if not self._names.stacked:
            pieces = self._names.pieces[expert, projection]
            where = f"{self._place(pieces)}{self._prefix}.{expert}.{projection}"
            return row.read(where, self._pieces(expert, projection))
        pieces = self._names.pieces[projection]
        where = f"{self._place(pieces)}{self._prefix}.{projection}[{expert}]"
        whole = row.read(where, self._pieces(expert, projection))
        if self._transposed:
            assert isinstance(whole, BF16)
            whole = BF16(whole.data.mT.contiguous())
        if self._interleaved and projection != self._names.projections[-1] and self.gated:
            whole = deinterleaved(whole)
        return whole

    def _place(self, pieces: dict[str, str]) -> str:
        """ "file: " where the tensors come from files, for errors."""
        file_of = getattr(self._tensors, "file_of", None)
        return f"{file_of(next(iter(pieces.values())))}: " if file_of else ""

    def _joined(self, gates: list[FormatTensor], expert: int) -> FormatTensor:
        try:
            return type(gates[0]).cat_rows(gates)  # type: ignore[attr-defined, no-any-return]
        except ValueError as error:
            raise FormatError(
                f"gate and up of {self._prefix}.{expert} cannot become one matrix of {self.layout}: {error}"
            ) from error

    # --- beside the weights --------------------------------------------------------------------------
    def biases(self) -> dict[str, torch.Tensor]:
        """gate_up_bias and down_bias [L, rows], where there are any."""
        projections = self._names.projections
        if not self._names.stacked:
            found = side.biases(self._find, list(self._only), projections, self._prefix)
        else:
            names = ("gate_up_bias", "down_bias")
            pieces = [self._names.pieces[projection] for projection in projections]
            rows = slice(self._only.start, self._only.stop, self._only.step)
            found = {n: self._get(p["bias"])[rows] for n, p in zip(names, pieces, strict=True) if "bias" in p}
            if self._interleaved and self.gated and "gate_up_bias" in found:
                bias = found["gate_up_bias"]
                found["gate_up_bias"] = torch.cat([bias[:, 0::2], bias[:, 1::2]], dim=1)
        if self._down_is_scaled and "gate_up_bias" in found:
            raise FormatError(f"{self._prefix}: pre_quant_scale and biases together have no place")
        side.check_biases(found, self._prefix, projections, list(self._only), self._names.stacked)
        return found

    def first_nan(self) -> str | None:
        """The first tensor whose values are NaN, with its file; None where there is none. Reads everything."""
        for e in self._only:
            for projection in self._names.projections:
                name = self.main_tensor(e, projection)
                values = self._get(name)[e] if self._names.stacked else self._get(name)
                floats = values.dtype.is_floating_point
                if floats and bool(
                    torch.isnan(values.float() if values.dtype.itemsize == 1 else values).any()
                ):
                    pieces = self._names.pieces[projection if self._names.stacked else (e, projection)]
                    return f"{self._place(pieces)}{name}{f'[{e}]' * self._names.stacked}"
        return None

    @cached_property
    def _input_pre_scale(self) -> torch.Tensor | None:
        if self._names.stacked:
            return None
        return side.pre_scale(self._find, list(self._only), list(self._names.projections[:-1]), self._prefix)

    @cached_property
    def _down_is_scaled(self) -> bool:
        """Whether down's input has an AWQ scale, which the rows of up then carry (see _with_down_scale)."""
        if self._names.stacked or not len(self):
            return False
        down = self._names.projections[-1]
        return self._find(self._only[0], down, "pre_quant_scale") is not None

    def _with_down_scale(self, gate_up: FormatTensor, expert: int) -> FormatTensor:
        """gate_up whose up rows carry the scale of down's input channels.

        down(s · act(gate) · up) = down(act(gate) · (s · up)): exact, as NVFP4 keeps a float32 scale per group of
        rows, here of one row.
        """
        if not self._down_is_scaled:
            return gate_up
        down = self._names.projections[-1]
        name = f"{self._prefix}.{expert}.{down}.pre_quant_scale"
        scale = side.checked_pre_scale(self._get(name), name)
        if not isinstance(gate_up, NVFP4) or not self.gated:
            raise FormatError(f"{name}: only gated NVFP4 experts have a place for it, got {self.layout}")
        rows = gate_up.row_global_scale().expand(gate_up.shape[0], 1).flatten().clone()
        rows[len(scale) :] *= scale.to(rows.device)
        return dataclasses.replace(gate_up, global_scale=rows)

    # --- stacked tensors -----------------------------------------------------------------------------
    def _is_transposed(self) -> bool:
        """Whether dense stacked tensors are [E, H, 2I] and [E, I, H] (gpt-oss, Llama-4), as their sizes show."""
        row = self._rows[self._names.projections[0]]
        if row.name != "unquantised":
            return False
        (_, a, b), (_, c, d) = (self._shape(projection) for projection in self._names.projections)
        factor = 2 if self.gated else 1
        if b == c and a == factor * d:
            return False
        if a == d and b == factor * c:
            return True
        words = ", ".join(f"{p} {list(self._shape(p))}" for p in self._names.projections)
        raise FormatError(
            f"the stacked experts of {self._prefix} must be [E, 2I, H] and [E, H, I], got {words}"
        )

    def _default_interleaved(self) -> bool:
        """gpt-oss' rows alternate: its blocks, and its dense weights, which are transposed and have biases."""
        if not self._names.stacked:
            return False
        biased = "bias" in self._names.pieces[self._names.projections[0]]
        return self.layout == "gpt-oss MXFP4" or (self._transposed and biased)


def deinterleaved(tensor: FormatTensor) -> FormatTensor:
    """Rows gate, up, gate, up, ... put in the order of all gates, then all ups."""
    if isinstance(tensor, FP8Block):
        raise FormatError(
            "rows of gate and up that alternate share the scales of FP8 blocks: they cannot be parted"
        )
    assert isinstance(tensor, BF16 | MXFP4)
    pieces = (torch.cat([piece[..., 0::2, :], piece[..., 1::2, :]], dim=-2) for piece in tensor.pieces)
    return type(tensor)(*pieces)
