"""The plugin in vLLM itself, on CPUs: tokens and logprobs with it and without it. `make test-vllm` runs these.

Without the plugin vLLM's own experts run the bf16 model, or the dequantised one where the checkpoint is packed.
Both round to bf16 at other places, so logprobs may differ by a step of the bf16 logits, and tokens only where
two are that near.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from compare import assert_equal, assert_same, serves, worst_logprob
from vllm_runs import NO_VLLM, Run, run_vllm, vllm_is_there

if not vllm_is_there():
    pytest.skip(NO_VLLM, allow_module_level=True)

Models = Callable[[str], Path]


def test_float32_nvfp4_equals_the_dequantised_model_in_520_tokens(run: Run, models: Models) -> None:
    packed = run(
        models("qwen3-compressed"), dtype="float32", tokens=130
    )  # vLLM takes no float32 for ModelOpt's
    dense = run(models("qwen3-dense"), plugin=False, dtype="float32", tokens=130)
    assert serves(packed, "nvfp4")
    assert "moestro:" not in dense.log
    assert sum(map(len, packed.tokens)) == 520
    assert_equal(packed, dense)


def test_bf16_nvfp4_parts_from_the_dequantised_model_at_near_ties_alone(run: Run, models: Models) -> None:
    packed = run(models("qwen3-modelopt"), tokens=130)
    dense = run(models("qwen3-dense"), plugin=False, tokens=130)
    assert serves(packed, "nvfp4")
    assert_same(packed, dense)


def test_bf16_nvfp4_equals_the_dequantised_model_on_the_same_kernels(run: Run, models: Models) -> None:
    packed, dense = run(models("qwen3-modelopt"), tokens=130), run(models("qwen3-dense"), tokens=130)
    assert (packed.tokens, packed.best) == (dense.tokens, dense.best)


def test_vllm_alone_refuses_nvfp4(models: Models) -> None:
    done = run_vllm(models("qwen3-modelopt"), {"MOESTRO_VLLM": "0"}, {})
    assert done.returncode != 0
    assert "No NvFp4 MoE backend supports the deployment configuration" in done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["compressed", "compressed_w4a4", "modelopt_w4a4"])
def test_the_other_nvfp4_checkpoints_give_the_same(kind: str, run: Run, models: Models) -> None:
    said = run(models(f"qwen3-{kind}"))
    assert serves(said, "nvfp4")
    assert ("activations of this W4A4 checkpoint stay" in said.log) == kind.endswith("w4a4")
    assert_same(said, run(models("qwen3-modelopt")))


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "glm4", "deepseek", "gptoss"])
def test_bf16_experts_give_what_vllms_own_give(family: str, run: Run, models: Models) -> None:
    ours, theirs = run(models(family)), run(models(family), plugin=False)
    assert serves(ours, "bf16")
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("packed", "kind"),
    [("gptoss-mxfp4", "mxfp4"), ("deepseek-modelopt", "nvfp4"), ("mixtral-modelopt", "nvfp4")],
)
def test_packed_experts_give_what_the_dequantised_model_gives(
    packed: str, kind: str, run: Run, models: Models
) -> None:
    ours = run(models(packed))
    assert serves(ours, kind)
    assert_same(ours, run(models(f"{packed.partition('-')[0]}-dense"), plugin=False))


def test_compiled_by_vllm(run: Run, models: Models) -> None:
    ours = run(models("qwen3-modelopt"), enforce_eager=False)
    assert_same(ours, run(models("qwen3-dense"), plugin=False, enforce_eager=False))


def test_a_bf16_checkpoint_quantised_at_load(run: Run, models: Models) -> None:
    said = run(models("qwen3"), quantization="moestro_nvfp4")
    assert serves(said, "nvfp4")
    plain = run(models("qwen3"), plugin=False)
    assert worst_logprob(said, plain) < 3  # another model's, but not noise: NVFP4 is off by about 10 %


def test_weights_reloaded(run: Run, models: Models) -> None:
    assert run(models("qwen3-modelopt"), reload=True).tokens == run(models("qwen3-modelopt")).tokens


def test_a_model_without_experts_is_as_without_the_plugin(run: Run, models: Models, tmp_path: Path) -> None:
    import transformers

    sizes = {**json.loads((models("qwen3") / "config.json").read_text()), "intermediate_size": 128}
    fields = {key: sizes[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")}
    config = transformers.Qwen3Config(
        **fields, num_attention_heads=2, num_key_value_heads=2, intermediate_size=128
    )
    transformers.Qwen3ForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    ours, theirs = run(tmp_path), run(tmp_path, plugin=False)
    assert (ours.tokens, ours.best) == (theirs.tokens, theirs.best)
    assert "moestro:" not in ours.log
    assert not [
        name
        for name in ours.modules
        if name.startswith(("moestro.kernels", "moestro.moe", "moestro.formats"))
    ]


def test_experts_that_are_left_to_vllm_are_as_without_the_plugin(run: Run, models: Models) -> None:
    ours = run(models("qwen3"), environ={"MOESTRO_VLLM": "nvfp4"})
    theirs = run(models("qwen3"), plugin=False)
    assert (ours.tokens, ours.best) == (theirs.tokens, theirs.best)
    assert "moestro:" not in ours.log


def test_vllm_plugins_is_respected(models: Models) -> None:
    done = run_vllm(models("qwen3-modelopt"), {"VLLM_PLUGINS": "", "MOESTRO_VLLM": "1"}, {})
    assert done.returncode != 0
    assert "moestro:" not in done.stdout + done.stderr


def test_a_checkpoint_with_a_scale_missing_is_an_error_that_names_it(models: Models, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(models("qwen3-modelopt"), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight_scale_2"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    done = run_vllm(tmp_path / "m", {}, {})
    assert done.returncode != 0
    said = (
        "model.layers.1.mlp.experts: every expert must have a weight_scale_2 for w13_weight_scale_2, got none"
    )
    assert said in done.stdout + done.stderr
    assert "for experts 3" in done.stdout + done.stderr


def test_tuned_before_serving_from_a_store(run: Run, models: Models, tmp_path: Path) -> None:
    environ = {"MOESTRO_VLLM_STORE": str(tmp_path / "store"), "MOESTRO_VLLM_TUNE_S": "4"}
    first = run(models("qwen3-modelopt"), environ=environ)
    assert "(measured at " in first.log
    del environ["MOESTRO_VLLM_TUNE_S"]
    assert "(measured at " in run(models("qwen3-modelopt"), environ=environ).log
    assert_same(first, run(models("qwen3-modelopt")))
