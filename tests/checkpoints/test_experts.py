"""Experts from safetensors: the values of the checkpoint, in every layout, with little memory beside the result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moestro
from moestro.checkpoints import Experts, Safetensors
from moestro.errors import FormatError, ShapeError
from moestro.formats import BF16, NVFP4

E, H, I = 5, 64, 48  # noqa: E741
PREFIX = "model.layers.3.mlp.experts"
SIZES = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
LAYOUTS = ("compressed-tensors", "modelopt", "bf16", "stacked")


def projections() -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{n: torch.randn(s, generator=g).bfloat16() for n, s in SIZES.items()} for _ in range(E)]


def checkpoint(layout: str, names: dict[str, str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of random experts in a layout, each projection with a global scale of its own."""
    experts, tensors = projections(), {}
    if layout == "stacked":
        gate_up = [torch.cat([e["gate_proj"], e["up_proj"]]) for e in experts]
        down = [e["down_proj"] for e in experts]
        return {f"{PREFIX}.gate_up_proj": torch.stack(gate_up), f"{PREFIX}.down_proj": torch.stack(down)}
    for i, expert in enumerate(experts):
        for name, dense in expert.items():
            at = f"{PREFIX}.{i}.{(names or {}).get(name, name)}"
            q = NVFP4.quantize(dense)
            if layout == "bf16":
                tensors[f"{at}.weight"] = dense
                continue
            tensors[f"{at}.weight_scale"] = q.scale
            if layout == "modelopt":
                tensors |= {f"{at}.weight": q.packed, f"{at}.weight_scale_2": q.global_scale}
                tensors[f"{at}.input_scale"] = torch.tensor(0.5 + i + (name == "up_proj"))
            else:
                tensors |= {
                    f"{at}.weight_packed": q.packed,
                    f"{at}.weight_global_scale": 1 / q.global_scale[None],
                }
    return tensors


