"""Linear layers of whole models: packed from a checkpoint, by keyword, by quantize_linear; saved, adapted, compiled."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers

import moestro
import moestro.integrations.transformers as mt
from moestro.errors import BackendError, FormatError
from moestro.integrations.transformers.linears import packed_linears
from moestro.moe.linear import PackedLinear

F32, BF16 = torch.float32, torch.bfloat16
AUTO = transformers.AutoModelForCausalLM
pytestmark = pytest.mark.usefixtures("registered")


def wide() -> Any:
    return tiny.qwen3(hidden=128, inter=128)


def llama(tied: bool = False) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **tiny.SMALL, intermediate_size=96, attention_bias=True, tie_word_embeddings=tied
        )
    )


def load(folder: Path, **keywords: Any) -> Any:
    keywords.setdefault("dtype", F32)
    return AUTO.from_pretrained(folder, experts_implementation="moestro", **keywords).eval()


def formats_of(model: Any) -> dict[str, str]:
    return {name.rpartition(".")[2]: f"{m.format} on {m.on}" for name, m in packed_linears(model)}


def generated(model: Any, **keywords: Any) -> list[int]:
    tokens = model.generate(
        torch.arange(5)[None] + 3,
        attention_mask=torch.ones(1, 5),
        max_new_tokens=6,
        do_sample=False,
        **keywords,
    )
    found: list[int] = tokens[0].tolist()
    return found


@pytest.mark.parametrize("layout", ["modelopt-nvfp4", "compressed-tensors-nvfp4", "compressed-tensors-mxfp4",
                                    "deepseek-fp8", "modelopt-mxfp8"])  # fmt: skip
def test_what_the_checkpoint_has_quantised_stays_packed_where_the_core_runs_it(
    tmp_path: Path, layout: str
) -> None:
    truth = tiny.write_per_expert(tmp_path, tiny.random_model(wide, F32), layout, linears=True)
    ours = load(tmp_path)
    expected = {} if layout == "modelopt-mxfp8" else {f"{p}_proj" for p in "qkvo"}
    assert set(formats_of(ours)) == set(expected)
    assert all(said.endswith("on cpu") for said in formats_of(ours).values())
    assert tiny.error(tiny.logits(ours), tiny.logits(truth, "eager")) < 1e-4
    assert generated(ours) == generated(truth)
    if expected:
        assert "weight" not in dict(ours.model.layers[0].self_attn.q_proj.named_parameters())


def test_the_keyword_true_runs_heads_and_plain_layers_on_the_core(tmp_path: Path) -> None:
    truth = tiny.write_per_expert(tmp_path, tiny.random_model(wide, BF16), "modelopt-mxfp8", linears=True)
    ours = load(tmp_path, dtype=BF16, moestro_linear=True)
    assert formats_of(ours) == dict.fromkeys(
        ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"], "bf16 on cpu"
    )
    assert tiny.error(tiny.logits(ours), tiny.logits(truth, "eager")) < 2e-2
    assert not dict(packed_linears(load(tmp_path, dtype=BF16)))


def test_the_keyword_false_leaves_all_to_torch(tmp_path: Path) -> None:
    truth = tiny.write_per_expert(tmp_path, tiny.random_model(wide, F32), "modelopt-nvfp4", linears=True)
    for model in (
        load(tmp_path, moestro_linear=False),
        moestro.load(tmp_path, moestro_linear=False, dtype=F32, report=False),
    ):
        assert formats_of(model) == {}
        assert tiny.error(tiny.logits(model), tiny.logits(truth, "eager")) < 1e-4
    with pytest.raises(TypeError, match="moestro_linear must be True, False or None"):
        load(tmp_path, moestro_linear="nvfp4")


def test_it_may_be_said_at_register(tmp_path: Path) -> None:
    tiny.random_model(wide, BF16).save_pretrained(tmp_path)
    assert formats_of(load(tmp_path, dtype=BF16)) == {}
    mt.register(moestro_linear=True)
    assert set(formats_of(load(tmp_path, dtype=BF16)).values()) == {"bf16 on cpu"}
    assert formats_of(load(tmp_path, dtype=BF16, moestro_linear=False)) == {}


def test_layers_that_stay_torchs_are_named_with_the_reason(tmp_path: Path, caplog: Any) -> None:
    tiny.random_model(lambda: llama(tied=True), BF16).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "moestro"):
        ours = load(tmp_path, dtype=BF16, moestro_linear=True)
    assert "lm_head" not in formats_of(ours)
    assert "its weight is another module's, too (lm_head)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "moestro"):
        assert formats_of(load(tmp_path, dtype=F32, moestro_linear=True)) == {}
    assert "dense weights of bfloat16, not float32" in caplog.text


def test_a_line_a_layer_says_what_runs_where(tmp_path: Path, capsys: Any) -> None:
    tiny.write_per_expert(tmp_path, tiny.random_model(wide, BF16), "modelopt-nvfp4", linears=True)
    moestro.load(tmp_path, moestro_linear=True)
    said = capsys.readouterr().out
    assert "model.layers.1.self_attn.q_proj: ModelOpt NVFP4 -> nvfp4 on cpu" in said
    assert "lm_head: unquantised -> bf16 on cpu" in said


def test_a_dense_model_is_quantised_saved_and_loaded_again(tmp_path: Path) -> None:
    model = tiny.random_model(llama, F32)
    lines = mt.quantize_linear(model, "nvfp4")
    assert len(lines) == 14
    assert "lm_head" not in formats_of(model)
    logits = tiny.logits(model)
    truth = copy.deepcopy(model)
    for name, layer in list(packed_linears(truth)):
        dense = torch.nn.Linear(layer.in_features, layer.out_features)
        dense.weight, dense.bias = torch.nn.Parameter(layer.dequantize(F32)), layer.bias
        if dense.bias is None:
            dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            dense.weight = torch.nn.Parameter(layer.dequantize(F32))
        parent, _, leaf = name.rpartition(".")
        setattr(truth.get_submodule(parent), leaf, dense)
    assert tiny.error(logits, tiny.logits(truth)) < 1e-5
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert formats_of(again) == formats_of(model)
    assert torch.equal(tiny.logits(again), logits)
    assert formats_of(AUTO.from_pretrained(tmp_path, dtype=F32, moestro_linear=True)) == formats_of(model)
    assert formats_of(moestro.load(tmp_path, report=False)) == formats_of(model)


def test_what_is_not_quantised_is_named_and_none_is_an_error(caplog: Any) -> None:
    model = tiny.random_model(llama, F32)
    with caplog.at_level(logging.WARNING, "moestro"):
        mt.quantize_linear(model, "mxfp4", exclude=["*.q_proj"])
    assert "excluded by name" in caplog.text
    assert formats_of(model)["lm_head"] == "mxfp4 on cpu"
    with pytest.raises(FormatError, match="must be a quantised one"):
        mt.quantize_linear(model, "bf16")
    with pytest.raises(BackendError, match="no Linear layer that can be quantised"):
        mt.quantize_linear(model, "nvfp4", exclude=["*"])


@pytest.mark.parametrize("layout", ["modelopt-nvfp4", "compressed-tensors-nvfp4", "deepseek-fp8"])
def test_a_loaded_model_is_saved_with_its_linear_layers_packed(tmp_path: Path, layout: str) -> None:
    tiny.write_per_expert(tmp_path / "a", tiny.random_model(wide, F32), layout, linears=True)
    ours = load(tmp_path / "a")
    ours.save_pretrained(tmp_path / "b")
    again = load(tmp_path / "b")
    assert formats_of(again) == formats_of(ours)
    assert torch.equal(tiny.logits(again), tiny.logits(ours))


def test_adapters_train_on_packed_layers_and_a_merge_is_refused(tmp_path: Path) -> None:
    tiny.write_per_expert(tmp_path, tiny.random_model(wide, F32), "modelopt-nvfp4", linears=True)
    model = load(tmp_path)
    before = tiny.logits(model)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    adapted = peft.get_peft_model(model, config)
    assert isinstance(model.model.layers[0].self_attn.q_proj.base_layer, PackedLinear)
    tokens = torch.arange(9)[None] * 7 % 64
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        adapted(tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert not torch.equal(tiny.logits(adapted), before)
    with adapted.disable_adapter():
        torch.testing.assert_close(tiny.logits(adapted), before)
    with pytest.raises(BackendError, match="packed Linear is a dequantised copy"):
        adapted.merge_and_unload()


def test_a_model_with_packed_layers_compiles_copies_and_uses_a_static_cache(tmp_path: Path) -> None:
    truth = tiny.write_per_expert(tmp_path, tiny.random_model(wide, F32), "modelopt-nvfp4", linears=True)
    ours = load(tmp_path)
    assert generated(ours, cache_implementation="static") == generated(truth)
    logits = tiny.logits(ours)
    assert torch.equal(tiny.logits(copy.deepcopy(ours)), logits)
    compiled = torch.compile(ours, backend="eager")
    torch.testing.assert_close(tiny.logits(compiled), logits)
    twin = load(tmp_path)
    twin.load_state_dict(ours.state_dict())
    assert torch.equal(tiny.logits(twin), logits)


def test_packed_layers_take_the_place_of_parameters(tmp_path: Path) -> None:
    tiny.write_per_expert(tmp_path, tiny.random_model(wide, BF16), "modelopt-nvfp4", linears=True)
    ours = load(tmp_path, dtype=BF16)
    layer = ours.model.layers[0].self_attn.q_proj
    assert layer.nbytes < 0.36 * 2 * layer.in_features * layer.out_features
    assert not list(layer.parameters())


def test_input_format_quantises_what_goes_into_quantised_layers(tmp_path: Path) -> None:
    tiny.write_per_expert(tmp_path, tiny.random_model(wide, F32), "modelopt-nvfp4", linears=True)
    plain = tiny.logits(load(tmp_path))
    mt.register(input_format="nvfp4")
    ours = load(tmp_path)
    layer = ours.model.layers[0].self_attn.q_proj
    assert (layer.input_format, float(layer.input_scale)) == ("nvfp4", pytest.approx(0.01))
    assert 1e-3 < tiny.error(tiny.logits(ours), plain) < 0.5
