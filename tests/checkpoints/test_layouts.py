"""Every layout of the field: the producer's own values, and an error that names whatever has no place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import moestro
from moestro.checkpoints import Experts, Safetensors
from moestro.errors import CheckpointWarning, FormatError
from moestro.formats import MXFP4, MXFP8, NVFP4, FP8Block

E, H, I, P = 3, 128, 64, "model.layers.0.mlp.experts"  # noqa: E741
SIZES = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def fp4(packed: torch.Tensor) -> torch.Tensor:
    """[..., C/2] to values [..., C], the low nibble first: independent of moestro.formats."""
    packed = packed.view(torch.uint8)
    return torch.stack([FP4[(packed & 15).long()], FP4[(packed >> 4).long()]], -1).flatten(-2)


def per(values: torch.Tensor, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """values times a scale per block of rows x columns."""
    wide = scale.repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return values * wide[..., : values.shape[-2], : values.shape[-1]]


def bytes_of(shape: tuple[int, ...], g: torch.Generator, high: int = 256) -> torch.Tensor:
    return torch.randint(0, high, shape, dtype=torch.uint8, generator=g)


def modelopt(r: int, c: int, g: torch.Generator) -> Any:
    w, s = bytes_of((r, c // 2), g), torch.rand(r, c // 16, generator=g).to(torch.float8_e4m3fn)
    t = torch.rand((), generator=g) + 0.1
    return {"weight": w, "weight_scale": s, "weight_scale_2": t}, per(fp4(w), s.float(), 1, 16) * t


def compressed(r: int, c: int, g: torch.Generator) -> Any:
    pieces, dense = modelopt(r, c, g)
    t = pieces["weight_scale_2"]
    names = {"weight_packed": pieces["weight"], "weight_scale": pieces["weight_scale"]}
    return {**names, "weight_global_scale": (1 / t).reshape(1)}, dense


def mxfp4(
    r: int, c: int, g: torch.Generator, names: tuple[str, str] = ("weight_packed", "weight_scale")
) -> Any:
    w, s = bytes_of((r, c // 2), g), torch.randint(120, 134, (r, c // 32), dtype=torch.uint8, generator=g)
    return dict(zip(names, (w, s), strict=True)), per(fp4(w), torch.exp2(s.float() - 127), 1, 32)


def e4m3(r: int, c: int, g: torch.Generator) -> torch.Tensor:
    return torch.randn(r, c, generator=g).to(torch.float8_e4m3fn)


def mxfp8(r: int, c: int, g: torch.Generator) -> Any:
    w, s = e4m3(r, c, g), torch.randint(120, 134, (r, c // 32), dtype=torch.uint8, generator=g)
    return {"weight": w, "weight_scale": s}, per(w.float(), torch.exp2(s.float() - 127), 1, 32)


def block(size: int, scale: Any, name: str = "weight_scale_inv") -> Any:
    def make(r: int, c: int, g: torch.Generator) -> Any:
        w = e4m3(r, c, g)
        s = scale(torch.exp2(torch.randint(-6, 2, (-(-r // size), -(-c // size)), generator=g).float()))
        return {"weight": w, name: s}, per(w.float(), s.float(), size, size)

    return make


def per_tensor(r: int, c: int, g: torch.Generator) -> Any:
    w, s = e4m3(r, c, g), torch.rand((), generator=g) + 0.1
    return {"weight": w, "weight_scale": s}, w.float() * s


def deepseek_fp4(r: int, c: int, g: torch.Generator) -> Any:
    pieces, dense = mxfp4(r, c, g, ("weight", "scale"))
    return {
        "weight": pieces["weight"].view(torch.int8),
        "scale": pieces["scale"].view(torch.float8_e8m0fnu),
    }, dense


def plain(dtype: torch.dtype) -> Any:
    def make(r: int, c: int, g: torch.Generator) -> Any:
        w = torch.randn(r, c, generator=g).to(dtype)
        return {"weight": w}, w.float()

    return make


LAYOUTS: dict[str, tuple[Any, Any]] = {
    "ModelOpt NVFP4": (modelopt, "nvfp4"),
    "compressed-tensors NVFP4": (compressed, "nvfp4"),
    "compressed-tensors MXFP4": (mxfp4, "mxfp4"),
    "ModelOpt MXFP4": (lambda r, c, g: mxfp4(r, c, g, ("weight", "weight_scale")), "mxfp4"),
    "MXFP8": (mxfp8, "mxfp8"),
    "FP8 128x128": (block(128, lambda s: s * 1.5), "fp8_block"),
    "FP8 128x128 ue8m0": (block(128, lambda s: s.to(torch.float8_e8m0fnu)), "fp8_block"),
    "FP8 32x32 ue8m0": (block(32, lambda s: s.to(torch.float8_e8m0fnu)), "mxfp8"),
    "FP8 block as ModelOpt": (block(128, lambda s: s, "weight_scale"), "fp8_block"),
    "FP8 per tensor": (per_tensor, "fp8_block"),
    "DeepSeek-V4 FP4": (deepseek_fp4, "mxfp4"),
    "bf16": (plain(torch.bfloat16), "bf16"),
    "fp16": (plain(torch.float16), "bf16"),
    "fp32": (plain(torch.float32), "bf16"),
}


def checkpoint(make: Any, sizes: Any = SIZES, seed: int = 0) -> tuple[dict[str, torch.Tensor], Any]:
    g, tensors, dense = torch.Generator().manual_seed(seed), {}, {}
    for e in range(E):
        for name, (r, c) in sizes.items():
            pieces, dense[e, name] = make(r, c, g)
            tensors |= {f"{P}.{e}.{name}.{suffix}": piece for suffix, piece in pieces.items()}
    return tensors, dense


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_stands_for_the_producers_values(tmp_path: Path, layout: str) -> None:
    make, format = LAYOUTS[layout]
    sizes = dict.fromkeys(SIZES, (128, 128)) if format == "fp8_block" else SIZES
    tensors, dense = checkpoint(make, sizes)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    w = moestro.ExpertWeights.from_experts(Experts(Safetensors(tmp_path), P), "portable")
    assert w.format == format
    gate_up, down = w.dequantize()
    for e in range(E):
        want = torch.cat([dense[e, "gate_proj"], dense[e, "up_proj"]])
        # bit for bit; compressed-tensors divides by a float32 of which we keep the reciprocal
        rtol = 3e-7 if layout == "compressed-tensors NVFP4" else 0
        torch.testing.assert_close(gate_up[e], want, rtol=rtol, atol=0)
        torch.testing.assert_close(down[e], dense[e, "down_proj"], rtol=rtol, atol=0)


def test_gpt_oss_rows_are_parted_and_its_biases_travel_along() -> None:
    g = torch.Generator().manual_seed(0)
    tensors, dense = {}, {}
    for name, (r, c) in {"gate_up_proj": (2 * I, H), "down_proj": (H, I)}.items():
        parts = [mxfp4(r, c, g) for _ in range(E)]
        tensors[f"{P}.{name}_blocks"] = torch.stack([p["weight_packed"] for p, _ in parts]).view(
            E, r, c // 32, 16
        )
        tensors[f"{P}.{name}_scales"] = torch.stack([p["weight_scale"] for p, _ in parts])
        tensors[f"{P}.{name}_bias"] = torch.randn(E, r, generator=g).bfloat16()
        dense[name] = torch.stack([d for _, d in parts])
    experts = Experts(tensors, P)
    assert experts.layout == "gpt-oss MXFP4"
    w = moestro.ExpertWeights.from_experts(experts, "portable")
    gate_up, down = w.dequantize()
    rows, bias = dense["gate_up_proj"], tensors[f"{P}.gate_up_proj_bias"]
    assert torch.equal(gate_up, torch.cat([rows[:, 0::2], rows[:, 1::2]], 1))
    assert torch.equal(down, dense["down_proj"])
    assert torch.equal(w.gate_up_bias, torch.cat([bias[:, 0::2], bias[:, 1::2]], 1))
    assert torch.equal(w.down_bias, tensors[f"{P}.down_proj_bias"])
    part = moestro.ExpertWeights.from_experts(Experts(tensors, P, only=range(1, 3)), "portable")
    assert torch.equal(part.gate_up_bias, w.gate_up_bias[1:3])


@pytest.mark.parametrize("biased", [False, True])
def test_dense_stacks_may_be_transposed(biased: bool) -> None:
    """[E, H, 2I] and [E, I, H]: Llama-4's, and with biases gpt-oss', whose rows alternate."""
    up, down = torch.randn(E, H, 2 * I), torch.randn(E, I, H)
    tensors = {f"{P}.gate_up_proj": up, f"{P}.down_proj": down}
    if biased:
        tensors |= {f"{P}.gate_up_proj_bias": torch.randn(E, 2 * I), f"{P}.down_proj_bias": torch.randn(E, H)}
    got, got_down = moestro.ExpertWeights.from_experts(Experts(tensors, P), "portable").dequantize()
    rows = up.mT
    assert torch.equal(got, torch.cat([rows[:, 0::2], rows[:, 1::2]], 1) if biased else rows)
    assert torch.equal(got_down, down.mT)


def test_experts_without_a_gate() -> None:
    sizes = {name: SIZES[name] for name in ("up_proj", "down_proj")}
    tensors, dense = checkpoint(modelopt, sizes)
    experts = Experts(tensors, P)
    w = moestro.ExpertWeights.from_experts(experts, "portable")
    assert not experts.gated
    assert torch.equal(w.dequantize()[0][1], dense[1, "up_proj"])


def awq(shared: bool = True) -> tuple[dict[str, torch.Tensor], dict[Any, torch.Tensor]]:
    tensors, dense = checkpoint(modelopt)
    g = torch.Generator().manual_seed(1)
    of_input = torch.rand(H, generator=g) + 0.5
    for e in range(E):
        of_down = torch.rand(I, generator=g) + 0.5  # experts' own
        for name in SIZES:
            scale = of_down if name == "down_proj" else of_input + (0 if shared else e)
            tensors[f"{P}.{e}.{name}.pre_quant_scale"] = scale
            dense[e, name] = dense[e, name] * scale
    return tensors, dense


def test_awq_scales_multiply_the_inputs() -> None:
    tensors, dense = awq()
    w = moestro.ExpertWeights.from_experts(Experts(tensors, P), "portable")
    x, ids = torch.randn(5, H), torch.tensor([[0], [1], [2], [1], [0]], dtype=torch.int32)
    for function in (moestro.fused_moe, moestro.reference.fused_moe):
        y = function(x, ids, torch.ones(5, 1), w)
        for n, e in enumerate(ids[:, 0].tolist()):
            gate, up = dense[e, "gate_proj"] @ x[n], dense[e, "up_proj"] @ x[n]
            want = dense[e, "down_proj"] @ (torch.nn.functional.silu(gate) * up)
            torch.testing.assert_close(y[n], want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    layer = moestro.FusedMoE(w, 1, backend="portable")
    torch.testing.assert_close(layer(x, ids, torch.ones(5, 1)), y, rtol=1e-4, atol=1e-2)
    clamped = moestro.SwiGLU(limit=7.0)
    with pytest.raises(moestro.BackendError, match="linear in up"):
        moestro.fused_moe(x, ids, torch.ones(5, 1), w, activation=clamped)


def test_awq_scales_that_differ_between_experts_are_an_error() -> None:
    with pytest.raises(FormatError, match=r"1\.gate_proj\.pre_quant_scale must equal"):
        moestro.ExpertWeights.from_experts(Experts(awq(shared=False)[0], P))


def bad(name: str, value: Any) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{P}.{name}"] = value

    return change


def lost(part: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if part in n]:
            del tensors[name]

    return change


nan_scale = torch.full((I, H // 16), float("nan")).to(torch.float8_e4m3fn)
WRONG: dict[str, tuple[Any, str]] = {
    "an expert is missing": (lost(".1."), r"experts\.1 is missing"),
    "a projection is missing": (lost("1.up_proj"), r"1\.up_proj is missing"),
    "a scale is missing": (lost("2.down_proj.weight_scale_2"), r"2\.down_proj\.weight_scale_2 is missing"),
    "a member has no scales": (lost("1.gate_proj.weight_scale"), r"1\.gate_proj\.weight_scale is missing"),
    "a tensor has no place": (bad("0.up_proj.zero_point", torch.zeros(1)), r"0\.up_proj\.zero_point"),
    "a tensor has no place in any": (bad("router.weight", torch.zeros(1)), r"router\.weight has no place"),
    "one input scale": (bad("1.up_proj.input_scale", torch.tensor(1.0)), r"1\.up_proj\.input_scale is there"),
    "global scale 0": (bad("1.up_proj.weight_scale_2", torch.tensor(0.0)), "positive and finite, got 0"),
    "global scale NaN": (bad("0.down_proj.weight_scale_2", torch.tensor(float("nan"))), "got nan"),
    "global scale < 0": (bad("2.gate_proj.weight_scale_2", torch.tensor(-1.0)), r"2\.gate_proj.*got -1"),
    "block scale NaN": (bad("1.gate_proj.weight_scale", nan_scale), r"1\.gate_proj\.weight_scale must hold"),
    "another dtype": (
        bad("1.up_proj.weight", torch.zeros(I, H // 2)),
        r"1\.up_proj\.weight must be torch\.uint8",
    ),
    "another shape": (
        bad("1.up_proj.weight_scale", torch.ones(I, 3).to(torch.float8_e4m3fn)),
        r"1\.up_proj.*no ModelOpt",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(what: str) -> None:
    tensors, _ = checkpoint(modelopt)
    change, message = WRONG[what]
    change(tensors)
    with pytest.raises(FormatError, match=message):
        moestro.ExpertWeights.from_experts(Experts(tensors, P), "portable")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("suffix", ["input_scale", "input_global_scale"])
def test_senseless_input_scales_are_named(suffix: str, value: float) -> None:
    tensors, _ = checkpoint(modelopt)
    for e in range(E):
        for name in SIZES:
            tensors[f"{P}.{e}.{name}.{suffix}"] = torch.tensor(0.5)
    tensors[f"{P}.1.down_proj.{suffix}"] = torch.tensor(value)
    with pytest.raises(FormatError, match=rf"1\.down_proj\.{suffix} must be positive and finite"):
        Experts(tensors, P).side_tensors()


def test_an_expert_that_calibration_never_reached_takes_the_largest_scale_and_says_so() -> None:
    tensors, _ = checkpoint(modelopt)
    for e in range(E):
        for name in SIZES:
            tensors[f"{P}.{e}.{name}.input_scale"] = torch.tensor(0.0 if e == 1 else 0.5 + e)
    with pytest.warns(CheckpointWarning, match=r"1\.down_proj\.input_scale is 0"):
        w = moestro.ExpertWeights.from_experts(Experts(tensors, P), "portable")
    assert w.down_input_scale.tolist() == [0.5, 2.5, 2.5]


def test_a_second_copy_beside_the_models_file_is_passed_over(tmp_path: Path) -> None:
    """Mistral's repositories have a consolidated.safetensors, others variants."""
    tensors, _ = checkpoint(modelopt)
    for name in ("model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"):
        save_file(tensors, tmp_path / name)
    found = Safetensors(tmp_path)
    assert {found.file_of(name).name for name in found} == {"model.safetensors"}
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="must be in one file"):
        Safetensors(tmp_path)


