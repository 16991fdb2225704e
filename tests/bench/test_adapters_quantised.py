"""Adapters to peers in MXFP4, with FP8 activations and in FP8 blocks, and what they write themselves as kernels.

The packages are stood in for by modules that compute what they document, in plain PyTorch; the kernels run in Triton's
interpreter. What is asked: the whole layer is the reference's, with biases, empty experts and experts of other ranks.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from bench_plain import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.bench.adapters import (
    ADAPTERS,
    AdapterContender,
    deep_gemm,
    fp8_glue,
    glue,
    humming,
    ogs_glue,
    triton_kernels_ogs,
    whole_peer,
)
from moestro.bench.adapters.base import Adapter
from moestro.bench.layers import LayerSource, make_case
from moestro.bench.measure import EXACT, QUANTISED, Plan, measure_case
from moestro.bench.models import MoeShape, from_sizes
from moestro.bench.truth import References
from moestro.formats import MXFP4, NVFP4
from moestro.routing import Uniform

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here")
SHAPE = from_sizes("8,2,64,32")
OSS = MoeShape("oss", 64, 32, 8, 2, activation="swiglu_oai", biases=True)
BLOCKS = from_sizes("5,2,256,128")


def put(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    for name, members in modules.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent in modules:
            setattr(sys.modules[parent], last, module)


def check(adapter: Adapter, shape: MoeShape, tokens: int = 21) -> AdapterContender:
    """The layer's output against the reference of its format, and of its activations."""
    source = LayerSource(shape, seed=3)
    peer = AdapterContender(adapter, [adapter.prepare(source.weights(adapter.format), shape)])
    case, truth = make_case(shape, tokens, Uniform(), seed=tokens), References(source)
    (call,) = peer.calls(case)
    bound = 1e-2 if adapter.input_format is None else QUANTISED[adapter.input_format]
    if not (case.ids < shape.num_local_experts).any():
        assert not call().any()
        return peer
    assert relative_error(call(), truth(peer, case)) < bound
    if adapter.input_format is not None:
        assert 2e-2 < relative_error(call(), truth.exact(peer, case)) < EXACT[adapter.input_format]
    return peer


