"""One decision for a group of ranks: how they talk while they tune, and what they agree on.

Ranks tune in lockstep: every rank makes the same calls inside `autotune(True, group=...)`, and whatever could
lead them apart (budgets, stores, candidates that fail, times) goes through an exchange first (link.py).

Who is missing when the time is over, leaves with an error, or asks for another operation breaks the group:
every rank gets a GroupError that names it, and the tuner serves the default tactic from there on.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from moestro.errors import GroupError, TuningError, unknown_name
from moestro.tuning.link import Link, link_of
from moestro.tuning.spec.evidence import Record
from moestro.tuning.spec.runner import DEFAULT_TACTIC, tactic_key
from moestro.tuning.spec.specs import Sizes

__all__ = ["STRATEGIES", "Group", "Vote", "group_of", "label_of_choice"]

STRATEGIES = {
    "parallel": "ranks share compiling, checking and screening, then race together: the slowest rank's time counts",
    "broadcast": "rank 0 measures alone, the others take its decisions",
    "merge": "every rank measures alone; per bucket the choice whose slowest rank is fastest",
    "independent": "every rank for itself: nothing is agreed on",
}


@dataclass(frozen=True)
class Vote:
    """What all ranks say of some candidates."""

    fit: list[str]  # those that no rank has a word against, in rank 0's order
    against: dict[str, str]  # candidate -> "rank 1: why"
    late: bool
    out_of_memory: str  # which rank cannot hold anything, "" if all can


@dataclass
class Group:
    """What a tuning asks its group. `broken` says why there is none any more."""

    link: Link
    strategy: str = "parallel"
    broken: str = ""

    @property
    def rank(self) -> int:
        return self.link.rank

    @property
    def size(self) -> int:
        return self.link.size

    def exchange(self, step: str, value: Any) -> list[Any]:
        """Link.exchange; a GroupError is remembered."""
        try:
            return self.link.exchange(step, value)
        except GroupError as error:
            self.broken = str(error)
            raise

    def leave(self, why: str) -> None:
        """This rank will not come again."""
        self.broken = self.broken or why
        self.link.leave(why)

    def start(
        self, facts: Mapping[str, Any], sizes: Sizes, first: Sizes, too_large: set[Sizes]
    ) -> tuple[Sizes, Sizes, set[Sizes]]:
        """(sizes, first bucket, buckets that do not fit) of all ranks: the largest of each, all of the last.

        Raises TuningError, on all ranks, unless all have the same facts; it names what differs.
        """
        mine = {"facts": dict(facts), "sizes": sizes, "first": first, "too_large": sorted(too_large)}
        said = json.loads(json.dumps(self.exchange("tune", mine)))
        for name in dict.fromkeys(n for one in said for n in one["facts"]):
            values = [one["facts"].get(name) for one in said]
            if any(value != values[0] for value in values):
                raise TuningError(
                    f"{name} must be the same on all ranks of a group, got {dict(enumerate(values))}"
                )
        largest = [
            tuple(map(max, zip(*(one[key] for one in said), strict=True))) for key in ("sizes", "first")
        ]
        return largest[0], largest[1], {tuple(bucket) for one in said for bucket in one["too_large"]}

    def least(self, value: float) -> float:
        """The smallest of all ranks' values: what is left of a budget."""
        return float(min(self.exchange("budget", value)))

    def slowest(self, times: list[float]) -> list[float]:
        """The element-wise maximum of all ranks' times: `combine` of a race, once a round."""
        rows = self.exchange("round", times)
        if len({len(row) for row in rows}) > 1:
            raise GroupError(
                f"ranks race different candidates: {[len(row) for row in rows]} times in a round"
            )
        return [max(column) for column in zip(*rows, strict=True)]

    def vote(
        self,
        step: str,
        fit: Sequence[str],
        against: Mapping[str, str],
        *,
        late: bool = False,
        out_of_memory: str = "",
    ) -> Vote:
        """One exchange: a candidate that some rank has a word against is out everywhere, as is one that some
        rank has in neither list.

        A rank has no say in candidates that are another's share: it lists them as fit.
        """
        mine = {"fit": list(fit), "against": dict(against), "late": late, "oom": out_of_memory}
        said = self.exchange(step, mine)
        objections: dict[str, str] = {}
        for rank, one in enumerate(said):
            for name, why in one["against"].items():
                objections.setdefault(name, f"rank {rank}: {why}")
        known = [{*one["fit"], *one["against"]} for one in said]
        for name in dict.fromkeys(n for one in said for n in one["fit"]):
            for rank, names in enumerate(known):
                if name not in names:
                    objections.setdefault(name, f"rank {rank}: does not offer it")
        memory = next((f"rank {r}: {one['oom']}" for r, one in enumerate(said) if one["oom"]), "")
        left = [name for name in said[0]["fit"] if name not in objections]
        return Vote(left, objections, any(one["late"] for one in said), memory)

    def share(self, count: int) -> list[bool]:
        """Which of `count` candidates this rank compiles, checks and screens: the first, which is the
        yardstick, and every size-th other. All of them where there is little to share."""
        if count - 1 < 2 * self.size:
            return [True] * count
        return [i == 0 or (i - 1) % self.size == self.rank for i in range(count)]

    # --- decisions ---------------------------------------------------------------------------------------
    def adopt(
        self, mine: Mapping[Sizes, Record], runners: Sequence[str], environment: str
    ) -> tuple[dict[Sizes, Record], set[Sizes]]:
        """(what the group knows, the buckets that this rank has to write down anew).

        A bucket that only some ranks know is taken from the lowest of them. Where choices differ the one that
        most ranks have holds (the lowest rank's, where there are as many) until it is measured again; so does
        one of another environment than some rank's. One exchange where all know the same, else two.
        """
        rows = {_text(bucket): _row(record, runners, environment) for bucket, record in mine.items()}
        said = self.exchange("stores", {"environment": environment, "rows": rows})
        known = [one["rows"] for one in said]
        givers, undisputed = _givers(known)
        differ = {b for b in givers if any(one.get(b) != known[givers[b]][b] for one in known)}
        if not differ:
            return dict(mine), set()
        give = {b: _portable(mine[_sizes(b)], runners) for b in sorted(differ) if givers[b] == self.rank}
        given = self.exchange("decisions", give)
        together = dict(mine)
        for bucket in differ:
            record = _local(given[givers[bucket]][bucket], runners)
            measured_in = known[givers[bucket]][bucket]["environment"]
            if bucket not in undisputed or any(one["environment"] != measured_in for one in said):
                record = replace(record, complete=False)
            together[_sizes(bucket)] = record
        return together, {_sizes(bucket) for bucket in differ}

    def decided(self, record: Record | None, runners: Sequence[str]) -> Record | None:
        """Rank 0's decision for everyone, complete if it is on all ranks; None if some rank has none."""
        said = self.exchange("decision", None if record is None else _portable(record, runners))
        if record is None or any(one is None for one in said):
            return None
        complete = all(one["complete"] for one in said)
        return replace(record if self.rank == 0 else _local(said[0], runners), complete=complete)

    def from_rank_0(self, record: Record | None, runners: Sequence[str]) -> Record | None:
        """Rank 0's decision for everyone, whatever the others have."""
        given = self.exchange("decision", None if record is None else _portable(record, runners))[0]
        return record if self.rank == 0 or given is None else _local(given, runners)

    def merged(self, record: Record | None, runners: Sequence[str], min_gain: float) -> Record | None:
        """Of every rank's own choices the one whose slowest rank is fastest, by medians; the default unless
        that is better by min_gain. None if some rank has none."""
        said = self.exchange("decision", None if record is None else _portable(record, runners))
        if record is None or any(one is None for one in said):
            return None
        times = [
            {_choice(c["runner"], c["tactic"]): c["median"] for c in one["evidence"]["candidates"]}
            for one in said
        ]
        owners = {_choice(one["runner"], one["tactic"]): one for one in reversed(said)}
        slowest = {
            name: max(math.inf if of.get(name) is None else of[name] for of in times)
            for name in (DEFAULT_CHOICE, *owners)
        }
        best = min(slowest, key=slowest.__getitem__)
        if slowest[best] * (1 + min_gain) > slowest[DEFAULT_CHOICE]:
            best = DEFAULT_CHOICE
        chosen = _local(owners.get(best, said[0]), runners)
        if best not in owners:
            chosen = replace(chosen, runner=runners[0], tactic=DEFAULT_TACTIC)
        return replace(chosen, complete=all(one["complete"] for one in said))


