"""The Python packages that a GPU machine without a network lacks, in one folder to carry: .gpu/site.

    python benchmarks/gpu_site.py                       about 340 MB of downloads, kept in .whl; prints sizes
    PYTHONPATH=src:.gpu/site python3 benchmarks/...     on the machine

Peers' packages and what Moestro needs, for Python 3.12 on x86-64: humming from its wheel; triton_kernels 3.5.1 and
DeepGEMM out of vLLM's wheel, which bundles them (they are on no registry), DeepGEMM's library without its debug
information (27 of its 29 MB). The folder stands before the machine's own packages, so it holds what is named here and
no more: a typer or a pydantic of another version beside the machine's own breaks both. Exit status 1, and no folder,
where the folder would be larger than --most MiB.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# wheel as pip takes it -> folders of it that are carried, and their new places
WHEELS: dict[str, dict[str, str]] = {
    "humming-kernels==0.1.19": {"humming": "humming"},
    "vllm==0.33.0": {
        "vllm/third_party/triton_kernels": "triton_kernels",
        "vllm/third_party/deep_gemm": "deep_gemm",
    },
    "platformdirs==4.14.8": {"platformdirs": "platformdirs"},
}
OWN = ("typer", "pydantic", "torch", "triton", "numpy", "transformers", "rich")  # the machine's
PLATFORMS = [*(f"manylinux_2_{n}_x86_64" for n in (28, 27, 17, 31, 34, 35)), "manylinux2014_x86_64", "any"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--site", type=Path, default=ROOT / ".gpu" / "site")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".whl", help="where downloads are kept")
    parser.add_argument("--most", type=float, default=60.0, help="MiB of the folder")
    options = parser.parse_args()
    options.site.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.site.parent) as scratch:
        made = Path(scratch) / "site"
        for wheel, folders in WHEELS.items():
            unpack(wheel_of(wheel, options.wheels), folders, made)
        strip(made / "deep_gemm")
        sizes = {folder.name: mib(folder) for folder in sorted(made.iterdir())}
        print(*(f"{size:7.1f} MiB  {name}" for name, size in sizes.items()), sep="\n")
        print(f"{sum(sizes.values()):7.1f} MiB  together, at most {options.most:g}")
        if foreign := [name for name in OWN if name in sizes]:
            print(f"{', '.join(foreign)} would hide the machine's own", file=sys.stderr)
            return 1
        if sum(sizes.values()) > options.most:
            return 1
        shutil.rmtree(options.site, ignore_errors=True)
        shutil.move(made, options.site)
    return 0


def wheel_of(name: str, folder: Path) -> Path:
    """The wheel's file, downloaded unless it is there. SystemExit where pip cannot."""
    project, version = name.split("==")
    pattern = f"{project.replace('-', '_')}-{version}-*.whl"
    if not any(folder.glob(pattern)):
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", "3.12", "--implementation", "cp", *platforms, "-d", str(folder), name]
        if subprocess.run(command).returncode:
            raise SystemExit(f"pip could not download {name}")
    [found] = folder.glob(pattern)
    return found


def unpack(wheel: Path, folders: dict[str, str], site: Path) -> None:
    """Copy folders of a wheel to their places. SystemExit for one that it does not have."""
    with zipfile.ZipFile(wheel) as archive:
        for inside, place in folders.items():
            names = [name for name in archive.namelist() if name.startswith(f"{inside}/")]
            if not names:
                raise SystemExit(f"{wheel.name} has no {inside}")
            for name in (name for name in names if not name.endswith("/")):
                target = site / place / name.removeprefix(f"{inside}/")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
                if archive.getinfo(name).external_attr >> 16 & 0o100:  # humming runs a compiler of its own
                    target.chmod(0o755)


def strip(folder: Path) -> None:
    """Take the debug information out of libraries; where there is no `strip`, they stay as they are, and it is said."""
    libraries = [str(path) for path in folder.rglob("*.so*")]
    if shutil.which("strip") is None:
        print("no `strip` here: libraries keep their debug information", file=sys.stderr)
    elif libraries:
        subprocess.run(["strip", "--strip-debug", *libraries], check=True)


def mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


if __name__ == "__main__":
    sys.exit(main())
