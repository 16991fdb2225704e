"""Checkpoints as they lie about: subfolders, the Hub's cache, shards and their index, layers that a model has not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro.errors import FormatError

transformers = pytest.importorskip("transformers", minversion="5.7")

import tiny  # noqa: E402

from moestro.integrations import transformers as mt  # noqa: E402
from moestro.integrations.transformers.bound import bound_to  # noqa: E402
from moestro.integrations.transformers.modules import experts_modules  # noqa: E402

F32 = torch.float32
COMMIT = "a" * 40
INDEX = "model.safetensors.index.json"
pytestmark = pytest.mark.usefixtures("registered_portable")


def checkpoint(folder: Path, layout: str = "modelopt-w4a16-nvfp4", **options: Any) -> torch.Tensor:
    """A checkpoint in a folder; the logits of the model that it stands for."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny.random_model(tiny.qwen3, F32)
    return tiny.logits(tiny.write_per_expert(folder, model, layout, **options), "eager")


def load(path: Any, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, experts_implementation="moestro", dtype=F32, **options
    )


def into_modelopts_own_file(folder: Path) -> None:
    """The quantisation config out of config.json, as ModelOpt's exports had it."""
    config = json.loads((folder / "config.json").read_text())
    raw = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": raw["quant_algo"]}}
    (folder / "hf_quant_config.json").write_text(json.dumps(beside))


def test_modelopts_own_file_in_a_subfolder(tmp_path: Path) -> None:
    truth = checkpoint(tmp_path / "sub")
    into_modelopts_own_file(tmp_path / "sub")
    assert tiny.error(tiny.logits(load(tmp_path, subfolder="sub")), truth) < 1e-5


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_modelopts_own_file_in_the_hubs_cache(tmp_path: Path, revision: str | None) -> None:
    repository = tmp_path / "models--somebody--tiny"
    truth = checkpoint(repository / "snapshots" / COMMIT)
    into_modelopts_own_file(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT)
    options = {} if revision is None else {"revision": revision}
    here = {"cache_dir": str(tmp_path), "local_files_only": True}
    # Transformers looks for adapters on the Hub, whatever is said of the model.
    ours = load("somebody/tiny", adapter_kwargs=here, **here, **options)
    assert tiny.error(tiny.logits(ours), truth) < 1e-5


def test_the_index_says_of_a_tensor_in_two_shards_which_it_is(tmp_path: Path) -> None:
    truth = checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    twice = "model.layers.0.mlp.experts.1.up_proj.weight"
    shards = {name: "one.safetensors" if "layers.0" in name else "two.safetensors" for name in tensors}
    for file in set(shards.values()):
        some = {name: tensor for name, tensor in tensors.items() if shards[name] == file}
        if file == "two.safetensors":
            some[twice] = tensors[twice].flip(0).contiguous()
        save_file(some, tmp_path / file, metadata={"format": "pt"})
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert tiny.error(tiny.logits(load(tmp_path)), truth) < 1e-5


def with_a_further_layer(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.replace(old, new): t.clone() for name, t in tensors.items() if old in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_quantised_layer_after_the_models_last_is_left(tmp_path: Path) -> None:
    """DeepSeek's and GLM's checkpoints have one, which predicts further tokens."""
    truth = checkpoint(tmp_path, linears=True)
    with_a_further_layer(tmp_path, "layers.1.", "layers.2.")
    assert tiny.error(tiny.logits(load(tmp_path)), truth) < 1e-5


def test_a_quantised_module_that_the_class_ignores_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = checkpoint(tmp_path, linears=True)
    with_a_further_layer(tmp_path, "model.layers.1.", "mtp.layers.0.")
    with pytest.raises(FormatError, match=r"mtp\.layers\.0\..* is no Linear layer of the model"):
        load(tmp_path)
    cls = transformers.Qwen3MoePreTrainedModel
    monkeypatch.setattr(cls, "_keys_to_ignore_on_load_unexpected", [r"^mtp.*"])
    assert tiny.error(tiny.logits(load(tmp_path)), truth) < 1e-5


@pytest.mark.parametrize("base", ["checkpoint", "model"])
def test_packed_tensors_are_not_reported_as_unexpected(tmp_path: Path, base: str) -> None:
    """Where either the checkpoint or the model has the base model's prefix, and the other has not."""
    checkpoint(tmp_path, linears=True)
    cls = transformers.AutoModelForCausalLM
    if base == "checkpoint":
        tensors = load_file(tmp_path / "model.safetensors")
        bare = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    else:
        cls = transformers.AutoModel
    _, said = cls.from_pretrained(tmp_path, experts_implementation="moestro", output_loading_info=True)
    assert {name for name in said["unexpected_keys"] if "layers" in name} == set()
    assert {name for name in said["missing_keys"] if "layers" in name} == set()


@pytest.mark.parametrize("format", ["int4", "mxfp8"])
def test_a_model_quantised_here_is_saved_and_loaded_whatever_the_format(tmp_path: Path, format: str) -> None:
    model = tiny.random_model(tiny.qwen3, F32)
    mt.quantize_experts(model, format)
    truth = tiny.logits(model)
    model.save_pretrained(tmp_path)
    assert tiny.error(tiny.logits(load(tmp_path)), truth) < 1e-5


def test_dequantize_gives_a_dense_model(tmp_path: Path) -> None:
    truth = checkpoint(tmp_path, linears=True)
    ours = load(tmp_path)
    ours.dequantize()
    assert tiny.error(tiny.logits(ours), truth) < 1e-5
    assert all(bound_to(module).weights.format == "bf16" for _, module in experts_modules(ours))
    ours.save_pretrained(tmp_path / "dense")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=F32)
    assert getattr(plain.config, "quantization_config", None) is None
    assert tiny.error(tiny.logits(plain, "eager"), truth) < 1e-5


def test_a_quantisation_config_that_is_not_used_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint(tmp_path)
    with caplog.at_level(logging.WARNING, logger="moestro"):
        load(tmp_path, quantization_config=transformers.FineGrainedFP8Config())
    assert "FineGrainedFP8Config" in caplog.text
    assert "is not used: the checkpoint has its own (modelopt)" in caplog.text
