"""The accuracy of a model's next token with its experts in each format; see moestro.bench.accuracy.

The checkpoint's folder must hold dense weights and a tokenizer. Reference: float32, Transformers' own experts, one
expert at a time. Each row is the checkpoint loaded in bf16 anew, its experts packed in the row's format; so the row
("bf16", "none") has what bf16 costs the rest of the model, too.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moestro.bench.accuracy import REFUSALS, pairs
from moestro.errors import FormatError, MoestroError

__all__ = ["ModelReference", "ModelRow", "model_rows", "open_model"]

log = logging.getLogger("moestro")
LENGTH, SEQUENCES = 256, 64
MOST_BYTES = 1 << 30  # of the reference's log-probabilities, which are kept


@dataclass(frozen=True)
class ModelRow:
    """A model with its experts in one format of weights and one of activations."""

    format: str
    input_format: str
    backends: tuple[str, ...] = ()
    perplexity: float | None = None
    kl: float | None = None  # nats a token, from the reference's distribution
    top_1: float | None = None  # share of tokens with the reference's most likely successor
    bytes: int | None = None  # of all layers' experts
    reason: str = ""  # why there are no figures


@dataclass(frozen=True)
class ModelReference:
    """What rows are compared with. batches: token ids [1, S]; log_probabilities: [S - 1, V] of each."""

    folder: Path
    batches: list[torch.Tensor]
    log_probabilities: list[torch.Tensor]

    @property
    def perplexity(self) -> float:
        return _perplexity(self.batches, self.log_probabilities)

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "dtype": "float32",
            "experts": "transformers eager",
            "tokens": sum(len(one) for one in self.log_probabilities),
            "perplexity": self.perplexity,
        }


def open_model(folder: Path, text: Path) -> ModelReference:
    """The reference on a text. Raises FormatError for a folder that holds no dense checkpoint, or an empty text."""
    from moestro.integrations import need_transformers

    transformers = need_transformers()
    from moestro.integrations.transformers.calibrate import text_batches

    config = folder / "config.json"
    if not config.is_file():
        raise FormatError(f"model-dir must be a folder with a config.json, got {folder}")
    known = json.loads(config.read_text())
    if "quantization_config" in known:
        raise FormatError(f"model-dir must hold dense weights, got a quantised checkpoint in {folder}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = _load(folder, torch.float32, "eager")
    vocabulary = model.get_output_embeddings().out_features
    sequences = max(1, min(SEQUENCES, MOST_BYTES // (4 * LENGTH * vocabulary)))
    if sequences < SEQUENCES:
        log.warning(
            "%d of %d sequences are run: log-probabilities of %d tokens are kept",
            sequences,
            SEQUENCES,
            vocabulary,
        )
    batches = [b for b in text_batches(tokenizer, text.read_text(), LENGTH, sequences) if b.shape[1] > 1]
    if not batches:
        raise FormatError(f"text must hold at least two tokens, got {text}")
    return ModelReference(folder, batches, [_log_probabilities(model, ids) for ids in batches])


def model_rows(
    reference: ModelReference,
    formats: Sequence[str],
    inputs: Sequence[str],
    *,
    backend: str = "auto",
    step: Callable[[str], None] = lambda what: None,
) -> Iterator[ModelRow]:
    """A row for every format of weights and activations."""
    for format, given in pairs(formats, inputs):
        step(f"model in {format}, activations {given}")
        try:
            yield _row(reference, format, given, backend)
        except REFUSALS as error:
            yield ModelRow(format, given, reason=str(error).splitlines()[0])


def _row(reference: ModelReference, format: str, given: str, backend: str) -> ModelRow:
    from moestro.integrations import transformers as ours
    from moestro.integrations.transformers.bound import bound_to
    from moestro.integrations.transformers.modules import experts_modules

    name = f"moestro_{format}_{given}"
    quantised = None if given == "none" else given
    ours.register(name, format=format, max_num_tokens=LENGTH, backend=backend, input_format=quantised)
    model = _load(reference.folder, torch.bfloat16, name)
    found = [_log_probabilities(model, ids) for ids in reference.batches]
    bound = [one for _, module in experts_modules(model) if (one := bound_to(module)) is not None]
    if not bound:
        raise MoestroError(f"{type(model).__name__} has no experts that run through Transformers' interface")
    layers = [one.layer for one in bound if one.layer is not None]
    count = sum(len(one) for one in found)
    both = list(zip(reference.log_probabilities, found, strict=True))
    kl = sum(float((p.exp() * (p - q)).sum()) for p, q in both) / count
    same = sum(int((p.argmax(-1) == q.argmax(-1)).sum()) for p, q in both) / count
    return ModelRow(
        format,
        given,
        backends=tuple(sorted({layer.runners[0].backend for layer in layers})),
        perplexity=_perplexity(reference.batches, found),
        kl=kl,
        top_1=same,
        bytes=sum(one.weights.nbytes for one in bound),
    )


def _load(folder: Path, dtype: torch.dtype, experts: str) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation=experts
    ).eval()


@torch.no_grad()
def _log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float32 [S - 1, V]: of every token but the last, of its successors."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def _perplexity(batches: Sequence[torch.Tensor], log_probabilities: Sequence[torch.Tensor]) -> float:
    losses = [
        -found.gather(1, ids[0, 1:, None]).double()
        for ids, found in zip(batches, log_probabilities, strict=True)
    ]
    return math.exp(float(torch.cat(losses).mean()))
