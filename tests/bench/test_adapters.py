"""The adapters to GPU peers: their glue kernels in Triton's interpreter, and what they ask of their packages.

humming, vLLM and triton_kernels are stood in for by modules that compute what their documents say, in plain
PyTorch: what is tested is what the adapters hand over and make of what comes back.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from bench_plain import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.bench import adapters
from moestro.bench.adapters import ADAPTERS, AdapterContender, glue, humming, triton_kernels, vllm
from moestro.bench.adapters.base import Adapter
from moestro.bench.layers import LayerSource, make_case
from moestro.bench.measure import Plan
from moestro.bench.models import MoeShape, from_sizes
from moestro.bench.peers import peer_names
from moestro.bench.run import BenchSpec, build
from moestro.bench.truth import References
from moestro.errors import BackendError
from moestro.formats import NVFP4
from moestro.routing import Uniform
from moestro.tuning.progress import Listener

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here")
SHAPE = from_sizes("8,2,64,32")


# --- glue ------------------------------------------------------------------------------------------------
def check_table(table: glue.Aligned, ids: torch.Tensor, experts: int) -> None:
    flat, length = ids.flatten().tolist(), int(table.length)
    assert length % table.height == 0
    pairs = table.pairs[:length].view(-1, table.height).tolist()
    tiles = table.experts[: len(pairs)].tolist()
    seen = []
    for expert, tile in zip(tiles, pairs, strict=True):
        real = [pair for pair in tile if pair != len(flat)]
        assert real, "an empty tile"
        assert tile[: len(real)] == real, "padding comes last"
        assert {flat[pair] for pair in real} == {expert}
        seen += real
    assert sorted(seen) == [pair for pair, expert in enumerate(flat) if 0 <= expert < experts]
    assert tiles == sorted(tiles)


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 9),
    heights=st.sampled_from([(8, 8), (8, 24), (1, 1), (32, 16)]),
    seed=st.integers(0, 99),
)
def test_aligning_puts_each_local_pair_into_a_tile_of_its_expert(
    tokens: int, experts: int, heights: tuple[int, int], seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts + 2, (tokens, 2), generator=rng, dtype=torch.int32)
    align = glue.Aligner(ids.numel(), experts, heights, "cpu")
    align(ids)
    for table in (align.first, align.second):
        check_table(table, ids, experts)


def test_aligning_more_pairs_than_one_program_takes() -> None:
    ids = Uniform().sample(1500, 6, 3)  # 4500 pairs: three programs
    align = glue.Aligner(ids.numel(), 5, (24, 32), "cpu")
    align(ids)
    check_table(align.first, ids, 5)
    check_table(align.second, ids, 5)


def test_activation_and_weighted_sum() -> None:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 2 * 37, generator=rng).bfloat16()
    out = torch.full((6, 37), float("nan"), dtype=torch.bfloat16)
    glue.silu_and_mul(hidden, out)
    gate, up = hidden.float().chunk(2, 1)
    assert relative_error(out, torch.nn.functional.silu(gate) * up) < 5e-3
    ids = torch.tensor([[0, 1], [3, 2], [1, 0]], dtype=torch.int32)
    weights = torch.rand(3, 2, generator=rng)
    y = torch.randn(6, 37, generator=rng).bfloat16()
    y[2] = float("nan")  # the pair of expert 3, which is not here
    total = torch.empty(3, 37, dtype=torch.bfloat16)
    glue.weighted_sum(y, weights, ids, total, 3)
    expected = torch.stack(
        [(y[2 * n : 2 * n + 2].float().nan_to_num(0) * weights[n, :, None]).sum(0) for n in range(3)]
    )
    assert relative_error(total, expected) < 5e-3


# --- humming ---------------------------------------------------------------------------------------------
def fake_humming(monkeypatch: pytest.MonkeyPatch, heights: Sequence[int]) -> list[dict[str, Any]]:
    """A humming whose products are plain PyTorch; the calls that it got."""
    calls: list[dict[str, Any]] = []

    class Schema:
        def convert_humming(self, tensors: Any, rows: Any, columns: Any, dtype: Any, **more: Any) -> Any:
            assert tensors["weight_scale"].dtype == torch.float8_e4m3fn
            return "schema", tensors

    def prepare(tensors: Any, rows: int, columns: int, schema: str, **more: Any) -> Any:
        assert more["pad_n_to_multiple"] == 256
        assert more["pad_k_to_multiple"] == 128
        weight = NVFP4(tensors["weight"], tensors["weight_scale"], tensors["weight_scale_2"])
        config = SimpleNamespace(to_str=lambda: f"{rows}x{columns}", rows=rows)
        return config, {"weight": weight.dequantize(torch.float32)}

    def heuristics(layer_config: Any, gemm_type: str, device: Any) -> list[Any]:
        assert gemm_type == "indexed"
        height = heights[0] if layer_config.rows == SHAPE.gate_up_rows else heights[1]
        return [(0, 8, {"block_shape": [8, 64, 64]}), (8, 1 << 30, {"block_shape": [height, 64, 64]})]

    def forward(
        config: Any, inputs: torch.Tensor, weight: torch.Tensor, outputs: torch.Tensor, **more: Any
    ) -> None:
        calls.append(more)
        outputs.fill_(float("nan"))
        entries = json.loads(more["tuning_config"])
        assert any(e[0] < 1 <= e[1] for e in entries)  # humming's launcher looks up size 1 as well
        (entry,) = [e for e in entries if e[0] < more["valid_shape_m"] <= e[1]]
        height = entry[2]["block_shape"][0]
        length = int(more["num_tokens_padded"])
        for tile in range(length // height):
            for pair in more["sorted_ids"][tile * height : (tile + 1) * height].tolist():
                if pair < len(outputs):
                    matrix = weight[int(more["expert_ids"][tile])]
                    outputs[pair] = (matrix @ inputs[pair // more["top_k"]].float()).bfloat16()

    compiled = SimpleNamespace(prepare_kernels=lambda *a, **k: calls.append({"compiled": a}))
    for name, members in {
        "humming": {},
        "humming.schema": {},
        "humming.schema.modelopt": {"ModeloptNvfp4WeightSchema": Schema},
        "humming.transform": {"prepare_and_transform_humming_tensors": prepare},
        "humming.tune": {"get_heuristics_config": heuristics},
        "humming.forward": {"humming_forward": forward},
        "humming.kernel": {},
        "humming.kernel.humming": {"HummingKernel": compiled},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize("heights", [(16, 16), (24, 8)])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE.on_ranks(2), SHAPE.on_ranks(2, local_pairs=True)])
def test_humming_computes_the_layer(
    monkeypatch: pytest.MonkeyPatch, heights: tuple[int, int], shape: MoeShape
) -> None:
    calls = fake_humming(monkeypatch, heights)
    source = LayerSource(shape, seed=3)
    peer = AdapterContender(humming.ADAPTER, [humming.ADAPTER.prepare(source.weights("nvfp4"), shape)])
    cases = [make_case(shape, tokens, Uniform(), seed=tokens) for tokens in (1, 21)]
    peer.compile(cases)
    assert len(calls) == 2  # one compilation for each product, of all sizes
    truth = References(source)
    for case in cases:
        (call,) = peer.calls(case)
        expected = truth(peer, case)
        if expected.norm() > 0:  # else: one token, all of its experts on other ranks
            assert relative_error(call(), expected) < 1e-2
    assert {c["top_k"] for c in calls[2:]} == {1, shape.top_k}


# --- vLLM and triton_kernels -----------------------------------------------------------------------------
def put(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module of that name, in modules of its parents' names."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            module = ModuleType(path)
            module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
            monkeypatch.setitem(sys.modules, path, module)
    sys.modules[name].__dict__.update(members)


LAYERS = "vllm.model_executor.layers"
EP_SHAPES = [SHAPE, SHAPE.on_ranks(2), SHAPE.on_ranks(2, local_pairs=True)]


def check_vllm(adapter: Adapter, shape: MoeShape) -> None:
    source = LayerSource(shape, seed=2)
    assert adapter.missing(shape) is None
    peer = AdapterContender(adapter, [adapter.prepare(source.weights(adapter.format), shape)])
    case = make_case(shape, 5, Uniform())
    assert relative_error(peer.calls(case)[0](), References(source)(peer, case)) < 1e-2


def computed(x: Any, w1: Any, w2: Any, weights: Any, ids: Any, count: int, mapped: Any) -> torch.Tensor:
    """The layer of dense w1 and w2, of which vLLM is told what `_routing` says."""
    assert count == (len(w1) if mapped is None else len(mapped))
    local = ids if mapped is None else mapped[ids.long()]
    from moestro.moe import reference
    from moestro.moe.weights import ExpertWeights

    layer = ExpertWeights.from_dense(w1, w2, "bf16")
    return reference.fused_moe(x, local.int(), weights, layer).bfloat16()


@pytest.mark.parametrize("shape", EP_SHAPES)
def test_vllm_triton_computes_the_layer(monkeypatch: pytest.MonkeyPatch, shape: MoeShape) -> None:
    def fused_experts(hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, *,
                      activation: str = "silu", global_num_experts: int = -1,
                      expert_map: Any = None) -> torch.Tensor:  # fmt: skip
        assert activation == "silu"  # an enum's member in newer versions, which text would break
        return computed(hidden_states, w1, w2, topk_weights, topk_ids, global_num_experts, expert_map)

    put(monkeypatch, f"{LAYERS}.fused_moe", fused_experts=fused_experts)
    check_vllm(vllm.TRITON, shape)


def repacked(layer: Any, w13: Any, s13: Any, g13: Any, w2: Any, s2: Any, g2: Any) -> Any:
    """vLLM 0.14's helper, with weights that stay as they came."""
    assert w13.shape[:2] == (layer.num_experts, 2 * layer.intermediate_size_per_partition)
    assert w2.shape[:2] == (layer.num_experts, layer.hidden_size)
    assert layer.params_dtype == torch.bfloat16
    return w13, s13, g13, w2, s2, g2


