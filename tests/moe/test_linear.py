"""PackedLinear in the place of torch.nn.Linear: numbers, gradients, copies, state."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moestro import formats
from moestro.errors import BackendError, MoestroError, ShapeError
from moestro.formats import BF16, NVFP4
from moestro.moe import linear
from moestro.moe.linear import PackedLinear

FORMATS = ("nvfp4", "mxfp4", "fp8_block", "mxfp8", "bf16")


def packed(format: str = "nvfp4", rows: int = 40, columns: int = 64, **options: Any) -> PackedLinear:
    torch.manual_seed(0)
    dense, bias = torch.randn(rows, columns) * columns**-0.5, torch.randn(rows)
    return PackedLinear(
        formats.get(format).quantize(dense.bfloat16() if format == "bf16" else dense), bias, **options
    )


def expected(layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x.float(), layer.dequantize(torch.float32), layer.bias.float())


def error(y: torch.Tensor, truth: torch.Tensor) -> float:
    return float((y.float() - truth).norm() / truth.norm())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", ["auto", "portable"])
def test_it_computes_what_the_dequantised_linear_does(format: str, backend: str) -> None:
    layer = packed(format, backend=backend)
    assert isinstance(layer, torch.nn.Linear)
    assert (layer.in_features, layer.out_features) == (64, 40)
    for shape in ((64,), (3, 64), (2, 5, 64)):
        x = torch.randn(shape).bfloat16()
        assert error(layer(x), expected(layer, x)) < 8e-3
    strided = torch.randn(64, 6).T
    assert error(layer(strided), expected(layer, strided)) < 1e-6


def test_what_runs_portably_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    linear.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "moestro"):
        assert [packed("mxfp8").on for _ in range(3)] == ["portable"] * 3
    assert [
        r.message
        for r in caplog.records
        if "mxfp8" in r.message and "dequantised for every call" in r.message
    ]
    assert len(caplog.records) == 1
    with pytest.raises(BackendError, match="not mxfp8"):
        packed("mxfp8", backend="cpu")


@pytest.mark.parametrize("format", FORMATS)
def test_x_and_the_bias_get_gradients_and_the_weight_none(format: str) -> None:
    layer = packed(format)
    layer.bias.requires_grad_()
    x = torch.randn(2, 3, 64, requires_grad=True)
    grad = torch.randn(2, 3, 40)
    layer(x).backward(grad)
    assert x.grad is not None
    assert layer.bias.grad is not None
    torch.testing.assert_close(x.grad, grad @ layer.dequantize(torch.float32), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.requires_grad_(),
        lambda layer: setattr(layer.weight, "data", torch.zeros(40, 64)),
        lambda layer: layer.weight.__setitem__(0, 1.0),
        lambda layer: torch.add(layer.weight, 1, out=layer.weight),
        lambda layer: layer.weight.__iadd__(1),
        lambda layer: torch.nn.init.normal_(layer.weight),
        lambda layer: setattr(layer, "weight", torch.nn.Parameter(torch.zeros(40, 64))),
    ],
)
def test_a_write_to_the_weight_is_an_error_and_not_lost(write: Any) -> None:
    layer = packed()
    with pytest.raises(BackendError, match="packed"):
        write(layer)


def test_the_weight_reads_as_any_tensor() -> None:
    layer = packed()
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((40, 64), torch.bfloat16, "cpu")
    assert type(weight.float()) is torch.Tensor
    assert torch.equal(weight.requires_grad_(False).float(), layer.dequantize(torch.bfloat16).float())


@pytest.mark.parametrize("format", FORMATS)
def test_copies_pickles_and_states_give_the_same_bits(format: str) -> None:
    layer, x = packed(format), torch.randn(5, 64).bfloat16()
    y = layer(x)
    twin = copy.deepcopy(layer)
    twin.bias.data.zero_()  # its own
    assert torch.equal(twin(torch.zeros(1, 64)), torch.zeros(1, 40))
    assert torch.equal(layer(x), y)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
    other = PackedLinear(BF16(torch.zeros(40, 64).bfloat16()), torch.zeros(40))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    assert other.format == format


def test_a_state_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"weight must be \[40, 64\], got \[40, 32\]"):
        packed().load_state_dict(packed(columns=32).state_dict())
    state = packed().state_dict()
    with pytest.raises(RuntimeError, match="weight"):
        packed().load_state_dict({"bias": state["bias"]})


def test_a_bias_that_was_replaced_or_written_is_used() -> None:
    layer, x = packed(), torch.randn(2, 64)
    y = layer(x)
    layer.bias = torch.nn.Parameter(layer.bias + 1)
    torch.testing.assert_close(layer(x).detach(), y + 1)
    with torch.no_grad():
        layer.bias.sub_(1)
        torch.testing.assert_close(layer(x), y)
        layer.bias.data.add_(1)
        torch.testing.assert_close(layer(x), y + 1)


def test_to_moves_the_dtype_of_what_is_not_packed() -> None:
    layer = packed().to(torch.float16)
    assert layer.bias.dtype == layer.weight.dtype == torch.float16
    x = torch.randn(3, 64).half()
    assert error(layer(x), expected(layer, x)) < 1e-3
    assert packed("bf16").float().weight.dtype == torch.bfloat16  # its own


@pytest.mark.parametrize("input_format", ["nvfp4", "fp8", "int8"])
def test_activations_are_quantised_where_that_was_asked_for(input_format: str) -> None:
    plain, layer, x = packed(), packed(input_format=input_format), torch.randn(7, 64)
    difference = error(layer(x), plain(x))
    assert 1e-3 < difference < 0.2
    portable = packed(input_format=input_format, backend="portable")
    assert error(layer(x), portable(x)) < 1e-4
    scaled = packed(input_format="nvfp4", input_scale=torch.tensor(0.002))
    assert error(scaled(x), plain(x)) < 0.2


def test_a_scale_of_the_input_multiplies_x() -> None:
    scale = torch.rand(64) + 0.5
    layer, x = packed(pre_scale=scale), torch.randn(4, 64)
    torch.testing.assert_close(layer(x), packed()(x * scale))
    assert error(layer(x), expected(layer, x)) < 1e-6


def test_torch_compile_takes_it_whole_and_sees_another_batch_size() -> None:
    layer = packed()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        for n in (1, 3, 9):
            x = torch.randn(n, 64)
            assert torch.equal(compiled(x), layer(x))
    x = torch.randn(3, 64, requires_grad=True)
    compiled(x).sum().backward()
    assert x.grad is not None


def test_the_thread_count_may_change_between_calls(set_torch_threads: Callable[[int], None]) -> None:
    layer, x = packed(rows=400), torch.randn(2, 64)
    y = layer(x)
    set_torch_threads(torch.get_num_threads() + 1)
    assert torch.equal(layer(x), y)


def test_what_does_not_fit_names_both_sizes() -> None:
    layer = packed()
    with pytest.raises(ShapeError, match=r"x must be \[\.\.\., 64\], got \[2, 63\]"):
        layer(torch.randn(2, 63))
    weight = NVFP4.quantize(torch.randn(32, 32))
    for options in ({"bias": torch.zeros(31)}, {"pre_scale": torch.ones(31)}, {"input_format": "int4"}):
        with pytest.raises(MoestroError):
            PackedLinear(weight, **options)
