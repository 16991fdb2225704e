"""convert, inspect and record from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_tools import Run
from safetensors.torch import save_file

from moestro.cli import console
from moestro.routing import Recorded


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    g, tensors = torch.Generator().manual_seed(0), {}
    for e in range(4):
        for name, shape in (("gate_proj", (32, 64)), ("up_proj", (32, 64)), ("down_proj", (64, 32))):
            weight = torch.randn(shape, generator=g).bfloat16()
            tensors[f"model.layers.0.mlp.experts.{e}.{name}.weight"] = weight
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_convert_then_inspect(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, dst = checkpoint(tmp_path / "src"), tmp_path / "dst"
    done = run("convert", str(src), str(dst), "--format", "nvfp4", "--layout", "compressed-tensors")
    assert done.exit_code == 0, done.output
    assert "compressed-tensors nvfp4-pack-quantized" in " ".join(done.output.split())
    found = json.loads(run("inspect", str(dst), "--json").output)
    assert found["layers"][0]["format"] == "nvfp4"
    assert found["layers"][0]["num_experts"] == 4
    monkeypatch.setattr(console.output, "_width", 240)  # as wide as the table wants, wherever this runs
    shown = run("inspect", str(dst)).output
    assert "model.layers.0.mlp.experts" in shown
    assert "known fault" in shown


def test_what_is_wrong_is_one_message(run: Run, tmp_path: Path) -> None:
    src = checkpoint(tmp_path / "src")
    done = run("convert", str(src), str(tmp_path / "dst"), "--format", "mxfp4", "--layout", "deepseek")
    assert done.exit_code == 1
    assert "cannot be written as layout 'deepseek'" in " ".join(done.output.split())
    assert run("inspect", str(tmp_path / "nowhere")).exit_code == 1


def test_record_and_calibrated_convert_run_a_text(run: Run, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.7")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[UNK]", *"abcdefghij"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h i j " * 5)
    out = tmp_path / "routing.safetensors"
    done = run("record", str(tmp_path / "model"), "--text", str(text), "--out", str(out), "--length", "20")
    assert done.exit_code == 0, done.output
    assert "[50, 2, 2]" in done.output
    assert Recorded(out, layer=1).sample(50, 4, 2).shape == (50, 2)
    done = run("convert", str(tmp_path / "model"), str(tmp_path / "dst"), "--text", str(text))
    assert done.exit_code == 0, done.output
    assert "modelopt NVFP4" in done.output  # with input scales: not W4A16
    assert run("record", str(tmp_path / "model"), "--text", str(tmp_path / "none")).exit_code == 2
    (empty := tmp_path / "empty.txt").write_text(" \n")
    for command in (["record", "--out", str(tmp_path / "x.pt")], ["convert", str(tmp_path / "uncalibrated")]):
        done = run(command[0], str(tmp_path / "model"), *command[1:], "--text", str(empty))
        assert done.exit_code == 1
        assert "must have at least one token" in done.output
    assert not (tmp_path / "uncalibrated").exists()