def repacked_newer(layer: Any, *parts: Any, is_act_and_mul: bool) -> Any:
    assert is_act_and_mul
    return repacked(layer, *parts)


def fused_marlin(hidden_states: Any, w1: Any, w2: Any, bias1: Any, bias2: Any, w1_scale: Any, w2_scale: Any,
                 topk_weights: Any, topk_ids: Any, quant_type_id: int, global_num_experts: int = -1,
                 activation: str = "silu", expert_map: Any = None, global_scale1: Any = None,
                 global_scale2: Any = None, workspace: Any = None) -> torch.Tensor:  # fmt: skip
    """Of vLLM 0.32's arguments those that matter here."""
    assert (bias1, bias2, quant_type_id, activation) == (None, None, 7, "silu")
    assert len(workspace) == 4
    first, second = NVFP4(w1, w1_scale, global_scale1), NVFP4(w2, w2_scale, global_scale2)
    dense = (part.dequantize(torch.bfloat16) for part in (first, second))
    return computed(hidden_states, *dense, topk_weights, topk_ids, global_num_experts, expert_map)


def fused_marlin_older(*, gating_output: Any, **more: Any) -> torch.Tensor:
    return fused_marlin(**more)


def fake_marlin(monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    """vLLM 0.14's signatures and places, or 0.32's."""

    def workspace(device: torch.device, blocks: int) -> torch.Tensor:
        return torch.zeros(blocks, dtype=torch.int32, device=device)

    utils = f"{LAYERS}.quantization.utils.marlin_utils"
    prepare = repacked if old else repacked_newer
    put(monkeypatch, f"{utils}_fp4", prepare_nvfp4_moe_layer_for_marlin=prepare)
    put(monkeypatch, utils, marlin_make_workspace_new=workspace)
    put(monkeypatch, "vllm.scalar_type", scalar_types=SimpleNamespace(float4_e2m1f=SimpleNamespace(id=7)))
    place = "fused_moe.fused_marlin_moe" if old else "fused_moe.experts.marlin_moe"
    fused = fused_marlin_older if old else fused_marlin
    put(monkeypatch, f"{LAYERS}.{place}", fused_marlin_moe=fused)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("shape", EP_SHAPES)
def test_marlin_computes_the_layer(monkeypatch: pytest.MonkeyPatch, shape: MoeShape, old: bool) -> None:
    fake_marlin(monkeypatch, old)
    check_vllm(vllm.MARLIN, shape)


def test_marlin_needs_a_vllm_that_repacks_nvfp4(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, f"{LAYERS}.quantization.utils.marlin_utils_fp4")  # as in 0.11
    assert "0.14 and newer" in str(vllm.MARLIN.missing(SHAPE))


def test_triton_kernels_computes_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def matmul(a: Any, b: Any, bias: None, *, a_ragged_metadata: Any, gather_indx: Any = None,
               scatter_indx: Any = None, precision_config: Any) -> torch.Tensor:  # fmt: skip
        rows = a if gather_indx is None else a[gather_indx.long()]
        expert = torch.repeat_interleave(torch.arange(len(b)), a_ragged_metadata)
        out = torch.stack(
            [row.float() @ b[e].float() for row, e in zip(rows, expert, strict=True)]
        ).bfloat16()
        if scatter_indx is None:
            return out
        scattered = torch.empty_like(out)
        scattered[scatter_indx.long()] = out
        return scattered

    for name, members in {
        "triton_kernels": {},
        "triton_kernels.matmul": {"matmul": matmul, "PrecisionConfig": object},
        "triton_kernels.tensor": {"make_ragged_tensor_metadata": lambda sizes, rows: sizes},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, module)
    assert triton_kernels.ADAPTER.missing(SHAPE) is None
    source = LayerSource(SHAPE, seed=2)
    peer = AdapterContender(
        triton_kernels.ADAPTER, [triton_kernels.ADAPTER.prepare(source.weights("bf16"), SHAPE)]
    )
    case = make_case(SHAPE, 9, Uniform())
    assert relative_error(peer.calls(case)[0](), References(source)(peer, case)) < 1e-2


def test_a_package_of_the_same_name_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("triton_kernels")
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "triton_kernels", module)
    assert "another package" in str(triton_kernels.ADAPTER.missing(SHAPE))


