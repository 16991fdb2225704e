"""What this machine is: one answer, whoever asks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moestro import machine

ASK = "import {first}sys; from moestro import machine; print(machine.threads(), 'torch' in sys.modules)"


def said(first: str, **environment: str) -> list[str]:
    cleared = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-c", ASK.format(first=first)]
    done = subprocess.run(command, env={**cleared, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    "environment", [{}, {"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "3"}, {"MKL_NUM_THREADS": "1"}]
)
def test_the_number_of_threads_is_the_same_before_and_after_torch_is_imported(
    environment: dict[str, str],
) -> None:
    (before, absent), (after, present) = said("", **environment), said("torch, ", **environment)
    assert (absent, present) == ("False", "True")
    assert before == after


def test_doctor_and_the_timer_that_flushes_caches_speak_of_the_same_cache() -> None:
    assert machine.cpu().cache_bytes == machine.last_level_cache_bytes()
    assert machine.cpu().name == machine.cpu_name()


def cpuinfo(*cores: tuple[str, str]) -> str:
    return "\n".join(
        f"processor\t: {i}\nFeatures\t: fp asimd\nCPU implementer\t: {who}\nCPU part\t: {part}\n"
        for i, (who, part) in enumerate(cores)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (cpuinfo(*[("0x41", "0xd0c")] * 4), "Arm Neoverse-N1"),
        (cpuinfo(("0x41", "0xd05"), ("0x41", "0xd05"), ("0x41", "0xd0b")), "Arm Cortex-A55 + Cortex-A76"),
        (cpuinfo(("0x61", "0x023")), "Apple part 0x023"),
        (cpuinfo(("0x99", "0xd0c")), "implementer 0x99 part 0xd0c"),  # another maker's number
        ("model name\t: AMD EPYC\nflags\t: avx2\n", None),
    ],
)
def test_arm_processors_are_told_apart_by_their_cores(text: str, expected: str | None) -> None:
    """Decisions are filed under the processor's name: two kinds of ARM must not share theirs."""
    assert machine.arm_name(text) == expected
