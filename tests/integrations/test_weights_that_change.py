"""Weights that are written, adapted, trained, copied and moved: the layer follows, or says that it cannot."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch

from moestro.errors import BackendError, FormatError, ShapeError
from moestro.formats import get

transformers = pytest.importorskip("transformers", minversion="5.7")

import tiny  # noqa: E402

from moestro.integrations import transformers as mt  # noqa: E402
from moestro.integrations.transformers import bound  # noqa: E402
from moestro.integrations.transformers.modules import (  # noqa: E402
    experts_modules,
    from_matrices,
    is_share,
    matrices,
)

F32 = torch.float32
pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules whose weights were packed."""
    seen: list[str] = []
    real = bound.make
    monkeypatch.setattr(bound, "make", lambda *a: seen.append(type(a[0]).__name__) or real(*a))
    return seen


def follows(model: Any, bound: float = 1e-4) -> None:
    assert tiny.error(tiny.logits(model, "moestro"), tiny.logits(model, "eager")) < bound


def experts_of(model: Any) -> list[Any]:
    return [p for name, p in model.named_parameters() if ".experts." in name]


WRITES: dict[str, Any] = {
    "in place": lambda p: p.mul_(2),
    "through .data": lambda p: p.data.mul_(2),
    "one expert through .data": lambda p: p.data[1].mul_(2),
    "copied through .data": lambda p: p.data.copy_(torch.randn_like(p)),
    "new .data": lambda p: setattr(p, "data", torch.randn_like(p)),
    "set_": lambda p: p.set_(torch.randn_like(p).data),
    "NaN, then numbers": lambda p: (p.data.fill_(float("nan")), p.data.normal_()),
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("backend", ["auto", "portable"])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_written_weights_are_followed(how: str, backend: str, dtype: torch.dtype, made: list[str]) -> None:
    mt.register(backend=backend)
    model = tiny.random_model(tiny.qwen3, dtype)
    follows(model, 3e-2)
    with torch.no_grad():
        for p in experts_of(model):
            WRITES[how](p)
    follows(model, 3e-2)
    count = len(made)
    follows(model, 3e-2)
    assert len(made) == count  # and not packed again where nothing was written


def test_weights_of_nan_are_not_packed_in_every_call(made: list[str]) -> None:
    model = tiny.random_model(tiny.qwen3)
    with torch.no_grad():
        experts_of(model)[0].fill_(float("nan"))
    for _ in range(3):
        tiny.logits(model, "moestro")
    assert len(made) == 2


def test_refresh_drops_what_was_made() -> None:
    model = tiny.random_model(tiny.qwen3)
    follows(model, 3e-2)
    assert mt.refresh(model) == 2
    assert mt.refresh(model) == 0
    follows(model, 3e-2)


def test_adapters_on_experts(made: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = tiny.random_model(tiny.qwen3, F32)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[], target_parameters=names)).eval()
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    follows(model)
    made.clear()
    follows(model)
    assert made == []  # an adapter is put on and off in every call: that alone is no change
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_B" in name:
                p.data.mul_(2)
    follows(model)
    with lora.disable_adapter():
        follows(model)
    lora.merge_adapter()
    follows(model)
    lora.unmerge_adapter()
    follows(model)
    want, got = (gradients(lora, model, implementation) for implementation in ("eager", "moestro"))
    assert set(want) == set(got)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-6)


def gradients(model: Any, inner: Any, implementation: str) -> dict[str, torch.Tensor]:
    inner.set_experts_implementation(implementation)
    for p in model.parameters():
        p.grad = None
    model(torch.arange(9)[None] * 7 % 64).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [[], ["experts"], ["embed", "attn", "gate.", "norm", "lm_head"]])
@pytest.mark.parametrize("make", [tiny.qwen3, tiny.gpt_oss])
def test_gradients_are_transformers_own(make: Any, frozen: list[str]) -> None:
    model = tiny.random_model(make, F32)
    for name, p in model.named_parameters():
        p.requires_grad_(not any(word in name for word in frozen))
    want, got = (gradients(model, model, implementation) for implementation in ("eager", "moestro"))
    assert set(want) == set(got)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-6)