def expected(layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up [E, 2I, H] and down [E, H, I] as the checkpoint has them."""

    def value(dense: torch.Tensor) -> torch.Tensor:
        return dense.float() if layout in ("bf16", "stacked") else NVFP4.quantize(dense).dequantize()

    rows = [torch.cat([value(e["gate_proj"]), value(e["up_proj"])]) for e in projections()]
    return torch.stack(rows), torch.stack([value(e["down_proj"]) for e in projections()])


@pytest.mark.parametrize("backend", ["cpu", "portable"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_checkpoints_values(tmp_path: Path, layout: str, backend: str) -> None:
    save_file(checkpoint(layout), tmp_path / "model.safetensors")
    experts = Experts(Safetensors(tmp_path), PREFIX)
    w = moestro.ExpertWeights.from_experts(experts, backend)
    assert len(experts) == w.num_experts == E
    for got, want in zip(w.dequantize(), expected(layout), strict=True):
        assert torch.allclose(got, want, rtol=3e-7, atol=0)


def test_mixtral_names_and_a_ranks_share() -> None:
    experts = Experts(checkpoint("modelopt", MIXTRAL), PREFIX, only=range(2, 4))
    w = moestro.ExpertWeights.from_experts(experts, "portable")
    assert torch.allclose(w.dequantize()[0], expected("modelopt")[0][2:4], rtol=3e-7, atol=0)


def test_an_index_leads_to_the_files(tmp_path: Path) -> None:
    tensors = checkpoint("bf16")
    halves = dict(list(tensors.items())[:7]), dict(list(tensors.items())[7:])
    index = {}
    for i, half in enumerate(halves):
        save_file(half, tmp_path / f"part-{i}.safetensors")
        index |= dict.fromkeys(half, f"part-{i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found = Safetensors(tmp_path)
    assert set(found) == set(tensors)
    assert len(found) == len(tensors)
    assert len(Experts(found, PREFIX)) == E


def test_input_scales_are_those_of_the_experts_the_larger_of_gate_and_up() -> None:
    scales = Experts(checkpoint("modelopt"), PREFIX).input_scales()
    assert torch.equal(scales["gate_up_input_scale"], torch.arange(E) + 1.5)
    assert torch.equal(scales["down_input_scale"], torch.arange(E) + 0.5)
    assert Experts(checkpoint("bf16"), PREFIX).input_scales() == {}


def test_what_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    tensors = checkpoint("modelopt")
    with pytest.raises(FormatError, match="elsewhere"):
        Experts(tensors, "elsewhere")
    del tensors[f"{PREFIX}.2.up_proj.weight_scale"]
    with pytest.raises(FormatError, match=r"2\.up_proj\.weight_scale"):
        list(Experts(tensors, PREFIX))
    with pytest.raises(FormatError, match="within the 5 experts"):
        Experts(checkpoint("bf16"), PREFIX, only=range(4, 6))
    fp8 = {f"{PREFIX}.0.gate_proj.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}
    with pytest.raises(FormatError, match="float8_e4m3fn"):
        Experts(fp8, PREFIX)
    with pytest.raises(FormatError, match="folder"):
        Safetensors(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(FormatError, match="cannot be read"):
        Safetensors(tmp_path)


def test_experts_that_are_fewer_than_they_say_are_an_error() -> None:
    class Short(list):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 3

    pair = (BF16(torch.zeros(64, 32).bfloat16()), BF16(torch.zeros(32, 32).bfloat16()))
    with pytest.raises(ShapeError, match="got 2"):
        moestro.ExpertWeights.from_experts(Short([pair, pair]), "cpu")
    with pytest.raises(ShapeError, match="got none"):
        moestro.ExpertWeights.from_experts([], "cpu")


@pytest.mark.parametrize("layout", ["compressed-tensors", "bf16"])
def test_loading_peaks_at_one_layer_and_little_more(tmp_path: Path, layout: str) -> None:
    """Measured on a process that maps 32 experts: the growth of its highest resident set, of all kinds of pages."""
    rows, columns, tensors = 1024, 1024, {}
    for e in range(32):
        for name in SIZES:
            at = f"{PREFIX}.{e}.{name}"
            if layout == "bf16":
                tensors[f"{at}.weight"] = torch.ones(rows, columns, dtype=torch.bfloat16)
                continue
            tensors[f"{at}.weight_packed"] = torch.full((rows, columns // 2), 0x22, dtype=torch.uint8)
            tensors[f"{at}.weight_scale"] = torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)
            tensors[f"{at}.weight_global_scale"] = torch.ones(1)
    save_file(tensors, tmp_path / "x.safetensors")
    code = (
        "import resource, sys, torch, moestro\n"
        "from moestro.checkpoints import Experts, Safetensors\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "load = lambda path, prefix: moestro.ExpertWeights.from_experts(Experts(Safetensors(path), prefix), 'cpu')\n"
        "small = torch.ones(2, 64, 32).bfloat16(), torch.ones(2, 32, 32).bfloat16()\n"
        "[moestro.ExpertWeights.from_dense(*small, f, backend='cpu') for f in ('nvfp4', 'bf16')]\n"
        "before = peak(); w = load(*sys.argv[1:])\n"
        "print((peak() - before) / w.nbytes)\n"
        "assert all(bool((d == 1).all()) for e in range(32) for d in [w.gate_up.expert(e).dequantize()])\n"
    )
    args = [sys.executable, "-c", code, str(tmp_path), PREFIX]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.2


def test_two_names_of_one_expert_are_refused() -> None:
    tensors = checkpoint("modelopt")
    twice = {
        n.replace(f"{PREFIX}.0.", f"{PREFIX}.00."): t
        for n, t in tensors.items()
        if n.startswith(f"{PREFIX}.0.")
    }
    with pytest.raises(
        FormatError, match=r"experts.00.gate_proj.weight_scale has no place: .* is the same expert's"
    ):
        Experts({**tensors, **twice}, PREFIX)


@pytest.mark.parametrize("count", [E - 1, E + 1])
@pytest.mark.parametrize("name", ["down_proj", "down_proj_bias", "gate_up_proj_bias"])
def test_stacked_tensors_with_other_numbers_of_experts_are_refused(name: str, count: int) -> None:
    tensors = checkpoint("stacked")
    rows = {"down_proj": (H, I), "down_proj_bias": (H,), "gate_up_proj_bias": (2 * I,)}[name]
    tensors[f"{PREFIX}.{name}"] = torch.zeros(count, *rows, dtype=torch.bfloat16)
    with pytest.raises(
        FormatError, match=rf"{name} must have the {E} experts of .*gate_up_proj, got {count}"
    ):
        Experts(tensors, PREFIX)


@pytest.mark.parametrize("layout", ["transposed", "gpt-oss"])
def test_experts_made_anew_are_not_given_back_with_the_files_pages(tmp_path: Path, layout: str) -> None:
    """Several pages an expert: what is transposed or parted on reading lies in ordinary memory, which reads zero then."""
    prefix, g = "model.layers.0.mlp.experts", torch.Generator().manual_seed(0)
    if layout == "transposed":
        made = torch.randn(3, 128, 256, generator=g), torch.randn(3, 128, 128, generator=g)
        tensors = dict(zip((f"{prefix}.gate_up_proj", f"{prefix}.down_proj"), made, strict=True))
        tensors[f"{prefix}.down_proj"] = torch.randn(3, 64, 256, generator=g)
        tensors[f"{prefix}.gate_up_proj"] = torch.randn(3, 256, 128, generator=g)
    else:
        blocks = {"gate_up_proj": (256, 8), "down_proj": (256, 4)}
        tensors = {}
        for name, (rows, n) in blocks.items():
            high = torch.randint(1, 256, (3, rows, n, 16), dtype=torch.uint8, generator=g)
            tensors[f"{prefix}.{name}_blocks"] = high
            tensors[f"{prefix}.{name}_scales"] = torch.full((3, rows, n), 127, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    held = [down for _, down in Experts(Safetensors(tmp_path), prefix)]
    gates = [gate_up for gate_up, _ in Experts(Safetensors(tmp_path), prefix)]
    again = list(Experts(tensors, prefix))
    for e in range(3):
        assert torch.equal(gates[e].dequantize(), again[e][0].dequantize())
        assert torch.equal(held[e].dequantize(), again[e][1].dequantize())
