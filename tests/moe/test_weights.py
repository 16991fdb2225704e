"""ExpertWeights: what it holds, converts and refuses."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from moe_cases import E, H, I, make_call, make_weights

from moestro import ExpertWeights, errors, formats, fused_moe
from moestro.kernels import backends
from moestro.moe import flat
from moestro.moe.options import Options, make_problem

FORMATS = sorted(formats.FORMATS)


@pytest.mark.parametrize("fmt", FORMATS)
def test_says_what_it_holds(fmt: str) -> None:
    w = make_weights(fmt)
    scale = 2 if formats.get(fmt).block == 32 else 1
    assert (w.format, w.num_experts, w.hidden_size, w.intermediate_size) == (fmt, E, H * scale, I * scale)
    assert w.device == torch.device("cpu")
    assert w.nbytes == w.gate_up.nbytes + w.down.nbytes
    gate_up, down = w.dequantize(torch.float32)
    assert gate_up.dtype == down.dtype == torch.float32
    assert (gate_up.shape, down.shape) == ((E, 2 * I * scale, H * scale), (E, H * scale, I * scale))
    assert fmt in repr(w)


def test_the_constructor_takes_format_tensors() -> None:
    w = make_weights("nvfp4")
    again = ExpertWeights(gate_up=w.gate_up, down=w.down)
    assert torch.equal(again.dequantize()[0], w.dequantize()[0])


def test_nvfp4_needs_at_most_three_tenths_of_bf16() -> None:
    assert make_weights("nvfp4").nbytes <= 0.30 * make_weights("bf16").nbytes


def test_bytes_count_biases() -> None:
    biases = {"gate_up_bias": torch.zeros(E, 2 * I), "down_bias": torch.zeros(E, H)}
    assert make_weights("nvfp4", **biases).nbytes - make_weights("nvfp4").nbytes == 4 * E * (2 * I + H)


def test_bf16_keeps_the_tensors_without_a_copy_and_without_gradients() -> None:
    gate_up = torch.nn.Parameter(torch.randn(E, 2 * I, H))
    w = ExpertWeights.from_dense(gate_up, torch.nn.Parameter(torch.randn(E, H, I)), "bf16")
    assert w.dequantize()[0].data_ptr() == gate_up.data_ptr()
    assert not any(t.requires_grad for t in w.tensors)


@pytest.mark.parametrize("fmt", FORMATS)
def test_moves_to_a_device(fmt: str) -> None:
    w = make_weights(fmt, down_bias=torch.zeros(E, 2 * H if formats.get(fmt).block == 32 else H))
    assert w.to("cpu") is w
    moved = w.to("meta")
    assert {t.device.type for t in moved.tensors} == {"meta"}
    assert moved.device.type == "meta"


@pytest.mark.parametrize("fmt", ["bf16", "nvfp4"])
@pytest.mark.parametrize("backend", list(backends.BACKENDS))
def test_prepared_weights_hold_the_same_values(fmt: str, backend: str) -> None:
    w = make_weights(fmt)
    reason = backends.why_not(backend, make_problem(w, Options(), top_k=1, dtype=torch.bfloat16))
    if reason is not None:
        with pytest.raises(errors.BackendError, match=f"backend '{backend}'"):
            w.prepare(backend)
        return
    prepared = make_weights(fmt).prepare(backend)
    for form in (prepared, prepared.unpacked()):
        for mine, theirs in zip(form.dequantize(), w.dequantize(), strict=True):
            assert torch.equal(mine, theirs)
    assert prepared.unpacked().layout == "checkpoint"
    call = make_call(5)
    assert torch.equal(
        fused_moe(*call, prepared, backend="portable", tactic="loop"),
        fused_moe(*call, w, backend="portable", tactic="loop"),
    )


@pytest.mark.parametrize("fmt", FORMATS)
def test_flat_weights_can_be_put_together_again(fmt: str) -> None:
    w = make_weights(fmt, down_input_scale=torch.tensor(0.5))
    again = flat.unflatten(w.tensors, w.spec)
    assert torch.equal(again.dequantize()[1], w.dequantize()[1])
    assert again.down_input_scale is w.down_input_scale
    assert w.spec == make_weights(fmt, seed=1, down_input_scale=torch.tensor(2.0)).spec


def test_flat_weights_of_foreign_classes_are_refused() -> None:
    with pytest.raises(errors.FormatError, match="classes of moestro"):
        flat.unflatten([], '{"class": "os:system", "fields": {}}')
    with pytest.raises(errors.FormatError, match="plain values"):
        flat.flatten(object())


def test_weights_that_nobody_holds_are_freed_with_what_ran_on_them() -> None:
    w = make_weights()
    fused_moe(*make_call(3), w)
    gone = weakref.ref(w)
    del w
    gc.collect()
    assert gone() is None


class TestBadWeights:
    """Each names the argument, what was expected and what came."""

    def test_dense_tensors_in_the_constructor(self) -> None:
        with pytest.raises(
            errors.FormatError, match=r"gate_up must be a tensor of moestro\.formats.*from_dense"
        ):
            ExpertWeights(gate_up=torch.zeros(E, 2 * I, H), down=torch.zeros(E, H, I))  # type: ignore[arg-type]

    def test_an_unknown_format(self) -> None:
        with pytest.raises(errors.FormatError, match="'nvfp5'; did you mean 'nvfp4'"):
            make_weights("nvfp5")

    def test_a_wrong_rank(self) -> None:
        with pytest.raises(errors.ShapeError, match=r"gate_up must have 3 dimensions.*\[160, 48\]"):
            ExpertWeights.from_dense(torch.zeros(2 * I, H), torch.zeros(E, H, I), "bf16")

    @pytest.mark.parametrize("shape", [(E + 1, H, I), (E, H + 1, I), (E, I, H)])
    def test_a_down_that_does_not_fit(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(errors.ShapeError, match="down must be"):
            ExpertWeights.from_dense(torch.zeros(E, 2 * I, H), torch.zeros(shape), "bf16")

    def test_rows_that_are_neither_gated_nor_not(self) -> None:
        with pytest.raises(errors.ShapeError, match="gate_up must have 2I=160 rows"):
            ExpertWeights.from_dense(torch.zeros(E, I + 1, H), torch.zeros(E, H, I), "bf16")

    def test_columns_that_do_not_fill_blocks(self) -> None:
        with pytest.raises(errors.ShapeError, match="16"):
            ExpertWeights.from_dense(torch.zeros(E, 2 * I, 40), torch.zeros(E, 40, I), "nvfp4")

    def test_mixed_formats(self) -> None:
        with pytest.raises(errors.FormatError, match="down must have gate_up's format"):
            ExpertWeights(gate_up=make_weights("nvfp4").gate_up, down=make_weights("bf16").down)

    def test_mixed_dtypes(self) -> None:
        with pytest.raises(errors.DTypeError, match="down must have gate_up's dtype"):
            ExpertWeights.from_dense(torch.zeros(E, 2 * I, H).half(), torch.zeros(E, H, I), "bf16")

    def test_biases_of_a_wrong_shape_dtype_or_device(self) -> None:
        with pytest.raises(errors.ShapeError, match="gate_up_bias must have shape"):
            make_weights(gate_up_bias=torch.zeros(E, I))
        with pytest.raises(errors.DTypeError, match="down_bias must be"):
            make_weights(down_bias=torch.zeros(E, H, dtype=torch.int32))
        with pytest.raises(errors.DeviceError, match="down_bias must be on cpu"):
            make_weights(down_bias=torch.zeros(E, H, device="meta"))

    def test_input_scales_of_a_wrong_shape(self) -> None:
        with pytest.raises(errors.ShapeError, match="down_input_scale must have shape"):
            make_weights(down_input_scale=torch.zeros(E + 1))

    def test_weights_are_immutable(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            make_weights().gate_up = None  # type: ignore[misc,assignment]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_senseless_pre_scale_is_refused(value: float) -> None:
    w = make_weights("nvfp4")
    scale = torch.ones(w.hidden_size)
    scale[3] = value
    with pytest.raises(
        errors.FormatError, match=r"gate_up_pre_scale must be finite and positive, got .* at channel 3"
    ):
        ExpertWeights(w.gate_up, w.down, gate_up_pre_scale=scale)