@pytest.fixture(autouse=True)
def carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 -> e4m3 as the GPU rounds: Triton's interpreter (3.8) loses a carry into the exponent, 124 becomes 64."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    plain = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) != ("fp32", "fp8e4nv"):
            return plain(data, source, target, mode)
        return torch.from_numpy(data.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


# --- humming ---------------------------------------------------------------------------------------------
def fake_humming(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """humming 0.1.19 on one process: readers, the input kernel, the indexed product. The calls that it got."""
    calls: list[dict[str, Any]] = []

    def reader(kind: Callable[..., Any], *names: str) -> type:
        class Schema:
            def convert_humming(self, tensors: Any, rows: Any, columns: Any, dtype: Any, **more: Any) -> Any:
                weight = kind(*(tensors[name] for name in names)).dequantize(torch.float32)
                return "schema", {
                    "weight": weight,
                    **({"bias": tensors["bias"]} if "bias" in tensors else {}),
                }

        return Schema

    def prepare(tensors: Any, rows: int, columns: int, schema: str, **more: Any) -> Any:
        assert more["has_bias"] == ("bias" in tensors)
        assert "bias" not in tensors or tensors["bias"].dtype == torch.bfloat16
        quantised = more["input_schema"] is not None
        return SimpleNamespace(to_str=str, rows=rows, quantised=quantised), dict(tensors)

    def process(
        config: Any, inputs: torch.Tensor, activation_type: str = "none", activation_impl: str = ""
    ) -> Any:
        """Activate in float32, then e4m3 with a scale a row, where the layer takes it."""
        values = inputs.float()
        if activation_type != "none":
            assert activation_type == "binary_split"
            gate, up = values.chunk(2, 1)
            values = _evaluated(activation_impl, gate, up)
        if not config.quantised:
            return values.to(inputs.dtype), None, None
        scales = values.abs().amax(1, keepdim=True) / 448
        calls.append({"quantised": values.shape[1]})
        return (values / scales).to(torch.float8_e4m3fn), None, scales

    def forward(config: Any, inputs: torch.Tensor, weight: torch.Tensor, outputs: torch.Tensor,
                input_scale: Any, bias: Any = None, **more: Any) -> None:  # fmt: skip
        assert (input_scale is None) == (inputs.dtype == torch.bfloat16) == (not config.quantised)
        rows = inputs.float() if input_scale is None else inputs.float() * input_scale
        height = json.loads(more["tuning_config"])[0][2]["block_shape"][0]
        outputs.fill_(float("nan"))
        for tile in range(int(more["num_tokens_padded"]) // height):
            expert = int(more["expert_ids"][tile])
            for pair in more["sorted_ids"][tile * height : (tile + 1) * height].tolist():
                if pair < len(outputs):
                    y = weight[expert] @ rows[pair // more["top_k"]]
                    outputs[pair] = (y if bias is None else y + bias[expert].float()).bfloat16()

    nvfp4 = reader(NVFP4, "weight", "weight_scale", "weight_scale_2")
    put(monkeypatch, {
        "humming": {},
        "humming.dtypes": {"float8e4m3": "float8e4m3"},
        "humming.schema": {},
        "humming.schema.modelopt": {"ModeloptNvfp4WeightSchema": nvfp4},
        "humming.schema.mxfp4": {"Mxfp4WeightSchema": reader(MXFP4, "weight", "weight_scale")},
        "humming.schema.humming": {"HummingInputSchema": lambda a_dtype: SimpleNamespace(a_dtype=a_dtype)},
        "humming.transform": {"prepare_and_transform_humming_tensors": prepare},
        "humming.tune": {"get_heuristics_config": lambda **more: [(0, 1 << 30, {"block_shape": [8, 64, 64]})]},
        "humming.forward": {"humming_forward": forward, "may_process_input": process},
    })  # fmt: skip
    return calls


def _evaluated(code: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The C++ of an activation, read as Python: declarations become assignments, floats lose their f."""
    body = re.search(r"\{(.*)\}", code, re.S).group(1)  # type: ignore[union-attr]
    names: dict[str, Any] = {
        "a": a, "b": b, "expf": torch.exp,
        "fminf": lambda x, y: x.clamp(max=y), "fmaxf": lambda x, y: x.clamp(min=y),
    }  # fmt: skip
    for statement in filter(str.strip, re.sub(r"(\d\.\d*)f", r"\1", body).split(";")):
        text = statement.strip().removeprefix("const float ").replace("return ", "result = ", 1)
        exec(text, names)
    result: torch.Tensor = names["result"]
    return result


@pytest.mark.parametrize("shape", [SHAPE, SHAPE.on_ranks(2), OSS])
@pytest.mark.parametrize("name", ["humming", "humming_mxfp4", "humming_fp8"])
def test_humming_computes_each_of_its_layers(
    monkeypatch: pytest.MonkeyPatch, name: str, shape: MoeShape
) -> None:
    calls = fake_humming(monkeypatch)
    assert ADAPTERS[name].missing(shape) is None
    check(ADAPTERS[name], shape)
    # x and the intermediate of each call, and nothing else, are quantised, where the layer takes FP8
    expected = [64, 32] * 2 if name == "humming_fp8" else []
    assert [call["quantised"] for call in calls] == expected


def test_peers_that_quantise_are_named_and_checked_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_humming(monkeypatch)
    source = LayerSource(SHAPE, seed=3)
    peer = AdapterContender(humming.FP8, [humming.FP8.prepare(source.weights("mxfp4"), SHAPE)])
    assert (peer.name, peer.input_format, whole_peer(peer)) == ("humming mxfp4 fp8", "fp8", True)
    truth = References(source)
    clock = SimpleNamespace(name="none", prepare=lambda call: lambda: 1.0)
    plan = Plan(min_rounds=1, max_rounds=1)
    case = make_case(SHAPE, 33, Uniform())
    outcome = measure_case([peer], case, lambda _: clock, plan, truth=truth, exact=truth.exact)
    (row,) = outcome.measured
    assert 0 < row.error < 0.02 < row.exact_error < EXACT["fp8"]  # type: ignore[operator]
    wrong = measure_case(
        [peer], case, lambda _: clock, plan, truth=truth, exact=lambda *_: torch.ones(33, 64)
    )
    assert "exact product" in wrong.failed[peer.name]


# --- triton_kernels 3.5 ------------------------------------------------------------------------------------
def fake_ogs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """triton_kernels 3.5.1 in plain PyTorch: routing from the bit matrix, the product with its epilogue."""
    seen: dict[str, Any] = {"constraints": {}}

    def routing(matrix: Any, weights: torch.Tensor, ids: torch.Tensor, experts: int, top_k: int) -> Any:
        words = matrix.words.view(torch.int32)
        for token, row in enumerate(ids.tolist()):
            found = [e for e in range(32 * words.shape[1]) if int(words[token, e // 32]) >> e % 32 & 1]
            assert found == sorted(row)
        order = torch.argsort(ids.flatten(), stable=True)
        data = SimpleNamespace(
            experts=ids.flatten()[order], order=order, top_k=top_k, gate_scal=weights.flatten()[order]
        )
        return data, "gather", "scatter"

    def matmul(x: torch.Tensor, w: torch.Tensor, bias: Any, routing: Any, *, gather_indx: Any = None,
               scatter_indx: Any = None, precision_config: Any, gammas: Any = None,
               fused_activation: Any = None) -> torch.Tensor:  # fmt: skip
        assert bias is None or bias.dtype == torch.float32
        if (scale := precision_config.weight_scale) is not None:
            assert seen["constraints"] == {"split_k": 1}
            packed = w.transpose(-2, -1).contiguous()
            groups = packed.shape[-1] // 16  # without the padding that the adapter added
            w = MXFP4(packed, scale.transpose(-2, -1)[..., :groups].contiguous()).dequantize(torch.float32)
            w = w.transpose(-2, -1)
        rows = x[routing.order // routing.top_k] if gather_indx else x
        y = torch.stack([r.float() @ w[e].float() for r, e in zip(rows, routing.experts, strict=True)])
        if bias is not None:
            y = y + bias[routing.experts]
        if fused_activation is not None:
            y = fused_activation.specs.fn(y[:, ::2], y[:, 1::2], *fused_activation.fn_args)
        if gammas is not None:
            y = y * gammas[:, None]
        if not scatter_indx:
            return y.bfloat16()
        out = torch.zeros(len(y) // routing.top_k, y.shape[1])
        return out.index_add(0, routing.order // routing.top_k, y).bfloat16()

    def swiglu(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)

    put(monkeypatch, {
        "triton_kernels": {},
        "triton_kernels.matmul_ogs": {
            "matmul_ogs": matmul, "FlexCtx": SimpleNamespace,
            "PrecisionConfig": lambda weight_scale=None, flex_ctx=None: SimpleNamespace(weight_scale=weight_scale),
            "FnSpecs": lambda name, fn, arguments: SimpleNamespace(name=name, fn=fn),
            "FusedActivation": lambda specs, arguments, reduction: SimpleNamespace(specs=specs, fn_args=arguments),
        },
        "triton_kernels.matmul_ogs_details": {},
        "triton_kernels.matmul_ogs_details.opt_flags": {
            "reset_opt_flags_constraints": lambda: seen.update(constraints={}),
            "update_opt_flags_constraints": lambda more: seen["constraints"].update(more),
        },
        "triton_kernels.routing": {"routing_from_bitmatrix": routing},
        "triton_kernels.swiglu": {"swiglu_fn": swiglu},
        "triton_kernels.tensor": {
            "Bitmatrix": lambda words, shape, shape_max: SimpleNamespace(words=words), "FP4": "fp4",
            "convert_layout": lambda tensor, layout, **more: tensor, "wrap_torch_tensor": lambda tensor, dtype=None: tensor,
        },
        "triton_kernels.tensor_details": {},
        "triton_kernels.tensor_details.layout": {
            "make_default_matmul_mxfp4_w_layout": lambda mx_axis: ("values", {}),
            "make_default_matmul_mxfp4_w_scale_layout": lambda mx_axis, num_warps: ("scales", {}),
        },
    })  # fmt: skip

    def silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gate) * up

    monkeypatch.setattr("moestro.bench.adapters.ogs_glue.silu", silu)
    return seen


@pytest.mark.parametrize("shape", [SHAPE, OSS, SHAPE.on_ranks(2, local_pairs=True)])
@pytest.mark.parametrize("name", ["triton_kernels", "triton_kernels_mxfp4"])
def test_triton_kernels_computes_each_of_its_layers(
    monkeypatch: pytest.MonkeyPatch, name: str, shape: MoeShape
) -> None:
    fake_ogs(monkeypatch)
    assert ADAPTERS[name].missing(shape) is None
    check(ADAPTERS[name], shape)


def test_triton_kernels_says_what_its_routing_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ogs(monkeypatch)
    assert "power of two" in str(triton_kernels_ogs.missing(from_sizes("8,3,64,32")))
    assert "other ranks" in str(triton_kernels_ogs.missing(SHAPE.on_ranks(2)))


@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(1, 300), experts=st.integers(1, 70), top_k=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_bits_are_the_experts_of_each_token(tokens: int, experts: int, top_k: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, max(experts, top_k), generator=rng).argsort(1)[:, :top_k].int()
    columns = math.ceil(max(experts, top_k) / 32)
    words = torch.full((tokens, columns), -1, dtype=torch.int32)
    ogs_glue.bits(ids, words)
    expected = torch.zeros(tokens, columns, dtype=torch.int64)
    for token, row in enumerate(ids.tolist()):
        for expert in row:
            expected[token, expert // 32] |= 1 << expert % 32
    assert torch.equal(words.long() & 0xFFFFFFFF, expected)


# --- DeepGEMM ----------------------------------------------------------------------------------------------
def fake_deep_gemm(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """DeepGEMM's contiguous product with the ends of experts, in plain PyTorch; rows of each call."""
    calls: list[int] = []

    def product(a: Any, b: Any, d: torch.Tensor, ends: torch.Tensor, *, disable_ue8m0_cast: bool,
                use_psum_layout: bool) -> None:  # fmt: skip
        assert disable_ue8m0_cast
        assert use_psum_layout
        codes, scales = a
        assert scales.shape == (len(codes), codes.shape[1] // 128)
        assert scales.stride(0) == 1
        start = 0
        for expert, end in enumerate(ends.tolist()):
            assert start <= end
            rows = codes[start:end].float().unflatten(1, (-1, 128)) * scales[start:end, :, None]
            weight, per_block = b[0][expert].float(), b[1][expert]
            per_block = per_block.repeat_interleave(128, 0).repeat_interleave(128, 1)
            weight = weight * per_block[: weight.shape[0], : weight.shape[1]]
            d[start:end] = (rows.flatten(1) @ weight.T).bfloat16()
            start = -(-end // 128) * 128  # the next expert's
        calls.append(int(ends[-1]))

    put(monkeypatch, {"deep_gemm": {"m_grouped_fp8_gemm_nt_contiguous": product,
                                    "get_mk_alignment_for_contiguous_layout": lambda: 128}})  # fmt: skip
    monkeypatch.setattr("moestro.bench.adapters.deep_gemm._no_compiler", lambda: None)
    return calls


@pytest.mark.parametrize("tokens", [1, 150])
@pytest.mark.parametrize("shape", [BLOCKS, from_sizes("8,2,256,128").on_ranks(2)])
def test_deep_gemm_computes_the_layer(monkeypatch: pytest.MonkeyPatch, shape: MoeShape, tokens: int) -> None:
    fake_deep_gemm(monkeypatch)
    assert deep_gemm.LAYER.missing(shape) is None
    check(deep_gemm.LAYER, shape, tokens)


def test_the_products_alone_are_a_bound_and_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_deep_gemm(monkeypatch)
    quantised = []
    monkeypatch.setattr(fp8_glue, "quantise_pairs", _counted(fp8_glue.quantise_pairs, quantised))
    peer = check(deep_gemm.PRODUCTS, BLOCKS)
    assert not whole_peer(peer)
    assert peer.facts(make_case(BLOCKS, 1, Uniform())) == {"part": "products alone"}
    assert len(quantised) == 1  # once, when it was bound
    assert len(calls) == 2 * (1 + 2)  # the layer, and two calls of its products


def _counted(run: Callable[..., None], calls: list[int]) -> Callable[..., None]:
    def counted(*arguments: Any) -> None:
        calls.append(1)
        run(*arguments)

    return counted


def test_deep_gemm_says_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_deep_gemm(monkeypatch)
    assert "{'I': 32}" in str(deep_gemm.LAYER.missing(from_sizes("8,2,256,32")))
    monkeypatch.undo()
    monkeypatch.setattr("moestro.bench.adapters.deep_gemm.installed", lambda package, hint: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "nvcc" in str(deep_gemm.LAYER.missing(BLOCKS))


@settings(max_examples=12, deadline=None)
@given(tokens=st.integers(1, 60), experts=st.integers(1, 7), seed=st.integers(0, 99))
def test_ends_are_where_an_experts_pairs_end(tokens: int, experts: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts + 1, (tokens, 2), generator=rng, dtype=torch.int32)
    ids[0, 0] = seed % experts  # at least one is here
    align = glue.Aligner(ids.numel(), experts, (8, 8), "cpu")
    align(ids)
    ends = torch.full((experts,), -7, dtype=torch.int32)
    fp8_glue.ends_of(align.first, ids.numel(), ends)
    start = 0
    for expert in range(experts):
        count = int((ids == expert).sum())
        assert int(ends[expert]) == start + count
        start += -(-count // 8) * 8
