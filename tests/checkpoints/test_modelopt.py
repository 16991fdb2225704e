"""Checkpoints by NVIDIA ModelOpt's own formulas, and by its own exporter where it is installed.

The exporter runs where modelopt can be imported, or by the Python that MOESTRO_MODELOPT_PYTHON names (it installs
beside torch 2.13 on a CPU: pip install nvidia-modelopt requests transformers accelerate).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt_formula as formula
import pytest
import torch
from safetensors.torch import load_file, save_file

import moestro
from moestro.checkpoints import Experts, Safetensors

PRODUCER = Path(__file__).with_name("modelopt_producer.py")
CONFIGS = {  # ModelOpt's configuration -> what its formulas are here, the format here
    "NVFP4_DEFAULT_CFG": (formula.nvfp4, "nvfp4"),
    "W4A16_NVFP4_CFG": (formula.nvfp4, "nvfp4"),
    "MIXED": (formula.nvfp4, "nvfp4"),
    "MXFP4_DEFAULT_CFG": (formula.mxfp4, "mxfp4"),
    "W4A8_MXFP4_FP8_CFG": (formula.mxfp4, "mxfp4"),
    "MXFP8_DEFAULT_CFG": (formula.mxfp8, "mxfp8"),
    "FP8_DEFAULT_CFG": (formula.fp8, "fp8_block"),
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": (None, "fp8_block"),
}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# float32(scale * scale_2) is rounded before it multiplies in ModelOpt's dequantize, and after it here
ROUNDING = 2.0**-23


def hard_matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    """bf16 with blocks of zeros, ties between codes, and magnitudes over twelve powers of two."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g) * torch.exp2(
        torch.randint(-9, 3, (rows, 1), generator=g).float()
    )
    w[:3, :32] = 0
    w[5, :16] = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5] * 2) * 0.5
    return w.bfloat16()


@pytest.mark.parametrize("make", [formula.nvfp4, formula.mxfp4, formula.mxfp8, formula.fp8])
def test_a_checkpoint_by_the_producers_formula_stands_for_its_values(
    tmp_path: Path, make: Callable[[torch.Tensor], formula.Made]
) -> None:
    prefix, tensors, values = "model.layers.0.mlp.experts", {}, {}
    for e in range(3):
        for i, (name, shape) in enumerate(zip(PROJECTIONS, ((96, 128), (96, 128), (128, 96)), strict=True)):
            pieces, values[e, name] = make(hard_matrix(*shape, seed=3 * e + i))
            tensors |= {f"{prefix}.{e}.{name}.{suffix}": v.contiguous() for suffix, v in pieces.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    experts = Experts(Safetensors(tmp_path / "model.safetensors"), prefix)
    for (e, name), wanted in values.items():
        assert torch.equal(experts.dense(e, name), wanted.float())
    if make is formula.fp8:
        return  # one scale a tensor: gate and up of 96 rows do not part at a block of 128
    gate_up, down = moestro.ExpertWeights.from_experts(experts, backend="portable").dequantize(torch.float32)
    for e in range(3):
        joined = torch.cat([values[e, "gate_proj"], values[e, "up_proj"]]).float()
        assert torch.equal(gate_up[e], joined)
        assert torch.equal(down[e], values[e, "down_proj"].float())


# --- the exporter itself -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint for each configuration."""
    python = os.environ.get("MOESTRO_MODELOPT_PYTHON")
    if python is None:
        spec = importlib.util.find_spec("modelopt")
        if spec is None or spec.origin is None:
            pytest.skip(
                "nvidia-modelopt is not installed here, and MOESTRO_MODELOPT_PYTHON names no Python with it"
            )
        python = sys.executable
    out = tmp_path_factory.mktemp("modelopt")
    done = subprocess.run(
        [python, str(PRODUCER), str(out), *CONFIGS], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return out


@pytest.mark.parametrize("config", CONFIGS)
def test_values_are_the_producers_own(exported: Path, config: str) -> None:
    values = load_file(f"{exported / config}.values")
    tensors = Safetensors(exported / config / "model.safetensors")
    make, format = CONFIGS[config]
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        experts = Experts(tensors, prefix, num_experts=4)
        for e in range(4):
            for name in PROJECTIONS:
                module = f"{prefix}.{e}.{name}"
                ours, theirs = experts.dense(e, name), values[module]
                assert experts.projection(e, name).format == format
                if format == "nvfp4":
                    assert bool(((ours - theirs).abs() <= ROUNDING * theirs.abs()).all())
                else:
                    assert torch.equal(ours, theirs)
                if make is not None:
                    assert_bytes(tensors, module, make, values[f"{module}.source"])


def assert_bytes(tensors: Any, module: str, make: Any, source: torch.Tensor) -> None:
    """The formula's bytes are the exporter's."""
    given = {formula.nvfp4: "weight_scale_2", formula.fp8: "weight_scale"}.get(make)  # gate and up share it
    more = () if given is None else (tensors[f"{module}.{given}"],)
    for suffix, wanted in make(source, *more)[0].items():
        found = tensors[f"{module}.{suffix}"]
        assert found.dtype == wanted.dtype
        assert torch.equal(bits(found), bits(wanted)), suffix


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("config", CONFIGS)
def test_models_load_with_the_producers_values(exported: Path, config: str) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.7")
    from moestro.integrations import transformers as mt

    mt.register(backend="portable")
    folder, values = exported / config, load_file(f"{exported / config}.values")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="moestro", dtype=torch.float32
    )
    raw = json.loads((folder / "config.json").read_text())
    plain = transformers.Qwen3MoeConfig(
        **{k: v for k, v in raw.items() if k not in ("quantization_config", "dtype", "model_type")}
    )
    truth = transformers.Qwen3MoeForCausalLM(plain).float().eval()
    truth.set_experts_implementation("eager")
    state = {k: v.float() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for name, parameter in truth.named_parameters():
            parameter.copy_(wanted(name, values, state))
        tokens = torch.arange(12)[None] * 5 % 64
        ours, theirs = model(tokens).logits, truth(tokens).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    mt.REGISTERED.clear()


def wanted(name: str, values: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> torch.Tensor:
    """A parameter of the dequantised model: the producer's values, or what was not quantised."""
    prefix, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        pairs = [[values[f"{prefix}.{e}.{p}"] for p in PROJECTIONS[:2]] for e in range(4)]
        return torch.stack([torch.cat(pair) for pair in pairs])
    if last == "down_proj":
        return torch.stack([values[f"{prefix}.{e}.down_proj"] for e in range(4)])
    return values.get(prefix, state[name]) if last == "weight" else state[name]
