"""`moestro doctor`: what this machine has, and which backends will run which formats, or why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from moestro.cli.console import output
from moestro.cli.options import writable
from moestro.machine import bytes_text

__all__ = ["doctor"]


def doctor(
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the findings as JSON; - for the terminal."),
    ] = None,
) -> None:
    """What this machine has, and which backends will run: with the reason for each that won't.

    Exit status 0 as long as one backend runs NVFP4 and bf16 on some device.
    """
    from moestro.bench import checkup, results

    to_terminal = str(json_file) == "-"
    if not to_terminal:
        writable(json_file)
    found = checkup.examine()
    if to_terminal:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(found)
        if json_file is not None:
            results.write_json(json_file, found)
    if not any(entry["runs"] for entry in found["backends"]):
        raise typer.Exit(1)


def _show(found: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _machine_lines(found):
        table.add_row(name, text)
    output.print(table)
    output.print()
    backends = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("device", "backend", "formats", "runs"):
        backends.add_column(title, overflow="fold")
    for (device, backend, verdict), names in _grouped(found["backends"]).items():
        runs = verdict is None
        said = Text("yes", style="green") if runs else Text(f"no: {verdict}", style="yellow")
        backends.add_row(device, backend, " ".join(names), said)
    output.print(backends)
    for device, choices in found["first_choices"].items():
        output.print()
        output.print(_choices_table(device, choices))


def _choices_table(device: str, choices: dict[str, dict[str, str | None]]) -> Table:
    """What backend="auto" begins with, by format of weights and what x is."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in (f"auto, {device}", *next(iter(choices.values()))):
        table.add_column(title, overflow="fold")
    for format, by_x in choices.items():
        table.add_row(format, *(name or "none" for name in by_x.values()))
    return table


def _grouped(entries: list[dict[str, Any]]) -> dict[tuple[str, str, str | None], list[str]]:
    """(device, backend, why not) -> formats; a reason that all backends of a device share is said once."""
    groups: dict[tuple[str, str, str | None], list[str]] = {}
    for device in dict.fromkeys(entry["device"] for entry in entries):
        here = [entry for entry in entries if entry["device"] == device]
        reasons = {entry["why_not"] for entry in here}
        if len(reasons) == 1 and reasons != {None}:
            groups[device, "all", reasons.pop()] = ["all"]
            continue
        for entry in here:
            groups.setdefault((device, entry["backend"], entry["why_not"]), []).append(entry["format"])
    return groups


def _instructions(cpu: dict[str, Any]) -> str:
    if not cpu["isas"]:
        return "no compiled core"
    return f"{cpu['isas'][0]} (also here: {', '.join(cpu['isas'][1:]) or 'nothing else'})"


def _threads(cpu: dict[str, Any]) -> str:
    quota = (
        "no cgroup limit" if cpu["quota"] is None else f"cgroups allow {cpu['quota']:g} cores' worth of time"
    )
    kinds = [f"{count} at {value:g}" for value, count in cpu["core_kinds"]]
    hybrid = (
        f"; CPUs of several kinds: {', '.join(kinds)} (MHz or capacity), the slower take less of the work"
        if len(kinds) > 1
        else ""
    )
    pinned = f"pinned by {cpu['pinned_by']}" if cpu["pinned_by"] else "not pinned"
    return f"{cpu['threads']} for the cpu backend, {pinned}; {quota}{_siblings(cpu)}{hybrid}"


def _siblings(cpu: dict[str, Any]) -> str:
    """How many CPUs affinity and cpusets allow, and whether two are one core's."""
    cpus, cores = cpu["cpus_allowed"], cpu["cores_allowed"]
    if not cpus:
        return ""
    return f"; {cpus} CPUs allowed" + (f", threads of {cores} cores" if cores < cpus else ", a core each")


def _pages(cpu: dict[str, Any]) -> str:
    """The memory nodes and where weights will lie; huge pages and whether weights will ask for them."""
    nodes = [f"{node['number']} ({node['cpus']} CPUs)" for node in cpu["numa_nodes"] if node["memory"]]
    over = cpu["spread_nodes"]
    where = (
        f"weights are spread over nodes {', '.join(map(str, over))}"
        if over
        else "weights lie where they are packed"
    )
    said = f", memory nodes {', '.join(nodes)}: {where}" if len(nodes) > 1 else ""
    kind = cpu["huge_pages"]
    asks = {
        "always": "always",
        "madvise": "madvise (packed weights ask for them)",
        "never": "never (weights lie in small pages)",
    }
    return f"{said}; transparent huge pages: {asks.get(kind, kind or 'not known')}"


def _machine_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, memory, software = found["cpu"], found["memory"], found["software"]
    cache = f", {bytes_text(cpu['cache_bytes'])} last-level cache"
    lines = [
        ("processor", f"{cpu['name']}, {cpu['cores']} cores for this process{cache}"),
        ("features", ", ".join(cpu["features"]) or "none that the kernels use"),
    ]
    lines.append(("instructions", _instructions(cpu)))
    lines.append(("threads", _threads(cpu)))
    if memory:
        lines.append(
            (
                "memory",
                f"{bytes_text(memory['total'])}, {bytes_text(memory['available'])} available{_pages(cpu)}",
            )
        )
    if isinstance(found["gpus"], str):
        lines.append(("GPU", f"none: {found['gpus']}"))
    for gpu in found["gpus"] if not isinstance(found["gpus"], str) else []:
        lines.append(
            (
                f"GPU {gpu['index']}",
                f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {bytes_text(gpu['memory'])}",
            )
        )
    lines.append(("driver", software.get("driver") or "none"))
    lines += [(name, value or "not installed") for name, value in software.items() if name != "driver"]
    lines.append(("store", f"{found['store']['path']} ({found['store']['decisions']} decisions)"))
    for bundle in found["bundles"]:
        counts = f"{bundle['decisions']} decisions for {bundle['layers']} layers"
        lines.append((f"bundle {bundle['bundle']}", f"{counts}: {bundle['verdict']}"))
    return lines
