"""The stand-ins are as vLLM's own classes where the plugin looks. `make test-vllm` runs these."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import stand_ins
import torch
from vllm_runs import NO_VLLM, vllm_is_there

if not vllm_is_there():
    pytest.skip(NO_VLLM, allow_module_level=True)

from moestro.integrations.vllm import hooks, kinds
from moestro.integrations.vllm.settings import CLASSES, FUSED_MOE, Settings


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What vLLM has set up when it makes a layer."""
    alone = SimpleNamespace(world_size=1, rank_in_group=0)
    monkeypatch.setattr(importlib.import_module("vllm.distributed.parallel_state"), "_TP", alone)
    config = importlib.import_module("vllm.config")
    with config.set_current_vllm_config(config.VllmConfig()):
        yield


def real(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def names_of(cls: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)} | set(dir(cls))


def test_the_configs_have_no_name_that_vllms_lack() -> None:
    config, parallel = (
        real(f"{FUSED_MOE}.config.FusedMoEConfig"),
        real(f"{FUSED_MOE}.config.FusedMoEParallelConfig"),
    )
    assert {f.name for f in dataclasses.fields(stand_ins.Config)} <= names_of(config)
    assert {f.name for f in dataclasses.fields(stand_ins.Parallel)} <= names_of(parallel)
    assert "is_act_and_mul" in names_of(config)


def test_the_activations_are_vllms() -> None:
    theirs = {one.value for one in real(f"{FUSED_MOE}.activation.MoEActivation")}
    assert {one.value for one in stand_ins.MoEActivation} <= theirs


def test_the_groups_are_where_the_plugin_looks() -> None:
    assert callable(real("vllm.distributed.get_ep_group"))


@pytest.mark.parametrize("path", CLASSES)
def test_vllms_methods_are_called_as_ours_are_written(path: str) -> None:
    cls = real(path)
    apply = list(inspect.signature(cls.apply).parameters)
    assert apply == [
        "self",
        "layer",
        "x",
        "topk_weights",
        "topk_ids",
        "shared_experts",
        "shared_experts_input",
    ]
    create = inspect.signature(cls.create_weights).parameters
    assert list(create)[1:6] == [
        "layer",
        "num_experts",
        "hidden_size",
        "intermediate_size_per_partition",
        "params_dtype",
    ]
    assert list(inspect.signature(cls.process_weights_after_loading).parameters) == ["self", "layer"]


def parameters(layer: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()}


def made(cls: Any, kind: Any, *args: Any, moe: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The parameters that our method class, over `cls`, creates."""
    method = hooks.subclass(cls, kind, Settings())(*args)
    layer = torch.nn.Module()
    layer.layer_name, layer.activation, layer.moe_config = "l", moe.activation, moe  # type: ignore[assignment]
    method.create_weights(
        layer=layer,
        num_experts=moe.num_local_experts,
        hidden_size=moe.hidden_dim,
        unpadded_hidden_size=moe.hidden_dim,
        intermediate_size_per_partition=moe.intermediate_size_per_partition,
        params_dtype=moe.in_dtype,
        weight_loader=lambda *given, **more: None,
        global_num_experts=moe.num_experts,
    )
    return parameters(layer)


def real_config(activation: str, bias: bool) -> Any:
    config = real(f"{FUSED_MOE}.config.FusedMoEConfig")
    parallel = real(f"{FUSED_MOE}.config.FusedMoEParallelConfig").make_no_parallel()
    return config(
        num_experts=4,
        experts_per_token=2,
        hidden_dim=256,
        intermediate_size=128,
        num_local_experts=4,
        num_logical_experts=4,
        activation=real(f"{FUSED_MOE}.activation.MoEActivation")(activation),
        device="cpu",
        routing_method=next(iter(real(f"{FUSED_MOE}.config.RoutingMethodType"))),
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
        has_bias=bias,
    )


@pytest.mark.parametrize(("path", "name"), CLASSES.items())
def test_parameters_have_vllms_names_shapes_and_dtypes(path: str, name: str) -> None:
    if path.endswith("CompressedTensorsW4A4Nvfp4MoEMethod"):
        pytest.skip("there is no stand-in for it; test_real_vllm.py runs it")
    cls = real(path)
    kind = kinds.KINDS[cls.__name__]
    gptoss = name == "mxfp4"
    theirs = real_config("swigluoai" if gptoss else "silu", gptoss)
    ours = stand_ins.Config(
        hidden_dim=256,
        intermediate_size_per_partition=128,
        has_bias=gptoss,
        activation=stand_ins.MoEActivation(theirs.activation.value),
    )
    fp8 = SimpleNamespace(
        is_checkpoint_fp8_serialized=True,
        weight_block_size=[128, 128],
        activation_scheme="dynamic",
        is_scale_e8m0=False,
    )
    args: dict[str, Any] = {
        "nvfp4": lambda moe: (stand_ins.quant_config(), moe),
        "fp8_block": lambda moe: (fp8, SimpleNamespace(moe_config=moe)),
    }
    given = args.get(name, lambda moe: (moe,))
    own = getattr(stand_ins.method_classes(), name)
    expected = made(cls, kind, *given(theirs), moe=theirs)
    actual = made(own, kind, *given(ours), moe=ours)
    assert actual == expected
