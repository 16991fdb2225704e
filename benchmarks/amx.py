"""AMX on a machine that is lent for a minute: build the core, test it with MOESTRO_CPU_ISA=amx, time it beside AVX-512.

    python3 benchmarks/amx.py --out "$OUT" [--seconds 75]

Needs g++ (or c++, clang++) and torch; setuptools, ninja, Transformers and pytest's plugins are not needed. The tree is
only read: the core is compiled from its csrc with setup.py's flags into a folder of its own. Where pytest or hypothesis
is missing, the checks of cpu_machine.py are all that is tested, and the record says so. OUT/cpu_amx.json is written
after every step, a step that is killed or outlives its time is recorded as such, and the status is 0 if all is right.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "src/moestro/kernels/cpu/csrc"
TESTS = ("test_correct.py", "test_linear.py", "test_batch_invariant.py", "test_int4.py", "test_integers.py")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--seconds", type=float, default=75.0, help="for everything")
    parser.add_argument("--isa", default="amx", help="what is tested (another one: to try this script)")
    parser.add_argument("--beside", default="avx512")
    parser.add_argument("--threads", type=int, default=min(16, len(os.sched_getaffinity(0))))
    args = parser.parse_args()
    run = Run(args)
    ready = run.step(build) and run.step(instruction_sets)
    sys.exit(
        not (ready and all([run.step(unit_tests), run.step(measure)]))
    )  # a wrong one is timed all the same


class Run:
    """What has been found so far, on disk after each step, and the time that is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.monotonic()
        self.core = Path(tempfile.mkdtemp(prefix="moestro-core-")) / "_core.so"
        self.found: dict[str, Any] = {"command": " ".join([Path(sys.executable).name, *sys.argv])}
        args.out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return float(self.args.seconds) - (time.monotonic() - self.start)

    def step(self, step: Any) -> bool:
        before, name = time.monotonic(), step.__name__
        result = step(self)
        result["seconds"] = round(time.monotonic() - before, 1)
        self.found[name] = result
        (self.args.out / "cpu_amx.json").write_text(json.dumps(self.found, indent=1) + "\n")
        print(f"== {name}: {'right' if result['right'] else 'WRONG'} in {result['seconds']} s", flush=True)
        return bool(result["right"])

    def call(self, command: list[str], seconds: float, threads: int) -> dict[str, Any]:
        """The command's status and the end of its output; a negative status is a signal, None is out of time."""
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH")))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "MOESTRO_CPU_CORE": str(self.core),
            "MOESTRO_CPU_ISA": self.args.isa,
            "OMP_NUM_THREADS": str(threads),
        }
        with tempfile.TemporaryFile("w+") as output:
            try:
                status: int | None = subprocess.run(
                    command, cwd=ROOT, env=env, stdout=output, stderr=output, timeout=max(1.0, seconds)
                ).returncode
            except subprocess.TimeoutExpired:
                status = None
            output.seek(0)
            return {"right": status == 0, "status": status, "output": output.read()[-6000:].splitlines()}


def flags_of_setup() -> tuple[str, dict[str, str]]:
    """COMMON and X86 of setup.py, which sets up a package when it is imported: its plain assignments alone are run."""
    names = {"COMMON", "AVX512", "QUIET", "X86", "ARM"}
    tree = ast.parse((ROOT / "setup.py").read_text())
    kept: list[ast.stmt] = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in names
    ]
    found: dict[str, Any] = {}
    exec(compile(ast.Module(kept, []), "setup.py", "exec"), found)
    return found["COMMON"], {**dict.fromkeys(found["ARM"], "not here"), **found["X86"]}


def build(run: Run) -> dict[str, Any]:
    compiler = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if compiler is None:
        return {"right": False, "output": ["no C++ compiler: none of g++, c++, clang++"]}
    common, isa = flags_of_setup()
    sources = [path for path in sorted(CSRC.glob("*.cpp")) if isa.get(path.name) != "not here"]

    def compile_one(source: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
        target = run.core.with_name(source.stem + ".o")
        flags = [*shlex.split(common), *shlex.split(isa.get(source.name, "")), "-c", str(source)]
        return target, subprocess.run(
            [compiler, *flags, "-o", str(target)], capture_output=True, text=True, timeout=run.left()
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(compile_one, sources))
    wrong = [done.stderr for _, done in results if done.returncode]
    if not wrong:
        objects = [str(target) for target, _ in results]
        command = [compiler, "-shared", "-pthread", *objects, "-o", str(run.core)]
        linked = subprocess.run(command, capture_output=True, text=True)
        wrong = [linked.stderr] if linked.returncode else []
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return {"right": not wrong, "compiler": version, "machine": platform.machine(), "output": wrong}


def instruction_sets(run: Run) -> dict[str, Any]:
    code = "from moestro.kernels.cpu import core; print(*core.available_isas()); core.choose_isa()"
    result = run.call([sys.executable, "-c", code], run.left(), 1)
    print("\n".join(result["output"][-3:]), flush=True)
    return result


def unit_tests(run: Run) -> dict[str, Any]:
    """tests/kernels/cpu, a process a file side by side, each with a share of the threads."""
    if missing := [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]:
        print("not run:", *missing, "missing", flush=True)
        return {"right": True, "not_run": f"{', '.join(missing)} not installed"}

    def one(name: str) -> dict[str, Any]:
        options = ["-q", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-W", "ignore"]
        command = [sys.executable, "-m", "pytest", *options, f"tests/kernels/cpu/{name}"]
        return run.call(command, run.left() / 2, max(1, run.args.threads // len(TESTS)))

    with ThreadPoolExecutor(len(TESTS)) as pool:
        results = dict(zip(TESTS, pool.map(one, TESTS), strict=True))
    for name, result in results.items():
        print(f"{name}: status {result['status']}, {result['output'][-1:]}", flush=True)
    return {"right": all(result["right"] for result in results.values()), "files": results}


def measure(run: Run) -> dict[str, Any]:
    """benchmarks/cpu_machine.py: every format and tactic against the reference, then times beside another set."""
    record = run.core.with_name("machine.json")
    options = ["--beside", run.args.beside, "--tokens", "1,16,64,512,2048", "--rounds", "5"]
    command = [sys.executable, "benchmarks/cpu_machine.py", *options, "--json", str(record)]
    result = run.call(command, run.left(), run.args.threads)
    print("\n".join(result["output"]), flush=True)
    return {**result, "record": json.loads(record.read_text()) if record.exists() else None}


if __name__ == "__main__":
    main()