def test_files_that_cannot_be_are_named(tmp_path: Path) -> None:
    tensors, _ = checkpoint(modelopt)
    file, index = tmp_path / "model-1.safetensors", tmp_path / "model.safetensors.index.json"
    save_file(tensors, file)
    whole = file.read_bytes()
    index.write_text('{"weight_map": {')
    with pytest.raises(FormatError, match=r"index .*index\.json cannot be read"):
        Safetensors(tmp_path)
    index.write_text('{"weight_map": {"a": "nowhere.safetensors"}}')
    with pytest.raises(FormatError, match=r"names the file nowhere\.safetensors"):
        Safetensors(tmp_path)
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(FormatError, match="says that a is in"):
        Safetensors(tmp_path)
    index.unlink()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=r"model-1\.safetensors cannot be read"):
        Safetensors(tmp_path)


@given(st.integers(0, 2**31 - 1), st.integers(1, 3), st.integers(1, 4), st.floats(-30, 30))
@settings(max_examples=30, deadline=None)
def test_mxfp8_keeps_the_magnitude_and_three_bits(seed: int, rows: int, blocks: int, exponent: float) -> None:
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, 32 * blocks, generator=g) * 2.0**exponent
    q = MXFP8.quantize(dense)
    unit = torch.exp2(q.scale.double() - 127).repeat_interleave(32, -1)
    error = (q.dequantize(torch.float64) - dense.double()).abs()
    assert bool((error <= torch.maximum(dense.double().abs() / 16, unit * 2.0**-10)).all())
    assert torch.equal(MXFP8.quantize(q.dequantize()).dequantize(), q.dequantize())


def test_formats_know_their_names() -> None:
    for cls in (NVFP4, MXFP4, MXFP8, FP8Block):
        assert moestro.formats.get(cls.format) is cls
