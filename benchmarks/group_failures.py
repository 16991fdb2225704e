"""Ranks that fail while they tune or serve together: randomised runs with real processes, gloo and a TCPStore.

    python benchmarks/group_failures.py --runs 200 [--json FILE]

Each run forks 2 to 4 ranks and does one thing to one of them: nothing; asleep for longer than the time-out;
dead before it begins; killed (SIGKILL) in the middle; a cold store where the others' are warm; a store with
another decision; a candidate that raises; a budget that ends at once. Half of the runs tune, with each
strategy in turn; half call ExpertParallel in a loop. A run is good when every rank that lives ends within the
time-out (and the seconds that it takes to say who is gone), all with the same answer, or each with an error
that names the rank.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from moestro.errors import GroupError

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / name) for name in ("tuning", "parallel")]

TIMEOUT_S = 2.0  # of a group; a run may take twice this where it says who is gone, and a little to start
SLACK_S = 6.0
HANG_S = 20.0  # from the fork on: starting and connecting included
TUNE = ("none", "slow", "dead", "killed", "cold", "differs", "raises", "budget")
SERVE = ("none", "slow", "dead", "killed", "raises")


def tune(group: Any, trouble: str, here: bool, seed: int, root: Path) -> str:
    """One tuning on paper; the tactic."""
    from test_group import TOGETHER, tuned_alone
    from tuning_fakes import Kernel, config, inputs, quiet_clock, tuner

    times: dict[Any, Any] = {-1: 1e-3, 0: 5e-4, 1: 7e-4, 2: 6e-4}
    if here and trouble == "raises":
        times[seed % 3] = RuntimeError("broken here")
    if trouble in ("killed", "slow"):  # long enough for something to happen in the middle
        times = {tactic: (lambda n, s=seconds: time.sleep(2e-3) or s) for tactic, seconds in times.items()}  # type: ignore[misc]
    if (trouble == "cold" and not here) or trouble == "differs":
        tuned_alone(root, {-1: 1e-3, 0: 9e-4, 1: 5e-4, 2: 8e-4} if here else times)
    clock = quiet_clock(seed=seed + 31 * group.rank())
    t, k = tuner(clock, root), Kernel(clock, times)
    budget = 0.004 if here and trouble == "budget" else None
    with t.autotune(
        True, group=group, strategy=TOGETHER[seed % len(TOGETHER)], budget_s=budget, timeout_s=TIMEOUT_S
    ):
        picks = [t.choose_one("op", [k], config(), inputs(n))[1] for n in (4, 16, 64)]
    return str(picks)


def serve(group: Any, trouble: str, here: bool, seed: int, root: Path) -> str:
    """Forty calls of an ExpertParallel; whether they are right."""
    import parallel_cases as cases

    from moestro import reference
    from moestro.parallel import ExpertParallel

    r, w = random.Random(seed), cases.weights_of_all()
    ep = ExpertParallel(cases.layer_of(w), group, way=r.choice(("gather", "dispatch")), timeout_s=TIMEOUT_S)
    for call in range(40):
        x, ids, weights = cases.tokens_of(group.rank(), (seed + call + group.rank()) % 9, "uniform")
        if here and trouble == "slow" and call == seed % 40:
            time.sleep(TIMEOUT_S + 1.5)
        if here and trouble == "raises" and call == seed % 40:
            ep.layer.run = lambda *_: 1 / 0  # type: ignore[assignment, method-assign]
        y = ep(x, ids, weights)
        if cases.error_of(y, reference.fused_moe(x, ids, weights, w)) > cases.TIGHT:
            return "wrong"
        time.sleep(2e-3)
    return "right"


def rank_main(
    pipe: Any, rank: int, size: int, port: int, work: str, trouble: str, victim: int, seed: int, root: str
) -> None:
    torch.set_num_threads(1)
    hangs = (Path(root).parent / f"hang-{rank}").open("w")
    faulthandler.dump_traceback_later(HANG_S, file=hangs)
    warnings.simplefilter("ignore")
    here = rank == victim
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    dist.barrier()  # all are connected, however busy the machine is: what follows is the run
    distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S), dist.group.WORLD)
    started = time.monotonic()
    if here and trouble == "dead":
        os._exit(1)
    if here and trouble == "killed":
        threading.Timer(
            random.Random(seed).uniform(0.0, 0.12), lambda: os.kill(os.getpid(), signal.SIGKILL)
        ).start()
    if here and trouble == "slow" and work == "tune":
        time.sleep(TIMEOUT_S + 1)
    try:
        answer = (tune if work == "tune" else serve)(
            dist.group.WORLD, trouble, here, seed, Path(root) / str(rank)
        )
    except (GroupError, ZeroDivisionError) as error:
        answer = f"{type(error).__name__}: {error}"
    pipe.send((answer, time.monotonic() - started))
    os._exit(0)  # without waiting for peers that may be gone


def host_store(pipe: Any, size: int) -> None:
    server = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
    pipe.send(server.port)
    pipe.recv()  # for ever: the run ends with a kill


def one(seed: int, root: Path) -> dict[str, Any]:
    """One run: what was done to whom, what each rank answered, and whether that is good."""
    r = random.Random(seed)
    work = ("tune", "serve")[seed % 2]
    size = r.choice([2, 3, 4])
    trouble, victim = r.choice(TUNE if work == "tune" else SERVE), r.randrange(size)
    context = get_context("fork")
    # The store is in a process of its own, as torchrun's: a server's threads do not survive a fork.
    theirs, ours = context.Pipe()
    server = context.Process(target=host_store, args=(ours, size))
    server.start()
    port = theirs.recv()
    ranks = []
    for rank in range(size):
        mine, theirs = context.Pipe(duplex=False)
        job = (theirs, rank, size, port, work, trouble, victim, seed, str(root / str(seed)))
        process = context.Process(target=rank_main, args=job)
        process.start()
        theirs.close()
        ranks.append((process, mine))
    answers, seconds, end = [], [], time.monotonic() + HANG_S + 5
    for process, pipe in ranks:
        answer = "hangs"
        try:
            if pipe.poll(max(0.0, end - time.monotonic())):
                answer, took = pipe.recv()
                seconds.append(took)
        except EOFError:
            answer = "gone"
        answers.append(answer)
        if answer == "hangs":
            process.kill()
        process.join()
    server.kill()
    server.join()
    return {
        "seed": seed, "work": work, "ranks": size, "trouble": trouble, "victim": victim, "answers": answers,
        "seconds": max(seconds, default=0.0), "good": good(trouble, victim, answers, max(seconds, default=0.0)),
    }  # fmt: skip


def good(trouble: str, victim: int, answers: list[str], seconds: float) -> bool:
    """Whether a run ended as it must."""
    left = [answer for answer in answers if answer != "gone"]
    if "hangs" in left or "wrong" in left or seconds > 2 * TIMEOUT_S + SLACK_S:
        return False
    if (answers[victim] == "gone") != (trouble in ("dead", "killed")) and trouble != "killed":
        return False
    errors = [answer for answer in left if "Error" in answer]
    if not errors:
        return len(set(left)) == 1
    others = [answer for rank, answer in enumerate(answers) if rank != victim and answer != "gone"]
    return trouble in ("slow", "dead", "killed", "raises") and all(
        "GroupError" in answer and (f"rank {victim}" in answer or "alive" in answer)
        for answer in others
        if answer in errors
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import test_group  # noqa: F401  # imported once, before the forks

    with tempfile.TemporaryDirectory() as root:
        runs = []
        for seed in range(options.first, options.first + options.runs):
            runs.append(one(seed, Path(root)))
            if not runs[-1]["good"]:
                print(runs[-1], flush=True)
    kinds = Counter(f"{run['work']} {run['trouble']}" for run in runs)
    bad = [run for run in runs if not run["good"]]
    print(
        f"{len(runs)} runs, {len(bad)} not good, slowest {max(run['seconds'] for run in runs):.1f} s: {dict(kinds)}"
    )
    if options.json is not None:
        from moestro.bench import results

        whole = {
            "command": " ".join(sys.argv),
            "date": results.now(),
            "environment": results.environment("cpu"),
        }
        results.write_json(
            options.json, {**whole, "timeout_s": TIMEOUT_S, "kinds": dict(kinds), "runs": runs}
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