def test_experts_in_another_format_refuse_gradients_of_their_own() -> None:
    mt.register(format="nvfp4")
    model = tiny.random_model(tiny.qwen3, F32)
    with pytest.raises(BackendError, match="want a gradient, and its experts run as nvfp4"):
        gradients(model, model, "moestro")


def test_packed_frozen_experts_give_the_gradients_of_what_stands_around() -> None:
    model = tiny.random_model(tiny.qwen3, F32)
    dense = dequantised(model, "mxfp8")
    mt.quantize_experts(model, "mxfp8", backend="portable")
    for p in experts_of(dense):
        p.requires_grad_(False)
    want, got = gradients(dense, dense, "eager"), gradients(model, model, "moestro")
    assert set(want) == set(got)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("warm", [True, False])
def test_compiled_models_need_no_call_before_and_follow_writes(fullgraph: bool, warm: bool) -> None:
    torch._dynamo.reset()
    model = tiny.random_model(tiny.qwen3, F32)
    tokens = torch.arange(9)[None] * 7 % 64
    with torch.no_grad():
        model.set_experts_implementation("moestro")
        if warm:
            model(tokens)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        for _ in range(2):
            got = compiled(tokens).logits
            assert tiny.error(got, tiny.logits(model, "eager")) < 1e-4
            model.set_experts_implementation("moestro")
            for p in experts_of(model):
                p.data.mul_(1.5)
        assert tiny.error(compiled(tokens).logits, tiny.logits(model, "eager")) < 1e-4


def test_under_inference_mode() -> None:
    with torch.inference_mode():
        model = tiny.random_model(tiny.qwen3, F32)
        follows(model)
        for p in experts_of(model):
            p.mul_(3)
        follows(model)


def test_live_models_are_copied_pickled_and_moved(made: list[str]) -> None:
    model = tiny.random_model(tiny.qwen3, F32)
    follows(model)
    twin, file = copy.deepcopy(model), io.BytesIO()
    with torch.no_grad():
        for p in experts_of(twin):
            p.mul_(2)
    follows(twin)
    follows(model)
    torch.save(model, file)
    file.seek(0)
    follows(torch.load(file, weights_only=False))
    follows(model.to(torch.bfloat16), 3e-2)


@pytest.mark.usefixtures("one_torch_thread")
def test_many_threads_get_exact_results() -> None:
    for options in ({}, {"format": "nvfp4"}, {"backend": "portable"}):
        mt.register(**options)
        model = tiny.random_model(tiny.qwen3)
        batches = [torch.arange(n)[None] % 64 for n in (3, 40, 90)]
        model.set_experts_implementation("moestro")
        with torch.no_grad():
            want, wrong = [model(b).logits for b in batches], []

        @torch.no_grad()
        def work(
            i: int, model: Any = model, want: Any = want, wrong: Any = wrong, all_: Any = batches
        ) -> None:
            for _ in range(12):
                if not torch.equal(model(all_[i]).logits, want[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(i % 3,)) for i in range(6)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert wrong == []


# --- quantize_experts ------------------------------------------------------------------------------------
def dequantised(model: Any, format: str) -> Any:
    """A copy of the model whose experts have the values that a format keeps."""
    twin = copy.deepcopy(model)
    for _, module in experts_modules(twin):
        values = (get(format).quantize(t.data).dequantize(t.data.dtype) for t in matrices(module))
        for name, value in from_matrices(module, *values).items():
            module._parameters[name].data.copy_(value)
    return twin


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "mxfp8", "fp8_block"])
@pytest.mark.parametrize("make", [tiny.qwen3, tiny.gpt_oss, tiny.nemotron])
def test_quantised_experts_equal_the_dequantised_models(make: Any, format: str, tmp_path: Any) -> None:
    model = tiny.random_model(make, F32)
    truth = tiny.logits(dequantised(model, format), "eager")
    lines = mt.quantize_experts(model, format)
    assert len(lines) == len(list(experts_modules(model)))
    assert experts_of(model) == []
    assert tiny.error(tiny.logits(model), truth) < 1e-5
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert tiny.error(tiny.logits(twin), truth) < 1e-5
    assert tiny.error(tiny.logits(twin, "eager"), truth) < 1e-5  # dequantised again
    if format == "fp8_block" and make is not tiny.nemotron:
        with pytest.raises(FormatError, match="no multiple of 128"):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, experts_implementation="moestro", dtype=F32)
    assert tiny.error(tiny.logits(again), truth) < 1e-5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_quantised_models_generate(cache: str) -> None:
    model = tiny.random_model(tiny.qwen3, F32)
    dense = dequantised(model, "nvfp4")
    mt.quantize_experts(model, "nvfp4")
    tokens = torch.tensor([[3, 5, 7, 9], [0, 0, 11, 13]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])  # padded on the left
    how = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "attention_mask": mask}
    dense.set_experts_implementation("eager")
    assert torch.equal(model.generate(tokens, **how), dense.generate(tokens, **how))


