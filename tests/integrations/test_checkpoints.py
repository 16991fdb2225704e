"""Whole checkpoints by from_pretrained and moestro.load: the dequantised model's logits, with experts kept packed."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moestro
from moestro.errors import BackendError, CheckpointWarning, FormatError
from moestro.kernels.cpu import core

transformers = pytest.importorskip("transformers", minversion="5.7")

import tiny  # noqa: E402

from moestro.integrations import transformers as mt  # noqa: E402
from moestro.integrations.transformers.bound import bound_to  # noqa: E402
from moestro.integrations.transformers.modules import experts_modules  # noqa: E402

F32 = torch.float32
pytestmark = pytest.mark.usefixtures("registered_portable")


def wide() -> Any:
    return tiny.qwen3(128, 128)


def maker(layout: str) -> Any:
    return wide if "128" in str(tiny.PER_EXPERT[layout][1]) else tiny.qwen3


@pytest.mark.parametrize("linears", [False, True])
@pytest.mark.parametrize("layout", tiny.PER_EXPERT)
def test_a_checkpoint_gives_the_dequantised_models_logits(tmp_path: Path, layout: str, linears: bool) -> None:
    model = tiny.random_model(maker(layout), F32)
    truth = tiny.write_per_expert(tmp_path, model, layout, linears=linears)
    ours = type(model).from_pretrained(tmp_path, experts_implementation="moestro", dtype=F32)
    assert tiny.error(tiny.logits(ours), tiny.logits(truth, "eager")) < 1e-5
    names = [name for name, _ in ours.named_parameters() if ".experts" in name]
    assert names == []  # nothing but the packed weights
    for _, module in experts_modules(ours):
        assert bound_to(module).packed
        assert bound_to(module).weights.format == {"w4a16": "nvfp4"}.get(
            layout, bound_to(module).weights.format
        )


@pytest.mark.parametrize("make", [tiny.gpt_oss, tiny.mixtral, tiny.nemotron])
def test_other_families(tmp_path: Path, make: Any) -> None:
    """Biases, interleaved rows and a clamp; other names on disk than in the model; no gate."""
    model = tiny.random_model(make, F32)
    if make is tiny.gpt_oss:
        truth = tiny.write_gpt_oss(tmp_path, model)
    else:
        truth = tiny.write_per_expert(tmp_path, model, "modelopt-nvfp4")
    ours = type(model).from_pretrained(tmp_path, experts_implementation="moestro", dtype=F32)
    assert tiny.error(tiny.logits(ours), tiny.logits(truth, "eager")) < 1e-5


def test_a_mixed_precision_checkpoint_has_a_format_for_each_layer(tmp_path: Path) -> None:
    model = tiny.random_model(tiny.qwen3, F32)
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, layout in ((first, "modelopt-nvfp4"), (second, "modelopt-mxfp8")):
        folder.mkdir()
        tiny.write_per_expert(folder, model, layout)
    parts = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    mixed = {n: t for n, t in parts[0].items() if ".layers.1." not in n}
    save_file(mixed | {n: t for n, t in parts[1].items() if ".layers.1." in n}, first / "model.safetensors")
    config = json.loads((first / "config.json").read_text())
    layers = {f"model.layers.{i}.mlp.experts": {"quant_algo": a} for i, a in enumerate(("NVFP4", "MXFP8"))}
    raw = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    (first / "config.json").write_text(json.dumps({**config, "quantization_config": raw}))
    ours = type(model).from_pretrained(first, experts_implementation="moestro", dtype=F32)
    assert [bound_to(m).weights.format for _, m in experts_modules(ours)] == ["nvfp4", "mxfp8"]
    layers["model.layers.0.mlp.experts"]["quant_algo"] = "INT3"
    (first / "config.json").write_text(json.dumps({**config, "quantization_config": raw}))
    with pytest.raises(FormatError, match="INT3"):
        type(model).from_pretrained(first, experts_implementation="moestro")


def test_modelopts_own_file_is_enough(tmp_path: Path) -> None:
    """hf_quant_config.json beside a config.json that says nothing of quantisation."""
    model = tiny.random_model(tiny.qwen3, F32)
    truth = tiny.write_per_expert(tmp_path, model, "modelopt-nvfp4")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    ours = type(model).from_pretrained(tmp_path, experts_implementation="moestro", dtype=F32)
    assert tiny.error(tiny.logits(ours), tiny.logits(truth, "eager")) < 1e-5


def test_calibrated_activations_by_keyword(tmp_path: Path) -> None:
    """W4A4: near the weights-only result, and not equal."""
    mt.register("w4a4", input_format="nvfp4", backend="portable")
    model = tiny.random_model(tiny.qwen3, F32)
    truth = tiny.write_per_expert(tmp_path, model, "modelopt-nvfp4")
    ours = type(model).from_pretrained(tmp_path, experts_implementation="w4a4", dtype=F32)
    assert all(bound_to(m).weights.gate_up_input_scale is not None for _, m in experts_modules(ours))
    assert 1e-3 < tiny.error(tiny.logits(ours), tiny.logits(truth, "eager")) < 0.5


def spoil(tmp_path: Path, change: Any) -> Any:
    model = tiny.random_model(tiny.qwen3)
    tiny.write_per_expert(tmp_path, model, "modelopt-nvfp4")
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return type(model)


EXPERT = "model.layers.1.mlp.experts.2"


def narrow(tensors: Any, name: str) -> None:
    """Half of the intermediate size, in every tensor alike."""
    value, halved = tensors[name], tensors[name]
    if value.ndim == 2:
        halved = value[:, : value.shape[1] // 2] if "down_proj" in name else value[: value.shape[0] // 2]
    tensors[name] = halved.contiguous()


SPOILT = {
    "a scale is missing": (
        lambda t: t.pop(f"{EXPERT}.up_proj.weight_scale_2"),
        r"2\.up_proj\.weight_scale_2",
    ),
    "an expert is missing": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{EXPERT}.")],
        r"experts\.2 is missing",
    ),
    "the last expert is missing": (
        lambda t: [t.pop(n) for n in list(t) if ".1.mlp.experts.3." in n],
        "must have 4 experts",
    ),
    "a scale of zero": (
        lambda t: t.update({f"{EXPERT}.up_proj.weight_scale_2": torch.tensor(0.0)}),
        r"2\.up_proj\.weight_scale_2 must be positive",
    ),
    "a tensor without a place": (
        lambda t: t.update({f"{EXPERT}.up_proj.rotation": torch.ones(1)}),
        "rotation",
    ),
    "all experts are narrower than the config says": (
        lambda t: [narrow(t, n) for n in list(t) if ".experts." in n],
        r"gate_up of an expert of model\.layers\.0\.mlp\.experts must be \[64, 64\] .*, got \[32, 64\]",
    ),
    "block scales that are all zero": (
        lambda t: t[f"{EXPERT}.up_proj.weight_scale"].view(torch.uint8).zero_(),
        r"2\.up_proj\.weight_scale must hold a scale above 0, got 0 in all",
    ),
    "all experts are missing": (
        lambda t: [t.pop(n) for n in list(t) if ".1.mlp.experts." in n],
        r"no experts for model\.layers\.1\.mlp\.experts",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_wrong_is_an_error_while_loading(tmp_path: Path, what: str) -> None:
    change, message = SPOILT[what]
    cls = spoil(tmp_path, change)
    with pytest.raises(FormatError, match=message):
        cls.from_pretrained(tmp_path, experts_implementation="moestro")


def test_biases_that_one_of_two_products_lacks_and_those_of_nan_are_named(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj_bias"
    tiny.write_gpt_oss(tmp_path, (model := tiny.random_model(tiny.gpt_oss)))
    tensors = load_file(tmp_path / "model.safetensors")
    without = {n: t for n, t in tensors.items() if n != name}
    spoilt = tensors[name].clone()
    spoilt[2, 5] = torch.inf
    neither = {n: t for n, t in without.items() if ".0.mlp.experts." not in n or not n.endswith("_bias")}
    for written, message in (
        (without, r"layers\.0\.mlp\.experts\.down_proj_bias is missing"),
        ({**tensors, name: spoilt}, r"experts\.down_proj_bias\[2\] must be finite"),
        (neither, "must have biases, but its experts in the checkpoint have none"),
    ):
        save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(FormatError, match=message):
            type(model).from_pretrained(tmp_path, experts_implementation="moestro")


def test_fp8_weights_of_nan_are_named_with_their_file(tmp_path: Path) -> None:
    if core.why_no_core() is not None:
        pytest.skip("the core that refuses them is not compiled")
    model = tiny.random_model(lambda: tiny.qwen3(128, 128))
    tiny.write_per_expert(tmp_path, model, "deepseek-fp8")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{EXPERT}.up_proj.weight"].view(torch.uint8)[3, 5] = 0xFF
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    mt.register()
    with pytest.raises(
        FormatError, match=r"model\.safetensors: .*experts\.2\.up_proj\.weight must hold no NaN"
    ):
        type(model).from_pretrained(tmp_path, experts_implementation="moestro")


def test_a_config_that_says_another_format_than_the_tensors_have_is_warned_of(tmp_path: Path) -> None:
    model = tiny.random_model(tiny.qwen3, F32)
    truth = tiny.write_per_expert(tmp_path, model, "modelopt-nvfp4")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = "MXFP8"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(
        CheckpointWarning, match=r"config says modelopt MXFP8 \(mxfp8\), .* are ModelOpt NVFP4"
    ):
        ours = type(model).from_pretrained(tmp_path, experts_implementation="moestro", dtype=F32)
    assert tiny.error(tiny.logits(ours), tiny.logits(truth, "eager")) < 1e-5


def test_a_scale_of_a_linear_layer_is_named_with_its_file(tmp_path: Path) -> None:
    model = tiny.random_model(tiny.qwen3)
    tiny.write_per_expert(tmp_path, model, "modelopt-nvfp4", linears=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight_scale_2"] *= torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"model\.safetensors: .*q_proj\.weight_scale_2 must be positive"):
        type(model).from_pretrained(tmp_path, experts_implementation="moestro")


def test_an_algorithm_that_nobody_knows_is_named(tmp_path: Path) -> None:
    cls = spoil(tmp_path, lambda tensors: None)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = "NVFP5"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"unknown quant_algo 'NVFP5'; did you mean 'NVFP4'"):
        cls.from_pretrained(tmp_path, experts_implementation="moestro")


def test_a_modelopt_checkpoint_for_other_experts_says_what_to_do(tmp_path: Path) -> None:
    cls = spoil(tmp_path, lambda tensors: None)
    with pytest.raises(BackendError, match="experts_implementation='moestro'"):
        cls.from_pretrained(tmp_path, experts_implementation="eager")


@pytest.mark.parametrize("layout", ["modelopt-nvfp4", "compressed-tensors-nvfp4", "deepseek-fp8"])
def test_a_loaded_model_is_saved_in_its_layout(tmp_path: Path, layout: str) -> None:
    model = tiny.random_model(maker(layout), F32)
    truth = tiny.logits(tiny.write_per_expert(tmp_path, model, layout), "eager")
    ours = type(model).from_pretrained(tmp_path, experts_implementation="moestro", dtype=F32)
    ours.save_pretrained(tmp_path / "again")
    before, after = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    for name, tensor in before.items():
        if ".experts." in name and not name.endswith("input_scale"):
            same = after[name].view(torch.uint8) if tensor.dtype.itemsize == 1 else after[name]
            torch.testing.assert_close(
                same, tensor.view(same.dtype) if tensor.dtype.itemsize == 1 else tensor
            )
    again = type(model).from_pretrained(tmp_path / "again", experts_implementation="moestro", dtype=F32)
    assert tiny.error(tiny.logits(again), truth) < 1e-5


def test_load_gives_the_model_and_a_line_a_layer(tmp_path: Path, capsys: Any) -> None:
    model = tiny.random_model(tiny.qwen3, F32)
    truth = tiny.write_per_expert(tmp_path, model, "modelopt-nvfp4", linears=True)
    ours = moestro.load(tmp_path)
    said = capsys.readouterr().out
    assert "model.layers.1.mlp.experts: ModelOpt NVFP4 -> nvfp4 on portable" in said
    assert "self_attn.q_proj: ModelOpt NVFP4 -> dequantised on torch" in said
    assert tiny.error(tiny.logits(ours), tiny.logits(truth, "eager")) < 1e-5
    dense = moestro.load(tmp_path / "truth", format="mxfp8", backend="portable", report=False)
    assert {bound_to(m).weights.format for _, m in experts_modules(dense)} == {"mxfp8"}
    with pytest.raises(FormatError, match=r"config\.json"):
        moestro.load(tmp_path / "nowhere")


def test_a_dense_model_lets_its_parameters_go_once_packed(tmp_path: Path) -> None:
    mt.register()  # the cpu backend packs bf16 in a layout of its own
    model = tiny.random_model(tiny.qwen3)
    model.save_pretrained(tmp_path)
    truth = tiny.logits(type(model).from_pretrained(tmp_path, experts_implementation="eager"))
    ours = type(model).from_pretrained(tmp_path, experts_implementation="moestro")
    assert [n for n, _ in ours.named_parameters() if ".experts" in n] == []
    assert tiny.error(tiny.logits(ours), truth) < 2e-2
    assert set(ours.state_dict()) == set(model.state_dict())  # they come back to be saved
    ours.save_pretrained(tmp_path / "again")
    before, after = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(tiny.logits(ours, "eager"), truth)  # and for Transformers' own experts
    mt.register("kept", release=False)
    kept = type(model).from_pretrained(tmp_path, experts_implementation="kept")
    assert [n for n, _ in kept.named_parameters() if ".experts" in n] != []


def test_fp8_experts_of_transformers_are_read_where_they_are() -> None:
    """A model that Transformers has loaded in FP8 asks a registry of its own."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    class Own(FP8Experts):
        pass

    cls = use_experts_implementation(experts_class=Own, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    config = tiny.qwen3(128, 128).config
    module = cls(config, block_size=(128, 128), has_bias=False, has_gate=True)
    g = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        value = (
            torch.rand(p.shape, generator=g) + 0.5 if "scale" in name else torch.randn(p.shape, generator=g)
        )
        p.requires_grad_(False)
        p.data = value.to(p.dtype)
    x, ids = torch.randn(5, 128, generator=g), torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0], [0, 2]])
    config._experts_implementation = "moestro"
    got = module(x, ids, torch.ones(5, 2))
    want = torch.zeros(5, 128)
    for n in range(5):
        for e in ids[n].tolist():
            up, down = (
                p[e].float() * s[e].repeat_interleave(128, 0).repeat_interleave(128, 1)
                for p, s in (
                    (module.gate_up_proj, module.gate_up_proj_scale_inv),
                    (module.down_proj, module.down_proj_scale_inv),
                )
            )
            gate, rest = (up @ x[n]).chunk(2)
            want[n] += down @ (torch.nn.functional.silu(gate) * rest)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_kv_scales_are_said_to_be_unused(tmp_path: Path, caplog: Any) -> None:
    cls = spoil(tmp_path, lambda t: t.update({"model.layers.0.self_attn.k_proj.k_scale": torch.tensor(1.0)}))
    with caplog.at_level(logging.WARNING, "moestro"):
        cls.from_pretrained(tmp_path, experts_implementation="moestro")
    assert "k_scale" in caplog.text


def test_a_packed_model_is_pickled_and_copied(tmp_path: Path) -> None:
    model = tiny.random_model(tiny.qwen3, F32)
    tiny.write_per_expert(tmp_path, model, "modelopt-nvfp4")
    ours = type(model).from_pretrained(tmp_path, experts_implementation="moestro", dtype=F32)
    want, file = tiny.logits(ours), io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert torch.equal(tiny.logits(torch.load(file, weights_only=False)), want)
