"""Decisions on disk.

    root/<environment>/environment.json          the facts that the folder's name is a digest of
    root/<environment>/<op>-<key>/<bucket>.json  one decision, with its key and evidence
    root/<environment>/<op>-<key>/quarantine-<candidate>.json, miss-<size>.json

Every file is whole in itself, readable by a person, and written to a temporary name and renamed, so that any
number of processes may share a root without locks: two that write the same decision leave one of the two.
What cannot be read, is foreign or of another schema is a miss with one warning; it is never an error and
never deleted.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.errors import StoreWarning, TuningError
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.spec.plain_json import digest
from moestro.tuning.spec.specs import Sizes
from moestro.tuning.store.environment import Environment
from moestro.tuning.store.records import SCHEMA, Record

__all__ = ["Entry", "Store", "default_root"]

KINDS = {"decision", "quarantine", "miss"}
ELSEWHERE = 8  # other environments that a warm start looks into, the newest first


def default_root() -> Path:
    """$MOESTRO_STORE, or the user's cache directory."""
    given = os.environ.get("MOESTRO_STORE")
    if given:
        return Path(given)
    import platformdirs

    return Path(platformdirs.user_cache_dir("moestro")) / "tuning"


@dataclass(frozen=True)
class Entry:
    """One file of a store."""

    path: Path
    environment: str
    kind: str
    op: str
    key: Mapping[str, Any]
    data: Mapping[str, Any]

    @property
    def created(self) -> float:
        """When its content was made, in seconds since 1970."""
        return created(self.data)

    @property
    def record(self) -> Record:
        """The decision in it. Raises what Record.from_json raises."""
        return Record.from_json(self.data["record"])


def created(data: Mapping[str, Any]) -> float:
    """When an entry's content was made, in seconds since 1970."""
    return float(data.get("created", data.get("record", {}).get("created", 0.0)))


def folder_of(key: StaticKey) -> str:
    """The folder of a key's decisions, within an environment's."""
    return f"{re.sub(r'[^A-Za-z0-9_.]+', '_', key.op)[:60]}-{key.text}"


def _file_of(bucket: Sizes, probes: tuple[str, ...]) -> str:
    name = "x".join(map(str, bucket)) or "only"
    return f"{name}.json" if not probes else f"{name}-{digest(list(probes))[:8]}.json"