# --- in the bench ----------------------------------------------------------------------------------------
def test_gpu_peers_can_be_asked_for_on_a_gpu_only() -> None:
    assert set(ADAPTERS) <= set(peer_names("cuda"))
    assert not set(ADAPTERS) & set(peer_names("cpu"))


def test_missing_and_broken_peers_are_listed_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weights: Any, shape: MoeShape) -> Any:
        raise AssertionError("wrong version")

    fakes = {
        "absent": Adapter("absent", "nvfp4", lambda shape: "absent is not installed", broken),
        "broken": Adapter("broken", "nvfp4", lambda shape: None, broken),
    }
    monkeypatch.setattr(adapters, "ADAPTERS", fakes)
    monkeypatch.setattr("moestro.bench.run.ADAPTERS", fakes)
    spec = BenchSpec(SHAPE, (1,), Uniform(), formats=("nvfp4",), peers=("absent", "broken"), plan=Plan())
    contenders, missing = build(spec, [LayerSource(SHAPE)], Listener())
    assert [contender.name for contender in contenders] == ["moestro nvfp4"]
    assert missing == [
        {"contender": "absent nvfp4", "reason": "absent is not installed"},
        {"contender": "broken nvfp4", "reason": "AssertionError: wrong version"},
    ]


def test_what_does_not_fit_into_memory_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 22.50 GiB.\nMore of it")

    monkeypatch.setattr("moestro.bench.contenders.make_layer", full)
    monkeypatch.setattr("moestro.bench.run.transformers_peers", full)
    monkeypatch.setattr("moestro.bench.run.transformers_missing", lambda: None)
    spec = BenchSpec(SHAPE, (1,), Uniform(), formats=("nvfp4",), peers=("grouped_mm",))
    contenders, missing = build(spec, [LayerSource(SHAPE)], Listener())
    assert contenders == []
    assert [(entry["contender"], "Tried to allocate 22.50 GiB" in entry["reason"]) for entry in missing] == [
        ("moestro nvfp4", True),
        ("transformers grouped_mm", True),
    ]
    monkeypatch.setattr(LayerSource, "weights", full)
    case = make_case(SHAPE, 2, Uniform())
    assert References(LayerSource(SHAPE))(SimpleNamespace(format="nvfp4"), case) is None  # type: ignore[arg-type]


def test_a_backend_that_cannot_be_imported_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        if name == "triton":
            raise BackendError("backend 'triton' is not available: it cannot be imported: ImportError: gone")

    monkeypatch.setattr("moestro.bench.run.backends.load", load)
    spec = BenchSpec(SHAPE, (1,), Uniform(), formats=(), peers=())
    (entry,) = build(spec, [LayerSource(SHAPE)], Listener())[1]
    assert entry["contender"] == "moestro's backend triton"
    assert "ImportError: gone" in entry["reason"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_say_what_they_cannot_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not installed" in str(ADAPTERS[name].missing(SHAPE))
    monkeypatch.setattr(f"moestro.bench.adapters.{_module(name)}.installed", lambda package, hint: None)
    assert "relu2" in str(ADAPTERS[name].missing(from_sizes("8,2,64,32", "relu2")))


def _module(name: str) -> str:
    modules = {"marlin": "vllm", "vllm_triton": "vllm", "triton_kernels_mxfp4": "triton_kernels_ogs"}
    return modules.get(name, name.removesuffix("_products").removesuffix("_mxfp4").removesuffix("_fp8"))
