"""What the system allows: read from files like Linux's, in a folder of their own."""

from __future__ import annotations

import ctypes
import platform
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from cpu_cases import Case, relative_error, run

from moestro.cli import doctor
from moestro.kernels.cpu import CpuRunner, machine, memory, placement


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
    assert machine.cores(tmp_path) == (0, 0)
    assert machine.allowed_cpus(tmp_path) is None
    assert memory.nodes(tmp_path) == memory.spread_nodes(tmp_path) == ()
    assert memory.huge_pages(tmp_path) is None


def test_hybrid_cores_and_pages(tmp_path: Path) -> None:
    cpus = {f"sys/devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq": "5200000\n" for i in range(4)}
    cpus |= {f"sys/devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq": "3900000\n" for i in range(4, 12)}
    cpus["sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"] = (
        "5500000\n"  # the favoured core of its kind
    )
    files(tmp_path, **cpus, **{"sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n"})
    assert machine.core_kinds(tmp_path) == ((5500.0, 4), (3900.0, 8))
    assert memory.huge_pages(tmp_path) == "madvise"
    files(tmp_path, **{"proc/self/status": "Cpus_allowed_list:\t4-7\n"})  # of the slow ones alone
    assert machine.core_kinds(tmp_path) == ((3900.0, 4),)
    files(tmp_path, **{"sys/devices/system/cpu/online": "0-5\n"})
    assert machine.core_kinds(tmp_path) == ((3900.0, 2),)


def test_capacities_of_big_and_little_arm_cores(tmp_path: Path) -> None:
    capacities = [1024, 1024, 905, 462, 462, 462]
    files(
        tmp_path,
        **{f"sys/devices/system/cpu/cpu{i}/cpu_capacity": f"{c}\n" for i, c in enumerate(capacities)},
    )
    assert machine.core_kinds(tmp_path) == ((1024.0, 3), (462.0, 3))


def server(root: Path, cpus: str = "0-15", mems: str = "0-1", has_memory: str = "0-1") -> Path:
    """Two nodes of four cores with two threads each: siblings are 8 apart."""
    siblings = {
        f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 8},{i % 8 + 8}\n"
        for i in range(16)
    }
    return files(
        root,
        **siblings,
        **{
            "proc/self/status": f"Name:\tx\nCpus_allowed_list:\t{cpus}\nMems_allowed_list:\t{mems}\n",
            "sys/devices/system/cpu/online": "0-15\n",
            "sys/devices/system/node/has_memory": f"{has_memory}\n",
            "sys/devices/system/node/node0/cpulist": "0-3,8-11\n",
            "sys/devices/system/node/node1/cpulist": "4-7,12-15\n",
        },
    )


@pytest.mark.parametrize(
    ("cpus", "expected"), [("0-15", (16, 8)), ("0-7", (8, 8)), ("0,8", (2, 1)), ("3,5,11", (3, 2))]
)
def test_siblings_of_one_core_are_counted_once(tmp_path: Path, cpus: str, expected: tuple[int, int]) -> None:
    assert machine.cores(server(tmp_path, cpus)) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (0, 1)),
        ({"cpus": "2,4"}, (0, 1)),
        ({"cpus": "0-3,8-11"}, ()),  # bound to one node: first use puts pages there
        ({"mems": "1"}, ()),  # a cpuset with the memory of one
        ({"has_memory": "0"}, ()),  # a node of CPUs alone
    ],
)
def test_weights_are_spread_over_the_nodes_whose_cpus_and_memory_the_process_has(
    tmp_path: Path, change: dict[str, str], expected: tuple[int, ...]
) -> None:
    assert memory.spread_nodes(server(tmp_path, **change)) == expected


def test_a_process_pinned_by_openmp_is_not_taken_for_one_of_few_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    server(tmp_path, "0")  # what the first thread sees of itself then
    assert machine.cores(tmp_path) == (16, 8)
    assert memory.spread_nodes(tmp_path) == (0, 1)
    assert placement.placement(tmp_path).pinned_by == "OMP_PROC_BIND=close"
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    assert machine.cores(tmp_path) == (1, 1)


