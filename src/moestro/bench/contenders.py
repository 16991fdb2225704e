"""What is measured against what: the protocol of a contender, and Moestro's own.

A contender is one way to run the layer: Moestro in one format on one backend, or somebody else's code on
the same weights (peers.py; GPU peers register there too). All of them get the same Case and return [N, H].
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from moestro.bench.layers import Case, LayerSource, activation_of
from moestro.errors import BackendError
from moestro.moe.call import as_inputs
from moestro.moe.layer import FusedMoE
from moestro.moe.tuning_config import OP
from moestro.tuning import AutoTuner
from moestro.tuning.measure.compile import precompile

__all__ = [
    "Call",
    "Compiles",
    "Contender",
    "MoestroLayers",
    "input_format_of",
    "make_layer",
    "moestro_contenders",
    "tactic_words",
]

Call = Callable[[], torch.Tensor]


class Contender(Protocol):
    """One way to run a layer."""

    @property
    def name(self) -> str:
        """As tables show it, e.g. "moestro nvfp4" or "transformers grouped_mm"."""

    @property
    def ours(self) -> bool:
        """Whether this is Moestro; ratios are taken against the fastest contender of which this is False."""

    @property
    def format(self) -> str:
        """The format of its weights."""

    @property
    def nbytes(self) -> int:
        """Bytes of one layer's weights as this contender holds them."""

    def why_not(self, case: Case) -> str | None:
        """Why it cannot (or should not) run this case; None if it can."""

    def calls(self, case: Case) -> Sequence[Call]:
        """One call per layer; each runs that layer on the case and returns [N, H]."""

    def facts(self, case: Case) -> dict[str, Any]:
        """What the results should say about this case, e.g. the tactic that was chosen."""


def input_format_of(contender: Any) -> str | None:
    """The format that a contender quantises activations to; one that says nothing takes them as they are."""
    return getattr(contender, "input_format", None)


@runtime_checkable
class Compiles(Protocol):
    """A contender whose kernels are compiled at first use."""

    def compile(self, cases: Sequence[Case]) -> None:
        """Compile what the cases need, in parallel; nothing is run."""


def make_layer(
    source: LayerSource,
    format: str,
    backend: str,
    max_num_tokens: int,
    tuner: AutoTuner | None = None,
    input_format: str | None = None,
) -> FusedMoE:
    """A source's layer as it is served, in a format, on a backend ("auto": the best that runs)."""
    shape = source.shape
    return FusedMoE(
        source.weights(format),
        top_k=shape.top_k,
        max_num_tokens=max_num_tokens,
        use_cuda_graph=source.device.startswith("cuda"),
        activation=activation_of(shape),
        num_experts=shape.num_local_experts if shape.local_pairs else shape.num_experts,
        backend=backend,
        input_format=input_format,
        dtype=source.dtype,
        tuner=tuner,
        donate=format != "bf16",  # these are the source's own, shared with the peers
    )


class MoestroLayers:
    """Moestro in one format on one backend, over the layers of `sources`."""

    ours = True

    def __init__(
        self,
        sources: Sequence[LayerSource],
        format: str,
        backend: str,
        max_num_tokens: int,
        name: str,
        tuner: AutoTuner | None = None,
        input_format: str | None = None,
    ) -> None:
        self.name = name
        self.format = format
        self.input_format = input_format
        self._layers = [
            make_layer(source, format, backend, max_num_tokens, tuner, input_format) for source in sources
        ]

    @property
    def nbytes(self) -> int:
        return self._layers[0].weights.nbytes

    def why_not(self, case: Case) -> str | None:
        return None

    def calls(self, case: Case) -> Sequence[Call]:
        return [functools.partial(layer, case.x, case.ids, case.weights) for layer in self._layers]

    def compile(self, cases: Sequence[Case]) -> None:
        """What fails here fails again, and is reported, when the case is run."""
        layer = self._layers[0]
        jobs = {}
        for case in cases:
            inputs = as_inputs(case.x, case.ids, case.weights, case.x)
            runner, tactic = layer.tuner.choose_one(OP, layer.runners, layer.tuning_config, inputs)
            if callable(hook := getattr(runner, "compile", None)):
                jobs[case.num_tokens] = functools.partial(hook, inputs, tactic)
        precompile(jobs)

    def facts(self, case: Case) -> dict[str, Any]:
        layer = self._layers[0]
        decision = layer.decision(case.num_tokens)
        runner = layer.runners[0] if decision is None else decision.runner
        made_of = getattr(runner, "arithmetic", None)  # what its products are made of, where it says so
        if decision is None:
            return {"backend": runner.backend, "tactic": None, "status": "default", "arithmetic": made_of}
        return {
            "backend": runner.backend,
            "arithmetic": made_of,
            "tactic": tactic_words(decision.tactic),
            "status": decision.status,
            "bucket": decision.bucket,
        }


def tactic_words(tactic: Any) -> str:
    """A tactic for tables: "default", or its knobs, less those at their defaults."""
    if not dataclasses.is_dataclass(tactic) or isinstance(tactic, type):
        return "default" if tactic == -1 else str(tactic)
    fields = [f for f in dataclasses.fields(tactic) if getattr(tactic, f.name) != f.default]
    return " ".join(f"{f.name}={getattr(tactic, f.name)}" for f in fields)


def moestro_contenders(
    sources: Sequence[LayerSource],
    formats: Sequence[str],
    backends: Sequence[str],
    max_num_tokens: int,
    tuner: AutoTuner | None = None,
    inputs: Sequence[str | None] = (None,),
) -> Iterator[tuple[Contender | str, str]]:
    """Ours per format, format of activations and backend: (contender, ""), or (its name, why it cannot take part).

    One by one. One whose weights or workspace do not fit into a GPU's memory cannot.
    """
    for format, taken, backend in itertools.product(formats, inputs, backends):
        words = ["moestro", format, *filter(None, [taken]), *([backend] if len(backends) > 1 else [])]
        name = " ".join(words)
        try:
            yield MoestroLayers(sources, format, backend, max_num_tokens, name, tuner, taken), ""
        except BackendError as error:
            yield name, str(error)
        except torch.OutOfMemoryError as error:
            yield name, f"its weights and workspace do not fit: {str(error).splitlines()[0]}"
