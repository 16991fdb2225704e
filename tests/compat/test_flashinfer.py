"""The public behaviour that FlashInfer's own tests hold of flashinfer.autotuner, over its compatible module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_runners import make

from moestro.errors import StoreWarning, TuningError
from moestro.tuning import Store

TIMES = {-1: 4.0, 0: 3.0, 1: 1.0, 2: 2.0}


def config(fi: Any, buckets: Any = (128, 256, 512)) -> Any:
    spec = fi.DynamicTensorSpec((0,), (0,), buckets, fi.last_positive_power_of_2)
    return fi.TuningConfig(dynamic_tensor_specs=(spec,))


def test_every_public_name_of_the_module_is_there(flashinfer: Any) -> None:
    for name in flashinfer.__all__:
        assert hasattr(flashinfer, name)
    for name in ("empty", "zeros", "ones", "randn", "rand", "rand_scaled"):
        made = getattr(flashinfer, f"autotuner_initializer_{name}")((3, 2), torch.float8_e4m3fn, "cpu")
        assert (made.shape, made.dtype) == ((3, 2), torch.float8_e4m3fn)
    with pytest.raises(TuningError, match="not needed"):
        flashinfer.ValueProfileArena([], (0,), 1, 1)


@pytest.mark.parametrize(("size", "bucket"), [(1000, 512), (1024, 1024), (10000, 8192)])
def test_the_nearest_profile_has_buckets_for_sizes_and_a_wildcard_for_what_follows(
    flashinfer: Any, size: int, bucket: int
) -> None:
    spec = flashinfer.DynamicTensorSpec((0, 1), (0, 0), (512, 1024), flashinfer.last_positive_power_of_2)
    cfg = flashinfer.TuningConfig(
        dynamic_tensor_specs=(spec,), constraint_specs=(flashinfer.ConstraintSpec(1, 2, lambda s: s[0][0]),)
    )
    found = flashinfer.AutoTuner._find_nearest_profile(((size, 8), (size, 9, 6)), cfg)
    assert found == ((bucket, 8), (bucket, 9, -1))


def test_profiles_carry_constraints_and_initializers(flashinfer: Any) -> None:
    def sevens(shape: Any, dtype: Any, device: Any) -> Any:
        return torch.full(tuple(shape), 7, dtype=dtype, device=device)

    cfg = flashinfer.TuningConfig(
        dynamic_tensor_specs=(flashinfer.DynamicTensorSpec((0, 2), (0, 0), (8, 16), lambda n: n),),
        constraint_specs=(flashinfer.ConstraintSpec(0, 1, lambda s: s[0][0] // 2),),
        tensor_initializers=((2, sevens),),
    )
    inputs = [torch.empty(12, 99), None, torch.empty(12, 1)]
    first, second = flashinfer.AutoTuner.get()._generate_optimization_profiles(cfg, inputs)
    assert (first.get_opt_shapes()[0], second.get_opt_shapes()[0]) == ((8, 4), (16, 8))
    assert first.shapes[0][0] == flashinfer.DynamicDim(8, 8, 16)
    assert first.tensor_initializers == [None, None, sevens]
    made = flashinfer.AutoTuner.get()._prepare_input_tensors(first, inputs)
    assert made[1] is None
    assert torch.equal(made[2], torch.full((8, 1), 7.0))


def test_what_a_caller_seeds_serves_first_and_finds_its_runner_in_any_list(flashinfer: Any) -> None:
    tuner, shapes, cfg = flashinfer.AutoTuner.get(), ((8, 16),), flashinfer.TuningConfig()
    winner, other = make(flashinfer, TIMES, base="A"), make(flashinfer, TIMES, base="B")
    assert tuner.search_cache("op", [winner], shapes, cfg) == (False, 0, -1, None)
    key = tuner._get_cache_key("op", winner, shapes, cfg)
    tuner.profiling_cache[key] = ((7, ((1, 2),)), None)
    assert tuner.search_cache("op", [other, winner], shapes, cfg) == (True, 1, (7, ((1, 2),)), None)
    assert tuner.choose_one("op", [other, winner], cfg, [torch.zeros(8, 16)]) == (winner, (7, ((1, 2),)))


def test_search_cache_finds_what_was_tuned_by_shapes_alone(flashinfer: Any) -> None:
    runner, cfg, tuner = make(flashinfer, TIMES), config(flashinfer), flashinfer.AutoTuner.get()
    with flashinfer.autotune(True):
        tuner.choose_one("op", [runner], cfg, [torch.zeros(300, 32)])
    assert tuner.search_cache("op", [runner], ((300, 32),), cfg)[:3] == (True, 0, 1)
    assert not tuner.search_cache("op", [runner], ((300 * 32,),), cfg)[0], "another rank is another key"
    assert not tuner.search_cache("op", [runner], ((300, 33),), cfg)[0]


def test_overrides_of_buckets_and_rounding_hold_inside_the_context_only(flashinfer: Any) -> None:
    tuner, cfg = flashinfer.AutoTuner.get(), config(flashinfer)
    plain = tuner.get_effective_map_to_tuning_buckets(cfg)
    assert plain is cfg.dynamic_tensor_specs[0].map_to_tuning_buckets
    with flashinfer.autotune(False, tuning_buckets=(100, 300, 600), round_up=True):
        assert (tuner._override_tuning_buckets, tuner._override_round_up) == ((100, 300, 600), True)
        assert [tuner.get_effective_map_to_tuning_buckets(cfg)(n) for n in (50, 101, 700)] == [100, 300, 600]
    with flashinfer.autotune(False, round_up=True):
        assert tuner.get_effective_map_to_tuning_buckets(cfg)(200) == 256
    assert tuner._override_tuning_buckets is None
    assert tuner.get_effective_map_to_tuning_buckets(cfg)(200) == 128
    with pytest.raises(ValueError, match="at least one"), flashinfer.autotune(True, tuning_buckets=()):
        pass


def test_skip_ops_takes_a_name_or_a_set_and_nested_contexts_unite(flashinfer: Any) -> None:
    runner, cfg, tuner, inputs = (
        make(flashinfer, TIMES),
        config(flashinfer),
        flashinfer.AutoTuner.get(),
        [torch.zeros(256, 4)],
    )

    def tactics() -> list[int]:
        return [tuner.choose_one(op, [runner], cfg, inputs)[1] for op in ("a", "b", "c")]

    with flashinfer.autotune(True, skip_ops="a"):
        with flashinfer.autotune(True, skip_ops={"b"}):
            assert tactics() == [-1, -1, 1]
        assert tactics() == [-1, 1, 1]
    assert tuner._effective_skip_ops == frozenset()


def test_capture_of_a_graph_takes_known_decisions_and_refuses_to_measure(
    flashinfer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, cfg, tuner, inputs = (
        make(flashinfer, TIMES),
        config(flashinfer),
        flashinfer.AutoTuner.get(),
        [torch.zeros(256, 4)],
    )
    with flashinfer.autotune(True):
        tuner.choose_one("warm", [runner], cfg, inputs)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with flashinfer.autotune(True):
        assert tuner.choose_one("warm", [runner], cfg, inputs)[1] == 1
        with pytest.raises(RuntimeError, match="active outer CUDA Graph capture"):
            tuner.choose_one("cold", [runner], cfg, inputs)


def test_a_cache_file_is_written_on_leaving_and_serves_another_process(
    flashinfer: Any, tmp_path: Path
) -> None:
    runner, cfg, path = make(flashinfer, TIMES), config(flashinfer), str(tmp_path / "fi.json")
    with flashinfer.autotune(True, cache=path):
        flashinfer.AutoTuner.get().choose_one("op", [runner], cfg, [torch.zeros(256, 4)])
    written = json.loads(Path(path).read_text())
    assert written["('op', 'Kernel', ((256, 4),), ())"] == ["Kernel", 1]
    assert "gpu" in written["_metadata"]
    flashinfer.AutoTuner.get().clear_cache()
    with flashinfer.autotune(False, cache=path):
        pass
    assert flashinfer.AutoTuner.get().choose_one("op", [runner], cfg, [torch.zeros(256, 4)]) == (runner, 1)


def test_a_file_of_flashinfers_serves_where_nothing_is_measured(flashinfer: Any, tmp_path: Path) -> None:
    runner, cfg, path = make(flashinfer, TIMES), config(flashinfer), tmp_path / "fi.json"
    here = flashinfer._collect_metadata()
    entry = {"('op', 'Kernel', ((256, 4),), ())": ["Kernel", [2]]}
    path.write_text(json.dumps({"_metadata": here, "_generation": "x", "_records": {}, **entry}))
    tuner, inputs = flashinfer.AutoTuner.get(), [torch.zeros(256, 4)]
    assert tuner.load_configs(str(path))
    assert tuner.choose_one("op", [runner], cfg, inputs) == (runner, (2,))
    assert tuner.search_cache("op", [runner], ((256, 4),), cfg) == (True, 0, (2,), None)
    with flashinfer.autotune(True):
        tuner.choose_one("op", [runner], cfg, inputs)
    assert tuner.choose_one("op", [runner], cfg, inputs) == (runner, 1), "measured here counts more"
    path.write_text(json.dumps({"_metadata": {**here, "gpu": "another"}, **entry}))
    with pytest.warns(StoreWarning, match="another environment"):
        assert not tuner.load_configs(str(path))
    with pytest.raises(FileNotFoundError):
        tuner.load_configs(str(tmp_path / "none"))
    path.write_text("[" * 100_000)
    with pytest.raises(TuningError):
        tuner.load_configs(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "('op', 'R', ((64, 4),))",
        "('op', 'R', ((64, 4),), ())",
        "('op', 'R', ((64, 4),), (torch.bfloat16, True))",
    ],
)
def test_todays_and_older_files_import_as_hints(tmp_path: Path, text: str) -> None:
    from moestro.tuning.store.flashinfer import import_flashinfer

    path = tmp_path / "fi.json"
    path.write_text(
        json.dumps({"_metadata": {}, "_generation": "ab", "_records": {"n": {}}, text: ["R", [8, 34]]})
    )
    assert import_flashinfer(path, Store(tmp_path / "store")) == 1


def test_a_blocklist_keeps_tactics_out(
    flashinfer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tmp_path / "blocked.json"
    listed.write_text(json.dumps({"_metadata": {"gpu": "*"}, "invalid_tactics": {"op::Kernel": [1]}}))
    monkeypatch.setenv("FLASHINFER_TACTICS_BLOCKLIST", str(listed))
    plain = flashinfer.AutoTuner.get()
    tuner = flashinfer.AutoTuner(timer=plain._timer, policy=plain.policy)
    runner, cfg = make(flashinfer, TIMES), config(flashinfer)
    with tuner.autotune(True):
        assert tuner.choose_one("op", [runner], cfg, [torch.zeros(256, 4)])[1] == 2
        assert tuner.choose_one("other", [runner], cfg, [torch.zeros(256, 4)])[1] == 1


def test_a_replaced_clock_decides(flashinfer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(
        self: Any, runner: Any, inputs: Any, tactic: Any, tuning_config: Any = None, **kwargs: Any
    ) -> float:
        return {-1: 9.0, 0: 5.0, 1: 3.0, 2: 1.0}[tactic]

    monkeypatch.setattr(flashinfer.AutoTuner, "_profile_single_kernel", fake)
    runner = make(flashinfer, TIMES)
    with flashinfer.autotune(True):
        assert (
            flashinfer.AutoTuner.get().choose_one("op", [runner], config(flashinfer), [torch.zeros(256, 4)])[
                1
            ]
            == 2
        )


# --- files that several environments and processes write ---------------------------------------------------
HERE = {
    "flashinfer_version": "0.6.13",
    "cuda_version": "13.0",
    "cudnn_version": "92101",
    "gpu": "NVIDIA B200",
}
OLD = "('old', 'R', ((1, 1),))"


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flashinfer: Any) -> tuple[Any, Path]:
    """(a tuner with one winner, where to write) on a machine whose facts are HERE."""
    from moestro.compat.flashinfer.autotuner import files

    monkeypatch.setattr(files, "collect_metadata", lambda: dict(HERE))
    tuner = flashinfer.AutoTuner.get()
    key = tuner._get_cache_key("new", make(flashinfer, TIMES), ((4, 8),), flashinfer.TuningConfig())
    tuner.profiling_cache[key] = (5, None)
    return tuner, tmp_path / "fi.json"


def written(path: Path, metadata: object) -> None:
    path.write_text(json.dumps({"_metadata": metadata, "_records": {"moe": {"a": 1}}, OLD: ["R", 3]}))


@pytest.mark.parametrize("metadata", [HERE, {**HERE, "cudnn_version": "*"}, {**HERE, "future": "x"}])
def test_saving_keeps_what_a_file_of_this_environment_holds(known: tuple[Any, Path], metadata: Any) -> None:
    tuner, path = known
    written(path, metadata)
    assert tuner.load_configs(str(path))
    tuner.clear_cache()
    tuner.save_configs(str(path))
    found = json.loads(path.read_text())
    assert found[OLD] == ["R", 3], "another process may have measured it"
    assert found["_records"] == {"moe": {"a": 1}}
    assert found["_metadata"] == metadata


@pytest.mark.parametrize("fact", ["gpu", "cudnn_version", "cuda_version", "flashinfer_version"])
def test_a_file_of_another_environment_is_neither_served_nor_overwritten(
    known: tuple[Any, Path], fact: str
) -> None:
    tuner, path = known
    written(path, {**HERE, fact: "another"})
    before = path.read_text()
    with pytest.warns(StoreWarning, match=f"{fact}: 'another' there.*is not used"):
        assert not tuner.load_configs(str(path))
    with pytest.warns(StoreWarning, match="is not overwritten"):
        tuner.save_configs(str(path))
    assert path.read_text() == before


@pytest.mark.parametrize(
    "metadata",
    ["garbage", {**HERE, "gpu": "unknown"}, {**HERE, "cudnn_version": "None"}, {"gpu": HERE["gpu"]}],
)
def test_a_file_that_cannot_tell_its_environment_is_not_served_and_replaced(
    known: tuple[Any, Path], metadata: Any, flashinfer: Any
) -> None:
    _, path = known
    written(path, metadata)
    with (
        pytest.warns(StoreWarning, match="is not used"),
        flashinfer.autotune(True, cache=str(path)),
    ):
        pass
    found = json.loads(path.read_text())
    assert found["_metadata"] == HERE
    assert OLD not in found
    assert [value for key, value in found.items() if not key.startswith("_")] == [["Kernel", 5]]


def test_leaving_a_tuning_context_writes_what_was_known_before_it(
    known: tuple[Any, Path], flashinfer: Any
) -> None:
    _, path = known
    with flashinfer.autotune(False, cache=str(path)):
        pass
    assert not path.exists(), "a context that only looks up writes nothing"
    with flashinfer.autotune(True, cache=str(path)):
        pass
    assert "('new', 'Kernel', ((4, 8),), ())" in json.loads(path.read_text())


@pytest.mark.parametrize("text", ["not json {{{", "[1, 2]", '{"a": 3}', '{"a": [1]}', "\x00", "[" * 100_000])
def test_what_is_no_file_of_theirs_is_their_error_and_ours(
    flashinfer: Any, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "fi.json"
    path.write_text(text)
    with pytest.raises(json.JSONDecodeError) as caught:
        flashinfer.AutoTuner.get().load_configs(str(path))
    assert isinstance(caught.value, TuningError)
    assert str(path) in str(caught.value)


def test_the_version_of_cudnn_is_torchs_else_its_frontends(
    flashinfer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(backend_version=lambda: 92101))
    for of_torch, expected in ((91900, "91900"), (None, "92101")):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda of_torch=of_torch: of_torch)
        assert flashinfer._get_cudnn_backend_version() == expected
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert flashinfer._collect_metadata()["cudnn_version"] == "unknown"


def test_a_tuner_that_was_thrown_away_is_made_anew(peer: Any) -> None:
    """As both peers' tests begin."""
    first = peer.AutoTuner.get()
    assert peer.AutoTuner.get() is first
    peer.AutoTuner._instance = None
    assert peer.AutoTuner.get() is not first
