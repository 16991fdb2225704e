"""benchmarks/gpu_session.py and gpu_site.py: a call keeps to its time and loses nothing; the folder holds what is named."""

from __future__ import annotations

import json
import shlex
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_session  # noqa: E402
import gpu_site  # noqa: E402
from gpu_calls import CALLS, LIMIT_S, TESTS, Step  # noqa: E402
from gpu_plan import PLAN  # noqa: E402

PYTHON = shlex.quote(sys.executable)


def call(monkeypatch: pytest.MonkeyPatch, steps: list[Step], out: Path, *more: str) -> int:
    monkeypatch.setattr(gpu_session, "CALLS", {"served": steps})
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "served", "--out", str(out), *more])
    return gpu_session.main()


def test_every_call_fits_its_time_and_names_what_there_is() -> None:
    for name, steps in CALLS.items():
        assert sum(step.about_s for step in steps) <= LIMIT_S, name
        assert all(0 < step.about_s <= step.limit_s for step in steps)
        assert len({step.name for step in steps}) == len(steps)
    names = [only for steps in CALLS.values() for step in steps if "--only" in step.command
             for only in step.command.split("--only ")[1].split(",")]  # fmt: skip
    assert names
    assert set(names) <= {step.name for step in PLAN}


def test_the_tests_that_run_side_by_side_are_all_of_tests_gpu() -> None:
    folder = Path(__file__).parents[1] / "gpu"
    of_file = {name: name.split("::")[0] for name in TESTS.split()}
    assert set(of_file.values()) == {path.name for path in folder.glob("test_*.py")}
    for name in {file for name, file in of_file.items() if name != file}:
        functions = {
            line.split("(")[0][4:]
            for line in (folder / name).read_text().splitlines()
            if line[:8] == "def test"
        }
        assert {one.split("::")[1] for one in of_file if one.startswith(f"{name}::")} == functions


def test_a_step_beyond_its_limit_is_killed_with_its_children_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "mark"
    child = f"import time; print('begun', flush=True); time.sleep(3); open({str(mark)!r}, 'w')"
    steps = [
        Step("hangs", f"{PYTHON} -c {shlex.quote(child)} & wait", 1, 1),
        Step("misses", f"{PYTHON} -c 'raise SystemExit(3)'", 20, 1),
        Step("writes", "echo done > {out}/file", 20, 1),
    ]
    assert call(monkeypatch, steps, tmp_path / "out") == 2
    said = capsys.readouterr().out
    assert "hangs: status 124" in said
    assert "misses: status 3 (target missed)" in said
    assert "writes: status 0" in said
    lines = [json.loads(line) for line in (tmp_path / "out" / "session.json").read_text().splitlines()]
    assert [line["status"] for line in lines] == [124, 3, 0]
    time.sleep(3)
    assert not mark.exists()


def test_a_step_for_which_no_time_is_left_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [Step("late", "echo done > {out}/file", 20, 1)]
    assert call(monkeypatch, steps, tmp_path, "--seconds", "5") == 1
    assert "late: not begun, 5 s are left" in capsys.readouterr().out
    assert not (tmp_path / "file").exists()


def test_more_files_than_come_back_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [Step("many", "for i in 1 2 3 4 5 6 7; do touch {out}/$i; done", 20, 1)]
    call(monkeypatch, steps, tmp_path)
    assert f"9 files in {tmp_path}, of which 8 can come back" in capsys.readouterr().out


def test_calls_leave_at_most_eight_files() -> None:
    for name, steps in CALLS.items():
        own = {word for step in steps for word in step.command.split() if word.endswith(".json")}
        recorded = 4 if any("gpu_record.py" in step.command for step in steps) else 0
        assert len(own - {"{out}/record.json"}) + recorded + 2 <= gpu_session.FILES, name


# --- packages to carry -------------------------------------------------------------------------------------
@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    files = {"a_b-1.0-py3-none-any.whl": ["a_b/__init__.py", "a_b/deep/x.py", "other/y.py"],
             "big-2.0-py3-none-any.whl": ["big/third_party/inner/__init__.py"]}  # fmt: skip
    for name, members in files.items():
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member in members:
                archive.writestr(member, member)
    wanted = {"a-b==1.0": {"a_b": "a_b"}, "big==2.0": {"big/third_party/inner": "inner"}}
    monkeypatch.setattr(gpu_site, "WHEELS", wanted)
    return folder


def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wheels: Path, *more: str) -> tuple[int, Path]:
    target = tmp_path / ".gpu" / "site"
    monkeypatch.setattr(sys, "argv", ["gpu_site.py", "--site", str(target), "--wheels", str(wheels), *more])
    return gpu_site.main(), target


def test_the_folder_holds_what_is_named_and_no_more(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, target = site(monkeypatch, tmp_path, wheels)
    assert status == 0
    found = {str(path.relative_to(target)) for path in target.rglob("*.py")}
    assert found == {"a_b/__init__.py", "a_b/deep/x.py", "inner/__init__.py"}
    assert (target / "a_b" / "deep" / "x.py").read_text() == "a_b/deep/x.py"
    assert "together, at most 60" in capsys.readouterr().out


def test_a_folder_that_is_too_large_or_hides_the_machines_own_is_not_made(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, target = site(monkeypatch, tmp_path, wheels, "--most", "0")
    assert (status, target.exists()) == (1, False)
    wanted: dict[str, Any] = {"a-b==1.0": {"a_b": "typer"}}
    monkeypatch.setattr(gpu_site, "WHEELS", wanted)
    status, target = site(monkeypatch, tmp_path, wheels)
    assert (status, target.exists()) == (1, False)
    assert "typer would hide the machine's own" in capsys.readouterr().err


def test_a_folder_that_a_wheel_does_not_have_is_named(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_site, "WHEELS", {"big==2.0": {"big/gone": "gone"}})
    with pytest.raises(SystemExit, match=r"big-2\.0-py3-none-any\.whl has no big/gone"):
        site(monkeypatch, tmp_path, wheels)
