"""Decisions on disk.

    root/<environment>/environment.json          the facts that the folder's name is a digest of
    root/<environment>/<op>-<key>/<bucket>.json  one decision, with its key and evidence
    root/<environment>/<op>-<key>/quarantine-<candidate>.json, miss-<size>.json

Every file is whole in itself, readable by a person, and written to a temporary name and renamed, so that any
number of processes may share a root without locks: two that write the same decision leave one of the two.
What cannot be read, is foreign (another key than its folder's, another bucket than its name's, a runner that
is not in its key) or of another schema is a miss with one warning; it is never an error and never deleted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.spec.evidence import SCHEMA, Record
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.spec.plain_json import digest
from moestro.tuning.spec.specs import Sizes
from moestro.tuning.store.environment import Environment
from moestro.tuning.store.notices import notice

__all__ = ["Entry", "Store", "default_root", "default_store", "write_text_atomically"]

KINDS = {"decision", "quarantine", "miss"}
ELSEWHERE = 8  # other environments that a warm start looks into, the newest first


def default_root() -> Path:
    """$MOESTRO_STORE, or the user's cache directory. Raises TuningError where there is no home at all."""
    given = os.environ.get("MOESTRO_STORE")
    if given:
        return Path(given)
    import platformdirs

    try:
        return Path(platformdirs.user_cache_dir("moestro")) / "tuning"
    except (RuntimeError, KeyError, OSError) as error:  # a user without HOME and passwd entry
        raise TuningError(
            f"no place for a store: {error}. Set MOESTRO_STORE (or HOME, or XDG_CACHE_HOME)"
        ) from error


def default_store() -> Store | None:
    """The user's store; None, with one warning, where there is no place for it: decisions stay in memory."""
    try:
        return Store(default_root())
    except TuningError as error:
        notice(f"{error}; decisions stay in memory", stacklevel=4)
        return None


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

    @property
    def file_name(self) -> str:
        """What its file is called. Raises KeyError, TypeError or ValueError for what is no entry."""
        if self.kind == "quarantine":
            return f"quarantine-{digest(str(self.data['candidate']))}.json"
        record = Record.unmade(self.data["record"])  # its tactic's class may not be loaded here
        return _file_of(record.bucket, record.probes)

    def why_foreign(self, keys: dict[str, str]) -> str | None:
        """What is wrong with a file that does not belong where it is. keys: key -> folder, kept between calls."""
        try:
            if self.kind not in KINDS:
                return f"kind {self.kind!r}"
            text = json.dumps(self.key, sort_keys=True)
            if text not in keys:
                keys[text] = folder_of(StaticKey.from_fields(self.key))
            if keys[text] != self.path.parent.name or self.op != self.key["op"]:
                return f"its key belongs to {keys[text]}"
            if self.kind == "quarantine":
                str(self.data["candidate"]), str(self.data["reason"])
            elif self.kind == "miss":
                return None
            if self.path.name != self.file_name:
                return f"its content belongs to {self.file_name}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None


def created(data: Mapping[str, Any]) -> float:
    """When an entry's content was made, in seconds since 1970; 0 where it does not say."""
    record = data.get("record", {})
    value = data.get("created", record.get("created", 0.0) if isinstance(record, Mapping) else 0.0)
    return float(value) if type(value) in (int, float) and math.isfinite(value) else 0.0


def folder_of(key: StaticKey) -> str:
    """The folder of a key's decisions, within an environment's."""
    return f"{re.sub(r'[^A-Za-z0-9_.]+', '_', key.op)[:60]}-{key.text}"


def _file_of(bucket: Sizes, probes: tuple[str, ...]) -> str:
    name = "x".join(map(str, bucket)) or "only"
    return f"{name}.json" if not probes else f"{name}-{digest(list(probes))[:8]}.json"


