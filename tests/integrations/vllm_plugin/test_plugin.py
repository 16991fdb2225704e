"""What the plugin takes over, what it leaves to vLLM, and what it does where something is missing."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import (
    Config,
    Dense,
    FusedMoEMethodBase,
    MoEActivation,
    Parallel,
    RoutedExperts,
    load,
    method_classes,
    quant_config,
)

from moestro.errors import MoestroError, StoreWarning
from moestro.integrations.vllm import hooks, imports, kinds, log, plugin, ranks, refusals, tuning
from moestro.integrations.vllm.settings import NAMES, Settings
from moestro.kernels.cpu import core
from moestro.moe.layer import FusedMoE


@pytest.fixture(autouse=True)
def _fresh_log() -> None:
    log.forget()


def hooked(name: str, settings: Settings | None = None) -> type:
    cls: type = getattr(method_classes(), name)
    hooks.install(cls, kinds.KINDS[cls.__name__], settings or Settings())
    return cls


REFUSED: list[tuple[str, Config, str]] = [
    ("LoRA", Config(is_lora_enabled=True), "LoRA is on"),
    ("EPLB", Config(moe_parallel_config=Parallel(enable_eplb=True)), "EPLB moves experts"),
    ("elastic", Config(elastic_ep_max_dp_size=4), "elastic expert parallelism"),
    ("a backend by name", Config(moe_backend="marlin"), "moe_backend='marlin'"),
    ("an activation", Config(activation=MoEActivation.GELU), "activation gelu has no kernel"),
    ("an ambiguous activation", Config(swiglu_alpha=1.7), "two meanings"),
    ("a dtype", Config(in_dtype=torch.float64), "x in torch.float64"),
    (
        "sizes of no whole blocks",
        Config(intermediate_size_per_partition=24),
        "divisible by 16 for nvfp4, got 24",
    ),
    (
        "an all-to-all layout",
        Config(moe_parallel_config=Parallel(use_all2all_kernels=True, all2all_backend="deepep_low_latency")),
        "'deepep_low_latency' hands over tokens in a layout of its own",
    ),
]


@pytest.mark.parametrize(("moe", "reason"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_we_cannot_run_is_vllms_own_object_and_one_log_line(
    moe: Config, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    cls = hooked("nvfp4")
    with caplog.at_level("INFO", logger="vllm.moestro"):
        methods = [cls(quant_config(), moe), cls(quant_config(), moe)]
    assert [type(m) for m in methods] == [cls, cls]
    assert methods[0].apply(None, torch.ones(1)) == "vLLM"
    assert len(caplog.records) == 1
    assert reason in caplog.text


def test_a_checkpoint_that_is_not_packed_yet_is_left() -> None:
    config = quant_config()
    config.is_checkpoint_nvfp4_serialized = False
    cls = hooked("nvfp4")
    assert type(cls(config, Config())) is cls


def test_what_we_serve_is_an_instance_of_vllms_class_with_its_name() -> None:
    cls = hooked("nvfp4")
    method = cls(quant_config=quant_config(), moe_config=Config())
    assert isinstance(method, cls)
    assert isinstance(method, FusedMoEMethodBase)
    assert (type(method) is cls, type(method).__name__) == (False, "ModelOptNvFp4FusedMoE")
    assert (method.is_monolithic, method.supports_eplb) == (False, False)


def test_a_subclass_of_vllms_class_is_left_alone() -> None:
    cls = hooked("bf16")
    other = type("OtherPlugins", (cls,), {})
    assert type(other(Config())) is other


def test_what_goes_wrong_while_a_layer_is_judged_leaves_it_to_vllm_with_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Older:
        """A FusedMoEConfig of another vLLM."""

    cls = hooked("bf16")
    with caplog.at_level("WARNING", logger="vllm.moestro"):
        assert type(cls(Older())) is cls
    assert (
        "UnquantizedFusedMoEMethod's experts are left to vLLM: AttributeError: 'Older' object has"
        in caplog.text
    )


def test_hooks_import_nothing_that_runs_layers() -> None:
    code = (
        "import sys; from moestro.integrations.vllm import hooks, plugin, settings\n"
        "hooks.install(type('M', (), {}), None, settings.Settings())\n"
        "print(*[m for m in sys.modules if m.startswith(('moestro.kernels', 'moestro.moe', 'moestro.formats', 'torch'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_installing_twice_changes_nothing() -> None:
    cls = method_classes().bf16
    for settings in (Settings(), Settings(kinds=frozenset())):
        hooks.install(cls, kinds.KINDS[cls.__name__], settings)
        made = cls.__new__
    hooks.install(cls, kinds.KINDS[cls.__name__], Settings())
    assert cls.__new__ is made
    assert type(cls(Config())) is not cls


def test_kinds_that_are_not_named_are_left(caplog: pytest.LogCaptureFixture) -> None:
    cls = hooked("bf16", Settings(kinds=frozenset({"nvfp4"})))
    with caplog.at_level("INFO", logger="vllm.moestro"):
        assert type(cls(Config())) is cls
    assert "does not name them" in caplog.text


def test_bf16_experts_in_float32_are_left_since_vllm_has_its_own() -> None:
    cls = hooked("bf16")
    assert type(cls(Config(in_dtype=torch.float32))) is cls


def test_batch_invariance_is_kept_or_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.envs", type("envs", (), {"VLLM_BATCH_INVARIANT": True}))
    able = "batch_invariant" in inspect.signature(FusedMoE).parameters
    assert (refusals._invariance(Config()) is None) == able


# --- what is missing -------------------------------------------------------------------------------------
def test_without_a_compiled_core_nvfp4_is_served_slowly_and_said_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(core, "why_no_core", lambda: "the core was not compiled: no C++ compiler")
    with caplog.at_level("WARNING", logger="vllm.moestro"):
        assert type(hooked("nvfp4")(quant_config(), Config())).__module__ == hooks.__name__
    assert "portable backend, which is slow: cpu: the core was not compiled" in caplog.text


def test_without_a_compiled_core_bf16_is_left_to_vllm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(core, "why_no_core", lambda: "the core was not compiled: no C++ compiler")
    cls = hooked("bf16")
    with caplog.at_level("INFO", logger="vllm.moestro"):
        assert type(cls(Config())) is cls
    assert "no kernel of ours runs them (cpu: the core was not compiled" in caplog.text


def test_a_torch_that_is_too_old_turns_the_plugin_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.8.0+cu128")
    monkeypatch.setattr(hooks, "install", lambda *args: pytest.fail("installed"))
    with caplog.at_level("WARNING", logger="vllm.moestro"):
        plugin.install()
    assert "the plugin is off: torch must be 2.11 or newer, got 2.8.0+cu128" in caplog.text


def test_a_setting_that_means_nothing_turns_the_plugin_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MOESTRO_VLLM_TUNE_S", "soon")
    with caplog.at_level("WARNING", logger="vllm.moestro"):
        plugin.install()
    assert "MOESTRO_VLLM_TUNE_S must be a number of seconds of at least 0, got 'soon'" in caplog.text


def test_a_vllm_without_the_class_is_left_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="vllm.moestro"):
        plugin._hook(types.ModuleType("vllm.old"), "Fp8MoEMethod", Settings())
    assert "Fp8MoEMethod's experts are left to vLLM: AttributeError" in caplog.text


def test_no_vllm_at_all_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with caplog.at_level("INFO", logger="vllm.moestro"):
        plugin.install()
        plugin.install()
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["moestro"]
    assert "quantization='moestro_nvfp4' is not there" in caplog.text


def test_a_module_is_hooked_when_it_is_imported_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waited_for.py").write_text("VALUE = 3")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[tuple[str, int]] = []
    for _ in range(2):
        imports.when_imported("waited_for", lambda module: seen.append((module.__name__, module.VALUE)))
    assert (seen, "waited_for" in sys.modules) == ([], False)
    module = importlib.import_module("waited_for")
    assert seen == [("waited_for", 3)] * 2
    assert module.__spec__ is not None
    assert module.__spec__.origin == str(tmp_path / "waited_for.py")
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
    imports.when_imported("waited_for", lambda module: seen.append(("now", module.VALUE)))
    assert seen[-1] == ("now", 3)
    assert importlib.reload(module).VALUE == 3


def test_tuning_under_the_default_dtype_that_vllm_loads_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_spent", 0.0)
    moe = Config(max_num_tokens=2)
    layer = RoutedExperts(hooked("nvfp4", Settings(store=str(tmp_path), tune_s=5.0))(quant_config(), moe))
    load(layer, **Dense.random(moe).nvfp4())
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer.quant_method.process_weights_after_loading(layer)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    decision = layer.quant_method.experts.decision(1)
    assert decision is not None
    assert decision.status == "measured"


@pytest.mark.filterwarnings("default::moestro.errors.StoreWarning")
def test_a_store_that_cannot_be_written_still_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_spent", 0.0)
    blocked = tmp_path / "file"
    blocked.write_text("")  # a folder cannot be made below a file
    settings = Settings(store=str(blocked / "store"), tune_s=5.0)
    cls = hooked("nvfp4", settings)
    moe = Config(max_num_tokens=2)
    layer = RoutedExperts(cls(quant_config(), moe))
    load(layer, **Dense.random(moe).nvfp4())
    with pytest.warns(StoreWarning):
        layer.quant_method.process_weights_after_loading(layer)
    decision = layer.quant_method.experts.decision(1)
    assert decision is not None
    assert decision.status == "measured"


# --- settings and tuning ---------------------------------------------------------------------------------
def test_what_the_environment_may_say() -> None:
    assert Settings.read({}) == Settings(frozenset(NAMES), None, 0.0, None)
    assert Settings.read({"MOESTRO_VLLM": "0"}).kinds == frozenset()
    said = {
        "MOESTRO_VLLM": "nvfp4, mxfp4",
        "MOESTRO_VLLM_W4A4": "1",
        "MOESTRO_VLLM_TUNE_S": "2.5",
        "MOESTRO_VLLM_STORE": "d",
    }
    assert Settings.read(said) == Settings(frozenset({"nvfp4", "mxfp4"}), True, 2.5, "d")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MOESTRO_VLLM", "nvfp5"),
        ("MOESTRO_VLLM_W4A4", "yes"),
        ("MOESTRO_VLLM_TUNE_S", "-1"),
        ("MOESTRO_VLLM_TUNE_S", "nan"),
    ],
)
def test_a_wrong_value_names_variable_and_value(name: str, value: str) -> None:
    with pytest.raises(MoestroError, match=f"(?s){name}.*{value}"):
        Settings.read({name: value})


def test_tuning_keeps_within_the_processs_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_spent", 0.0)
    clock = iter([0.0, 3.0, 10.0, 12.0])
    monkeypatch.setattr(tuning.time, "monotonic", lambda: next(clock))
    given: list[float] = []

    class Layer:
        def tune(self, budget_s: float, progress: bool, group: object) -> None:
            given.append(budget_s)
            assert group is None

    layer: Any = Layer()
    for _ in range(3):
        assert tuning.settle(layer, Config(), Settings(tune_s=5.0))
    assert given == [5.0, 2.0]


def test_ranks_that_vllm_has_made_no_group_for_take_the_default(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    distributed = types.ModuleType("vllm.distributed")

    def get_ep_group() -> Any:
        raise AssertionError("expert parallel group is not initialized")

    distributed.get_ep_group = get_ep_group  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    moe = Config(moe_parallel_config=Parallel(tp_size=2))
    layer = RoutedExperts(hooked("nvfp4", Settings(tune_s=5.0))(quant_config(), moe))
    load(layer, **Dense.random(moe).nvfp4())
    with caplog.at_level("WARNING", logger="vllm.moestro"):
        layer.quant_method.process_weights_after_loading(layer)
    assert layer.quant_method.experts.options.tactic == -1
    assert "they cannot talk (expert parallel group is not initialized)" in caplog.text
    assert ranks.parallel(moe)


def test_the_log_says_what_serves(caplog: pytest.LogCaptureFixture) -> None:
    cls = hooked("nvfp4")
    moe = Config(max_num_tokens=32)
    layer = RoutedExperts(cls(quant_config(), moe))
    load(layer, **Dense.random(moe).nvfp4())
    with caplog.at_level("INFO", logger="vllm.moestro"):
        layer.quant_method.process_weights_after_loading(layer)
    assert "serves nvfp4 experts (E 4, local 4, K 2, H 64, I 32" in caplog.text
    assert "on the cpu backend; decisions by tokens: 1: " in caplog.text


def test_the_package_imports_neither_vllm_nor_torch() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['vllm'] = None; import moestro.integrations.vllm as v; v.register"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
