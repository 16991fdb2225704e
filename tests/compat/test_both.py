"""What FlashInfer's and TensorRT-LLM's suites hold of their tuners alike, over the names that both share."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peer_runners import make

from moestro.errors import TuningError, TuningWarning

TIMES = {-1: 4.0, 0: 3.0, 1: 1.0, 2: 2.0}


def config(peer: Any, buckets: Any = (16, 64), to: Any = None, **more: Any) -> Any:
    spec = peer.DynamicTensorSpec(
        input_idx=(0,),
        dim_idx=(0,),
        gen_tuning_buckets=buckets,
        map_to_tuning_buckets=to or peer.last_positive_power_of_2,
    )
    return peer.TuningConfig(dynamic_tensor_specs=(spec,), **more)


def test_without_tuning_the_first_runners_fallback_serves(peer: Any) -> None:
    runner, tuner = make(peer, TIMES), peer.AutoTuner.get()
    assert tuner.choose_one("op", [runner], config(peer), [torch.zeros(64, 4)]) == (runner, -1)


def test_tuning_finds_the_fastest_tactic_and_serves_it_afterwards(peer: Any) -> None:
    runner, cfg = make(peer, TIMES), config(peer)
    with peer.autotune(True):
        chosen = peer.AutoTuner.get().choose_one("op", [runner], cfg, [torch.zeros(64, 4)])
    assert chosen == (runner, 1)
    assert peer.AutoTuner.get().choose_one("op", [runner], cfg, [torch.zeros(20, 4)]) == (runner, 1)
    assert len(peer.AutoTuner.get().profiling_cache) >= 2
    assert peer.AutoTuner.get().stats.tuned_op_successful_configs["op"] >= 2


def test_choose_one_by_their_parameter_names(peer: Any) -> None:
    runner = make(peer, TIMES)
    with peer.autotune(True):
        chosen = peer.AutoTuner.get().choose_one(
            custom_op="op", runners=[runner], tuning_config=config(peer), inputs=[torch.zeros(64, 4)]
        )
    assert chosen == (runner, 1)


def test_list_and_dict_tactics_are_served_as_they_were_given(peer: Any) -> None:
    lists = make(peer, {-1: 4.0, (32, 0): 3.0, (64, 1): 1.0}, offered=[[32, 0], [64, 1]], base="Lists")
    dicts = make(
        peer, {-1: 4.0, 0: 3.0, 1: 1.0}, offered=[{"id": 0, "t": (1, 2)}, {"id": 1, "t": [3]}], base="Dicts"
    )
    with peer.autotune(True):
        for op, runner, expected in (("a", lists, [64, 1]), ("b", dicts, {"id": 1, "t": [3]})):
            assert (
                peer.AutoTuner.get().choose_one(op, [runner], config(peer), [torch.zeros(64, 4)])[1]
                == expected
            )


def test_a_decision_belongs_to_its_runner_whatever_the_list(peer: Any) -> None:
    a, b = make(peer, {-1: 4.0, 0: 3.0}, base="A"), make(peer, {-1: 4.0, 1: 1.0}, base="B")
    tuner, cfg, inputs = peer.AutoTuner.get(), config(peer), [torch.zeros(64, 4)]
    with peer.autotune(True):
        tuner.choose_one("op", [a, b], cfg, inputs)
        tuner.choose_one("alone", [b], cfg, inputs)
    assert tuner.choose_one("op", [b, a], cfg, inputs) == (b, 1)
    assert tuner.choose_one("op", [b], cfg, inputs) == (b, 1)
    assert tuner.choose_one("alone", [a, b], cfg, inputs) == (b, 1)
    assert tuner.choose_one("op", [a], cfg, inputs) == (a, -1), "its winner is not in this list"


def test_runners_with_other_attributes_have_other_keys(peer: Any) -> None:
    one, other = make(peer, TIMES, block=128), make(peer, {**TIMES, 1: 5.0}, block=256)
    tuner, cfg, inputs = peer.AutoTuner.get(), config(peer), [torch.zeros(64, 4)]
    with peer.autotune(True):
        assert tuner.choose_one("op", [one], cfg, inputs)[1] == 1
        assert tuner.choose_one("op", [other], cfg, inputs)[1] == 2


def test_tuning_mode_ends_with_the_context(peer: Any) -> None:
    tuner = peer.AutoTuner.get()
    assert not tuner.is_tuning_mode
    with peer.autotune(True):
        assert tuner.is_tuning_mode
        with peer.autotune(False):
            assert not tuner.is_tuning_mode
        assert tuner.is_tuning_mode
    assert not tuner.is_tuning_mode


def test_clear_cache_forgets_everything(peer: Any) -> None:
    runner, cfg, tuner = make(peer, TIMES), config(peer), peer.AutoTuner.get()
    with peer.autotune(True):
        tuner.choose_one("op", [runner], cfg, [torch.zeros(64, 4)])
    tuner.clear_cache()
    assert len(tuner.profiling_cache) == 0
    assert tuner.choose_one("op", [runner], cfg, [torch.zeros(64, 4)]) == (runner, -1)


def test_a_tactic_that_raises_is_not_chosen_and_named_in_the_statistics(peer: Any) -> None:
    runner = make(peer, {-1: 4.0, 0: 3.0}, offered=[0, 9])  # 9 is a KeyError
    tuner = peer.AutoTuner.get()
    with peer.autotune(True):
        assert tuner.choose_one("op", [runner], config(peer), [torch.zeros(64, 4)])[1] == 0
    assert tuner.stats.failed_tactics["op::Kernel"] == {9}
    assert "failed" in str(tuner.stats)
    tuner.reset_statistics()
    assert tuner.stats.failed_tactics == {}


def test_keywords_that_are_not_needed_are_named_once_and_the_others_work(
    peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moestro.tuning.spec.specs._said", set())
    with pytest.warns(TuningWarning, match="value_aware_input_indices.*not needed") as caught:
        [
            config(peer, value_aware_input_indices=(0,), profiling_repeat=5, cuda_graph_profile_replays=2)
            for _ in "123"
        ]
    assert len(caught) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config(
            peer,
            use_cold_l2_cache=False,
            use_cuda_graph=False,
            tune_max_num_tokens=8,
            exclude_from_cache=True,
        )


def test_tensor_initializers_make_the_inputs_they_name(peer: Any) -> None:
    seen: list[set[float]] = []

    class Seen(type(make(peer, TIMES))):  # type: ignore[misc]
        def forward(self, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
            seen.append({float(inputs[0].min()), float(inputs[0].max())})
            return super().forward(inputs, tactic, do_preparation, **kwargs)

    cfg = config(peer, tensor_initializers=((0, lambda shape, dtype, device: torch.full(tuple(shape), 7.0)),))
    with peer.autotune(True):
        peer.AutoTuner.get().choose_one("op", [Seen()], cfg, [torch.zeros(64, 4)])
    assert seen
    assert all(values == {7.0} for values in seen)


def test_a_tune_limit_ends_the_buckets_and_serves_everything_beyond(peer: Any) -> None:
    runner, tuner = make(peer, TIMES), peer.AutoTuner.get()
    cfg = config(peer, lambda n: [1 << k for k in range(n.bit_length())], lambda n: n, tune_max_num_tokens=32)
    with peer.autotune(True):
        tuner.choose_one("op", [runner], cfg, [torch.zeros(100, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuner.choose_one("op", [runner], cfg, [torch.zeros(5000, 4)]) == (runner, 1)
    assert tuner.decision("op", [runner], cfg, [torch.zeros(5000, 4)]).bucket == 32


def test_a_map_that_scales_is_taken_at_its_word(peer: Any) -> None:
    tuner, cfg = peer.AutoTuner.get(), config(peer, (1, 2, 4, 8, 16, 32), lambda n: int(n * 0.25))
    runner = make(peer, TIMES)
    with peer.autotune(True):
        tuner.choose_one("op", [runner], cfg, [torch.zeros(1, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {
            n: tuner.decision("op", [runner], cfg, [torch.zeros(n, 4)]).bucket for n in (1, 4, 32, 64, 128)
        }
    assert found == {1: 1, 4: 1, 32: 8, 64: 16, 128: 32}


def test_absent_inputs_pass_through_linked_sizes_and_constraints(peer: Any) -> None:
    spec = peer.DynamicTensorSpec((0, 1), (0, 0), (16, 64), peer.last_positive_power_of_2)
    constraint = peer.ConstraintSpec(1, 0, lambda shapes: shapes[0][0])
    cfg = peer.TuningConfig(dynamic_tensor_specs=(spec,), constraint_specs=(constraint,))
    runner = make(peer, TIMES)
    with peer.autotune(True):
        assert peer.AutoTuner.get().choose_one("op", [runner], cfg, [torch.zeros(64, 4), None])[1] == 1
    wrong = peer.TuningConfig(
        dynamic_tensor_specs=(spec,), constraint_specs=(peer.ConstraintSpec(5, 0, len),)
    )
    with pytest.raises(TuningError, match="input_idx=5"):
        peer.AutoTuner.get().choose_one("op", [runner], wrong, [torch.zeros(64, 4), None])


def test_rank_tactics_is_best_first(peer: Any) -> None:
    runner, tuner = make(peer, TIMES), peer.AutoTuner.get()
    with peer.autotune(True):
        assert tuner.rank_tactics("op", [runner], config(peer), [torch.zeros(64, 4)], k=2) == [1, 2]
        assert tuner.rank_tactics("op", [runner], config(peer), [torch.zeros(64, 4)], k=3) == [1, 2, 0]
    assert tuner.rank_tactics("new", [runner], config(peer), [torch.zeros(64, 4)], k=3) == [-1]
    for runners, k in (([runner, runner], 1), ([runner], 0)):
        with pytest.raises(TuningError):
            tuner.rank_tactics("op", runners, config(peer), [torch.zeros(64, 4)], k=k)


def test_profile_tactic_gives_milliseconds_and_decides_nothing(peer: Any) -> None:
    runner, tuner = make(peer, TIMES), peer.AutoTuner.get()
    cfg, batches = tuner.prepare_tactic_profile([torch.zeros(64, 4)], config(peer))
    assert tuner.profile_tactic(runner, [torch.zeros(64, 4)], 2, cfg, batches) == pytest.approx(2.0)
    assert len(tuner.profiling_cache) == 0
