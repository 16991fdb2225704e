"""The decision for one bucket by a group of ranks: what measure.py does alone, with the group's word wherever
ranks could come apart.

"parallel": (1) the candidates that every rank offers, in rank 0's order; (2) each rank compiles and checks its
share, and a word against a candidate is one against it everywhere; (3) each rank screens its share, timed
against the default tactic, and what is slower than the best by the policy's screen_ratio is out; (4) all
ranks make the rest ready; (5) they race in step, one exchange a round, by the slowest rank's times; (6) rank
0's account of it is everybody's. Steps 2 and 3 are shared only where there is enough to share
(Group.share).
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from moestro.errors import GroupError, TuningError, TuningWarning
from moestro.tuning.group import Group, Vote, label_of_choice
from moestro.tuning.measure.campaign import Campaign
from moestro.tuning.measure.candidates import Trial
from moestro.tuning.measure.decide import conclude, measure, nothing_yet, race_of, samplers_of, without_choice
from moestro.tuning.measure.request import Candidate, Job, OutOfMemoryError
from moestro.tuning.race.rounds import ClockError
from moestro.tuning.spec.evidence import CandidateEvidence, Record
from moestro.tuning.spec.specs import Sizes

__all__ = ["measure_together", "run_campaign"]

Samplers = list[Callable[[], float]]
Result = TypeVar("Result")


def run_campaign(campaign: Campaign, environment: str, facts: Mapping[str, object]) -> bool:
    """Run it, in step with its job's group where there is one; True if nothing is left to do.

    A group that breaks ends it with one warning. facts: what all ranks must have the same, besides the
    operation.
    """
    group = campaign.job.group
    if group is None:
        return campaign.run()
    try:
        return campaign_of(group, campaign, environment, facts).run()
    except GroupError as error:
        op = campaign.job.key.op
        text = f"{op}: the ranks came to no decision, all use the default tactic: {error}"
        warnings.warn(text, TuningWarning, stacklevel=2)
        return False


def campaign_of(group: Group, campaign: Campaign, environment: str, facts: Mapping[str, object]) -> Campaign:
    """A campaign in which all ranks start from the same: sizes, buckets, decisions.

    Raises TuningError where ranks want to tune different things, GroupError where some do not come.
    """
    job = campaign.job
    facts = {
        **facts,
        "crossover": campaign.crossover,
        "op": job.key.op,
        "runners": [name.partition("#")[0] for name in job.key.runners],
        "probes": list(job.probe_names),
        "policy": dataclasses.asdict(job.policy),
        "strategy": group.strategy,
    }
    sizes, first, large = group.start(facts, job.sizes, campaign.first, campaign.too_large)
    known, changed = group.adopt(campaign.known(), job.key.runners, environment)
    for bucket in sorted(changed):
        # As the newest and complete, or this rank's own would go on serving.
        campaign.keep(replace(known[bucket], complete=True, created=time.time()))

    def keep(record: Record) -> None:
        known[record.bucket] = record
        campaign.keep(record)

    return Campaign(
        replace(
            job, sizes=sizes, decide=_deciders[group.strategy], left=lambda: group.least(job.budget.left)
        ),
        lambda: known,
        keep,
        first,
        large,
        campaign.crossover,
        campaign.ahead,
    )


def measure_together(
    job: Job,
    bucket: Sizes,
    *,
    preferred: Record | None = None,
    only: Sequence[Record] | None = None,
    deadline: float = float("inf"),
    unfinished: Record | None = None,
) -> Record | None:
    """measure() for the strategy "parallel". What was unfinished begins anew: its samples are one rank's."""
    try:
        return _in_step(job, bucket, preferred, only, deadline)
    finally:
        if job.statics is not None:
            job.statics.put_back()


def _in_step(
    job: Job, bucket: Sizes, preferred: Record | None, only: Sequence[Record] | None, deadline: float
) -> Record | None:
    assert job.group is not None
    trial, memory = _guarded(lambda: Trial(job, bucket, deadline, None))
    offered = [] if trial is None else trial.candidates(only)
    vote = job.group.vote("candidates", _labels(job, offered), {}, out_of_memory=memory)
    _check_memory(vote)
    assert trial is not None
    step = _Step(trial, job.group)
    fit, samplers = step.ready(step.left_by(vote, offered))
    if not fit and not step.late and trial.spare:
        fit, samplers = step.ready(trial.spare)
    if len(fit) < 2:
        record = nothing_yet(trial) if step.late else without_choice(trial, fit)
        return job.group.decided(record, job.key.runners)
    try:
        result = race_of(trial, fit, samplers, preferred, job.group.slowest)
    except (GroupError, ClockError):
        raise
    except TuningError as error:  # every candidate failed while it was timed
        for candidate in fit:
            trial.fail(candidate, error)
        return job.group.decided(without_choice(trial, []), job.key.runners)
    record = conclude(trial, fit, result) if trial.intact(fit) else None
    return job.group.decided(record, job.key.runners)


def _by_rank_0(job: Job, bucket: Sizes, **how: object) -> Record | None:
    """measure() for the strategy "broadcast"."""
    assert job.group is not None
    record, memory = _guarded(lambda: measure(job, bucket, **how)) if job.group.rank == 0 else (None, "")  # type: ignore[arg-type]
    _check_memory(job.group.vote("memory", [], {}, out_of_memory=memory))
    return job.group.from_rank_0(record, job.key.runners)


def _merged(job: Job, bucket: Sizes, **how: object) -> Record | None:
    """measure() for the strategy "merge"."""
    assert job.group is not None
    record, memory = _guarded(lambda: measure(job, bucket, **how))  # type: ignore[arg-type]
    _check_memory(job.group.vote("memory", [], {}, out_of_memory=memory))
    return job.group.merged(record, job.key.runners, job.policy.min_gain)