class Store:
    """A root directory; nothing is created before something is written.

    `~` and relative paths are resolved when it is made. Raises TuningError for a path that cannot be one.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        try:
            text = os.fspath(root)
            if not isinstance(text, str) or not text or "\0" in text:
                raise ValueError("no path")
            self.root = Path(os.path.abspath(Path(text).expanduser()))
        except (TypeError, ValueError, RuntimeError, OSError) as error:
            raise TuningError(f"a store must be a folder's path, got {root!r}: {error}") from error
        self.unwritable: str | None = None  # why something could not be written, if ever
        self._warned: set[str] = set()
        self._families: dict[
            str, tuple[int, dict[str, list[Path]]]
        ] = {}  # environment -> (time, family -> folders)

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    # --- decisions -----------------------------------------------------------------------------------
    def folder(self, environment: Environment, key: StaticKey) -> Path:
        """Where a key's decisions are."""
        return self.root / environment.name / folder_of(key)

    def load(self, environment: Environment, key: StaticKey, arity: int | None = None) -> list[Record]:
        """This environment's decisions for a key. arity: how many sizes a bucket must have."""
        entries = self._entries(self.folder(environment, key))
        return self._records((e for e in entries if e.kind == "decision"), key, arity)

    def put(self, environment: Environment, key: StaticKey, record: Record) -> bool:
        """Write a decision; False, with one warning, if that cannot be."""
        data = {"record": record.to_json()}
        return self._write(environment, key, _file_of(record.bucket, record.probes), "decision", data)

    def put_entry(self, environment: Environment, entry: Entry) -> bool:
        """Write another store's entry; False if what is here is as new. TuningError if it cannot be."""
        try:
            key = StaticKey.from_fields(entry.key)
            name = entry.file_name
        except (KeyError, TypeError, ValueError, AttributeError, TuningError) as error:
            raise TuningError(f"{entry.path} does not hold an entry of a store: {error!r}") from error
        here = self._read(self.folder(environment, key) / name)
        if here is not None and created(here) >= created(entry.data):
            return False
        left_out = {"schema", "kind", "op", "key", "environment"}
        data = {k: v for k, v in entry.data.items() if k not in left_out}
        if not self._write(environment, key, name, entry.kind, data):
            raise TuningError(f"the store {self.root} cannot be written")
        return True

    def elsewhere(self, environment: Environment, key: StaticKey, arity: int | None = None) -> list[Record]:
        """Decisions for the same key in other environments, the newest first: a warm start."""
        others = [path for path in self.environments() if path.name != environment.name][:ELSEWHERE]
        return [r for path in others for r in self._quiet(path / folder_of(key), key, arity)]

    def relatives(
        self, environment: Environment, key: StaticKey, arity: int | None = None
    ) -> list[tuple[StaticKey, list[Record]]]:
        """Decisions of this environment for keys that differ in who takes part only."""
        found = []
        for folder in self._folders_of_family(environment, key):
            entries = [entry for entry in self._entries(folder) if entry.kind == "decision"]
            if entries:
                other = StaticKey.from_fields(entries[0].key)
                if other.family == key.family and other.text != key.text:
                    found.append((other, self._records(entries, other, arity)))
        return found

    def _folders_of_family(self, environment: Environment, key: StaticKey) -> list[Path]:
        """The folders of one family, from an index that is made again when a folder has come or gone."""
        home = self.root / environment.name
        try:
            changed = home.stat().st_mtime_ns
            known = self._families.get(environment.name)
            if known is None or known[0] != changed:
                known = self._families[environment.name] = (changed, _index(home))
        except (OSError, ValueError):
            return []
        return known[1].get(key.family, [])

    # --- quarantine and misses -----------------------------------------------------------------------
    def ban(self, environment: Environment, key: StaticKey, candidate: str, reason: str) -> None:
        """Remember that a candidate must not be tried again here, and why."""
        data = {"candidate": candidate, "reason": reason, "created": time.time()}
        self._write(environment, key, f"quarantine-{digest(candidate)}.json", "quarantine", data)

    def banned(self, environment: Environment, key: StaticKey) -> dict[str, str]:
        """Candidate -> reason, of everything in quarantine for a key."""
        entries = self._entries(self.folder(environment, key), quiet=True)
        return {str(e.data["candidate"]): str(e.data["reason"]) for e in entries if e.kind == "quarantine"}

    def log_miss(
        self, environment: Environment, key: StaticKey, label: Sizes, miss: Mapping[str, Any]
    ) -> None:
        """Remember sizes that were served from beyond what was tuned; one file for each label."""
        self._write(environment, key, f"miss-{'x'.join(map(str, label))}.json", "miss", miss)

    def forget(self, entry: Entry) -> None:
        """Delete an entry's file, a miss that has been worked off; one warning if that cannot be."""
        try:
            entry.path.unlink(missing_ok=True)
        except OSError as error:
            self._cannot_write(error)

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
        facts = data.get("facts") if data is not None else None
        return dict(facts) if isinstance(facts, Mapping) else {}

    def entries(self, kinds: Iterable[str] = ("decision",)) -> list[Entry]:
        """Every readable file of these kinds in every environment."""
        wanted = set(kinds)
        folders = [folder for path in self.environments() for folder in _listed(path) if folder.is_dir()]
        return [entry for folder in folders for entry in self._entries(folder) if entry.kind in wanted]

    def _quiet(self, folder: Path, key: StaticKey, arity: int | None) -> list[Record]:
        """Other environments' records; what cannot be read there is their problem."""
        entries = (e for e in self._entries(folder, quiet=True) if e.kind == "decision")
        return self._records(entries, key, arity, quiet=True)

    def _records(
        self, entries: Iterable[Entry], key: StaticKey, arity: int | None, quiet: bool = False
    ) -> list[Record]:
        records = []
        for entry in entries:
            try:
                record = entry.record
                if record.runner not in key.runners:
                    raise TuningError(f"its runner {record.runner} is not one of {', '.join(key.runners)}")
                if arity is not None and len(record.bucket) != arity:
                    raise TuningError(f"its bucket {record.bucket} must have {arity} sizes")
                records.append(record)
            except Exception as error:
                text = f"{entry.path} does not hold a decision for its key ({error}); it is not used"
                self._warn(str(entry.path), text, quiet)
        return records

    def _entries(self, folder: Path, quiet: bool = False) -> Iterator[Entry]:
        keys: dict[str, str] = {}
        for path in _listed(folder):
            data = self._read(path, quiet) if path.suffix == ".json" else None
            if data is None:
                continue
            key: Any = data.get("key")
            entry = Entry(path, folder.parent.name, str(data.get("kind")), str(data.get("op")), key, data)
            why = entry.why_foreign(keys)
            if why is None:
                yield entry
            else:
                self._warn(str(path), f"{path} is not a file of this store ({why}); it is not used", quiet)

    def _read(self, path: Path, quiet: bool = False) -> dict[str, Any] | None:
        try:
            data = json.loads(_text_of(path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError, MemoryError) as error:
            what = error if str(error) else type(error).__name__
            self._warn(str(path), f"{path} cannot be read ({what}); it is not used", quiet)
            return None
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            text = f"{path} has schema {found!r}, this version reads {SCHEMA}; it is not used"
            self._warn(str(path), text, quiet)
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
        except (OSError, ValueError) as error:
            self._cannot_write(error)
            return False
        return True

    def _cannot_write(self, error: Exception) -> None:
        self.unwritable = self.unwritable or str(error)
        self._warn("write", f"the store {self.root} cannot be written ({error}); decisions stay in memory")

    def _warn(self, about: str, message: str, quiet: bool = False) -> None:
        if not quiet and about not in self._warned and notice(message):
            self._warned.add(about)


def _listed(folder: Path) -> list[Path]:
    """What is in a folder, in order; nothing where it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except (OSError, ValueError):
        return []


def _text_of(path: Path) -> str:
    """What is in a file. Raises OSError, also for what is none: a pipe would be waited for."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no regular file")
    return path.read_text(encoding="utf-8")


def _index(home: Path) -> dict[str, list[Path]]:
    """The folders of an environment by the family of their keys, each known from its first file."""
    found: dict[str, list[Path]] = {}
    for folder in _listed(home):
        for path in _listed(folder):
            try:
                family = StaticKey.from_fields(json.loads(_text_of(path))["key"]).family
            except Exception:  # whatever is wrong with it is said where its own key is asked for
                continue
            found.setdefault(family, []).append(folder)
            break
    return found


def write_atomically(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON so that a reader sees the old file or the new one, whenever this process ends. Raises
    OSError.
    """
    write_text_atomically(path, json.dumps(data, indent=1))


def write_text_atomically(path: Path, text: str) -> None:
    """As write_atomically, of a text. The file has the permissions that the umask gives: a store that root made
    serves others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:100]}.{secrets.token_hex(6)}.tmp"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
