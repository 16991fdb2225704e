"""Tactics that a person has banned or allowed: read from files, never written by us.

    {"ban": {"OP::Runner": [TACTIC, ...]}, "allow": {"OP::Runner": [TACTIC, ...]}}

OP and Runner (a class's name) are patterns as in a shell; a tactic is as a store writes it, with lists for
tuples, and "*" is every tactic but the default. Where "allow" names an operation and runner, its other
tactics are out. The default tactic always stays: it is what serves where nothing else may. FlashInfer's
blocklists ("invalid_tactics" for "ban") are read as they are. $MOESTRO_TACTICS names files, separated as in
$PATH, for every tuner of a process.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.errors import TuningError
from moestro.tuning.spec.keys import StaticKey
from moestro.tuning.spec.runner import DEFAULT_TACTIC, tactic_key

__all__ = ["TacticList", "from_environment"]

ENVIRONMENT = "MOESTRO_TACTICS"
MARKS = {"object", "dict", "enum", "text", "list"}  # what tells a stored tactic from a plain dictionary
EVERY = "*"


@dataclass(frozen=True)
class _Rule:
    op: str
    runner: str
    tactics: frozenset[str]
    allow: bool
    source: str

    def concerns(self, op: str, runner: str) -> bool:
        return fnmatch.fnmatchcase(op, self.op) and fnmatch.fnmatchcase(runner, self.runner)


class TacticList:
    """The rules of some files, in order. Raises TuningError for a file that is none."""

    def __init__(self, paths: Iterable[str | os.PathLike[str]] = ()) -> None:
        self._rules: tuple[_Rule, ...] = ()
        for path in paths:
            self.load(path)

    def __len__(self) -> int:
        return len(self._rules)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Add the rules of a file."""
        try:
            data = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
            ban = {**data.get("ban", {}), **data.get("invalid_tactics", {})}
            rules = [
                _rule(name, tactics, allow, str(path))
                for allow, given in ((False, ban), (True, data.get("allow", {})))
                for name, tactics in given.items()
            ]
        except (OSError, ValueError, AttributeError, TypeError, RecursionError, RuntimeError) as error:
            raise TuningError(f"{path} is not a list of tactics: {error}") from error
        self._rules = (*self._rules, *rules)

    def reason(self, op: str, runner: str, tactic: Any) -> str | None:
        """Why a tactic (its key) of a runner (its class's name) is out; None if it is not."""
        rules = [rule for rule in self._rules if rule.concerns(op, runner)]
        if not rules or tactic == DEFAULT_TACTIC:
            return None
        text = json.dumps(tactic, sort_keys=True)
        for rule in rules:
            if not rule.allow and (text in rule.tactics or EVERY in rule.tactics):
                return f"banned by {rule.source}"
        allowed = [rule for rule in rules if rule.allow]
        if allowed and not any(text in rule.tactics or EVERY in rule.tactics for rule in allowed):
            return f"not among what {allowed[0].source} allows"
        return None

    def why_not(self, key: StaticKey, record: Any) -> str | None:
        """Why a record's choice is out."""
        if not self._rules:
            return None
        return self.reason(key.op, class_name(record.runner), tactic_key(record.tactic, None))

    def over(self, banned: Mapping[str, str], op: str) -> Mapping[str, str]:
        """The candidates in quarantine with those that these rules keep out, by their names."""
        return _Over(self, banned, op) if self._rules else banned


class _Over(Mapping[str, str]):
    """A quarantine, and the rules before it."""

    def __init__(self, rules: TacticList, banned: Mapping[str, str], op: str) -> None:
        self._rules, self._banned, self._op = rules, banned, op

    def __getitem__(self, candidate: str) -> str:
        runner, _, tactic = candidate.partition(" ")
        reason = self._rules.reason(self._op, class_name(runner), json.loads(tactic))
        return reason if reason is not None else self._banned[candidate]

    def __iter__(self) -> Iterator[str]:
        return iter(self._banned)

    def __len__(self) -> int:
        return len(self._banned)


def class_name(runner: str) -> str:
    """The class's name in a runner's short identity."""
    return runner.partition("#")[0].partition("~")[0].rpartition(".")[2]


def from_environment() -> list[str]:
    """The files that $MOESTRO_TACTICS names."""
    return [path for path in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if path]


def _rule(name: str, tactics: Any, allow: bool, source: str) -> _Rule:
    op, _, runner = name.rpartition("::")
    if not op or not isinstance(tactics, list):
        raise ValueError(f"{name!r} must be OP::Runner with a list of tactics, got {tactics!r}")
    return _Rule(op, runner, frozenset(map(_text, tactics)), allow, source)


def _text(tactic: Any) -> str:
    if tactic == EVERY:
        return EVERY
    stored = isinstance(tactic, dict) and bool(MARKS & set(tactic))
    return json.dumps(tactic if stored else tactic_key(tactic, None), sort_keys=True)
