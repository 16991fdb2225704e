"""FusedMoE: its workspace, its output, its limits and its tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_cases import E, H, K, error, make_call, make_weights

import moestro
from moestro import FusedMoE, Workspace, errors
from moestro.formats import NVFP4
from moestro.kernels.portable.runner import PortableRunner
from moestro.moe.tuning_config import default_routing, routing_probe, tuning_config
from moestro.routing import Balanced, Trained, Zipf
from moestro.tuning import AutoTuner, MeasurementPolicy, Probe

PORTABLE: dict[str, Any] = {"backend": "portable"}


class StoppedClock:
    """Runs every candidate once, and says that each took a second."""

    name = "stopped"

    def prepare(self, call: Any) -> Any:
        call()
        return lambda: 1.0


def quick_tuner() -> AutoTuner:
    return AutoTuner(timer=StoppedClock(), policy=MeasurementPolicy(max_rounds=3))


@pytest.mark.parametrize("fmt", ["bf16", "nvfp4"])
@pytest.mark.parametrize("use_cuda_graph", [False, True])
def test_equals_the_reference(fmt: str, use_cuda_graph: bool) -> None:
    w = make_weights(fmt)
    layer = FusedMoE(w, K, max_num_tokens=300, use_cuda_graph=use_cuda_graph)
    for num_tokens in (0, 1, 17, 257, 300):
        call = make_call(num_tokens)
        assert error(layer(*call), *call, w) < 1e-2


def test_takes_the_keywords_of_fused_moe() -> None:
    w = make_weights("nvfp4", gated=False, experts=4)
    layer = FusedMoE(
        w, K, activation="relu2", input_format="nvfp4", expert_offset=2, deterministic=True, num_experts=E
    )
    call = make_call(33)
    options: dict[str, Any] = {"activation": "relu2", "input_format": "nvfp4", "expert_offset": 2}
    assert error(layer(*call), *call, w, **options) < 1e-2


def test_takes_x_of_every_kind() -> None:
    w = make_weights("nvfp4")
    layer = FusedMoE(w, K)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        call = make_call(9, dtype=dtype)
        assert layer(*call).dtype == dtype
        assert error(layer(*call), *call, w) < 1e-2
    x, ids, weights = make_call(9)
    q = NVFP4.quantize_rows(x)
    assert error(layer(q, ids, weights), q, ids, weights, w) < 1e-2


def test_out_is_written_in_place() -> None:
    layer, call = FusedMoE(make_weights(), K), make_call(9)
    out = torch.full((9, H), torch.nan, dtype=torch.bfloat16)
    assert layer(*call, out=out) is out
    assert torch.equal(out, layer(*call))


def test_results_are_new_unless_the_layer_is_for_a_cuda_graph() -> None:
    call, other = make_call(9), make_call(9, seed=1)
    plain = FusedMoE(make_weights(), K)
    first = plain(*call)
    kept = first.clone()
    plain(*other)
    assert torch.equal(first, kept)
    graph = FusedMoE(make_weights(), K, use_cuda_graph=True)
    assert graph(*call).data_ptr() == graph(*other).data_ptr() == graph(*make_call(2)).data_ptr()


def test_a_layer_for_a_graph_that_owns_no_output_makes_a_new_one_for_each_call() -> None:
    layer = FusedMoE(make_weights(), K, use_cuda_graph=True, own_output=False)
    first = layer(*make_call(9))
    kept = first.clone()
    layer(*make_call(9, seed=1))
    assert torch.equal(first, kept)
    assert layer._outputs.by_dtype == {}


def test_a_layer_does_not_take_its_own_output_for_x() -> None:
    layer = FusedMoE(make_weights(), K, use_cuda_graph=True)
    x, ids, weights = make_call(9)
    y = layer(x, ids, weights)
    with pytest.raises(errors.ShapeError, match="x must not be the output that this layer owns"):
        layer(y, ids, weights)
    layer(y, ids, weights, out=torch.empty_like(x))


@pytest.mark.parametrize("backend", ["portable", "auto"])
def test_the_workspace_of_a_graph_layer_never_grows(backend: str) -> None:
    workspace = Workspace("cpu")
    layer = FusedMoE(make_weights(), K, 64, True, backend=backend, workspace=workspace)
    reserved = workspace.nbytes
    assert reserved > 0
    for num_tokens in (64, 1, 33, 64):
        layer(*make_call(num_tokens))
    assert workspace.nbytes == reserved


def test_layers_can_share_a_workspace() -> None:
    workspace = Workspace("cpu")
    weights = [make_weights("bf16", seed=seed) for seed in range(2)]
    layers = [FusedMoE(w, K, workspace=workspace, **PORTABLE) for w in weights]
    for num_tokens in (3, 40, 7):
        for layer, w in zip(layers, weights, strict=True):
            call = make_call(num_tokens)
            assert error(layer(*call), *call, w) < 1e-2
    runner = layers[0].runners[0]
    assert workspace.nbytes == max(runner.workspace_bytes(n, -1) for n in (3, 40, 7))


def test_no_allocation_of_size_is_made_where_torch_takes_an_out() -> None:
    """Past the first call the largest new tensor is an index list, not rows of x."""
    layer = FusedMoE(make_weights("bf16"), K, max_num_tokens=64, tactic="loop", **PORTABLE)
    call, out = make_call(64), torch.empty(64, H, dtype=torch.bfloat16)
    layer(*call, out=out)
    with torch.profiler.profile(profile_memory=True) as profile:
        layer(*call, out=out)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 64 * H * 2


@pytest.mark.parametrize("use_cuda_graph", [False, True])
def test_memory_from_a_call_in_inference_mode_serves_outside(use_cuda_graph: bool) -> None:
    w, call = make_weights("bf16"), make_call(40)
    layer = FusedMoE(w, K, use_cuda_graph=use_cuda_graph, **PORTABLE)
    with torch.inference_mode():
        layer(*make_call(40))
    assert error(layer(*call), *call, w) < 1e-2
    with torch.inference_mode():
        inside = make_call(40)
        made_inside = FusedMoE(make_weights("nvfp4"), K, use_cuda_graph=use_cuda_graph)
    assert error(layer(*inside), *inside, w) < 1e-2
    assert error(made_inside(*call), *call, made_inside.weights) < 1e-2
    assert not made_inside(*call).is_inference()  # else its owner could not write to it


def test_limits_are_checked() -> None:
    layer = FusedMoE(make_weights(), K, max_num_tokens=8)
    layer(*make_call(8))
    with pytest.raises(errors.ShapeError, match="max_num_tokens=8 tokens, got 9"):
        layer(*make_call(9))
    with pytest.raises(errors.ShapeError, match="K=3"):
        layer(*make_call(4, top_k=2))
    x, ids, weights = make_call(4)
    with pytest.raises(errors.DTypeError, match=r"weights must be torch\.float32"):
        layer(x, ids, weights.double())


@pytest.mark.parametrize(
    ("keywords", "kind", "message"),
    [
        ({"top_k": 0}, errors.RoutingError, "top_k must be a positive integer"),
        ({"top_k": E + 1}, errors.RoutingError, "top_k must be at most"),
        ({"top_k": 2.0}, errors.RoutingError, "top_k must be a positive integer, got 2.0"),
        ({"max_num_tokens": 0}, errors.ShapeError, "max_num_tokens must be a positive integer, got 0"),
        ({"backend": "cuda"}, errors.BackendError, "unknown backend 'cuda'"),
        ({"activation": "swish"}, errors.BackendError, "activation"),
        ({"dtype": torch.float64}, errors.DTypeError, "dtype must be"),
        ({"tactic": {}}, errors.BackendError, "tactic must be hashable"),
    ],
)
def test_bad_construction_is_named(keywords: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        FusedMoE(make_weights(), **{"top_k": K, **keywords})


def test_weights_that_are_no_weights_are_named() -> None:
    with pytest.raises(errors.DTypeError, match=r"w must be a moestro\.ExpertWeights"):
        FusedMoE(torch.zeros(3), K)  # type: ignore[arg-type]


def test_a_fixed_tactic_is_used_and_checked() -> None:
    layer = FusedMoE(make_weights(), K, tactic=("pairs", 2), **PORTABLE)
    call = make_call(4)
    assert error(layer(*call), *call, make_weights()) < 1e-2
    with pytest.raises(errors.BackendError, match="at most 256 pairs"):
        layer(*make_call(100))
    with pytest.raises(errors.BackendError, match="tactic must be None"):
        layer.tune()


class TestTuning:
    """What the tuner sees of a layer, and what the layer does with its answers."""

    def tuned(self, **options: Any) -> FusedMoE:
        layer = FusedMoE(make_weights("nvfp4"), K, 12, tuner=quick_tuner(), **PORTABLE, **options)
        layer.tune(progress=False)
        return layer

    def test_the_function_is_tuned_inside_autotune(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(AutoTuner, "_default", quick_tuner())
        w, call = make_weights(), make_call(4)
        with moestro.autotune(True):
            y = moestro.fused_moe(*call, w, **PORTABLE)
        assert error(y, *call, w) < 1e-2
        layer = FusedMoE(w, K, **PORTABLE)  # the same problem, so the same decision
        assert layer.decision(4) is not None

    def test_nothing_is_decided_before(self) -> None:
        assert FusedMoE(make_weights(), K, **PORTABLE).decision(8) is None

    def test_every_size_up_to_the_largest_has_a_decision(self) -> None:
        layer = self.tuned()
        for num_tokens in (1, 2, 3, 11, 12):
            decision = layer.decision(num_tokens)
            assert decision is not None
            assert decision.runner is layer.runners[0]
            assert decision.status in {"measured", "default"}
        call = make_call(11)
        assert error(layer(*call), *call, layer.weights) < 1e-2

    def test_a_layer_runs_what_was_decided(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = FusedMoE(make_weights(), K, **PORTABLE)
        bound, runner, seen = layer._call(torch.bfloat16), layer.runners[0], []
        choice: Any = (runner, ("masked", 2))
        monkeypatch.setattr(bound, "_pick", lambda inputs: choice)
        bind = runner.bind
        monkeypatch.setattr(
            runner, "bind", lambda inputs, tactic: seen.append(tactic) or bind(inputs, tactic)
        )
        layer(*make_call(5))
        layer(*make_call(5))
        assert seen == [("masked", 2)]
        choice = (runner, "loop")  # a decision that came later
        layer(*make_call(5))
        assert seen == [("masked", 2), "loop"]

    def test_every_candidate_is_timed_in_the_same_workspace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The buffer is there, for the largest candidate, before the first of them runs."""
        seen: dict[int, set[int]] = {}
        forward = PortableRunner.forward

        def spy(
            self: PortableRunner, inputs: Any, tactic: Any = -1, do_preparation: bool = False, **more: Any
        ) -> torch.Tensor:
            assert not more
            assert self._workspace is not None
            assert self._workspace.numel() >= self.workspace_bytes(inputs[0].shape[0], tactic)
            seen.setdefault(inputs[0].shape[0], set()).add(self._workspace.data_ptr())
            return forward(self, inputs, tactic, do_preparation)

        monkeypatch.setattr(PortableRunner, "forward", spy)
        FusedMoE(make_weights(), K, 8, tuner=quick_tuner(), **PORTABLE).tune(progress=False)
        assert set(seen) == {1, 2, 4, 8}
        assert all(len(buffers) == 1 for buffers in seen.values())

    def test_the_buckets_follow_the_size(self) -> None:
        problem = FusedMoE(make_weights(), K, **PORTABLE).runners[0].problem
        (spec,) = tuning_config(problem).dynamic_tensor_specs
        for size in (8192, 16384, 40000):
            assert max(spec.buckets(size)) == size
        assert spec.bucket_of(16385) == 32768
        assert spec.input_idx == (0, 1, 2, 3)
        assert tuning_config(problem, quantized_input=True).dynamic_tensor_specs[0].input_idx[-1] == 5

    def test_the_default_probes_are_uniform_zipf_and_a_trained_models(self) -> None:
        config = FusedMoE(make_weights(), K, **PORTABLE).tuning_config
        names = [probe.name for probe in config.probes]
        assert names == ["uniform", "zipf(1.0)", Trained().name]
        assert config.accepts == (("uniform", "zipf(1.0)"),), "what the bundles that ship were tuned on"

    def test_without_the_recording_layers_are_tuned_on_two_probes_and_the_log_says_so(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("moestro.routing.trained.RECORDINGS", tmp_path)
        found = default_routing.__wrapped__()
        assert [distribution.name for distribution in found] == ["uniform", "zipf(1.0)"]
        assert str(tmp_path) in caplog.text

    def test_a_probe_routes_as_its_distribution_says(self) -> None:
        layer = FusedMoE(make_weights(), K, **PORTABLE)
        problem = layer.runners[0].problem
        inputs = [*make_call(70), torch.empty(70, H, dtype=torch.bfloat16)]
        profile: Any = None
        x, ids, weights, out = routing_probe(problem, Balanced()).make(inputs, profile, 0)
        assert torch.bincount(ids.flatten()).tolist() == [70 * K // E] * E
        torch.testing.assert_close(weights.sum(-1), torch.ones(70))
        assert (x is inputs[0], out is inputs[3], ids.dtype) == (True, True, torch.int32)

    def test_probes_can_be_given_as_distributions(self) -> None:
        layer = FusedMoE(make_weights(), K, 4, tuner=quick_tuner())
        probe = Probe("mine", lambda inputs, profile, seed: inputs)
        layer.tune(probes=[Zipf(1.5), probe], progress=False)
        with pytest.raises(errors.TuningError, match="probes must be"):
            layer.tune(probes=["zipf"], progress=False)  # type: ignore[list-item]

    @pytest.mark.parametrize("size", [0, -1, 65])
    def test_sizes_outside_the_layer_are_refused(self, size: int) -> None:
        with pytest.raises(errors.ShapeError, match=r"max_num_tokens must be in 1..64"):
            FusedMoE(make_weights(), K, 64, **PORTABLE).tune(size)
