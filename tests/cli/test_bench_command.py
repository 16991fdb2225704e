"""`moestro bench`: its table, its JSON, its exit statuses, and what Ctrl-C leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_tools import QUICK, TINY, Run

from moestro.bench import measure, results, roofline
from moestro.bench.peers import IMPLEMENTATIONS, transformers_missing

ROW_FIELDS = {
    "tokens": int,
    "contender": str,
    "ours": bool,
    "format": str,
    "median_s": float,
    "low_s": float,
    "high_s": float,
    "samples": int,
    "clock": str,
    "experts_hit": int,
    "tflops": float,
    "weight_bytes_per_s": float,
    "roofline": float,
    "facts": dict,
}


def test_measures_every_contender_at_every_size(run: Run) -> None:
    done = run("bench", *TINY, *QUICK, "--tokens", "1,5", "--json", "out/o.json")
    assert done.exit_code == 0, done.output
    data = json.loads(Path("out/o.json").read_text())
    assert data["schema"] == "moestro.bench/1"
    peers = [] if transformers_missing() else [f"transformers {name}" for name in IMPLEMENTATIONS]
    expected = {(n, name) for n in (1, 5) for name in [*peers, "moestro bf16", "moestro nvfp4"]}
    assert {(row["tokens"], row["contender"]) for row in data["rows"]} == expected
    for row in data["rows"]:
        for name, kind in ROW_FIELDS.items():
            assert isinstance(row[name], kind), (name, row)
        assert row["samples"] == 2
        assert 0 < row["low_s"] <= row["median_s"] <= row["high_s"]


def test_json_says_under_which_conditions(run: Run) -> None:
    run("bench", *TINY, *QUICK, "--tokens", "2", "--routing", "zipf:1.2", "--seed", "7", "--json", "o.json")
    data = json.loads(Path("o.json").read_text())
    assert data["environment"]["torch"]
    assert data["environment"]["device_name"]
    assert data["date"].endswith("Z")
    assert data["command"].startswith("moestro bench --sizes 8,2,64,32 --device cpu")
    assert data["conditions"] | {"routing": "zipf(1.2)", "seed": 7, "layers": 1} == data["conditions"]
    assert data["ceilings"]["bytes_per_s"] > 0
    assert data["problem"]["num_experts"] == 8


def test_the_roofline_is_of_the_best_rates_of_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter((3e9, 9e9, 6e9))  # at the start, and before the second and the third case

    def ceilings(device: str) -> roofline.Ceilings:
        rate = next(rates)
        return roofline.Ceilings(rate, 1e30 / rate, "bfloat16")

    monkeypatch.setattr(roofline, "measure_ceilings", ceilings)
    run("bench", *TINY, *QUICK, "--tokens", "1,2,5", "--format", "bf16", "--json", "o.json")
    data = json.loads(Path("o.json").read_text())
    assert data["ceilings"] == {
        "bytes_per_s": 9e9,
        "flops_per_s": 1e30 / 3e9,
        "dtype": "bfloat16",
        "rates": {},
    }
    first = next(row for row in data["rows"] if row["ours"] and row["tokens"] == 1)
    weights = first["weight_bytes_per_s"] * first["median_s"]
    assert first["roofline"] == pytest.approx((weights + 2 * 2 * 64) / 9e9 / first["median_s"])


def test_ratios_are_against_the_fastest_peer_of_the_row(run: Run) -> None:
    run("bench", *TINY, *QUICK, "--tokens", "3", "--json", "o.json")
    rows = results.read(Path("o.json")).rows
    best = min(row.median_s for row in rows if not row.ours)
    for row in rows:
        assert row.ratio_to_best_peer == pytest.approx(best / row.median_s)


def test_memory_is_in_table_and_json(run: Run) -> None:
    sizes = ["--sizes", "4,2,512,256", "--device", "cpu"]
    done = run("bench", *sizes, *QUICK, "--tokens", "1", "--peers", "none", "--json", "o.json")
    memory = {entry["contender"]: entry for entry in json.loads(Path("o.json").read_text())["memory"]}
    assert memory["moestro bf16"]["bytes"] == 2 * 4 * 3 * 512 * 256
    assert memory["moestro bf16"]["ratio_to_bf16"] == 1.0
    # 4 bits a weight, 8 a block of 16, a float32 or two a matrix, and what the layout pads
    assert 0.28125 <= memory["moestro nvfp4"]["ratio_to_bf16"] < 0.30
    assert "× bf16" in done.output
    assert "0.28" in done.output


def test_table_shows_ratios_and_roofline(run: Run) -> None:
    done = run("bench", *TINY, *QUICK, "--tokens", "1,9")
    for word in ("grouped_mm", "batched_mm", "eager", "nvfp4", "roof", "peer"):
        assert word in done.output


def test_several_layers_have_weights_of_their_own(run: Run) -> None:
    done = run("bench", *TINY, *QUICK, "--tokens", "1", "--layers", "2", "--json", "o.json")
    assert done.exit_code == 0, done.output
    assert json.loads(Path("o.json").read_text())["conditions"]["layers"] == 2


@pytest.mark.parametrize("extra", [["--ep", "2"], ["--ep", "2", "--local-pairs"]])
def test_a_slice_of_expert_parallelism_is_measured(run: Run, extra: list[str]) -> None:
    done = run("bench", *TINY, *QUICK, "--tokens", "6", *extra, "--json", "o.json")
    assert done.exit_code == 0, done.output
    data = json.loads(Path("o.json").read_text())
    assert (data["problem"]["ep"], data["problem"]["num_local_experts"]) == (2, 4)
    assert data["failed"] == []


def test_named_backends_are_contenders_of_their_own(run: Run) -> None:
    done = run(
        "bench",
        *TINY,
        *QUICK,
        "--tokens",
        "2",
        "--backend",
        "portable",
        "--backend",
        "auto",
        "--json",
        "o.json",
    )
    assert done.exit_code == 0, done.output
    names = results.read(Path("o.json")).contenders
    assert {"moestro bf16 portable", "moestro nvfp4 portable", "moestro bf16 auto"} <= set(names)


def test_batched_mm_beyond_its_memory_is_said_not_to_run(run: Run) -> None:
    done = run("bench", *TINY, *QUICK, "--tokens", "4", "--peer-memory", "0.00001")
    assert done.exit_code == 0
    assert "batched_mm not run at N = 4: would copy" in done.output


def test_only_the_peers_that_are_asked_for_run(run: Run) -> None:
    run("bench", *TINY, *QUICK, "--tokens", "1", "--peers", "eager", "--json", "o.json")
    names = results.read(Path("o.json")).contenders
    assert [name for name in names if name.startswith("transformers")] == ["transformers eager"]


def test_ctrl_c_keeps_what_is_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measure.measure_case

    def interrupted(contenders, case, *rest):  # type: ignore[no-untyped-def]
        if case.num_tokens == 5:
            raise KeyboardInterrupt
        return real(contenders, case, *rest)

    monkeypatch.setattr("moestro.bench.run.measure_case", interrupted)
    done = run("bench", *TINY, *QUICK, "--tokens", "1,5,9", "--json", "o.json")
    assert done.exit_code == 130
    assert "interrupted" in done.output
    data = json.loads(Path("o.json").read_text())
    assert data["interrupted"] is True
    assert {row["tokens"] for row in data["rows"]} == {1}


def test_a_failure_of_ours_is_status_1_after_the_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self, case):  # type: ignore[no-untyped-def]
        raise RuntimeError("the kernel is on fire")

    monkeypatch.setattr("moestro.bench.contenders.MoestroLayers.calls", broken)
    done = run("bench", *TINY, *QUICK, "--tokens", "1")
    assert done.exit_code == 1
    assert "moestro bf16 at N = 1: RuntimeError: the kernel is on fire" in done.output
    assert "Traceback" not in done.output


def test_a_run_that_measures_nothing_is_status_1(run: Run) -> None:
    done = run("bench", *TINY, *QUICK, "--tokens", "1", "--peers", "none", "--backend", "triton")
    assert done.exit_code == 1
    assert "not run: backend 'triton' cannot run this" in " ".join(done.output.split())
    assert "nothing could be measured" in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "qwen3-30b-a3"], "did you mean 'qwen3-30b-a3b'"),
        ([], "--model"),
        (["--model", "mixtral-8x7b", "--sizes", "8,2,64,32"], "both"),
        (["--sizes", "8,2,64"], "four positive integers"),
        ([*TINY, "--tokens", "0"], "expected positive integers"),
        ([*TINY, "--tokens", "8..4"], "expected positive integers"),
        ([*TINY, "--tokens", ""], "expected positive integers"),
        ([*TINY, "--tokens", "²"], "expected positive integers"),
        ([*TINY, "--store", "file"], "is a file"),
        ([*TINY, "--format", "nvpf4"], "did you mean 'nvfp4'"),
        ([*TINY, "--backend", "tritom"], "did you mean 'triton'"),
        ([*TINY, "--routing", "zip:1"], "did you mean 'zipf'"),
        ([*TINY, "--peers", "eger"], "did you mean 'eager'"),
        (["--sizes", "8,2,64,32", "--device", "tpu"], "expected cpu"),
        ([*TINY, "--ep", "3"], "divides the 8 experts"),
        ([*TINY, "--local-pairs"], "without --ep"),
        ([*TINY, "--no-such-option"], "No such option"),
    ],
)
def test_wrong_usage_is_status_2_and_says_what_is_meant(run: Run, arguments: list[str], said: str) -> None:
    Path("file").touch()
    done = run("bench", *arguments)
    assert done.exit_code == 2
    flat = " ".join(done.output.replace("│", " ").split())
    assert said in flat
    assert "Traceback" not in done.output


def test_several_routings_in_one_run_and_the_worst_ratio_to_each_peer(run: Run) -> None:
    asked = ("--routing", "uniform", "--routing", "zipf:1.0", "--routing", "trained")
    done = run("bench", *TINY, *QUICK, "--tokens", "4", "--format", "bf16", *asked, "--json", "o.json")
    assert done.exit_code == 0, done.output
    data = json.loads(Path("o.json").read_text())
    assert data["schema"] == "moestro.bench.routings/1"
    names = [result["conditions"]["routing"] for result in data["results"]]
    assert names[:2] == ["uniform", "zipf(1.0)"]
    assert names[2].startswith("trained(")
    hit = [next(row["experts_hit"] for row in result["rows"] if row["ours"]) for result in data["results"]]
    assert all(2 <= experts <= 8 for experts in hit)
    if transformers_missing():
        assert data["worst"] == []
    else:
        assert {row["peer"] for row in data["worst"]} == {f"transformers {name}" for name in IMPLEMENTATIONS}
        for row in data["worst"]:
            assert set(row["ratios"]) == set(names)
            assert row["ratio"] == min(row["ratios"].values())
        assert "The worst of all routings" in done.output
    assert run("report", "o.json").exit_code == 0
    assert Path("report.html").read_text().count("<section>") == 3


def test_accuracy_is_a_table_and_a_file(run: Run) -> None:
    asked = ("--format", "nvfp4", "--input-format", "none", "--input-format", "fp8", "--tokens", "5")
    done = run("bench", "--accuracy", *TINY, *asked, "--json", "a.json")
    assert done.exit_code == 0, done.output
    assert "weights  activations" in done.output
    data = json.loads(Path("a.json").read_text())
    assert data["schema"] == "moestro.accuracy/1"
    assert [(row["format"], row["input_format"]) for row in data["layer"]] == [
        ("nvfp4", "none"),
        ("nvfp4", "fp8"),
    ]
    assert data["layer"][0]["error"] < 0.01 < data["layer"][1]["error"]
    assert data["conditions"] == {"routing": "uniform", "tokens": 5, "seed": 0, "backend": "auto"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--accuracy", *TINY, "--tokens", "1,2"), "--tokens"),
        (("--accuracy", *TINY, "--routing", "uniform", "--routing", "zipf"), "--routing"),
        (("--accuracy", *TINY, "--input-format", "fp9"), "fp8"),
        ((*TINY, "--input-format", "fp9"), "fp8"),
        ((*TINY, "--text", "x"), "goes with --accuracy"),
        ((*TINY, "--model-dir", "x"), "goes with --accuracy"),
    ],
)
def test_accuracy_of_what_it_does_not_take_is_a_wrong_usage(
    run: Run, asked: tuple[str, ...], said: str
) -> None:
    done = run("bench", *asked)
    assert done.exit_code == 2, done.output
    assert said in done.output
