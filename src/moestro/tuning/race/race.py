"""Who wins: a race of candidates in paired rounds, with elimination and a tie rule made for agreement.

Pure statistics: `race` is given one sampler (or one per probe) for each candidate, in their fixed order,
and knows nothing of timers or devices. The bounds are in moestro.tuning.race.statistics.

Screening. Every candidate runs once, in shuffled order; who is slower than the best by `screen_ratio`,
twice, is out. The best is run twice more before that: one reading that is far too small must not drop all others.

Rounds. Every live candidate runs once per round, in rotating order. The *incumbent* (who would be the
answer if nothing else came) runs twice, half a round apart. What is compared is the log-ratio of two
candidates *in the same round*: drift of clocks, temperature and neighbours multiplies both and cancels. The
log-ratio of the incumbent's two runs is the race's own noise: the *noise floor* is the largest bias that its
two-sigma interval does not exclude.

Who leaves. The default tactic is the incumbent until it is beaten; after it the preferred tactic (the
neighbour bucket's winner), then the first listed. The margin of the default is min_gain, of any other `tie`.
A candidate leaves
  - "slower": the leader (smallest ratio so far) beats it by more than its margin;
  - "no gain": it does not beat the incumbent by the incumbent's margin + `resolution`;
  - "default beaten": everyone left is better than the default by more than max(min_gain, noise floor).
All are one-sided bounds that hold at every look at once. With E candidates and confidence c, "no gain" and
"default beaten" use alpha = (1 - c) / max(10, E) each: their share of the race's error, and small enough
to keep a default within min_gain in 99 % of races of two. "slower" uses 2 (1 - c) / rivals: it only chooses
among tactics within tie + resolution, where an error costs agreement and at most 1 % of speed.

Ties. Gaps up to `tie` are a tie, gaps from tie + resolution on are told apart; between the two the answer
may be either. Two hypotheses with nothing between them could not be told apart by any number of rounds, and
a tie rule that asks "is it proven slower at all?" flips with the noise; this one asks a question that the
data can answer. When rounds or time end first, gaps below tie + resolution / 2, or below one standard error,
count as ties, and only a candidate that is proven better than the default by its margin may replace it.

Several probes. A sample is one time per probe, and a candidate's ratio is its worst over the probes,
relative to the default (which is measured to the end for that): to be better it must be better on every
probe, to be worse one probe is enough.

Several ranks. `combine` gets each round's times with a stop flag at the end as one list of floats and
returns the group's (the element-wise maximum): one collective a round. All ranks then take the same steps
from the same data.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moestro.errors import TuningError
from moestro.tuning.race.rounds import ClockError, Combine, Rounds, Sampler
from moestro.tuning.race.statistics import Floats, Gaps, gaps, half_width
from moestro.tuning.spec.evidence import CandidateEvidence
from moestro.tuning.spec.policy import MeasurementPolicy

__all__ = ["CandidateEvidence", "RaceResult", "Sampler", "race"]

TIE_ERRORS = 2.0  # times 1 - confidence: see the module, "slower"


@dataclass(frozen=True)
class RaceResult:
    """What a race learned. left_at: the round in which a candidate left; None: it stayed to the end. logs: log
    seconds [rounds, 2, candidates, probes], for a race that goes on another time.
    """

    winner: int
    leader: int  # the smallest ratio at the end; differs from the winner in a tie
    candidates: tuple[CandidateEvidence, ...]
    noise_floor: float  # relative
    rounds: int
    samples: int
    seconds: float  # wall time
    ended: str  # "decided" | "rounds" | "time" | "budget"
    left_at: tuple[int | None, ...] = ()
    logs: Floats = field(default_factory=lambda: np.empty((0, 2, 0, 0)), compare=False, repr=False)


def race(
    samplers: Sequence[Sampler | Sequence[Sampler]],
    policy: MeasurementPolicy | None = None,
    *,
    default: int = 0,
    preferred: int | None = None,
    seed: int | None = None,
    stop: Callable[[], bool] | None = None,
    abort: Callable[[], bool] | None = None,
    combine: Combine | None = None,
    clock: Callable[[], float] = time.perf_counter,
    who: Sequence[tuple[str, Any]] | None = None,
    probes: Sequence[str] = ("default",),
    earlier: Floats | None = None,
) -> RaceResult:
    """Race candidates; index 0, 1, ... is their fixed order.

    Args:
        samplers: per candidate a callable that runs it once and returns seconds, or one per probe.
        default: index of the default tactic. preferred: index of the one that wins ties, if any.
        seed: of the order; policy.seed if None. stop: asked after every round; True ends the race.
        abort: asked before every sample; True ends the race and discards the round (a hard budget).
        combine: see the module, "Several ranks".
        who: (runner, tactic) of each candidate, for the evidence; ("", index) without. probes: their names.
        earlier: log seconds [rounds, 2, candidates, probes] of an unfinished race among these (nan: did not run).

    Raises TuningError if there is no candidate, an index is out of range, or every candidate failed; ClockError,
    which is one, if none could be timed because the clock made no sense.
    """
    policy = policy or MeasurementPolicy()
    lanes = [(s,) if callable(s) else tuple(s) for s in samplers]
    _check(lanes, default, preferred)
    rounds = Rounds(lanes, policy, stop, abort, combine, clock, earlier)
    running = _Race(rounds, policy, default, preferred, policy.seed if seed is None else seed)
    running.run()
    return running.result(who or [("", i) for i in range(len(lanes))], probes)


class _Race:
    """The deciding half: who is live, who leaves, who wins."""

    def __init__(
        self, rounds: Rounds, policy: MeasurementPolicy, default: int, preferred: int | None, seed: int
    ) -> None:
        self.rounds, self.policy, self.default = rounds, policy, default
        count = len(rounds.samplers)
        self.live = list(range(count))
        self.left: dict[int, tuple[int, str]] = {}
        first = [default] if preferred is None else [default, preferred]
        self.rank = [first.index(i) if i in first else len(first) + i for i in range(count)]
        self.start = random.Random(seed).sample(self.live, count)
        self.alpha = (1 - policy.confidence) / max(10, count)
        self.noise_floor = 0.0
        self.ended = ""

    # --- running ---------------------------------------------------------------------------------------
    def run(self) -> None:
        self._screen()
        next_look = self.policy.min_rounds
        if self.rounds.earlier >= next_look and not self.rounds.ended:
            self._look()
        while not self._finished():
            self._run(self._order())
            if self.rounds.count >= next_look:
                self._look()
                next_look = self.rounds.count + max(1, self.rounds.count // 12)

    def _finished(self) -> bool:
        if not self.live:
            if self.rounds.senseless == set(self.rounds.failed):
                raise ClockError("; ".join(dict.fromkeys(self.rounds.failed.values())))
            reasons = "; ".join(f"{i}: {why}" for i, (_, why) in sorted(self.left.items()))
            raise TuningError(f"no candidate is left: {reasons}")
        if len(self.live) == 1:
            self.ended = "decided"
        elif self.rounds.count >= self.policy.max_rounds:
            self.ended = "rounds"
        else:
            self.ended = self.rounds.ended
        return bool(self.ended)

    def _run(self, order: list[int]) -> None:
        self.rounds.run(order)
        self._drop_failed()

    def _screen(self) -> None:
        runs = self._runs()
        new = [i for i in self.start if not runs[i]]
        if new:
            self._run(new)
        if self.rounds.ended or not self.live:
            return
        slow = self._slow()
        if not slow:
            return
        self.rounds.confirm(min(self.live, key=lambda i: self._behind([i])[0]))
        slow = self._slow()
        runs = self._runs()
        if once := [i for i in slow if runs[i] < 2]:
            self.rounds.again(once)
            self._drop_failed()
        if not self.rounds.ended:
            for i in set(slow) & set(self._slow()):
                self._leave(i, "screened")

    def _slow(self) -> list[int]:
        """Who is behind the best by more than screen_ratio; never the default."""
        limit = self._behind(self.live).min() + math.log(self.policy.screen_ratio)
        return [i for i in self.live if i != self.default and self._behind([i])[0] > limit]

    def _best(self) -> Floats:
        """The smallest log times so far [candidates, probes]; inf for who has not run."""
        logs = self.rounds.logs[:, 0]
        return np.asarray(np.min(np.where(np.isfinite(logs), logs, np.inf), axis=0))

    def _runs(self) -> list[int]:
        """In how many rounds each candidate has run."""
        return [int(n) for n in np.isfinite(self.rounds.logs[:, 0]).all(axis=-1).sum(axis=0)]

    def _behind(self, columns: list[int]) -> Floats:
        """The worst log-ratio to the default by the smallest times so far; inf for who has not run."""
        best = self._best()
        absent = self.default in self.rounds.failed or not np.isfinite(best[self.default]).all()
        reference = 0.0 if absent else best[self.default]
        return np.asarray((best[columns] - reference).max(axis=-1))

    def _order(self) -> list[int]:
        """Who runs next: rotated by one each round, reversed after each full turn, the incumbent again half a
        round after its first run."""
        reference = self.default if self.rounds.probes > 1 and self.default not in self.rounds.failed else -1
        runners = [i for i in self.start if i in self.live or i == reference]
        turn, shift = divmod(self.rounds.count, len(runners))
        order = runners[shift:] + runners[:shift]
        if turn % 2:
            order.reverse()
        at = order.index(self.incumbent)
        order.insert((at + (len(order) + 1) // 2) % (len(order) + 1), self.incumbent)
        return order

    # --- deciding --------------------------------------------------------------------------------------
    @property
    def incumbent(self) -> int:
        return min(self.live, key=self.rank.__getitem__)

    def _leave(self, i: int, reason: str) -> None:
        if i in self.live:
            self.live.remove(i)
            self.left[i] = (self.rounds.count, reason)

    def _drop_failed(self) -> None:
        for i, reason in self.rounds.failed.items():
            self._leave(i, reason)

    def _gaps(self, columns: list[int], reference: int) -> Gaps:
        """Gaps of columns to the reference; 0 to itself, which is no evidence of how noisy the others are.

        Candidates that ran in the same rounds as the reference are looked at together: in most races that is all
        of them. One that has fewer rounds in common (it came later, or a budget cut a round short) has its own.
        """
        logs = self.rounds.logs
        difference = logs[:, :, columns] - logs[:, :, [reference]]
        common = np.asarray(np.isfinite(difference).all(axis=(1, 3))).T  # [columns, rounds]
        shape = (len(columns), self.rounds.probes)
        found = Gaps(np.zeros(shape), np.zeros(shape), np.full(shape, float(max(1, len(logs)))))
        together: dict[bytes, list[int]] = {}
        for at, column in enumerate(columns):
            if column != reference:
                together.setdefault(common[at].tobytes(), []).append(at)
        for members in together.values():
            self._gaps_of(difference[common[members[0]]][:, :, members], members, columns, reference, found)
        return found

    def _gaps_of(
        self, table: Floats, members: list[int], columns: list[int], reference: int, found: Gaps
    ) -> None:
        """Fill in the gaps of `members`, from the rounds that they share with the reference."""
        assert isinstance(found.rounds, np.ndarray)
        found.rounds[members] = max(1, len(table))
        if len(table) >= 2:
            gap = gaps(table)
            found.location[members], found.scale[members] = gap.location, gap.scale
            return
        found.scale[members] = np.inf  # one round in common, or none: an estimate, and no proof of anything
        if len(table):
            found.location[members] = table[0].mean(axis=0)
        else:
            best = self._best()
            found.location[members] = np.nan_to_num(best[[columns[m] for m in members]] - best[reference])

    def _offset(self) -> Floats:
        """Log-ratio of the incumbent to the default, per probe: how the probes weigh in a worst case."""
        probes = self.rounds.probes
        if probes == 1 or self.incumbent == self.default or self.default in self.rounds.failed:
            return np.zeros(probes)
        return np.asarray(self._gaps([self.incumbent], self.default).location[0])

    def _margin(self, i: int) -> float:
        """By how much (log) one must be better than i to replace it; the default has the noise floor, too."""
        return math.log1p(self.policy.min_gain if i == self.default else self.policy.tie)

    def _bound(self, gap: Gaps, alpha: float) -> Floats:
        return half_width(gap, alpha / self.rounds.probes, self.policy.resolution)

    def _look(self) -> None:
        """Let leave who cannot win, by the bounds."""
        if len(self.live) < 2:
            return
        self._measure_noise()
        live, incumbent, offset = list(self.live), self.incumbent, self._offset()
        gap = self._gaps(live, incumbent)
        self._drop_slower(live, gap, offset)
        if incumbent == self.default:
            self._challenge_default(live, gap)
        if incumbent in self.live:
            self._drop_without_gain(live, gap, offset)

    def _drop_slower(self, live: list[int], gap: Gaps, offset: Floats) -> None:
        value = gap.location + offset  # [live, probes]
        lead = int(value.max(axis=-1).argmin())
        to_lead = gap if live[lead] == self.incumbent else self._gaps(live, live[lead])
        bound = self._bound(to_lead, TIE_ERRORS * (1 - self.policy.confidence) / (len(live) - 1))
        least = (value[lead] + to_lead.location - bound).max(axis=-1)
        for i, b in zip(live, least, strict=True):
            if i not in (live[lead], self.default) and b > value[lead].max() + self._margin(i):
                self._leave(i, "slower")

    def _drop_without_gain(self, live: list[int], gap: Gaps, offset: Floats) -> None:
        incumbent = self.incumbent
        least = (offset + gap.location - self._bound(gap, self.alpha)).max(axis=-1)
        needed = offset.max() - self._margin(incumbent) - self.policy.resolution
        for i, b in zip(live, least, strict=True):
            if i != incumbent and b > needed:
                self._leave(i, "no gain")

    def _challenge_default(self, live: list[int], gap: Gaps) -> None:
        proven = self._proven(live, gap)
        others = [i for i in self.live if i != self.default]
        if others and proven.issuperset(others):
            self._leave(self.default, "default beaten")

    def _proven(self, live: list[int], gap: Gaps) -> set[int]:
        """Who is better than the default (the reference of `gap`) by more than its margin, on every probe."""
        worst_case = (gap.location + self._bound(gap, self.alpha)).max(axis=-1)
        margin = max(self._margin(self.default), math.log1p(self.noise_floor))
        enough = np.asarray(gap.rounds).min(axis=-1) >= self.policy.min_rounds
        found = zip(live, worst_case, enough, strict=True)
        return {i for i, worst, e in found if i != self.default and e and worst < -margin}

    def _measure_noise(self) -> None:
        if len(self.rounds.twins) >= 2:
            noise = gaps(np.array(self.rounds.twins)[:, None, None, :].repeat(2, axis=1))
            self.noise_floor = float(np.expm1((np.abs(noise.location) + 2 * noise.standard_error).max()))

    def _choose(self) -> tuple[int, int]:
        """(winner, leader) among the live at the end."""
        live = list(self.live)
        if len(live) == 1 or self.rounds.count < 2:
            return self.incumbent, self.incumbent
        offset, gap = self._offset(), self._gaps(live, self.incumbent)
        value = (gap.location + offset).max(axis=-1)
        leader = live[int(value.argmin())]
        eligible = live
        if self.default in live:
            proven = self._proven(live, gap) if self.rounds.count >= self.policy.min_rounds else set()
            eligible = [i for i in live if i in proven]
            if not eligible:
                return self.default, leader
        of = dict(zip(live, value, strict=True))
        best = min(eligible, key=of.__getitem__)
        if len(eligible) == 1:
            return best, leader
        error = self._gaps(eligible, best).standard_error.max(axis=-1)
        allowed = np.maximum(error, self.policy.tie + self.policy.resolution / 2)
        tied = [i for i, a in zip(eligible, allowed, strict=True) if i == best or of[i] - of[best] <= a]
        return min(tied, key=self.rank.__getitem__), leader

    def result(self, who: Sequence[tuple[str, Any]], probes: Sequence[str]) -> RaceResult:
        winner, leader = self._choose()
        staying = "undecided" if winner == self.default else "tied"
        evidence, left_at = [], []
        for i, name in enumerate(who):
            at, reason = self.left.get(i, (None, "won" if i == winner else staying))
            fate = "finalist" if at is None else "failed" if i in self.rounds.failed else "eliminated"
            fate = "winner" if i == winner else fate
            evidence.append(self.rounds.evidence(i, self.default, name, probes, fate, reason))
            left_at.append(at)
        return RaceResult(
            winner=winner,
            leader=leader,
            candidates=tuple(evidence),
            noise_floor=self.noise_floor,
            rounds=self.rounds.complete,
            samples=sum(self.rounds.samples),
            seconds=self.rounds.seconds,
            ended=self.ended,
            left_at=tuple(left_at),
            logs=self.rounds.logs,
        )


def _check(samplers: Sequence[tuple[Sampler, ...]], default: int, preferred: int | None) -> None:
    if not samplers:
        raise TuningError("samplers: expected at least one candidate, got none")
    counts = {len(s) for s in samplers}
    if len(counts) > 1 or 0 in counts:
        raise TuningError(
            f"samplers: expected the same number of probes for each candidate, got {sorted(counts)}"
        )
    for name, index in (("default", default), ("preferred", preferred)):
        if index is not None and not 0 <= index < len(samplers):
            raise TuningError(f"{name}: expected an index below {len(samplers)}, got {index}")
