"""torch's default dtype is the user's: programs that load language models set it to bf16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.formats import NVFP4
from moestro.kernels.cpu import core
from moestro.moe.linear import PackedLinear

transformers = pytest.importorskip("transformers", minversion="5.7")

import tiny  # noqa: E402

from moestro.integrations import transformers as mt  # noqa: E402

DEFAULTS = [torch.bfloat16, torch.float64]
pytestmark = pytest.mark.usefixtures("registered", "float32_afterwards")


@pytest.fixture
def float32_afterwards() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("make", [tiny.qwen3, tiny.gpt_oss, tiny.nemotron])
def test_a_checkpoint_loads_and_gives_the_same(tmp_path: Path, make: Any, default: torch.dtype) -> None:
    model = tiny.random_model(make, torch.float32)
    mt.quantize_experts(model, "nvfp4")
    model.save_pretrained(tmp_path)
    cls = type(model)
    options = {"experts_implementation": "moestro", "dtype": torch.float32}
    truth = tiny.logits(cls.from_pretrained(tmp_path, **options))
    torch.set_default_dtype(default)
    assert torch.equal(tiny.logits(cls.from_pretrained(tmp_path, **options)), truth)


@pytest.mark.skipif(core.why_no_core() is not None, reason=str(core.why_no_core()))
@pytest.mark.parametrize("default", DEFAULTS)
def test_a_packed_linear_with_a_bias_gives_the_same(default: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(96, 64, generator=g), torch.randn(5, 64, generator=g)
    bias = torch.nn.Parameter(torch.randn(96, generator=g), requires_grad=False)
    results = []
    for chosen in (torch.float32, default):
        torch.set_default_dtype(chosen)
        results.append(PackedLinear(NVFP4.quantize(weight), bias, dtype=torch.float32)(x))
    assert torch.equal(*results)