@contextmanager
def leaving(group: Group | None) -> Iterator[None]:
    """Whoever leaves with an error tells the others of the group, if there is one, not to wait."""
    try:
        yield
    except BaseException as error:
        if group is not None:
            group.leave(f"{type(error).__name__}: {error}")
        raise


def group_of(group: Any, strategy: str | None = None, timeout_s: float | None = None) -> Group | None:
    """The Group of a ProcessGroup or a Link; None without one, or for the strategy "independent".

    Raises TuningError for an unknown strategy, for what is no group, or for settings of a group without one.
    """
    if group is None:
        if (strategy, timeout_s) != (None, None):
            raise TuningError(
                f"strategy and timeout_s mean nothing without a group, got {strategy!r}, {timeout_s!r}"
            )
        return None
    strategy = strategy or "parallel"
    if strategy not in STRATEGIES:
        raise TuningError(unknown_name("strategy", strategy, STRATEGIES))
    if strategy == "independent":
        return None
    return Group(group if isinstance(group, Link) else link_of(group, timeout_s), strategy)


# --- records as the ranks exchange them: runners by position, for their names hold what differs over ranks ----
def label_of_choice(index: int, tactic: Any, runner: Any = None) -> str:
    """What a candidate is called between ranks: its runner's position and its tactic."""
    return _choice(index, tactic_key(tactic, runner))


