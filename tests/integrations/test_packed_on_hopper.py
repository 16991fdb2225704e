"""moestro.load of a model whose experts the Triton backend packs for quantised activations, on a pretended Hopper."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("triton", minversion="3.8")

import tiny
from chips import pretend

import moestro
import moestro.integrations.transformers as mt
from moestro.integrations.transformers.bound import bound_to
from moestro.integrations.transformers.modules import experts_modules

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a chip of another capability is here")
LAYOUTS = {
    ("nvfp4", None): "triton-r64c64",
    ("nvfp4", "fp8"): "triton-fp8-nvfp4-r64c128",
    ("mxfp4", "fp8"): "triton-fp8-mxfp4-r64c128g32",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    tiny.random_model(tiny.qwen3).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "hopper")


def packed(model: Any) -> list[moestro.ExpertWeights]:
    found = [bound_to(module) for _, module in experts_modules(model)]
    return [each.weights for each in found if each is not None]


@pytest.mark.parametrize(("format", "input_format"), LAYOUTS, ids=str)
def test_experts_are_packed_for_the_activations_that_they_will_meet(
    format: str, input_format: str | None, folder: Path, tmp_path: Path
) -> None:
    """However they are quantised; copies, pickles, state dicts and what is saved have the same weights."""
    options: dict[str, Any] = {"input_format": input_format, "backend": "triton"}
    model = moestro.load(folder, format=format, device="cpu", report=False, **options)
    held = packed(model)
    assert {w.layout for w in held} == {LAYOUTS[format, input_format]}
    quantised = tiny.random_model(tiny.qwen3)
    mt.quantize_experts(quantised, format, **options)
    model.save_pretrained(tmp_path)
    loaded = moestro.load(tmp_path, device="cpu", report=False, **options)
    for other in (quantised, loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for mine, theirs in zip(held, packed(other), strict=True):
            assert theirs.layout == mine.layout
            assert all(map(torch.equal, theirs.dequantize(), mine.dequantize()))
    state = model.state_dict()
    assert any(key.endswith(f"moestro.gate_up.{format}.packed") for key in state)
    assert str(loaded.load_state_dict(state)) == "<All keys matched successfully>"
    assert {w.layout for w in packed(loaded)} == {LAYOUTS[format, input_format]}
