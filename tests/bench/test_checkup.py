"""The table of `moestro doctor` that docs/formats.md has for GPUs, on chips that are not here."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from moestro.bench import checkup
from moestro.kernels.triton import TritonRunner, chip
from moestro.kernels.triton.paths import fp8


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
def test_first_choices_on_a_gpu(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonRunner, "why_not", TritonRunner._unsupported)
    monkeypatch.setattr(chip, "capability", lambda: capability)
    monkeypatch.setattr(fp8, "has_wgmma", lambda: capability[0] == 9)
    choices = checkup._first_choices("cuda")
    for by_x in choices.values():
        assert (by_x["x bf16"], by_x["nvfp4"], by_x["fp8"]) == ("triton", "triton", "triton")
        assert (by_x["x fp32"], by_x["int8"]) == ("portable", "portable")
