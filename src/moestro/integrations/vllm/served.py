"""What served, from a server's log: `moestro explain --vllm LOG`.

The plugin writes a line for each shape of layer that it serves, one for each reason to leave layers to vLLM, and
warnings (log.py); every process of a server writes its own, behind its name and pid where vLLM puts them. What
ranks have in common is said once; what they serve differently is two rows. Sizes beyond all that was tuned are in
the miss logs of the stores that the lines name. Imports neither vLLM nor torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.errors import MoestroError
from moestro.tuning.show.explain import age_text
from moestro.tuning.store.store import Store

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LINE = re.compile(
    r"(?:\((?P<process>[^()]*pid=\d+)\))?.*?\b(?P<level>INFO|WARNING)\b.*?moestro: (?P<text>.*)"
)
BEYOND = re.compile(r"TuningWarning: (?P<text>.*)")
SERVES = re.compile(
    r"serves (?P<kind>\S+) experts \((?P<sizes>E .*?), (?P<nbytes>\d+) bytes a layer\) on the (?P<backend>\S+) backend"
    r"(?P<invariant>, rows the same in any batch)?; "
    r"decisions by tokens(?P<together>, of all ranks)?: (?P<decisions>.*); store: (?P<store>.*)"
)
LEFT = re.compile(r"(?P<kind>.+?)(?:'s)? experts are left to vLLM: (?P<reason>.*)")
NAMES = {  # sizes in the line -> in a problem's fields
    "E": "num_experts",
    "local": "num_local_experts",
    "K": "top_k",
    "H": "hidden_size",
    "I": "intermediate_size",
}


@dataclass(frozen=True)
class Served:
    """One shape of layer, and what serves it. decisions: (tokens, tactic and how it is known)."""

    kind: str
    sizes: str
    backend: str
    invariant: bool  # VLLM_BATCH_INVARIANT
    together: bool
    decisions: tuple[tuple[str, str], ...]
    store: str

    def fields(self) -> dict[str, int | str]:
        """Its problem's fields, as far as the line tells them."""
        pairs = (one.split(" ") for one in self.sizes.split(", "))
        return {"weight_format": self.kind, **{NAMES[name]: int(value) for name, value in pairs}}


@dataclass(frozen=True)
class Said:
    """What the processes of a server said; each with the processes that said it."""

    served: Mapping[Served, list[str]]
    left: Mapping[str, list[str]]  # "bf16 experts: reason"
    warnings: Mapping[str, list[str]]


def read(path: Path) -> Said:
    """The lines of a log, or of all files in a folder. MoestroError where there is none of the plugin's."""
    said = Said({}, {}, {})
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise MoestroError(f"{file} cannot be read: {error}") from error
        _collect(said, text.splitlines())
    if not (said.served or said.left or said.warnings):
        raise MoestroError(
            f"{path} has no line of Moestro's plugin ('moestro: serves ...'): was it installed beside vLLM, on "
            "(MOESTRO_VLLM, VLLM_PLUGINS), and the log level INFO?"
        )
    return said


def _collect(said: Said, lines: Iterable[str]) -> None:
    for line in lines:
        plain = COLOUR.sub("", line)
        if found := LINE.search(plain):
            process, text = found["process"] or "one process", found["text"]
            if served := SERVES.match(text):
                _add(said.served, _served(served), process)
            elif left := LEFT.match(text):
                _add(said.left, f"{left['kind']}: {left['reason']}", process)
            elif found["level"] == "WARNING":
                _add(said.warnings, text, process)
        elif found := BEYOND.search(plain):
            _add(said.warnings, found["text"], "")


def _add(of: Any, what: Any, process: str) -> None:
    names = of.setdefault(what, [])
    if process and process not in names:
        names.append(process)


def _served(found: re.Match[str]) -> Served:
    pairs = [one.partition(": ") for one in found["decisions"].split("; ")]
    decisions = tuple((tokens, words) for tokens, _, words in pairs)
    together = found["together"] is not None
    return Served(
        found["kind"],
        found["sizes"],
        found["backend"],
        found["invariant"] is not None,
        together,
        decisions,
        found["store"].strip(),
    )


# --- in words --------------------------------------------------------------------------------------------
def explain(said: Said) -> Iterator[str]:
    """Lines of text."""
    for served, processes in said.served.items():
        ranks = ", one decision of all ranks" if served.together else ""
        rows = ", rows the same in any batch" if served.invariant else ""
        yield f"{served.kind} experts ({served.sizes}) on the {served.backend} backend{rows}{ranks}"
        yield f"  in {', '.join(processes)}"
        width = max(len(tokens) for tokens, _ in served.decisions)
        yield from (f"  {tokens:>{width}} tokens: {words}" for tokens, words in served.decisions)
        yield f"  store: {served.store}"
        yield from _misses(served)
        yield ""
    for title, found in (("left to vLLM", said.left), ("warnings", said.warnings)):
        if found:
            yield title
            yield from (f"  {text}{_by(processes)}" for text, processes in found.items())
            yield ""


def _by(processes: list[str]) -> str:
    return f"  [{', '.join(processes)}]" if processes else ""


def _misses(served: Served) -> Iterator[str]:
    """Sizes of this layer beyond all that was tuned, from the store's miss log."""
    if served.store == "none":
        return
    wanted = served.fields()
    for entry in sorted(Store(served.store).entries(("miss",)), key=lambda e: e.data.get("sizes", [])):
        if any(_holds(runner, wanted) for runner in entry.key.get("runners", [])):
            asked, used = (" x ".join(map(str, entry.data[name])) for name in ("sizes", "bucket"))
            yield (
                f"  beyond what was tuned: {asked} tokens, served by the decision for {used}; "
                f"{age_text(entry.created)} (`moestro tune --from-misses`)"
            )


def _holds(runner: Mapping[str, Any], wanted: Mapping[str, int | str]) -> bool:
    fields = runner.get("config", {}).get("problem", {}).get("fields", {})
    return all(fields.get(name) == value for name, value in wanted.items())
