"""`moestro explain --vllm`: what served, from a server's log and the miss log."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from stand_ins import Config, Dense, RoutedExperts, load, method_classes, quant_config
from typer.testing import CliRunner

import moestro
from moestro.cli.app import app
from moestro.errors import MoestroError, TuningWarning
from moestro.integrations.vllm import hooks, kinds, served, tuning
from moestro.integrations.vllm.settings import Settings

PREFIX = "(Worker_TP{rank} pid={pid}) \x1b[32mINFO\x1b[0m 11-28 23:09:56 [tuning.py:66] "
SERVES = (
    "moestro: serves nvfp4 experts (E 8, local 4, K 2, H 128, I 64, 59440 bytes a layer) on the cpu backend; decisions "
    "by tokens, of all ranks: 1: -1 (measured at 1); 16: CpuTactic(rows=3, cols=1) (extrapolated at 8); store: none"
)


def explained(*argv: str) -> str:
    done = CliRunner().invoke(app, ["explain", *argv])
    assert done.exit_code == 0, done.output
    return done.output


def test_two_ranks_that_say_the_same_are_one_entry(tmp_path: Path) -> None:
    lines = [PREFIX.format(rank=rank, pid=40 + rank) + SERVES for rank in range(2)]
    (tmp_path / "server.log").write_text("\n".join(["INFO 11-28 [x.py:1] vLLM's own", *lines]))
    text = explained("--vllm", str(tmp_path))
    assert text.count("nvfp4 experts (E 8, local 4") == 1
    assert "in Worker_TP0 pid=40, Worker_TP1 pid=41" in text
    assert "one decision of all ranks" in text
    assert "16 tokens: CpuTactic(rows=3, cols=1) (extrapolated at 8)" in text


def test_layers_of_batch_invariant_rows_say_so(tmp_path: Path) -> None:
    line = SERVES.replace("on the cpu backend;", "on the cpu backend, rows the same in any batch;")
    (tmp_path / "server.log").write_text(PREFIX.format(rank=0, pid=40) + line)
    assert "on the cpu backend, rows the same in any batch, one decision of all ranks" in explained(
        "--vllm", str(tmp_path)
    )


def test_what_is_left_and_warned_of_is_said_with_its_process(tmp_path: Path) -> None:
    file = tmp_path / "one.log"
    file.write_text(
        "(EngineCore pid=7) INFO 11-28 1 [hooks.py:43] moestro: bf16 experts are left to vLLM: LoRA is on, and more\n"
        "WARNING 11-28 1 [plugin.py:9] moestro: Fp8MoEMethod's experts are left to vLLM: AttributeError: none\n"
        "WARNING 11-28 1 [plugin.py:9] moestro: the plugin is off: torch must be 2.11 or newer, got 2.8\n"
        "x.py:3: TuningWarning: moestro.fused_moe: size 60 is beyond everything tuned; the decision for 8 is used.\n"
    )
    said = served.read(file)
    assert said.left == {
        "bf16: LoRA is on, and more": ["EngineCore pid=7"],
        "Fp8MoEMethod: AttributeError: none": ["one process"],
    }
    assert list(said.warnings) == [
        "the plugin is off: torch must be 2.11 or newer, got 2.8",
        "moestro.fused_moe: size 60 is beyond everything tuned; the decision for 8 is used.",
    ]


@pytest.mark.parametrize("text", ["", "INFO 11-28 [x.py:1] vLLM's own\n"])
def test_a_log_without_the_plugin_is_an_error_that_says_where_to_look(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text(text)
    with pytest.raises(MoestroError, match=r"no line of Moestro's plugin.*MOESTRO_VLLM, VLLM_PLUGINS"):
        served.read(tmp_path)


@pytest.mark.usefixtures("by_itself")
def test_the_plugins_own_lines_are_read_and_its_layers_misses_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moe, store = Config(max_num_tokens=64), tmp_path / "store"
    w = moestro.ExpertWeights.from_dense(torch.randn(4, 64, 64), torch.randn(4, 64, 32), format="nvfp4")
    tuner = tuning.tuner(Settings(store=str(store)))
    moestro.FusedMoE(w, 2, max_num_tokens=4, tuner=tuner).tune(budget_s=2, progress=False)
    cls = method_classes().nvfp4
    hooks.install(cls, kinds.KINDS[cls.__name__], Settings(store=str(store)))
    layer = RoutedExperts(cls(quant_config(), moe))
    load(layer, **Dense.random(moe).nvfp4())
    with caplog.at_level(logging.INFO, logger="vllm.moestro"):
        layer.quant_method.process_weights_after_loading(layer)
    ids = torch.zeros(40, 2, dtype=torch.int32)
    with pytest.warns(TuningWarning, match="size 40 is beyond"):
        layer.quant_method.apply(layer, torch.ones(40, 64, dtype=torch.bfloat16), torch.ones(40, 2), ids)
    file = tmp_path / "server.log"
    file.write_text("".join(f"{r.levelname} 11-28 [x.py:1] {r.getMessage()}\n" for r in caplog.records))
    text = explained("--vllm", str(file))
    assert "nvfp4 experts (E 4, local 4, K 2, H 64, I 32) on the cpu backend" in text
    assert "(extrapolated at 4)" in text
    assert f"store: {store}" in text
    assert "beyond what was tuned: 40 tokens, served by the decision for 4; just now" in text