def _choice(runner: int, tactic: Any) -> str:
    return f"{runner} {json.dumps(tactic, sort_keys=True)}"


DEFAULT_CHOICE = _choice(0, DEFAULT_TACTIC)


def _text(bucket: Sizes) -> str:
    return "x".join(map(str, bucket))


def _sizes(text: str) -> Sizes:
    return tuple(int(part) for part in text.split("x") if part)


def _row(record: Record, runners: Sequence[str], environment: str) -> dict[str, Any]:
    return {
        "choice": _choice(runners.index(record.runner), tactic_key(record.tactic, None)),
        "environment": record.environment or environment,
        "rest": [record.status, record.complete, list(record.tuned_for), record.learned],
    }


def _givers(said: Sequence[Mapping[str, Any]]) -> tuple[dict[str, int], set[str]]:
    """(bucket -> the lowest rank with the choice that holds, buckets where all who know it agree)."""
    givers, settled = {}, set()
    for bucket in dict.fromkeys(b for one in said for b in one):
        choices = {rank: one[bucket]["choice"] for rank, one in enumerate(said) if bucket in one}
        votes = Counter(choices.values())
        most = max(votes.values())
        givers[bucket] = min(rank for rank, choice in choices.items() if votes[choice] == most)
        if len(votes) == 1:
            settled.add(bucket)
    return givers, settled


def _portable(record: Record, runners: Sequence[str]) -> dict[str, Any]:
    """A record whose runners are positions; without the samples of an unfinished race, which are a rank's own."""
    data = replace(record, samples={}).to_json()
    data["runner"] = runners.index(record.runner)
    for candidate in data["evidence"]["candidates"]:
        candidate["runner"] = runners.index(candidate["runner"]) if candidate["runner"] in runners else -1
    return data


def _local(given: Mapping[str, Any], runners: Sequence[str]) -> Record:
    """A record of another rank, as this one would have made it."""
    data: dict[str, Any] = json.loads(json.dumps(given))
    data["runner"] = runners[data["runner"]]
    for candidate in data["evidence"]["candidates"]:
        candidate["runner"] = runners[candidate["runner"]] if candidate["runner"] >= 0 else "?"
    return replace(Record.from_json(data), environment="")