_deciders = {"parallel": measure_together, "broadcast": _by_rank_0, "merge": _merged}


class _Step:
    """Candidates of one bucket, on their way to the race, in step with the other ranks."""

    def __init__(self, trial: Trial, group: Group) -> None:
        self.trial, self.job, self.group = trial, trial.job, group
        self.late = False

    def ready(self, candidates: list[Candidate]) -> tuple[list[Candidate], list[Samplers]]:
        """(who races on all ranks, their samplers here)."""
        self.trial.reserve(candidates)
        share = self.group.share(len(candidates))
        mine = {c.name for c, is_mine in zip(candidates, share, strict=True) if is_mine}
        candidates = self._checked(candidates, mine)
        made: dict[str, Samplers] = {}
        if not all(share):
            self._prepare([c for c in candidates if c.name in mine], made)
            candidates = self._screened(candidates, made)
        self._prepare([c for c in candidates if c.name not in made], made)
        candidates = self._voted("ready", candidates, {c.name for c in candidates} - made.keys())
        return candidates, [made[c.name] for c in candidates]

    def left_by(self, vote: Vote, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates that a vote leaves, in its order; notes why the others are out."""
        self.late = self.late or vote.late
        of = dict(zip(_labels(self.job, candidates), candidates, strict=True))
        for label, why in vote.against.items():
            if label in of and all(
                e.tactic != of[label].tactic or e.runner != of[label].runner for e in self.trial.evidence
            ):
                self._note(of[label], why)
        return [of[label] for label in vote.fit]

    def _note(self, candidate: Candidate, why: str) -> None:
        """Another rank's word against a candidate: into quarantine here, too, if it is there."""
        fate = next((fate for fate in ("quarantined", "not measured") if f": {fate}" in why), "failed")
        if fate == "quarantined":
            self.job.ban(candidate, why)
        self.trial.evidence.append(CandidateEvidence(candidate.runner, candidate.tactic, fate, reason=why))

    def _checked(self, candidates: list[Candidate], mine: set[str]) -> list[Candidate]:
        sound, memory = _guarded(lambda: self.trial.fit([c for c in candidates if c.name in mine]))
        passed = {c.name for c in sound or []}
        return self._voted("checked", candidates, mine - passed, memory)

    def _voted(
        self, step: str, candidates: list[Candidate], out: set[str], memory: str = ""
    ) -> list[Candidate]:
        """One vote, with this rank's word against the candidates in `out`, whose reasons are in the evidence."""
        why = {(e.runner, repr(e.tactic)): f"{e.fate} {e.reason}" for e in self.trial.evidence}
        against, fit = {}, []
        for label, c in zip(_labels(self.job, candidates), candidates, strict=True):
            if c.name in out:
                against[label] = why.get((c.runner, repr(c.tactic)), "not measured")
            else:
                fit.append(label)
        vote = self.group.vote(step, fit, against, late=self.trial.late, out_of_memory=memory)
        if not vote.fit:
            _check_memory(vote)
        return self.left_by(vote, candidates)

    def _prepare(self, candidates: list[Candidate], made: dict[str, Samplers]) -> None:
        fit, samplers = samplers_of(self.trial, candidates)
        made.update(zip((c.name for c in fit), samplers, strict=True))

    def _screened(self, candidates: list[Candidate], made: dict[str, Samplers]) -> list[Candidate]:
        """The candidates within screen_ratio of the best, each timed by one rank, twice, against the first."""
        labels = dict(zip((c.name for c in candidates), _labels(self.job, candidates), strict=True))
        ratios: dict[str, float] = {}
        for name in list(made):
            try:
                ratios[labels[name]] = self._ratio(made[candidates[0].name], made[name])
            except Exception as error:
                candidate = next(c for c in candidates if c.name == name)
                self.trial.fail(candidate, error)
                made.pop(name)
        together: dict[str, float] = {}
        for of in self.group.exchange("screened", ratios):
            together.update({label: min(ratio, together.get(label, ratio)) for label, ratio in of.items()})
        limit = min(together.values(), default=1.0) * self.job.policy.screen_ratio
        left = []
        for at, c in enumerate(candidates):
            ratio = together.get(labels[c.name])
            if at and ratio is not None and ratio > limit:
                self.trial.evidence.append(
                    CandidateEvidence(c.runner, c.tactic, "eliminated", 2, ratio=ratio, reason="screened")
                )
            else:
                left.append(c)
        return left

    def _ratio(self, default: Samplers, candidate: Samplers) -> float:
        """The candidate's time over the default's on its worst probe, the better of two runs each."""
        if default is candidate:
            return 1.0
        runs = [[(d(), c()) for d, c in zip(default, candidate, strict=True)] for _ in range(2)]
        pairs = [tuple(map(min, zip(*probe, strict=True))) for probe in zip(*runs, strict=True)]
        return float(max(mine / theirs for theirs, mine in pairs))


def _labels(job: Job, candidates: Sequence[Candidate]) -> list[str]:
    return [label_of_choice(c.index, c.tactic, job.runners[c.index]) for c in candidates]


def _guarded(step: Callable[[], Result]) -> tuple[Result | None, str]:
    """(what the step gives, ""), or (None, why) where memory is short: the others must hear of it."""
    try:
        return step(), ""
    except OutOfMemoryError as error:
        return None, str(error)


def _check_memory(vote: Vote) -> None:
    if vote.out_of_memory:
        raise OutOfMemoryError(vote.out_of_memory)