def test_what_cannot_be_quantised_is_named() -> None:
    model = tiny.random_model(tiny.qwen3)
    with pytest.raises(FormatError, match="got 'bf16'"):
        mt.quantize_experts(model, "bf16")
    with pytest.raises(FormatError, match="did you mean 'nvfp4'"):
        mt.quantize_experts(model, "nvpf4")
    with pytest.raises(BackendError, match="no experts"):
        mt.quantize_experts(torch.nn.Linear(2, 2), "nvfp4")
    odd = tiny.random_model(lambda: tiny.qwen3(64, 24))
    with pytest.raises(ShapeError, match=r"Qwen3MoeExperts.*model\.layers\.0\.mlp\.experts"):
        mt.quantize_experts(odd, "nvfp4")


def test_sentinels_of_expert_parallelism_contribute_nothing() -> None:
    """index num_experts stands for an expert elsewhere; top_k may exceed this rank's share."""
    module = next(m for _, m in experts_modules(tiny.random_model(tiny.qwen3, F32)))
    module._is_expert_parallel = True
    x = torch.randn(5, 64)
    ids = torch.tensor(
        [[0, 4, 4, 4, 4, 4], [1, 2, 4, 4, 4, 4], [4] * 6, [3, 2, 1, 0, 4, 4], [2, 4, 4, 4, 4, 4]]
    )
    weights = torch.rand(5, 6).masked_fill(ids == 4, 0)
    with torch.no_grad():
        module.config._experts_implementation = "eager"
        want = module(x, ids, weights)
        module.config._experts_implementation = "moestro"
        torch.testing.assert_close(module(x, ids, weights), want, rtol=1e-4, atol=1e-5)


def test_a_transformers_that_does_not_say_so_counts_a_ranks_share() -> None:
    """5.17 has no flag: its sharding sets num_experts of the module, and leaves the config's."""
    module = next(m for _, m in experts_modules(tiny.random_model(tiny.qwen3, F32)))
    module.__dict__.pop("_is_expert_parallel", None)
    assert not is_share(module)
    module.num_experts //= 2
    assert is_share(module)


def test_unknown_options_are_named_when_registering() -> None:
    with pytest.raises(TypeError, match="did you mean 'deterministic'"):
        mt.register(determinstic=True)
    with pytest.raises(FormatError, match="did you mean 'nvfp4'"):
        mt.register(format="nvpf4")
    with pytest.raises(ShapeError, match="max_num_tokens"):
        mt.register(max_num_tokens=0)
    with pytest.raises(FormatError, match="unknown input_format 'nvfp5'; did you mean 'nvfp4'"):
        mt.register(input_format="nvfp5")
    with pytest.raises(BackendError, match="unknown backend 'gpu'"):
        mt.register(backend="gpu")
    with pytest.raises(BackendError, match="deterministic must be"):
        mt.register(deterministic="no")
    with pytest.raises(BackendError, match="unknown backend 'gpu'"):
        mt.quantize_experts(tiny.random_model(tiny.qwen3), "nvfp4", backend="gpu")


def test_prepare_asks_for_top_k_that_no_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.random_model(tiny.qwen3)
    assert [layer.top_k for layer in mt.prepare(model)] == [2, 2]
    monkeypatch.setattr(mt, "TOP_K_NAMES", ("num_of_experts_that_nobody_calls_so",))
    with pytest.raises(BackendError, match=r"pass prepare\(model, top_k=...\)"):
        mt.prepare(model)
    assert len(mt.prepare(model, top_k=2)) == 2