def test_doctor_says_what_it_found_and_what_will_be_done(tmp_path: Path) -> None:
    files(
        server(tmp_path),
        **{
            "proc/self/cgroup": "4:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "600000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
        },
    )
    found = asdict(placement.placement(tmp_path))
    text = doctor._threads(found)
    assert "cgroups allow 6 cores' worth of time; 16 CPUs allowed, threads of 8 cores" in text
    assert doctor._pages(found) == (
        ", memory nodes 0 (8 CPUs), 1 (8 CPUs): weights are spread over nodes 0, 1; "
        "transparent huge pages: never (weights lie in small pages)"
    )


def test_pages_are_dealt_out_to_the_nodes_that_are_asked_for() -> None:
    """On node 0 alone, which every machine has: what the system then says of the memory."""
    number = {"x86_64": 239, "aarch64": 236}.get(platform.machine())  # get_mempolicy
    if number is None or not Path("/sys/devices/system/node/node0").exists():
        pytest.skip("no memory nodes here, or no number of the system call")
    out = torch.empty(1 << 20, dtype=torch.uint8)
    memory._refused.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        done = memory.spread(out.data_ptr(), out.nbytes, (0,))
    if not done:
        assert "could not be spread over the memory nodes [0]" in str(said[0].message)
        pytest.skip(f"mbind is not allowed here: {said[0].message}")
    policy, mask = ctypes.c_int(-1), (ctypes.c_ulong * (memory.MOST_NODES // 64))()
    middle = ctypes.c_ulong(out.data_ptr() + out.nbytes // 2)
    call = ctypes.CDLL(None, use_errno=True).syscall
    at_address = ctypes.c_ulong(2)  # MPOL_F_ADDR
    assert (
        call(
            ctypes.c_long(number),
            ctypes.byref(policy),
            mask,
            ctypes.c_ulong(memory.MOST_NODES),
            middle,
            at_address,
        )
        == 0
    )
    assert (policy.value, mask[0]) == (memory.INTERLEAVE, 1)
    out.fill_(1)
    assert int(out.sum()) == out.nbytes


def test_weights_that_cannot_be_spread_are_packed_all_the_same_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "_spread_here", lambda: (0, 1))
    monkeypatch.setattr(memory, "MBIND", {platform.machine(): 100_000})  # a call that no system has
    memory._refused.cache_clear()
    case = Case()
    w, call = case.fresh_weights(), case.call(3)
    with pytest.warns(
        UserWarning, match=r"could not be spread over the memory nodes \[0, 1\]: Function not"
    ) as said:
        y = run(CpuRunner(case.problem, w), call)
    assert len(said) == 1
    assert relative_error(y, case.expected(call, w)) < 4e-3


def test_more_threads_than_cpus_run_and_say_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_num_cpus", lambda: 2)
    monkeypatch.setattr(machine, "quota", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    machine._warn_of_cpus.cache_clear()
    with pytest.warns(UserWarning, match=r"torch has 7 threads, this process may use 2 CPUs"):
        assert machine.threads() == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert machine.threads() == 7


def test_a_quota_bounds_the_threads_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, set_torch_threads: Callable[[int], None]
) -> None:
    case = Case()
    call = case.call(9)
    expected = run(CpuRunner(case.problem, case.weights()), call)
    monkeypatch.setattr(machine, "quota", lambda: 1.5)
    machine._warn.cache_clear()
    set_torch_threads(4)
    runner = CpuRunner(case.problem, case.weights())
    with pytest.warns(
        UserWarning, match=r"allow 1.5 cores' worth of time: the cpu backend takes 1 thread, torch has 4"
    ):
        assert torch.equal(expected, run(runner, call))
    assert runner.get_cache_key_extras([]) == ("threads", 1)
    assert {cut.threads for cut in runner._cuts_cache.values()} == {1}
