"""How exact each format of weights and activations is: on a layer, and on a model's next token.

layer_rows  one layer with random weights. `error` is the distance of what runs here to the exact product (float64) of
            the format's own weights with x as it is; `own` to the reference with the same roundings, which is what is
            left of it for the kernels; `weights` what the format's weights cost, exact product against exact product
            of the bf16 weights. All are relative error norms.
model_rows  a checkpoint in bf16 with its experts in each format, on text, against itself in float32 with Transformers'
            own experts: perplexity, mean KL divergence of the next token's distribution (nats), and the share of
            tokens whose most likely successor is the same.
What does not run is a row with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from moestro.bench import results
from moestro.bench.contenders import make_layer
from moestro.bench.layers import Case, LayerSource, activation_of, make_case
from moestro.bench.models import MoeShape
from moestro.errors import BackendError, FormatError, ShapeError
from moestro.kernels.problem import INPUT_FORMATS
from moestro.moe import reference
from moestro.routing import Distribution
from moestro.tuning import AutoTuner

__all__ = ["FORMATS", "INPUTS", "SCHEMA", "AccuracyResult", "LayerRow", "layer_rows", "pairs", "relative"]

SCHEMA = "moestro.accuracy/1"
FORMATS = ("bf16", "nvfp4", "mxfp4", "mxfp8", "fp8_block")
INPUTS = ("none", *INPUT_FORMATS)  # of activations; "none": as they are
REFUSALS = (BackendError, FormatError, ShapeError)


@dataclass(frozen=True)
class LayerRow:
    """A layer in one format of weights and one of activations."""

    format: str
    input_format: str
    backend: str = ""
    arithmetic: str | None = None
    error: float | None = None
    own: float | None = None
    weights: float | None = None
    reason: str = ""  # why there are no figures


@dataclass(frozen=True)
class AccuracyResult:
    """One run of `moestro bench --accuracy`."""

    command: str
    date: str
    environment: dict[str, Any]
    problem: dict[str, Any] | None  # of the layer
    conditions: dict[str, Any]
    layer: list[LayerRow] = field(default_factory=list)
    model: list[Any] = field(default_factory=list)  # model_accuracy.ModelRow
    reference: dict[str, Any] = field(default_factory=dict)  # of the model: its perplexity, tokens, dtype

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


def pairs(formats: Sequence[str], inputs: Sequence[str]) -> list[tuple[str, str]]:
    """(format of weights, format of activations): every one of both."""
    return [(format, given) for format in formats for given in inputs]


def layer_rows(
    shape: MoeShape,
    formats: Sequence[str],
    inputs: Sequence[str],
    routing: Distribution,
    *,
    tokens: int,
    backend: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    step: Callable[[str], None] = lambda what: None,
) -> Iterator[LayerRow]:
    """A row for every format of weights and activations; see the module."""
    source = LayerSource(shape, seed=seed, device=device)
    case = make_case(shape, tokens, routing, seed=seed, device=device)
    step("exact product")
    dense = _exact(source, "bf16", case)
    for format in formats:
        exact = dense if format == "bf16" else None
        for given in inputs:
            step(f"{format}, activations {given}")
            try:
                exact = _exact(source, format, case) if exact is None else exact
                yield _row(source, case, format, given, backend, exact, dense)
            except REFUSALS as error:
                yield LayerRow(format, given, reason=str(error).splitlines()[0])


def _exact(source: LayerSource, format: str, case: Case) -> torch.Tensor:
    return _reference(source, format, case, None, torch.float64)


def _reference(
    source: LayerSource, format: str, case: Case, given: str | None, dtype: torch.dtype
) -> torch.Tensor:
    return reference.fused_moe(
        case.x, case.ids, case.weights, source.weights(format), activation=activation_of(source.shape),
        input_format=given, dtype=dtype,
    )  # fmt: skip


def _row(
    source: LayerSource,
    case: Case,
    format: str,
    given: str,
    backend: str,
    exact: torch.Tensor,
    dense: torch.Tensor,
) -> LayerRow:
    name = None if given == "none" else given
    layer = make_layer(source, format, backend, case.num_tokens, AutoTuner(store=None), input_format=name)
    runner = layer.runners[0]
    got = layer(case.x, case.ids, case.weights).double()
    return LayerRow(
        format,
        given,
        backend=runner.backend,
        arithmetic=getattr(runner, "arithmetic", None),
        error=relative(got, exact),
        own=relative(got, _reference(source, format, case, name, torch.float32)),
        weights=relative(exact, dense),
    )


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The error's norm over the expected one's."""
    norm = float(expected.double().norm())
    return float((got.double() - expected.double()).norm()) / (norm or 1.0)


def new_result(
    command: str, device: str, shape: MoeShape | None, conditions: dict[str, Any]
) -> AccuracyResult:
    """A result without rows, with where and when."""
    problem = None if shape is None else shape.to_json()
    return AccuracyResult(command, results.now(), results.environment(device), problem, conditions)
