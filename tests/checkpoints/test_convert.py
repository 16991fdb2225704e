"""Conversion: right values in every layout, resumable after a kill, byte for byte the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moestro
from moestro import checkpoints, formats
from moestro.checkpoints import Experts, Safetensors
from moestro.errors import FormatError

E, H, I, LAYERS = 4, 256, 128, 3  # noqa: E741
SIZES = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}


def source(folder: Path) -> Path:
    """A bf16 checkpoint of one shard a layer, with biases, a router and an embedding."""
    folder.mkdir()
    g, where = torch.Generator().manual_seed(0), {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.mlp.gate.weight": torch.randn(E, H, generator=g).bfloat16()}
        for e in range(E):
            for name, shape in SIZES.items():
                tensors[f"{prefix}.mlp.experts.{e}.{name}.weight"] = torch.randn(
                    shape, generator=g
                ).bfloat16()
                tensors[f"{prefix}.mlp.experts.{e}.{name}.bias"] = torch.randn(
                    shape[0], generator=g
                ).bfloat16()
        if layer == 0:
            tensors["model.embed_tokens.weight"] = torch.randn(8, H, generator=g).bfloat16()
        file = f"model-{layer + 1:05}-of-{LAYERS:05}.safetensors"
        save_file(tensors, folder / file)
        where |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("format", "layout"),
    [
        ("nvfp4", "modelopt"),
        ("nvfp4", "compressed-tensors"),
        ("mxfp4", None),
        ("mxfp4", "compressed-tensors"),
        ("mxfp8", "modelopt"),
        ("fp8_block", None),
        ("fp8_block", "compressed-tensors"),
        ("int4", None),
    ],
)
def test_experts_are_quantised_and_everything_else_stays(
    tmp_path: Path, format: str, layout: str | None
) -> None:
    src, dst = source(tmp_path / "src"), tmp_path / "dst"
    done: list[tuple[str, int, int]] = []
    checkpoints.convert(src, dst, format, layout, progress=lambda *step: done.append(step))
    assert [step[1:] for step in done] == [(1, 3), (2, 3), (3, 3)]
    before, after = Safetensors(src), Safetensors(dst)
    for name in before:
        if ".experts." not in name:
            assert torch.equal(before[name], after[name])
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp.experts"
        w = moestro.ExpertWeights.from_experts(Experts(after, prefix), "portable")
        gate_up, down = w.dequantize()
        for e in range(E):
            dense = {name: before[f"{prefix}.{e}.{name}.weight"] for name in SIZES}
            rows = torch.cat([dense["gate_proj"], dense["up_proj"]]).float()
            want = formats.get(format).quantize(rows).dequantize()  # one global scale for gate and up
            torch.testing.assert_close(gate_up[e], want, rtol=3e-7, atol=0)
            want = formats.get(format).quantize(dense["down_proj"].float()).dequantize()
            torch.testing.assert_close(down[e], want, rtol=3e-7, atol=0)
            bias = torch.cat([before[f"{prefix}.{e}.{name}.bias"] for name in ("gate_proj", "up_proj")])
            assert torch.equal(w.gate_up_bias[e], bias)
    assert (dst / "tokenizer.json").read_text() == "{}"
    found = checkpoints.inspect(dst)
    assert {entry.format for entry in found.layers} == {format}
    excluded = json.dumps(json.loads((dst / "config.json").read_text())["quantization_config"])
    assert "model.layers.2.mlp.gate" in excluded


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    whole = contents(checkpoints.convert(src, tmp_path / "whole"))
    for stop in (1, 2):  # after so many shards
        dst = tmp_path / f"killed-{stop}"
        code = (
            "import sys, time\nfrom moestro import checkpoints\n"
            "def step(name, done, of):\n"
            "    print(done, flush=True)\n"
            f"    if done == {stop}: time.sleep(60)\n"
            "checkpoints.convert(*sys.argv[1:], progress=step)\n"
        )
        running = subprocess.Popen(
            [sys.executable, "-c", code, str(src), str(dst)], stdout=subprocess.PIPE, text=True
        )
        assert running.stdout is not None
        for _ in range(stop):
            running.stdout.readline()
        running.send_signal(signal.SIGKILL)
        running.wait()
        running.stdout.close()
        shards = {p.name: p.stat().st_mtime_ns for p in dst.glob("*.safetensors")}
        assert len(shards) == stop
        (dst / "left.partial").write_bytes(b"half of a shard")
        time.sleep(0.01)
        checkpoints.convert(src, dst)
        assert contents(dst) == whole
        assert all((dst / name).stat().st_mtime_ns == at for name, at in shards.items())  # not made again


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    src, dst = source(tmp_path / "src"), tmp_path / "dst"
    with pytest.raises(FormatError, match="'mxfp4' cannot be written as layout 'deepseek'"):
        checkpoints.convert(src, dst, "mxfp4", "deepseek")
    dst.mkdir()
    (dst / "mine.txt").write_text("precious")
    with pytest.raises(FormatError, match="empty folder"):
        checkpoints.convert(src, dst)
    with pytest.raises(FormatError, match="another folder than src"):
        checkpoints.convert(src, src)
    other = tmp_path / "other"
    other.mkdir()
    (other / ".moestro-convert.json").write_text('{"format": "mxfp4"}')
    with pytest.raises(FormatError, match="holds another conversion"):
        checkpoints.convert(src, other)


def test_blocks_that_gate_and_up_would_share_are_refused_before_the_work(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    shapes = {"gate_proj": (96, 128), "up_proj": (96, 128), "down_proj": (128, 96)}
    tensors = {f"model.layers.0.mlp.experts.0.{n}.weight": torch.ones(s) for n, s in shapes.items()}
    save_file(tensors, src / "model.safetensors")
    with pytest.raises(FormatError, match="fp8_block needs gate and up with rows divisible by 128, got 96"):
        checkpoints.convert(src, tmp_path / "dst", "fp8_block")
    assert not list((tmp_path / "dst").glob("*.safetensors"))


def test_calibrated_scales_are_written_and_read(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    seen = {
        f"model.layers.{n}.mlp.experts": {"gate_up": torch.tensor([2688.0, 0, 1, 2]), "down": torch.ones(E)}
        for n in range(LAYERS)
    }
    for layout in ("modelopt", "compressed-tensors"):
        dst = checkpoints.convert(src, tmp_path / layout, "nvfp4", layout, calibration=seen)
        scales = Experts(Safetensors(dst), "model.layers.1.mlp.experts").input_scales()
        # an expert that no token reached takes the largest
        torch.testing.assert_close(
            scales["gate_up_input_scale"], torch.tensor([1.0, 1.0, 1 / 2688, 2 / 2688])
        )


@pytest.mark.parametrize(
    ("amax", "message"),
    [
        (
            [0.0, 0, 0, 0],
            r"must reach an expert of model\.layers\.0\.mlp\.experts, got 0 for gate_up of all 4",
        ),
        ([1.0, float("nan"), 1, 1], "must be finite, got nan for gate_up of expert 1"),
    ],
)
def test_a_calibration_that_gives_no_scale_is_an_error(
    tmp_path: Path, amax: list[float], message: str
) -> None:
    seen = {"model.layers.0.mlp.experts": {"gate_up": torch.tensor(amax), "down": torch.ones(E)}}
    with pytest.raises(FormatError, match=message):
        checkpoints.convert(source(tmp_path / "src"), tmp_path / "dst", "nvfp4", calibration=seen)
    assert not (tmp_path / "dst").exists()


def test_inspect_tells_what_runs_and_what_others_get_wrong(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    found = checkpoints.inspect(src)
    assert [(entry.num_experts, entry.hidden_size, entry.intermediate_size) for entry in found.layers] == [
        (E, H, I)
    ] * 3
    assert found.scheme is None
    assert found.expert_bytes == sum(3 * H * I * 2 + (2 * I + H) * 2 for _ in range(E)) * LAYERS
    tensors = dict(Safetensors(checkpoints.convert(src, tmp_path / "dst")))
    name = "model.layers.1.mlp.experts.0.up_proj.weight_scale"
    tensors[f"{name}_2"] = tensors[f"{name}_2"] * 2
    tensors[name] = torch.full_like(tensors[name].view(torch.uint8), 3).view(torch.float8_e4m3fn)
    changed = tmp_path / "changed"
    changed.mkdir()
    save_file(tensors, changed / "model.safetensors")
    faults = " ".join(checkpoints.inspect(changed).faults)
    assert "different global scales" in faults
    assert "subnormal" in faults
