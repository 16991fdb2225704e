"""What the system allows: read from files like Linux's, in a folder of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cpu_cases import Case, run

from moestro.kernels.cpu import CpuRunner, machine


def files(root: Path, **contents: str) -> Path:
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_least_quota_of_nested_groups_holds(tmp_path: Path) -> None:
    files(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/pod/container\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/container/cpu.max": "400000 100000\n",
        },
    )
    assert machine.quota(tmp_path) == 1.5


def test_a_quota_of_the_first_version(tmp_path: Path) -> None:
    files(
        tmp_path,
        **{
            "proc/self/cgroup": "5:cpu,cpuacct:/job\n3:memory:/job\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert machine.quota(tmp_path) == 3.0


def test_no_files_are_no_limit(tmp_path: Path) -> None:
    assert machine.quota(tmp_path) is None
    assert machine.core_kinds(tmp_path) == ()
    assert machine.numa_nodes(tmp_path) == 1
    assert machine.huge_pages(tmp_path) is None


def test_hybrid_cores_nodes_and_pages(tmp_path: Path) -> None:
    cpus = {f"sys/devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq": "5200000\n" for i in range(4)}
    cpus |= {f"sys/devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq": "3900000\n" for i in range(4, 12)}
    cpus["sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"] = (
        "5500000\n"  # the favoured core of its kind
    )
    cpus |= {f"sys/devices/system/node/node{i}/x": "" for i in range(2)}
    files(tmp_path, **cpus, **{"sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n"})
    assert machine.core_kinds(tmp_path) == ((5500.0, 4), (3900.0, 8))
    assert machine.numa_nodes(tmp_path) == 2
    assert machine.huge_pages(tmp_path) == "madvise"


def test_a_quota_bounds_the_threads_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case, before = Case(), torch.get_num_threads()
    call = case.call(9)
    expected = run(CpuRunner(case.problem, case.weights()), call)
    monkeypatch.setattr(machine, "quota", lambda: 1.5)
    machine._warn.cache_clear()
    try:
        torch.set_num_threads(4)
        runner = CpuRunner(case.problem, case.weights())
        with pytest.warns(
            UserWarning, match=r"allow 1.5 cores' worth of time: the cpu backend takes 1 thread, torch has 4"
        ):
            assert torch.equal(expected, run(runner, call))
        assert runner.get_cache_key_extras([]) == ("threads", 1)
        assert {cut.threads for cut in runner._cuts_cache.values()} == {1}
    finally:
        torch.set_num_threads(before)
