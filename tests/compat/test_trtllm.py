"""The public behaviour that TensorRT-LLM's own tests hold of its autotuner, over its compatible module."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_runners import make, spent

from moestro.errors import TuningError

TIMES = {-1: 4.0, 0: 3.0, 1: 1.0, 2: 2.0}


def test_profiles_of_several_dynamic_sizes_are_their_product(trt: Any) -> None:
    specs = (
        trt.DynamicTensorSpec(0, 0, [1, 3, 5]),
        trt.DynamicTensorSpec(0, 1, [16, 24, 1024]),
        trt.DynamicTensorSpec(1, 1, [3, 7, 9], lambda x: x // 2),
    )
    profiles = trt.AutoTuner()._optimization_profiles(
        tuning_config=trt.TuningConfig(dynamic_tensor_specs=specs),
        inputs=[torch.rand(5, 1024), torch.rand(7, 19)],
    )
    assert len(profiles) == 27, "19 is mapped to 9, which is a bucket"
    dim, inf = trt.DynamicDim, float("inf")
    first = [[dim(1, 1, 3), dim(16, 16, 24)], [trt.StaticDim(7), dim(3, 3, 7)]]
    last = [[dim(5, 5, inf), dim(1024, 1024, inf)], [trt.StaticDim(7), dim(9, 9, inf)]]
    assert profiles[0] == trt.OptimizationProfile(shapes=first)
    assert profiles[-1] == trt.OptimizationProfile(shapes=last)


def test_empty_profiles_can_be_made(trt: Any) -> None:
    assert trt.OptimizationProfile().get_opt_shapes() == ((),)
    assert trt.OptimizationProfile([[]]) == trt.OptimizationProfile()


def test_a_specification_without_a_map_sends_every_size_to_itself(trt: Any) -> None:
    assert [trt.DynamicTensorSpec(0, 0, [16, 64]).bucket_of(n) for n in (1, 17)] == [1, 17]
    assert trt.DynamicTensorSpec(0, 0).buckets(48) == (48,), "no buckets: the size seen"
    assert trt.get_power_of_2_num_tokens_buckets(20) == (16, 8, 4, 2, 1)


def test_the_cache_of_an_operation_has_an_entry_for_each_combination_and_survives_a_file(
    trt: Any, tmp_path: Path
) -> None:
    cfg = trt.TuningConfig(
        dynamic_tensor_specs=(
            trt.DynamicTensorSpec(0, 0, (3, 4, 5), lambda x: x),
            trt.DynamicTensorSpec(1, 1, (64, 128, 256, 512), lambda x: x),
        )
    )
    runner, tuner, path = make(trt, TIMES), trt.AutoTuner.get(), tmp_path / "cache.json"
    with trt.autotune(cache_path=str(path)):
        tuner.choose_one("op", [runner], cfg, [torch.zeros(3, 64), torch.zeros(64, 128)])
    assert len(tuner.profiling_cache.get_specific_custom_op("op")) == 12
    hit = tuner.profiling_cache.search_cache("op", [runner], ((3, 64), (64, 128)), cfg)
    assert hit[:3] == (True, 0, 1)
    assert hit[3] == pytest.approx(1.0)
    tuner.profiling_cache.clear()
    assert len(tuner.profiling_cache) == 0
    tuner.profiling_cache.load_cache(path, 0)
    assert len(tuner.profiling_cache.get_specific_custom_op("op")) == 12
    assert tuner.choose_one("op", [runner], cfg, [torch.zeros(4, 64), torch.zeros(64, 256)]) == (runner, 1)


def test_keyword_arguments_reach_get_valid_tactics_and_separate_decisions(trt: Any) -> None:
    class Moe(trt.TunableRunner):  # type: ignore[name-defined,misc]
        def get_valid_tactics(self, inputs: Any, profile: Any, **kwargs: Any) -> Any:
            return [0, 1] if kwargs.get("gemm_idx", 0) == 0 else [2]

        def forward(self, /, inputs: Any, *, tactic: Any = -1, gemm_idx: int = 0) -> Any:
            spent(TIMES[tactic])
            return inputs[0]

    runner, tuner, inputs = Moe(), trt.AutoTuner.get(), [torch.zeros(8, 4)]
    with trt.autotune():
        found = [tuner.choose_one("moe", [runner], trt.TuningConfig(), inputs, gemm_idx=i)[1] for i in (0, 1)]
    assert found == [1, 2]


def test_every_combination_of_captured_choices_can_be_replayed(trt: Any) -> None:
    runner, tuner, inputs = make(trt, TIMES), trt.AutoTuner.get(), [torch.zeros(8, 4)]
    cfg = trt.TuningConfig()

    def operation() -> list[Any]:
        return [tuner.choose_one(op, [runner], cfg, inputs) for op in ("first", "second")]

    with tuner.capture() as tactics:
        assert operation() == [(runner, -1)] * 2
    combinations = list(tactics)
    assert len(combinations) == 9
    for combination in combinations:
        with tuner.replay(combination):
            assert operation() == list(combination)
            assert operation() == list(combination), "again, from the first"
    assert operation() == [(runner, -1)] * 2


def test_replay_refuses_another_operation_and_checkers_leave_combinations_out(trt: Any) -> None:
    runner, tuner, inputs = make(trt, TIMES), trt.AutoTuner(), [torch.zeros(8, 4)]
    with pytest.raises(RuntimeError, match="capture"), tuner.replay(((runner, 0),)):
        pass
    with tuner.capture() as tactics:
        tuner.choose_one("op_a", [runner], trt.TuningConfig(), inputs)
    with pytest.raises(RuntimeError, match=r"Custom op mismatch.*op_a.*op_b"), tuner.replay(((runner, 0),)):
        tuner.choose_one("op_b", [runner], trt.TuningConfig(), inputs)
    checker = tuner.TacticsCapture.register_runner_tactic_comb_checker(lambda pairs: pairs[0][1] != 1)
    try:
        assert [pair[1] for (pair,) in tactics] == [0, 2]
    finally:
        tuner.TacticsCapture.checkers.remove(checker)


def test_skipping_dynamic_buckets_tunes_the_sizes_of_calls_only(trt: Any) -> None:
    spec = trt.DynamicTensorSpec(0, 0, trt.get_power_of_2_num_tokens_buckets, trt.next_positive_power_of_2)
    cfg, runner, tuner = trt.TuningConfig(dynamic_tensor_specs=(spec,)), make(trt, TIMES), trt.AutoTuner.get()
    with trt.autotune(skip_dynamic_tuning_buckets=True):
        tuner.choose_one("op", [runner], cfg, [torch.zeros(48, 4)])
    assert {key[3][0][0] for key in tuner.profiling_cache} == {48}


def test_runners_are_told_apart_by_unique_id(trt: Any) -> None:
    one, other = make(trt, TIMES, block=1), make(trt, TIMES, block=2)
    keys = [
        trt.AutoTuner.get().profiling_cache.get_cache_key("op", r, ((8, 4),), trt.TuningConfig())
        for r in (one, other)
    ]
    assert keys[0] != keys[1]
    assert keys[0][2] == "(1,)"


def test_a_ranks_own_file_of_older_versions_is_that_rank_of_the_file(trt: Any, tmp_path: Path) -> None:
    runner, cfg, path = make(trt, {-1: 4.0, 0: 3.0, 1: 1.0}), trt.TuningConfig(), tmp_path / "x.json"
    for rank in (0, 3):
        with trt.autotune(cache_path=str(path), rank=rank):
            trt.AutoTuner.get().choose_one("op", [runner], cfg, [torch.zeros(4, 4)])
    tuner = trt.AutoTuner.get()
    tuner.profiling_cache.clear()
    tuner.profiling_cache.load_cache(tmp_path / "x.rank3.json")
    assert [entry[1] for entry in tuner.profiling_cache.get_specific_custom_op("op").values()] == [1]
    with pytest.raises(TuningError, match="for rank 7"):
        tuner.profiling_cache.load_cache(tmp_path / "x.rank7.json")
    with pytest.raises(FileNotFoundError):
        tuner.profiling_cache.load_cache(tmp_path / "y.rank3.json")


def test_a_hook_for_child_processes_that_is_not_asked_is_named_once(
    trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make(trt, {-1: 4.0, 1: 1.0})
    assert plain.should_profile_tactic_in_subprocess("op", [], 1, trt.TuningConfig()) is False

    class Selective(type(plain)):
        def should_profile_tactic_in_subprocess(self, *args: Any, **kwargs: Any) -> bool:
            return True

    monkeypatch.setattr(trt, "_said", set())
    monkeypatch.setenv("TLLM_AUTOTUNER_MULTIPROCESS", "1")
    with warnings.catch_warnings(record=True) as caught, trt.autotune(True):
        warnings.simplefilter("always")
        for runner in (plain, Selective(), Selective()):
            trt.AutoTuner.get().choose_one("op", [runner], trt.TuningConfig(), [torch.zeros(4, 4)])
    assert ["isolate=True" in str(w.message) for w in caught] == [True]
