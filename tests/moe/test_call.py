"""The way of a warm call: how many modules it enters, what it replays, and when a plan is made anew."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from moe_cases import E, H, K, error, make_call, make_weights

from moestro import FusedMoE, errors, fused_moe
from moestro.kernels.portable.runner import PortableRunner
from moestro.moe import call as call_module
from moestro.moe import devices


def modules_of(call: Any) -> list[str]:
    """The modules of ours whose functions a call runs in, one after the other, up to the backend."""
    seen: list[str] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_globals.get("__name__", "")
        if event in ("call", "return") and name.startswith("moestro.") and (not seen or seen[-1] != name):
            seen.append(name)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    first = next(i for i, name in enumerate(seen) if ".kernels." in name)
    return seen[: first + 1]


@pytest.mark.parametrize("backend", ["auto", "portable"])
def test_a_warm_call_changes_module_at_most_ten_times_before_the_backend(backend: str) -> None:
    w, call = make_weights("nvfp4"), make_call(9)
    layer = FusedMoE(w, K, 16, backend=backend)
    for run in (lambda: fused_moe(*call, w, backend=backend), lambda: layer(*call)):
        for _ in range(3):
            run()
        walk = modules_of(run)
        assert len(walk) - 1 <= 10, walk


def test_a_plan_is_made_once_for_a_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, made = FusedMoE(make_weights(), K, 64, backend="portable"), []
    bind = PortableRunner.bind
    monkeypatch.setattr(
        PortableRunner,
        "bind",
        lambda self, inputs, tactic: made.append(len(inputs[0])) or bind(self, inputs, tactic),
    )
    for num_tokens in (3, 9, 3, 9, 9, 3):
        layer(*make_call(num_tokens))
    assert made == [3, 9]


@pytest.mark.parametrize("fmt", ["bf16", "nvfp4"])
def test_torchs_number_of_threads_may_change_between_calls(
    fmt: str, set_torch_threads: Callable[[int], None]
) -> None:
    w, call = make_weights(fmt), make_call(40)
    layer = FusedMoE(w, K, 64)
    for number in (1, 2, 1, 3):
        set_torch_threads(number)
        assert error(layer(*call), *call, w) < 1e-2
        assert error(fused_moe(*call, w), *call, w) < 1e-2


def test_weights_written_in_place_are_seen_by_a_bound_call() -> None:
    w, call = make_weights("bf16"), make_call(9)
    before = fused_moe(*call, w)
    w.down.data.mul_(2)  # type: ignore[attr-defined]
    assert torch.equal(fused_moe(*call, w), before * 2)


def test_a_guard_that_knows_a_call_refuses_what_the_checks_refuse() -> None:
    """Warm, the checks are one compiled guard: nothing slips through beside it."""
    w, (x, ids, weights) = make_weights(), make_call(9)
    layer = FusedMoE(w, K, 9)
    for _ in range(3):
        layer(x, ids, weights)
    bad: list[tuple[type[Exception], str, Any]] = [
        (errors.ShapeError, "N=9", (x, ids[:8], weights)),
        (errors.ShapeError, "ids' shape", (x, ids, weights[:8])),
        (errors.ShapeError, "max_num_tokens=9", tuple(t.repeat(2, 1) for t in (x, ids, weights))),
        (errors.ShapeError, "x must be contiguous", (x.T.contiguous().T, ids, weights)),
        (errors.ShapeError, "K=3", (x, ids[:, :2].contiguous(), weights[:, :2].contiguous())),
        (errors.DTypeError, "weights must be", (x, ids, weights.double())),
        (errors.DTypeError, "ids must be", (x, ids.short(), weights)),
        (errors.DeviceError, "x must be on cpu", (x.to("meta"), ids, weights)),
        (errors.DTypeError, "x must be a torch.Tensor, got list", ([1.0], ids, weights)),
    ]
    for kind, message, call in bad:
        with pytest.raises(kind, match=message):
            layer(*call)
    assert torch.equal(layer(x, ids.long(), weights), layer(x, ids, weights))
    with torch.inference_mode():
        inside = make_call(9)
        assert error(layer(*inside), *inside, w) < 1e-2


def test_a_guard_that_knows_a_call_with_out_refuses_what_the_checks_refuse() -> None:
    """Where memory overlaps is no matter of the guard: it is looked at each time."""
    w, (x, ids, weights) = make_weights(), make_call(9)
    layer, plain = FusedMoE(w, K, 9), torch.zeros_like(x)
    expected = layer(x, ids, weights)
    for _ in range(3):
        assert layer(x, ids, weights, out=plain) is plain
    room = torch.zeros(2 * x.numel(), dtype=x.dtype)
    high = room[5 : 5 + x.numel()].view_as(x)
    wanting = torch.zeros_like(x, requires_grad=True)
    bad: list[tuple[type[Exception], str, Any, Any]] = [
        (errors.ShapeError, "out must have x's shape", (x, ids, weights), plain[:8]),
        (
            errors.ShapeError,
            "out must be contiguous",
            (x, ids, weights),
            torch.zeros_like(x.T.contiguous()).T,
        ),
        (errors.DTypeError, "out must be torch.bfloat16", (x, ids, weights), plain.float()),
        (errors.DeviceError, "out must be on cpu", (x, ids, weights), plain.to("meta")),
        (errors.DTypeError, "out must be a torch.Tensor", (x, ids, weights), [1.0]),
        (errors.ShapeError, "out must not overlap x", (x, ids, weights), x),
        (errors.ShapeError, "out must not overlap x", (room[: x.numel()].view_as(x), ids, weights), high),
        (errors.ShapeError, "ids' shape", (x, ids, weights[:8]), plain),
    ]
    for kind, message, call, out in bad:
        with pytest.raises(kind, match=message):
            layer(*call, out=out)
    with torch.no_grad():
        for _ in range(3):
            layer(x, ids, weights, out=wanting)
    with pytest.raises(errors.BackendError, match="out must not want a gradient"):
        layer(x, ids, weights, out=wanting)
    assert torch.equal(layer(x, ids, weights, out=plain), expected)


def test_out_over_the_routing_is_seen_in_a_warm_call() -> None:
    w, (x, ids, weights) = make_weights(), make_call(9)
    layer, out = FusedMoE(w, K, 9), torch.zeros_like(x)
    for _ in range(3):
        layer(x, ids, weights, out=out)
    inside = out.view(torch.uint8).view(-1)[: 4 * ids.numel()]
    for name, call in (
        ("ids", (x, inside.view(torch.int32).view_as(ids).zero_(), weights)),
        ("weights", (x, ids, inside.view(torch.float32).view_as(weights))),
    ):
        with pytest.raises(errors.ShapeError, match=f"out must not overlap {name}"):
            layer(*call, out=out)


def test_a_tensor_of_another_class_gets_a_plain_result_each_time() -> None:
    """empty_like() of it would be of its class, or whatever the class makes of it."""

    class Named(torch.Tensor):
        pass

    w, (x, ids, weights) = make_weights(), make_call(9)
    layer = FusedMoE(w, K, 9)
    expected = layer(x, ids, weights)
    for given in (x.as_subclass(Named), torch.nn.Parameter(x, requires_grad=False)):
        for _ in range(3):
            y = layer(given, ids, weights)
            assert type(y) is torch.Tensor
            assert torch.equal(y, expected)


def test_the_checks_are_made_once_for_a_number_of_tokens_and_a_kind_of_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, made = FusedMoE(make_weights(), K, 16), []
    check = call_module.check_call
    monkeypatch.setattr(
        call_module, "check_call", lambda *given: made.append(given[1].shape[0]) or check(*given)
    )
    for n in (3, 9, 3, 9, 9, 3):
        call = make_call(n)
        layer(*call)
        layer(*call, out=torch.empty_like(call[0]))
    assert made == [3, 3, 9, 9]  # without out and with it


def test_what_fused_moe_binds_goes_with_the_weights() -> None:
    w = make_weights("nvfp4")
    fused_moe(*make_call(3), w)
    gone = weakref.ref(w)
    del w
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("fmt", ["bf16", "nvfp4", "fp8_block"])
@pytest.mark.parametrize("layer", [False, True])
def test_a_default_device_is_nothing_to_a_call(fmt: str, layer: bool) -> None:
    """A model made under torch.device("meta"), then filled: packing used to write to address zero."""
    w, call = make_weights(fmt), make_call(9)
    with torch.device("meta"):
        made = FusedMoE(w, K, 16)
        for _ in range(3):  # the last are warm
            y = made(*call) if layer else fused_moe(*call, w)
        again = fused_moe(*call, w, input_format="int8", backend="portable", batch_invariant=True)
    assert error(y, *call, w) < 1e-2
    assert error(again, *call, w, input_format="int8") < 1e-2


def test_launches_go_to_the_weights_gpu_whichever_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """There need be no second GPU: what counts is where the call would be made."""
    current, entered = 0, []

    class Guard:
        def __init__(self, device: Any) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: Any) -> None:
            return None

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    elsewhere = devices.elsewhere(torch.device("cuda:1"))
    assert elsewhere is not None
    assert elsewhere()
    current = 1
    assert not elsewhere()
    assert devices.elsewhere(torch.device("cpu")) is None
    layer, call = FusedMoE(make_weights(), K, 16), make_call(9)
    bound = layer._call(torch.bfloat16)
    layer(*call)
    monkeypatch.setattr(bound, "_elsewhere", lambda: True)
    monkeypatch.setattr(bound, "device", torch.device("cpu"))
    monkeypatch.setattr(devices, "current", lambda device: Guard(device))
    layer(*call)
    assert entered == [torch.device("cpu")]


@pytest.mark.parametrize("fmt", ["bf16", "nvfp4", "mxfp4", "fp8_block"])
@pytest.mark.parametrize("backend", ["auto", "portable"])
def test_a_rank_without_experts_contributes_zeros(fmt: str, backend: str) -> None:
    w = make_weights(fmt, experts=0)
    call = make_call(5, hidden=w.hidden_size)
    layer = FusedMoE(w, K, 8, num_experts=E, backend=backend)
    layer.tune(progress=False)
    for y in (fused_moe(*call, w, num_experts=E, backend=backend), layer(*call)):
        assert y.shape == (5, w.hidden_size)
        assert not y.any()


@pytest.mark.parametrize("backend", ["auto", "portable"])
def test_top_k_may_exceed_a_ranks_share(backend: str) -> None:
    """Most choices are of other ranks; a sentinel stands for them."""
    w, (x, ids, weights) = make_weights(experts=2), make_call(9, top_k=K)
    ids[ids >= 2] = E
    y = fused_moe(x, ids, weights, w, num_experts=E + 1, backend=backend)
    layer = FusedMoE(w, K, 16, num_experts=E + 1, backend=backend)
    assert error(y, x, ids, weights, w) < 1e-2
    assert error(layer(x, ids, weights), x, ids, weights, w) < 1e-2
    assert H == y.shape[1]
