"""Runners, specifications and files as FlashInfer and TensorRT-LLM have them, unchanged."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning_fakes import quiet_clock, tuner

from moestro.errors import TuningError
from moestro.tuning import (
    ConstraintSpec,
    DynamicTensorSpec,
    OptimizationProfile,
    Store,
    TunableRunner,
    TuningConfig,
    get_hybrid_num_tokens_buckets,
    last_positive_power_of_2,
    map_to_hybrid_bucket,
    map_to_hybrid_bucket_uncapped,
)
from moestro.tuning.spec.runner import DEFAULT_TACTIC
from moestro.tuning.store.flashinfer import import_flashinfer

CLOCK = quiet_clock()


class GemmRunner(TunableRunner):
    """As FlashInfer writes them: a workspace input, optional inputs, lists as tactics, an algorithm cache."""

    def __init__(self, out_dtype: torch.dtype, use_swizzle: bool = True):  # type: ignore[no-untyped-def]
        self.out_dtype = out_dtype
        self.use_swizzle = use_swizzle
        self._algo_cache: dict[Any, Any] = {}
        self.plan_cache = {}  # type: ignore[var-annotated]
        self.prepared = 0

    def get_valid_tactics(self, inputs, profile: OptimizationProfile):  # type: ignore[no-untyped-def,override]
        a, _, _, out, _ = inputs
        m = profile.get_opt_shapes()[0][0]
        assert a.shape[0] == out.shape[0] == m
        return [
            [tile, cluster]
            for tile, cluster in itertools.product((64, 128), ((1, 1), (2, 1)))
            if tile <= 2 * m
        ]

    def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):  # type: ignore[no-untyped-def,override]
        a, b, _, out, _ = inputs
        assert not kwargs
        if do_preparation:
            self._algo_cache["prepared"] = True
            return None
        assert self._algo_cache["prepared"]
        tile, cluster = (256, (1, 1)) if tactic == -1 else tactic
        CLOCK.advance(
            1e-3 * (1 + abs(tile - min(128, a.shape[0])) / 64) * (1 if tuple(cluster) == (1, 1) else 1.2)
        )
        torch.matmul(a, b, out=out)
        return out


def gemm_config() -> TuningConfig:
    return TuningConfig(
        dynamic_tensor_specs=(
            DynamicTensorSpec((0,), (-2,), get_hybrid_num_tokens_buckets, map_to_hybrid_bucket_uncapped),
        ),
        constraint_specs=(ConstraintSpec(3, -2, lambda shapes: shapes[0][-2]),),
        use_cold_l2_cache=True,
    )


def gemm_inputs(m: int) -> list[Any]:
    return [
        torch.randn(m, 16),
        torch.randn(16, 8),
        None,
        torch.empty(m, 8),
        torch.empty(32, dtype=torch.uint8),
    ]


def test_a_gemm_with_none_scale_workspace_constraint_and_list_tactics(store: Path) -> None:
    runner = GemmRunner(torch.bfloat16)
    runner_again = GemmRunner(torch.bfloat16)
    cfg, t = gemm_config(), tuner(CLOCK, store)
    with t.autotune(True):
        chosen, tactic = t.choose_one("gemm", [runner], cfg, gemm_inputs(512))
    assert chosen is runner
    assert tactic == [128, (1, 1)]
    out = runner(inputs=gemm_inputs(100), tactic=tactic)
    assert out.shape == (100, 8)
    fresh = tuner(CLOCK, store)
    assert fresh.choose_one("gemm", [runner_again], cfg, gemm_inputs(300)) == (runner_again, [128, (1, 1)])
    assert fresh.choose_one("gemm", [runner_again], cfg, gemm_inputs(40)) == (runner_again, [64, (1, 1)])
    assert fresh.choose_one("gemm", [runner_again], cfg, gemm_inputs(30)) == (runner_again, -1), (
        "64 starts at 32"
    )
    other = GemmRunner(torch.float16)
    other._algo_cache["prepared"] = True
    assert fresh.choose_one("gemm", [other], cfg, gemm_inputs(300)) == (other, -1)


class MoERunner(TunableRunner):
    """As TensorRT-LLM writes them: keyword-only after the inputs, integers as tactics, linked token
    dimensions.
    """

    tuning_config = TuningConfig(
        dynamic_tensor_specs=(
            DynamicTensorSpec(
                input_idx=(0, 1, 2, 3),
                dim_idx=(0, 0, 0, 0),
                gen_tuning_buckets=get_hybrid_num_tokens_buckets(512, 1),
                map_to_tuning_buckets=lambda x: map_to_hybrid_bucket(x, 512),
                tensor_initializers=[
                    lambda shapes, dtype, device: torch.empty(shapes, device=device, dtype=dtype),
                    lambda shapes, dtype, device: torch.randint(0, 4, shapes, device=device).to(dtype),
                    lambda shapes, dtype, device: torch.ones(shapes, device=device, dtype=dtype),
                    lambda shapes, dtype, device: torch.ones(shapes, device=device).to(dtype),
                ],
            ),
        ),
    )

    def __init__(self, top_k: int, num_experts: int):  # type: ignore[no-untyped-def]
        self.top_k = top_k
        self.num_experts = num_experts

    def get_valid_tactics(self, inputs, profile):  # type: ignore[no-untyped-def,override]
        return range(3)

    def forward(self, /, inputs, *, tactic=-1, do_preparation=False, gemm_idx=0):  # type: ignore[no-untyped-def,override]
        x, ids, weights, out, bias, alpha = inputs
        assert bias is None
        assert alpha == 1.5
        assert gemm_idx == 2
        assert bool((ids < 4).all())
        if do_preparation:
            return
        n = x.shape[0]
        CLOCK.advance({-1: 2e-3, 0: 1e-3 + n * 1e-5, 1: 2e-3, 2: 4e-3}[tactic])
        out.copy_(weights.sum(-1, keepdim=True).to(out.dtype).expand_as(out))


def moe_inputs(n: int) -> list[Any]:
    return [
        torch.zeros(n, 8, dtype=torch.bfloat16),
        torch.zeros(n, 2, dtype=torch.int32),
        torch.ones(n, 2),
        torch.zeros(n, 8, dtype=torch.bfloat16),
        None,
        1.5,
    ]


def test_an_moe_with_linked_dimensions_initialisers_and_keyword_arguments() -> None:
    runner, t = MoERunner(2, 4), tuner(CLOCK)
    cfg = MoERunner.tuning_config
    with t.autotune(True):
        t.choose_one("trtllm::moe", [runner], cfg, moe_inputs(300), gemm_idx=2)
    assert t.choose_one("trtllm::moe", [runner], cfg, moe_inputs(20), gemm_idx=2) == (runner, 0)
    assert t.choose_one("trtllm::moe", [runner], cfg, moe_inputs(300), gemm_idx=2) == (runner, -1)
    assert t.choose_one("trtllm::moe", [runner], cfg, moe_inputs(20), gemm_idx=1) == (runner, -1)
    other = [*moe_inputs(20)[:5], 2.5]
    assert t.choose_one("trtllm::moe", [runner], cfg, other, gemm_idx=2) == (runner, -1)


def test_specifications_with_plain_integers_and_the_older_map() -> None:
    spec = DynamicTensorSpec(0, 0, [1, 8, 64], last_positive_power_of_2)
    assert (spec.input_idx, spec.dim_idx, spec.gen_tuning_buckets) == ((0,), (0,), (1, 8, 64))


def flashinfer_file(path: Path, entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"_metadata": {"flashinfer_version": "0.6"}, **entries}))
    return path


def test_winners_of_a_flashinfer_file_are_tried_first(store: Path, tmp_path: Path) -> None:
    profile = ((512, 16), (16, 8), (0,), (-1, 8), (32,))
    path = flashinfer_file(
        tmp_path / "fi.json",
        {
            str(("gemm", "GemmRunner", profile)): ["GemmRunner", [128, [2, 1]]],
            str(("gemm", "OtherRunner", profile)): ["OtherRunner", 3],
            str(("other", "GemmRunner", profile)): ["GemmRunner", [64, [2, 1]]],
        },
    )
    assert import_flashinfer(path, Store(store)) == 3
    tried: list[Any] = []

    class Watching(GemmRunner):
        def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):  # type: ignore[no-untyped-def]
            if not do_preparation and tactic not in tried:
                tried.append(tactic)
            return super().forward(inputs, tactic, do_preparation, **kwargs)

    Watching.__qualname__ = "GemmRunner"
    t = tuner(CLOCK, store)
    with t.autotune(True, tuning_buckets=(512,)):
        assert t.choose_one("gemm", [Watching(torch.float32)], gemm_config(), gemm_inputs(512))[1] == [
            128,
            (1, 1),
        ]
    assert tried[:2] == [DEFAULT_TACTIC, [128, (2, 1)]]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"_metadata": {}}', '{"a": 1}', '{"(1, 2, 3)": ["A", 1]}', '{"__import__(0)": 1}'],
)
def test_what_is_no_flashinfer_file_is_an_error(store: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "fi.json"
    path.write_text(text)
    with pytest.raises(TuningError, match=r"fi\.json"):
        import_flashinfer(path, Store(store))
