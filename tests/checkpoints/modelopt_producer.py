"""A program for NVIDIA ModelOpt's Python: writes checkpoints of a tiny model, and what ModelOpt itself dequantises them to.

    python modelopt_producer.py OUT NVFP4_DEFAULT_CFG ...

OUT/<config>/ is what export_hf_checkpoint writes; OUT/<config>.values has each quantised projection in float32 by
ModelOpt's own QTensor.dequantize, and beside it (".source") the weight that it was made from. On a CPU. Not among
the configurations: AWQ, whose search wants a CUDA kernel, and whose export of ModelOpt 0.47 ends at Transformers 5's
fused experts in a TypeError. Nothing of Moestro is imported.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import modelopt.torch.quantization as mtq  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from modelopt.torch.export import export_hf_checkpoint  # noqa: E402
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

MIXED = "MIXED"  # NVFP4 experts, FP8 attention


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        intermediate_size=128,
    )
    made = transformers.Qwen3MoeForCausalLM(config).bfloat16().eval()
    made.config.architectures = [type(made).__name__]
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
            if "layers.1.mlp.experts" in name:
                parameter[0, :, :32] = 0  # blocks of zeros
                parameter[1] *= 2e-3  # an expert of other magnitude
    return made


def weights(of: Any) -> dict[str, torch.Tensor]:
    """Its matrices by the names of a checkpoint's modules."""
    found = {}
    for name, value in of.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(expert.chunk(2) for expert in value):
                prefix = f"{name.removesuffix('.gate_up_proj')}.{e}"
                found |= {f"{prefix}.gate_proj": gate.clone(), f"{prefix}.up_proj": up.clone()}
        elif name.endswith("experts.down_proj"):
            found |= {
                f"{name.removesuffix('.down_proj')}.{e}.down_proj": v.clone() for e, v in enumerate(value)
            }
        else:
            found[name.removesuffix(".weight")] = value.clone()
    return found


def config_of(name: str) -> Any:
    if name != MIXED:
        return getattr(mtq, name)
    mixed = copy.deepcopy(mtq.NVFP4_EXPERTS_ONLY_CFG)
    fp8 = [entry for entry in mtq.FP8_DEFAULT_CFG["quant_cfg"] if entry.get("cfg")]
    for entry in fp8:
        found = copy.deepcopy(entry)
        found["quantizer_name"] = f"*self_attn*{found['quantizer_name'].lstrip('*')}"
        mixed["quant_cfg"].append(found)
    return mixed


def dequantised(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """A projection in float32, by the producer's class for what the export wrote."""
    weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    rows, columns = weight.shape
    f32, found = torch.float32, None
    if (double := tensors.get(f"{module}.weight_scale_2")) is not None:
        found = NVFP4QTensor(torch.Size((rows, 2 * columns)), f32, weight)
        return found.dequantize(f32, scale=scale, double_scale=double, block_sizes={-1: 16})
    if weight.dtype == torch.uint8:
        found = MXFP4QTensor(torch.Size((rows, 2 * columns)), f32, weight)
        return found.dequantize(f32, scale=scale, block_sizes={-1: 32})
    if scale.dtype == torch.uint8:
        return MXFP8QTensor(weight.shape, f32, weight).dequantize(f32, scale=scale)
    if scale.ndim == 4:  # [R/128, 1, C/128, 1]
        sizes = {-1: 128, -2: 128}
        return FP8QTensor(weight.shape, f32, weight).dequantize(
            f32, scale=scale.squeeze(-1).squeeze(-2), block_sizes=sizes
        )
    return FP8QTensor(weight.shape, f32, weight).dequantize(f32, scale=scale)


def produce(name: str, out: Path) -> None:
    def loop(m: Any) -> None:
        for seed in range(4):
            m(torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(seed)))

    source = weights(made := model())
    quantised = mtq.quantize(made, config_of(name), loop)
    with torch.inference_mode():
        export_hf_checkpoint(quantised, export_dir=out)
    tensors: dict[str, torch.Tensor] = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    modules = [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]
    values = {module: dequantised(tensors, module).contiguous() for module in modules}
    save_file(values | {f"{module}.source": source[module] for module in modules}, f"{out}.values")
    raw = json.loads((out / "config.json").read_text())["quantization_config"]
    print(f"{name}: {raw['quant_algo']}, {len(values)} projections", flush=True)


def main() -> None:
    for name in sys.argv[2:]:
        produce(name, Path(sys.argv[1]) / name)


if __name__ == "__main__":
    main()
