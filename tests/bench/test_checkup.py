"""The table of `moestro doctor` that docs/formats.md has for GPUs, on chips that are not here."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from moestro.bench import checkup
from moestro.kernels.triton import TritonRunner, chip
from moestro.kernels.triton.paths import fp8

TRITON_FP8 = {
    (9, 0): {"nvfp4", "mxfp4", "fp8_block"},  # what FP8 activations run on Hopper's kernels
    (10, 0): {"mxfp4", "mxfp8"},
    (12, 0): set(),
}


@pytest.mark.parametrize("capability", TRITON_FP8)
def test_first_choices_on_a_gpu(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonRunner, "why_not", TritonRunner._unsupported)
    monkeypatch.setattr(chip, "capability", lambda: capability)
    monkeypatch.setattr(fp8, "has_wgmma", lambda: capability[0] == 9)
    choices = checkup._first_choices("cuda")
    assert {fmt for fmt, by_x in choices.items() if by_x["fp8"] == "triton"} == TRITON_FP8[capability]
    for by_x in choices.values():
        assert (by_x["x bf16"], by_x["nvfp4"]) == ("triton", "triton")
        assert (by_x["x fp32"], by_x["int8"]) == ("portable", "portable")
