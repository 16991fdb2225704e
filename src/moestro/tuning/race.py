"""Who wins: a race of candidates in paired rounds, with elimination and a tie rule made for agreement.

Pure statistics: `race` is given one sampler (or one per probe) for each candidate, in their fixed order,
and knows nothing of timers or devices. The bounds are in moestro.tuning.bounds.

Screening. Every candidate runs once, in shuffled order; who is slower than the best by `screen_ratio`,
twice, is out.

Rounds. Every live candidate runs once per round, in rotating order, reversed in every other round. The
*incumbent* (who would be the answer if nothing else came) runs twice, half a round apart. What is compared
is the log-ratio of two candidates *in the same round*: drift of clocks, temperature and neighbours
multiplies both and cancels. The two runs of the incumbent are averaged where it is the reference; their
log-ratio is the race's own noise: the *noise floor* is the largest bias that its interval does not exclude.

Who leaves. The default tactic is the incumbent until it is beaten; after it the preferred tactic (the
neighbour bucket's winner), then the first listed. The margin of the default is max(min_gain, noise floor),
of any other `tie`. A candidate leaves
  - "slower": the leader (smallest ratio so far) beats it by more than its margin;
  - "no gain": it does not beat the incumbent by the incumbent's margin + `resolution`;
  - "beaten" (the default only): everyone left is better than it by more than its margin;
  - "failed": its sampler raised.
All are one-sided bounds that hold at every look at once. With E candidates and confidence c, "no gain" and
"beaten" use alpha = (1 - c) / max(10, E) each: a share of the race's error, and small enough to keep a
default that lies within min_gain in 99 % of races of two. "slower" uses alpha = 1 - c, since it only
chooses among those within tie + resolution.

Ties. Gaps up to `tie` are a tie, gaps from tie + resolution on are told apart: between the two the answer
may be either. Two hypotheses with nothing between them could not be told apart by any number of rounds, and
a tie rule that asks "is it proven slower at all?" would flip with the noise; this one asks a question that
the data can answer. When rounds or time end first, gaps below tie + resolution / 2, or below one standard
error, count as ties, and only a candidate that is proven better than the default by its margin may replace
it.

Several probes. A sample is then one time per probe, and a candidate's ratio is its worst over the probes,
relative to the default (which is measured to the end for that): to be better it must be better on every
probe, to be worse one probe is enough.

Several ranks. `combine` gets each round's times with a stop flag at the end as one list of floats and
returns the group's (the element-wise maximum): one collective a round. All ranks then take the same steps
from the same data."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moestro.errors import TuningError
from moestro.tuning.bounds import Floats, Gaps, gaps, half_width
from moestro.tuning.policy import MeasurementPolicy

__all__ = ["CandidateEvidence", "RaceResult", "Sampler", "race"]

Sampler = Callable[[], float]


@dataclass(frozen=True)
class CandidateEvidence:
    """What a race learned about one candidate. Ratios are time over the default's: below 1 is faster."""

    index: int
    samples: int  # runs, over all probes
    median: tuple[float, ...]  # seconds, per probe; empty without samples
    spread: tuple[float, ...]  # robust relative standard deviation of single runs, per probe
    ratio: float | None  # worst probe; None where nothing was measured
    ratio_low: float | None  # interval of `ratio` that holds at every look, at the policy's confidence
    ratio_high: float | None
    probe_ratios: tuple[float, ...]
    left_at: int | None  # the round in which it left; None: it stayed to the end
    # "won" | "tied" | "undecided" | "default beaten" | "slower" | "no gain" | "screened" | "failed: ..."
    reason: str


@dataclass(frozen=True)
class RaceResult:
    winner: int
    leader: int  # the smallest ratio at the end; differs from the winner in a tie
    candidates: tuple[CandidateEvidence, ...]
    noise_floor: float  # relative
    rounds: int
    samples: int
    seconds: float  # wall time
    ended: str  # "decided" | "rounds" | "time" | "budget"