class Store:
    """A root directory. Nothing is created before something is written."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    # --- decisions -----------------------------------------------------------------------------------
    def load(self, environment: Environment, key: StaticKey) -> list[Record]:
        """This environment's decisions for a key."""
        entries = self._entries(self.root / environment.name / folder_of(key))
        return self._records(entry for entry in entries if entry.kind == "decision")

    def put(self, environment: Environment, key: StaticKey, record: Record) -> bool:
        """Write a decision; False, with one warning, if that cannot be."""
        data = {"record": record.to_json()}
        return self._write(environment, key, _file_of(record.bucket, record.probes), "decision", data)

    def put_entry(self, environment: Environment, entry: Entry) -> bool:
        """Write another store's entry; False if what is here is as new. TuningError if it cannot be."""
        key = StaticKey.from_fields(entry.key)
        if entry.kind == "decision":
            written = entry.data["record"]  # as it is: its tactic's class may not be loaded here
            name = _file_of(tuple(map(int, written["bucket"])), tuple(written["probes"]))
        else:
            name = f"quarantine-{digest(entry.data['candidate'])}.json"
        path = self.root / environment.name / folder_of(key) / name
        here = self._read(path)
        if here is not None and created(here) >= created(entry.data):
            return False
        data = {
            k: v for k, v in entry.data.items() if k not in {"schema", "kind", "op", "key", "environment"}
        }
        if not self._write(environment, key, name, entry.kind, data):
            raise TuningError(f"the store {self.root} cannot be written")
        return True

    def elsewhere(self, environment: Environment, key: StaticKey) -> list[Record]:
        """Decisions for the same key in other environments, the newest first: a warm start."""
        folders = [path / folder_of(key) for path in self.environments() if path.name != environment.name][
            :ELSEWHERE
        ]
        return [record for folder in folders if folder.is_dir() for record in self._quiet(folder)]

    # --- quarantine and misses -----------------------------------------------------------------------
    def ban(self, environment: Environment, key: StaticKey, candidate: str, reason: str) -> None:
        """Remember that a candidate must not be tried again here, and why."""
        data = {"candidate": candidate, "reason": reason, "created": time.time()}
        self._write(environment, key, f"quarantine-{digest(candidate)}.json", "quarantine", data)

    def banned(self, environment: Environment, key: StaticKey) -> dict[str, str]:
        """Candidate -> reason, of everything in quarantine for a key."""
        entries = self._entries(self.root / environment.name / folder_of(key))
        return {str(e.data["candidate"]): str(e.data["reason"]) for e in entries if e.kind == "quarantine"}

    def log_miss(
        self, environment: Environment, key: StaticKey, label: Sizes, miss: Mapping[str, Any]
    ) -> None:
        """Remember sizes that were served from beyond what was tuned; one file for each label."""
        self._write(environment, key, f"miss-{'x'.join(map(str, label))}.json", "miss", miss)

    # --- everything ----------------------------------------------------------------------------------
    def environments(self) -> list[Path]:
        """The environments' folders, the one changed last first."""
        try:
            folders = [path for path in self.root.iterdir() if path.is_dir()]
            return sorted(folders, key=lambda path: -path.stat().st_mtime)
        except OSError:
            return []

    def facts(self, environment: str) -> dict[str, Any]:
        """The facts of an environment, by its folder's name; empty if unknown."""
        data = self._read(self.root / environment / "environment.json")
        return dict(data.get("facts", {})) if data is not None else {}

    def entries(self, kinds: Iterable[str] = ("decision",)) -> list[Entry]:
        """Every readable file of these kinds in every environment."""
        wanted = set(kinds)
        folders = [
            folder for path in self.environments() for folder in sorted(path.iterdir()) if folder.is_dir()
        ]
        return [entry for folder in folders for entry in self._entries(folder) if entry.kind in wanted]

    def _quiet(self, folder: Path) -> list[Record]:
        """Other environments' records; what cannot be read there is their problem."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StoreWarning)
            return self._records(e for e in self._entries(folder) if e.kind == "decision")

    def _records(self, entries: Iterable[Entry]) -> list[Record]:
        records = []
        for entry in entries:
            try:
                records.append(entry.record)
            except Exception as error:
                self._warn(
                    str(entry.path), f"{entry.path} does not hold a decision ({error}); it is not used"
                )
        return records

    def _entries(self, folder: Path) -> Iterator[Entry]:
        try:
            paths = sorted(path for path in folder.iterdir() if path.suffix == ".json")
        except OSError:
            return
        for path in paths:
            data = self._read(path)
            if data is None:
                continue
            if data.get("kind") not in KINDS or not isinstance(data.get("key"), dict):
                self._warn(str(path), f"{path} is not a file of this store; it is not used")
                continue
            yield Entry(path, folder.parent.name, data["kind"], str(data.get("op")), data["key"], data)

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._warn(str(path), f"{path} cannot be read ({error}); it is not used")
            return None
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            self._warn(str(path), f"{path} has schema {found!r}, this version reads {SCHEMA}; it is not used")
            return None
        return data

    def _write(
        self, environment: Environment, key: StaticKey, name: str, kind: str, data: Mapping[str, Any]
    ) -> bool:
        home = self.root / environment.name
        whole = {"schema": SCHEMA, "kind": kind, "op": key.op, "key": key.fields, **data}
        try:
            if not (home / "environment.json").exists():
                write_atomically(home / "environment.json", {"schema": SCHEMA, "facts": environment.facts})
            write_atomically(home / folder_of(key) / name, whole)
        except OSError as error:
            self._warn(
                "write", f"the store {self.root} cannot be written ({error}); decisions stay in memory"
            )
            return False
        return True

    def _warn(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, StoreWarning, stacklevel=2)


def write_atomically(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON so that a reader sees the old file or the new one, whenever this process ends. Raises
    OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
