"""Tunes and times the models of gpu_plan.py beside their peers on one GPU, in one process and a given time.

    CUDA_HOME=/usr/local/cuda PYTHONPATH=src:.gpu/site python benchmarks/gpu_record.py $OUT --seconds 300
    python benchmarks/gpu_record.py --plan                       the steps, in their order; --only NAME,NAME picks

A wave of steps at a time: all kernels that its tunings may want are compiled in threads, those of peers in processes
beside; then step by step its layers are tuned (--each seconds a layer) and timed beside the peers with what was tuned.
After every step, and after every size of a timing, the files of recording.py are written anew. What a shipped bundle
has decided for these very kernels and versions is not tuned again, unless with --anew. At the end of --seconds, on SIGTERM
or Ctrl-C the step that is running gives what it has. A step that hangs, or leaves the GPU in an error, is given up: the
program starts itself anew with those after it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_plan import PLAN, Step, tiny
from recording import Console, Recorder, lines

from moestro import routing
from moestro.bench import results, timing
from moestro.bench.adapters import ADAPTERS, AdapterContender
from moestro.bench.contenders import make_layer, tactic_words
from moestro.bench.layers import LayerSource, make_case
from moestro.bench.measure import Plan
from moestro.bench.models import MoeShape
from moestro.bench.peers import peer_names
from moestro.bench.run import BenchSpec, run_each
from moestro.moe.call import as_inputs
from moestro.tuning import AutoTuner
from moestro.tuning.measure.compile import jobs_of, precompile
from moestro.tuning.progress import Listener
from moestro.tuning.store import shipped

COMPILING = 0.4  # of what is left, at most, for a wave's compilation
LEAST = 12.0  # seconds below which no step begins
HANGS = 90.0  # seconds after which a step is given up, or half of what is left
GRACE = 15.0  # seconds after the end for what is running to give what it has


def main() -> int:
    """How many steps failed or were left out."""
    options = arguments()
    if options.plan:
        print(*(step.words() for step in chosen(options.only)), sep="\n")
        return 0
    if options.warm:
        return warm(chosen([options.warm])[0], options)
    options.out.mkdir(parents=True, exist_ok=True)
    say = Console(options.out / "log.txt")
    try:
        return Session(options, say).run()
    finally:
        say.close()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", default=Path(os.environ.get("OUT", "/tmp/gpu-record")))
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument(
        "--each", type=float, default=8.0, help="seconds of tuning a layer, compilation aside"
    )
    parser.add_argument("--only", type=lambda text: text.split(","), default=None, metavar="NAMES")
    parser.add_argument("--plan", action="store_true", help="print the steps")
    parser.add_argument("--anew", action="store_true", help="tune what shipped bundles have, too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--tiny", action="store_true", help="small layers: a look at the flow")
    parser.add_argument("--store", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--warm", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen(names: Sequence[str] | None) -> list[Step]:
    """The steps of these names, or all."""
    known = {step.name: step for step in PLAN}
    if unknown := [name for name in names or () if name not in known]:
        raise SystemExit(f"--only: no step {', '.join(unknown)}; there are {', '.join(known)}")
    return [step for step in PLAN if names is None or step.name in names]


class Session:
    """One run of the plan."""

    def __init__(self, options: argparse.Namespace, say: Console) -> None:
        self.options, self.say = options, say
        self.end = time.monotonic() + options.seconds
        self.store = options.store or Path(tempfile.mkdtemp(prefix="gpu-record-"))
        self.recorder = Recorder(options.out, self.store)
        if options.anew:
            shipped.FOLDER = self.store  # has no bundles
            shipped.forget()
        self.tuner = AutoTuner(store=self.store)
        self.watchdog = Watchdog(self.give_up)
        self.failed, self.waiting = 0, chosen(options.only)
        self.children: list[subprocess.Popen[bytes]] = []

    @property
    def left(self) -> float:
        return float(self.end - time.monotonic())

    def run(self) -> int:
        where = results.environment(self.options.device)
        self.say(
            " ".join(f"{k} {where.get(k)}" for k in ("device_name", "driver", "torch", "triton", "moestro"))
        )
        for signum in (signal.SIGALRM, signal.SIGTERM):
            signal.signal(signum, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, max(0.1, self.left))
        self.watchdog.start()
        try:
            for _, wave in itertools.groupby([*self.waiting], lambda step: step.wave):
                if self.left < LEAST:
                    break
                self.wave(list(wave))
        except KeyboardInterrupt:
            pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.recorder.export()
        if self.waiting:
            self.say(f"no time left for {', '.join(step.name for step in self.waiting)}")
        return self.failed + len(self.waiting)

    def wave(self, steps: list[Step]) -> None:
        """Compile together, then step by step tune and time."""
        self.watchdog.allow(COMPILING * self.left + 60)
        self.warm_peers(steps)
        try:
            layers = {step.name: self.layers(step) for step in steps}
            self.compile([pair for step in steps for pair in layers[step.name]], steps)
        finally:
            self.end_children()
        for step in steps:
            if self.left < LEAST:
                return
            self.watchdog.allow(max(HANGS, self.left / 2))
            for name, layer in layers.pop(step.name):
                self.tune(name, layer, step)
            if step.timed:
                self.time(step)
            self.waiting.remove(step)
            gc.collect()
            if self.options.device.startswith("cuda"):
                torch.cuda.empty_cache()

    def attempt(self, what: str, call: Any) -> Any:
        """The call's result, or None after saying why; where the GPU is lost, a new process goes on."""
        try:
            return call()
        except Exception as error:
            self.failed += 1
            self.say.failed(what, error)
            try:
                if self.options.device.startswith("cuda"):
                    torch.cuda.synchronize()
            except RuntimeError:
                self.give_up("leaves the GPU in an error")
        return None

    # --- layers, compilation, tuning -------------------------------------------------------------------
    def layers(self, step: Step) -> list[tuple[str, Any]]:
        """(name, layer) of what a step tunes."""
        made = []
        for fmt, taken in step.layers:
            name = f"{step.name} {'+'.join(filter(None, (fmt, taken)))}"
            source = LayerSource(shape_of(step, self.options), device=self.options.device)
            sizes = max(step.tokens), self.tuner, taken
            layer = self.attempt(
                name, lambda s=source, f=fmt, z=sizes: make_layer(s, f, self.options.backend, *z)
            )
            made += [(name, layer)] * (layer is not None)
        return made

    def compile(self, layers: Sequence[tuple[str, Any]], steps: Sequence[Step]) -> None:
        """All kernels of what is not decided yet, once each, while peers compile theirs in processes of their own."""
        began, most = time.monotonic(), COMPILING * self.left
        jobs: dict[Any, Any] = {}
        tokens = {pair: step.tokens for step in steps for pair in _names(step)}
        for name, layer in layers:
            if not self.known(layer, tokens[name]):
                self.attempt(
                    f"{name} kernels", lambda n=name, one=layer: jobs.update(kernels_of(one, tokens[n]))
                )

        def late() -> bool:
            return time.monotonic() - began > most

        failed = precompile(jobs, late)
        took = time.monotonic() - began
        while any(child.poll() is None for child in self.children) and not late():
            time.sleep(0.1)
        ended = [child.poll() for child in self.children]
        names = ", ".join(step.name for step in steps)
        self.say(f"compiled for {names}: {len(jobs)} kernels in {took:.0f} s, {len(failed)} failed; peers' processes "
                 f"{ended} after {time.monotonic() - began:.0f} s; {self.left:.0f} s left")  # fmt: skip
        for error in list(failed.values())[:2]:
            self.say.failed("a kernel", error)

    def known(self, layer: Any, tokens: Sequence[int]) -> bool:
        """Whether every size is decided for good, by a bundle or an earlier step."""
        found = [layer.decision(n) for n in tokens]
        return all(d is not None and d.status == "measured" and d.record.complete for d in found)

    def tune(self, name: str, layer: Any, step: Step) -> None:
        """Decide what is not decided, write the files, say what won."""
        if self.known(layer, step.tokens):
            self.say(f"tune {name}: decided already, {layer.decision(step.tokens[0]).source}")
            return
        began, budget = time.monotonic(), min(self.options.each, max(1.0, self.left / 8))
        self.attempt(
            f"tune {name}",
            lambda: layer.tune(max(step.tokens), budget, None, Listener(), buckets=step.tokens),
        )
        decisions = {n: layer.decision(n) for n in step.tokens}
        own = {n: d for n, d in decisions.items() if d is not None and d.record and d.record.bucket == (n,)}
        whole = sum(d.record.complete for d in own.values())
        won = {n: d for n, d in own.items() if d.tactic != -1}
        words = ", ".join(f"{n} {_won(d)}" for n, d in won.items())
        self.say(f"tune {name} on {layer.runners[0].backend}: {whole} of {len(decisions)} sizes decided, "
                 f"{len(own) - whole} begun in {time.monotonic() - began:.1f} s; not the default at "
                 f"{words or 'any'}")  # fmt: skip
        for n, d in won.items():
            print(name, n, tactic_words(d.tactic))  # to the log
        self.recorder.export()

    # --- timing ------------------------------------------------------------------------------------------
    def time(self, step: Step) -> None:
        """Beside the peers, with the decisions of the store; the record has each size once it is measured."""
        options, known = self.options, peer_names(self.options.device)
        routings = [routing.parse(text) for text in step.routings]
        spec = BenchSpec(
            shape_of(step, options),
            step.tokens,
            routings[0],
            step.formats,
            step.inputs,
            (options.backend,),
            tuple(name for name in step.peers if name in known),
            options.device,
            store=self.store,
            plan=Plan(min_rounds=options.rounds, max_rounds=3 * options.rounds, seconds=0.08),
        )
        clock = timing.timer_for(options.device)
        keep = lambda found: self.recorder.keep(step.name, found)  # noqa: E731
        found = self.attempt(
            f"time {step.name}", lambda: run_each(spec, routings, clock, step.words(), None, keep)
        )
        self.recorder.keep(step.name, found or [])
        for text in (text for result in found or () for text in lines(step.name, result, step.tokens)):
            self.say(text)
        if found and found[-1].interrupted:
            raise KeyboardInterrupt

    def warm_peers(self, steps: Sequence[Step]) -> None:
        """Start processes in which peers compile what they keep on disk, one a step."""
        o = self.options
        if not o.device.startswith("cuda"):
            return
        rest = [str(o.out), "--device", o.device, *["--tiny"] * o.tiny]
        wanted = [step.name for step in steps if step.timed and any(name in ADAPTERS for name in step.peers)]
        for name in wanted:
            self.children.append(subprocess.Popen([sys.executable, __file__, *rest, "--warm", name]))

    def end_children(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()
        self.children = []

    def give_up(self, why: str) -> None:
        """Start anew with the steps after the one that is running; from any thread, whatever the GPU does."""
        rest = [step.name for step in self.waiting[1:]]
        self.say(f"{self.waiting[0].name if self.waiting else 'the end'} {why} and is given up")
        if not rest or self.left < LEAST:
            os._exit(self.failed + len(rest) + 1)
        o = self.options
        command = [
            sys.executable,
            __file__,
            str(o.out),
            "--seconds",
            f"{self.left:.0f}",
            "--each",
            str(o.each),
        ]
        command += ["--only", ",".join(rest), "--rounds", str(o.rounds), "--device", o.device]
        command += [
            "--backend",
            o.backend,
            "--store",
            str(self.store),
            *["--tiny"] * o.tiny,
            *["--anew"] * o.anew,
        ]
        self.end_children()
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.say.close()  # stdout and stderr are the first ones again
        os.execv(sys.executable, command)


class Watchdog(threading.Thread):
    """Calls give_up beyond the time that was allowed last."""

    def __init__(self, give_up: Any) -> None:
        super().__init__(daemon=True)
        self._give_up, self._until = give_up, float("inf")

    def allow(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds + GRACE

    def run(self) -> None:
        while time.monotonic() < self._until:
            time.sleep(0.2)
        self._give_up("hangs")


def shape_of(step: Step, options: argparse.Namespace) -> MoeShape:
    return tiny(step) if options.tiny else step.shape


def _names(step: Step) -> list[str]:
    return [f"{step.name} {'+'.join(filter(None, pair))}" for pair in step.layers]


def kernels_of(layer: Any, tokens: Sequence[int]) -> dict[Any, Any]:
    """Key -> job, of the default and all that a tuning would try, at these sizes."""
    runner = layer.runners[0]
    jobs: dict[Any, Any] = {}
    for n in tokens:
        x = torch.zeros(n, layer.weights.hidden_size, dtype=layer.dtype, device=layer.weights.device)
        ids = torch.zeros(n, layer.top_k, dtype=torch.int32, device=x.device)
        inputs = as_inputs(x, ids, torch.zeros(n, layer.top_k, device=x.device), torch.empty_like(x))
        for tactic in (-1, *runner.get_valid_tactics(inputs, None)):
            jobs |= jobs_of(runner, inputs, tactic, (id(layer), n, str(tactic)))
    return jobs


def _won(decision: Any) -> str:
    """Path and ratio of a winner."""
    chosen = decision.evidence.of(decision.record.runner, decision.tactic)
    ratio = f" {chosen.ratio:.2f}" if chosen is not None and chosen.ratio else ""
    return f"{getattr(decision.tactic, 'path', decision.runner.backend)}{ratio}"


def warm(step: Step, options: argparse.Namespace) -> int:
    """Run a step's adapted peers once at each size, so that what they compile is on disk."""
    shape = shape_of(step, options)
    source = LayerSource(shape, device=options.device)
    cases = [make_case(shape, n, routing.parse(step.routings[0]), device=options.device) for n in step.tokens]
    failed = 0
    for adapter in (ADAPTERS[name] for name in step.peers if name in ADAPTERS):
        if adapter.missing(shape) is not None:
            continue
        try:
            made = AdapterContender(adapter, [adapter.prepare(source.weights(adapter.format), shape)])
            made.compile(cases)
            for case in cases:
                made.calls(case)[0]()
            torch.cuda.synchronize()
        except Exception as error:  # said when the peer is timed
            failed += 1
            print(f"{step.name} {adapter.title}: {type(error).__name__}: {error}", file=sys.stderr)
    return failed


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(min(status, 99))  # compilations that are not wanted any more are not waited for