def race(
    samplers: Sequence[Sampler | Sequence[Sampler]],
    policy: MeasurementPolicy | None = None,
    *,
    default: int = 0,
    preferred: int | None = None,
    seed: int | None = None,
    stop: Callable[[], bool] | None = None,
    combine: Callable[[list[float]], list[float]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> RaceResult:
    """Race candidates; index 0, 1, ... is their fixed order.

    Args:
        samplers: per candidate a callable that runs it once and returns seconds, or one per probe.
        default: index of the default tactic. preferred: index of the one that wins ties, if any.
        seed: of the order (policy.seed if None). stop: asked in every round; True ends the race (a budget).
        combine: see the module, "Several ranks".

    Raises TuningError if there is no candidate, an index is out of range, or every candidate failed.
    """
    return _Race(
        samplers, policy or MeasurementPolicy(), default, preferred, seed, stop, combine, clock
    ).run()


class _Race:
    def __init__(
        self,
        samplers: Sequence[Sampler | Sequence[Sampler]],
        policy: MeasurementPolicy,
        default: int,
        preferred: int | None,
        seed: int | None,
        stop: Callable[[], bool] | None,
        combine: Callable[[list[float]], list[float]] | None,
        clock: Callable[[], float],
    ) -> None:
        self.samplers = [(s,) if callable(s) else tuple(s) for s in samplers]
        count = len(self.samplers)
        _check(self.samplers, default, preferred)
        self.policy, self.default, self.stop, self.combine, self.clock = policy, default, stop, combine, clock
        self.probes = len(self.samplers[0])
        self.random = random.Random(policy.seed if seed is None else seed)
        self.live = list(range(count))
        first = [default] if preferred is None else [default, preferred]
        self.rank = [first.index(i) if i in first else len(first) + i for i in range(count)]
        self.base = self.random.sample(self.live, count)
        self.logs = np.full((32, count, self.probes), np.nan)  # mean log seconds of a round
        self.twins: list[Floats] = []  # log-ratio of the incumbent's two runs, [probes]
        self.runs = [0] * count
        self.left: dict[int, tuple[int, str]] = {}
        self.rounds = 0
        self.noise_floor = 0.0
        self.alpha = (1 - policy.confidence) / max(10, count)
        self.started = clock()
        self.ended = ""

    # --- running ---------------------------------------------------------------------------------------
    def run(self) -> RaceResult:
        self._screen()
        next_look = self.policy.min_rounds
        while not self._finished():
            self._round()
            if self.rounds >= next_look or self.ended:
                self._look()
                next_look = self.rounds + max(1, self.rounds // 12)
        return self._result()

    def _finished(self) -> bool:
        if not self.live:
            reasons = "; ".join(f"{i}: {why}" for i, (_, why) in sorted(self.left.items()))
            raise TuningError(f"every candidate failed or left: {reasons}")
        if len(self.live) == 1:
            self.ended = "decided"
        elif not self.ended and self.rounds >= self.policy.max_rounds:
            self.ended = "rounds"
        return bool(self.ended)

    def _screen(self) -> None:
        self._measure(self.base)
        if not self.live or self.ended:
            return
        now = self.logs[0, self.live]  # [live, probes]
        reference = self.logs[0, self.default] if self.default in self.live else 0.0
        behind = (now - reference).max(axis=-1)
        limit = behind.min() + math.log(self.policy.screen_ratio)
        slow = [i for i, b in zip(self.live, behind, strict=True) if b > limit and i != self.default]
        if not slow:
            return
        first = self.logs[0].copy()
        self._measure(slow, again=True)
        for i in slow:
            if i in self.live:
                self.logs[0, i] = np.minimum(first[i], self.logs[0, i])
                if (self.logs[0, i] - reference).max() > limit:
                    self._leave(i, "screened")

    def _round(self) -> None:
        sampled = [
            i
            for i in self.base
            if i in self.live or (self.probes > 1 and i == self.default and self._sound(i))
        ]
        shift = self.rounds % len(sampled)
        order = sampled[shift:] + sampled[:shift]
        if self.rounds % 2:
            order.reverse()
        at = order.index(self.incumbent)
        order.insert((at + (len(order) + 1) // 2) % (len(order) + 1), self.incumbent)
        self._measure(order)

    def _measure(self, order: list[int], again: bool = False) -> None:
        """One run of each in `order` (twice in it: twice), as a new round or `again` into the last one."""
        flat = [seconds for i in order for seconds in self._sample(i)]
        flat.append(float(self._must_stop()))
        if self.combine is not None:
            flat = self.combine(flat)
        if flat[-1] and not self.ended:
            self.ended = "time" if self.stop is None or not self.stop() else "budget"
        if not again:
            self.rounds += 1
            if self.rounds > len(self.logs):
                self.logs = np.concatenate([self.logs, np.full_like(self.logs, np.nan)])
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(np.array(flat[:-1])).reshape(len(order), self.probes)
        row = self.logs[self.rounds - 1]
        for position, i in enumerate(order):
            twin = order.index(i)
            if not np.isfinite(logs[position]).all():
                self._leave(i, "failed on another rank")
            elif twin != position:
                self.twins.append(logs[twin] - logs[position])
                row[i] = (logs[twin] + logs[position]) / 2
            else:
                row[i] = logs[position]

    def _sample(self, i: int) -> list[float]:
        if i not in self.live and not self._sound(i):
            return [math.inf] * self.probes
        try:
            seconds = [float(sampler()) for sampler in self.samplers[i]]
            self.runs[i] += self.probes
            if not all(0 < s < math.inf for s in seconds):
                raise TuningError(f"the clock read {seconds}, expected positive seconds")
        except Exception as error:
            self._leave(i, f"failed: {type(error).__name__}: {error}")
            return [math.inf] * self.probes
        return seconds

    def _must_stop(self) -> bool:
        limit = self.policy.max_seconds
        return (self.stop is not None and self.stop()) or (
            limit is not None and self.clock() - self.started > limit
        )

    # --- deciding --------------------------------------------------------------------------------------
    @property
    def incumbent(self) -> int:
        return min(self.live, key=self.rank.__getitem__)

    def _sound(self, i: int) -> bool:
        return i not in self.left or not self.left[i][1].startswith("failed")

    def _leave(self, i: int, reason: str) -> None:
        if i in self.live:
            self.live.remove(i)
            self.left[i] = (self.rounds, reason)

    def _table(self, columns: list[int]) -> Floats:
        return self.logs[: self.rounds, columns]

    def _gaps(self, columns: list[int], reference: int) -> Gaps:
        return gaps(self._table(columns) - self._table([reference]))

    def _offset(self) -> Floats:
        """Log-ratio of the incumbent to the default, per probe: how the probes weigh in a worst case."""
        if self.probes == 1 or self.incumbent == self.default or not self._sound(self.default):
            return np.zeros(self.probes)
        return np.asarray(self._gaps([self.incumbent], self.default).location[0])

    def _margin(self, i: int) -> float:
        """By how much (log) one must be better than i to replace it; the default has the noise floor, too."""
        return math.log1p(self.policy.min_gain if i == self.default else self.policy.tie)

    def _bound(self, gap: Gaps, alpha: float) -> Floats:
        return half_width(gap, alpha / self.probes, self.policy.resolution)

    def _look(self) -> None:
        """Let leave who cannot win, by the bounds."""
        if self.rounds < self.policy.min_rounds or len(self.live) < 2:
            return
        self._measure_noise()
        live = list(self.live)
        incumbent, offset = self.incumbent, self._offset()
        gap = self._gaps(live, incumbent)
        value = gap.location + offset  # [live, probes]
        lead = int(value.max(axis=-1).argmin())
        to_lead = gap if live[lead] == incumbent else self._gaps(live, live[lead])
        behind = (to_lead.location - self._bound(to_lead, 1 - self.policy.confidence) + value[lead]).max(
            axis=-1
        )
        for i, b in zip(live, behind, strict=True):
            if i not in (live[lead], self.default) and b > value[lead].max() + self._margin(i):
                self._leave(i, "slower")
        if incumbent == self.default:
            self._challenge_default(live, gap)
        if incumbent in self.live:
            best_case = (gap.location - self._bound(gap, self.alpha) + offset).max(axis=-1)
            floor = offset.max() - self._margin(incumbent) - self.policy.resolution
            for i, b in zip(live, best_case, strict=True):
                if i != incumbent and b > floor:
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
        return {i for i, w in zip(live, worst_case, strict=True) if i != self.default and w < -margin}

    def _measure_noise(self) -> None:
        if len(self.twins) >= 2:
            noise = gaps(np.array(self.twins)[:, None, :])
            self.noise_floor = float(np.expm1((np.abs(noise.location) + 2 * noise.standard_error).max()))

    def _choose(self) -> tuple[int, int]:
        """(winner, leader) among the live at the end."""
        live = list(self.live)
        if len(live) == 1 or self.rounds < 2:
            return self.incumbent, self.incumbent
        offset, gap = self._offset(), self._gaps(live, self.incumbent)
        value = (gap.location + offset).max(axis=-1)
        leader = live[int(value.argmin())]
        eligible = live
        if self.default in live:
            proven = self._proven(live, gap) if self.rounds >= self.policy.min_rounds else set()
            eligible = [i for i in live if i in proven]
            if not eligible:
                return self.default, leader
        of = dict(zip(live, value, strict=True))
        best = min(eligible, key=of.__getitem__)
        error = self._gaps(eligible, best).standard_error.max(axis=-1)
        allowed = np.maximum(error, self.policy.tie + self.policy.resolution / 2)
        tied = [i for i, a in zip(eligible, allowed, strict=True) if i == best or of[i] - of[best] <= a]
        return min(tied, key=self.rank.__getitem__), leader

    # --- reporting -------------------------------------------------------------------------------------
    def _result(self) -> RaceResult:
        winner, leader = self._choose()
        evidence = tuple(self._evidence(i, winner) for i in range(len(self.samplers)))
        return RaceResult(
            winner,
            leader,
            evidence,
            self.noise_floor,
            self.rounds,
            sum(self.runs),
            self.clock() - self.started,
            self.ended,
        )

    def _evidence(self, i: int, winner: int) -> CandidateEvidence:
        mine = self.logs[: self.rounds, i]
        mine = mine[np.isfinite(mine).all(axis=-1)]
        middle = np.median(mine, axis=0) if len(mine) else np.empty(0)
        spread = 1.4826 * np.median(np.abs(mine - middle), axis=0) if len(mine) else middle
        left_at, reason = self.left.get(i, (None, "undecided" if winner == self.default else "tied"))
        ratio, low, high, per_probe = self._ratio(i)
        return CandidateEvidence(
            index=i,
            samples=self.runs[i],
            median=tuple(np.exp(middle).tolist()),
            spread=tuple(spread.tolist()),
            ratio=ratio,
            ratio_low=low,
            ratio_high=high,
            probe_ratios=per_probe,
            left_at=left_at,
            reason="won" if i == winner else reason,
        )

    def _ratio(self, i: int) -> tuple[float | None, float | None, float | None, tuple[float, ...]]:
        """(ratio, low, high, per probe) to the default, over the rounds that both ran in."""
        if i == self.default:
            return 1.0, 1.0, 1.0, (1.0,) * self.probes
        both = self.logs[: self.rounds, i] - self.logs[: self.rounds, self.default]
        both = both[np.isfinite(both).all(axis=-1)]
        if not len(both):
            return None, None, None, ()
        if len(both) == 1:
            each = np.exp(both[0])
            return float(each.max()), 0.0, math.inf, tuple(each.tolist())
        gap = gaps(both[:, None, :])
        width = self._bound(gap, (1 - self.policy.confidence) / 2)[0]
        middle = gap.location[0]
        low, high = (middle - width).max(), (middle + width).max()
        return (
            float(np.exp(middle.max())),
            float(np.exp(low)),
            float(np.exp(high)),
            tuple(np.exp(middle).tolist()),
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
