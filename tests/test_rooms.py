"""The walls inside packages: which room may import which, and that no module imports itself by a detour."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "moestro"

# package -> room -> the rooms of it that it may import. A room is a folder or a file of the package.
ROOMS: Mapping[str, Mapping[str, set[str]]] = {
    "tuning": {
        "spec": set(),
        "progress": set(),
        "forks": set(),
        "link": {"spec"},
        "race": {"spec"},
        "store": {"spec", "forks"},
        "group": {"link", "spec", "store"},  # how ranks agree, in the words of records
        "measure": {"spec", "race", "store", "progress", "group"},
        "contexts": {"spec", "store", "measure", "progress", "group"},
        "lookup": {"spec", "store", "contexts"},
        "show": {"spec", "store", "lookup"},
    },
    "kernels/triton": {
        "device": set(),
        "words": set(),
        "chip": {"device"},
        "tactic": set(),
        "layout": {"device", "words"},
        "fp8_layout": {"chip", "layout", "words"},
        "call": {"device", "layout", "tactic", "chip"},
        "c_library": set(),
        "nvrtc": {"c_library"},
        "cuda_driver": {"c_library"},
        "graphs": {"c_library"},
        "cuda": {"nvrtc", "cuda_driver"},
        "cuda_source": set(),
        "paths": {
            "device",
            "words",
            "chip",
            "tactic",
            "layout",
            "fp8_layout",
            "call",
            "nvrtc",
            "cuda",
            "cuda_source",
        },
        "choose": {"chip", "tactic", "paths", "layout", "fp8_layout", "nvrtc"},
        "counters": {"device", "paths", "tactic"},
    },
    "kernels/portable": {
        "quantize": set(),
        "steady": set(),
        "stages": {"quantize", "steady"},
        "run": {"stages"},
        "invariant": {"stages", "steady"},
        "runner": {"run", "invariant", "stages"},
    },
}


def modules() -> list[str]:
    return [name_of(path) for path in sorted(SRC.rglob("*.py"))]


def name_of(path: Path) -> str:
    parts = ("moestro", *path.relative_to(SRC).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def path_of(module: str) -> Path:
    path = SRC.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def for_types_alone(tree: ast.AST) -> set[ast.AST]:
    """Everything under `if TYPE_CHECKING`."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            found |= {inner for statement in node.body for inner in ast.walk(statement)}
    return found


def imported(path: Path, known: set[str]) -> Iterator[tuple[str, bool]]:
    """(module of ours, whether it is imported with the file) for each import but those for types alone."""
    tree = ast.parse(path.read_text())
    skipped = for_types_alone(tree)
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if node in skipped or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [full if (full := f"{node.module}.{n}") in known else str(node.module) for n in names]
        for name in names:
            if name in known:
                yield name, node not in inside


def room_of(module: str, package: str) -> str | None:
    """The room of a package that a module stands in; "" for the package itself, None for one of another package."""
    prefix = "moestro." + package.replace("/", ".")
    if module == prefix:
        return ""
    return module.removeprefix(prefix + ".").split(".")[0] if module.startswith(prefix + ".") else None


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_only_what_lies_below_them(package: str) -> None:
    known, allowed, wrong = set(modules()), ROOMS[package], []
    for module in known:
        here = room_of(module, package)
        if not here or here not in allowed:
            continue
        for name, _ in imported(path_of(module), known):
            there = room_of(name, package)
            if there is not None and there != here and there not in allowed[here]:
                wrong.append(f"{module} imports {name}")
    assert sorted(wrong) == []


@pytest.mark.parametrize("package", ROOMS)
def test_the_table_names_rooms_that_exist(package: str) -> None:
    folder = SRC / package
    there = {p.stem for p in folder.glob("*.py")} | {
        p.name for p in folder.iterdir() if (p / "__init__.py").exists()
    }
    named = set(ROOMS[package]) | {room for rooms in ROOMS[package].values() for room in rooms}
    assert named - there == set()


def test_no_module_imports_itself_by_a_detour() -> None:
    """Imports with the file only: one inside a function is how a heavy or optional module is put off."""
    known = set(modules())
    edges = {m: {name for name, early in imported(path_of(m), known) if early and name != m} for m in known}
    assert circles(edges) == []


def test_the_search_finds_a_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for name in edges.get(waiting.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    waiting.append(name)
        return seen

    reached = {module: reach(module) for module in edges}
    groups = {
        tuple(sorted(n for n in reached[m] if m in reached.get(n, ()))) for m in edges if m in reached[m]
    }
    return [list(group) for group in sorted(groups)]
