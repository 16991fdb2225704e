"""Runs a warp-specialised Gluon kernel on the CPU, and lets everything asynchronous happen as late as it may.

Triton's interpreter knows no Gluon. Here a kernel's own Python code runs, with `gl` replaced by `gluon_values.Gl` and
the operations below. The partitions of a program are threads of which one runs at a time; at each operation on a
barrier, a copy or a product a seeded draw says who goes on. So one run is one interleaving, and a seed repeats it.

What the hardware may do late is done late, and what it may overwrite early is overwritten early:

- a copy makes its target NaN when it is issued; the data comes when a copy engine (an agent of its own) gets its turn,
  and the barrier hears of it then; the tensor memory accelerator's copies likewise, each box at its own time;
- a wgmma reads shared memory when it is waited for, and its sum cannot be used before; it must not read what came
  through a barrier before the partition has fenced the proxies.

A partition that reads a stage too early, gives one back too early or waits for the wrong phase thus computes NaN, stops
with an error, or leaves nobody who can go on, which raises DeadlockError. Registers are values here: that a running wgmma's
A registers are not written is what inflight.py reads from the machine code.
"""

from __future__ import annotations

import ast
import inspect
import random
import textwrap
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gluon_values import Gl, Pointer, ProgramExit, Shared, Tensor, plain, poison

THREADS = 128  # of a partition of four warps
Mutants = dict[str, tuple[str, str]]  # function -> (text, what stands there instead)


class DeadlockError(AssertionError):
    """Nobody can go on."""


def notices(right: Callable[[int], bool], seeds: int) -> bool:
    """Whether a mutant's result is not right, or the machine stops it, in one of the interleavings of so many seeds."""

    def wrong(seed: int) -> bool:
        try:
            return not right(seed)
        except AssertionError:
            return True

    return any(wrong(seed) for seed in range(seeds))


class Barrier:
    def __init__(self, count: int) -> None:
        self.count, self.missing, self.phase = count, count, 0
        self.bytes = 0  # that are expected and have not come
        self.threads_copy = False  # whether cp.async fills what this guards

    def arrive(self, count: int, expected: int = 0) -> None:
        assert count <= self.missing, f"{count} arrivals at a barrier that waits for {self.missing}"
        self.missing -= count
        self._turn(expected)

    def receive(self, count: int) -> None:
        self._turn(-count)

    def _turn(self, more: int) -> None:
        self.bytes += more
        if self.missing == 0 and self.bytes == 0:
            self.missing = self.count
            self.phase += 1

    def passed(self, parity: int) -> bool:
        """Whether the phase of this parity is over, as try_wait.parity says it."""
        return self.phase & 1 != parity


class Agent:
    """One partition: a thread that runs while it holds the machine's turn."""

    def __init__(self, machine: Program, body: Callable[[], None], weight: float) -> None:
        self.ready: Callable[[], bool] = lambda: True
        self.turn = threading.Semaphore(0)
        self.weight, self.over, self.fenced = weight, False, False
        self.error: BaseException | None = None
        self.uncommitted: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # (target, data) no barrier waits for yet
        self.running: deque[Callable[[], None]] = deque()  # products, oldest first
        self._machine, self._body = machine, body
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.turn.acquire()
        try:
            if not self._machine.stopped:
                self._body()
        except ProgramExit:
            pass
        except BaseException as e:
            self.error = e
        if self.error is None and (self.running or self.uncommitted):
            self.error = AssertionError("a partition left with products or copies under way")
        self.over = True
        self._machine.turn.release()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run, until `ready`."""
        self.ready = ready
        self._machine.turn.release()
        self.turn.acquire()
        if self._machine.stopped:
            raise ProgramExit


class Program:
    """One program of a grid: its shared memory, barriers and partitions."""

    def __init__(self, number: int, grid: int, draw: random.Random) -> None:
        self.number, self.grid = number, grid
        self.turn = threading.Semaphore(0)
        self.stopped = False
        self.agents: list[Agent] = []
        self._arriving: deque[Callable[[], None]] = deque()  # copies on their way, with whom they tell
        self._barriers: dict[tuple[int, ...], Barrier] = {}
        self._allocated = 0
        self._draw = draw
        self._current: Agent | None = None

    def run(self, bodies: Sequence[Callable[[], None]]) -> None:
        """Run partitions until all are over."""
        weight = [self._draw.choice((0.02, 1.0, 50.0)) for _ in range(len(bodies) + 1)]
        self.agents = [Agent(self, body, w) for body, w in zip(bodies, weight[1:], strict=True)]
        for agent in self.agents:
            agent.thread.start()
        try:
            while any(not a.over for a in self.agents):
                self._go_on(weight[0])
        finally:
            self._stop()

    def _go_on(self, engine: float) -> None:
        ready = [a for a in self.agents if not a.over and a.ready()]
        weights = [a.weight for a in ready] + [engine if self._arriving else 0.0]
        if not ready and not self._arriving:
            raise DeadlockError(
                f"program {self.number}: {sum(not a.over for a in self.agents)} partitions wait"
            )
        chosen = self._draw.choices([*ready, None], weights)[0]
        if chosen is None:
            self._arriving.popleft()()
            return
        self._current = chosen
        chosen.turn.release()
        self.turn.acquire()
        if chosen.error is not None:
            raise chosen.error

    def _stop(self) -> None:
        self.stopped = True
        for agent in self.agents:
            if not agent.over:
                agent.turn.release()
                self.turn.acquire()

    @property
    def here(self) -> Agent:
        assert self._current is not None, "outside warp_specialize"
        return self._current

    # what the language says --------------------------------------------------------------------------------

    def allocate_shared_memory(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        data = torch.empty(*shape, dtype=dtype)
        poison(data)
        self._allocated += 1
        return Shared(data, (self._allocated,))

    def init(self, barrier: Shared, count: int) -> None:
        self._barriers[barrier.place] = Barrier(count)

    def wait(self, barrier: Shared, phase: Any) -> None:
        at, parity = self._barriers[barrier.place], int(phase)
        self.here.pause(lambda: at.passed(parity))
        self.here.fenced = not at.threads_copy

    def arrive(self, barrier: Shared, count: int = 1) -> None:
        self._barriers[barrier.place].arrive(count)
        self.here.pause()

    def copy(self, to: Shared, source: Pointer, mask: Any = None) -> None:
        data = source.read(mask)
        assert data.shape == to.data.shape
        assert data.dtype == to.data.dtype
        poison(to.data)
        self.here.uncommitted.append((to.data, data))
        self.here.pause()

    def expect(self, barrier: Shared, count: int) -> None:
        self._barriers[barrier.place].arrive(1, expected=count)
        self.here.pause()

    def copy_box(self, descriptor: Any, at: Sequence[Any], barrier: Shared, to: Shared) -> None:
        """The tensor memory accelerator: a box of a tensor, with zeros where there is none of it."""
        first, box = [int(i) for i in at], tuple(descriptor.block_shape)
        assert tuple(to.data.shape) == box, f"a box {box} to {tuple(to.data.shape)}"
        source = descriptor.base[tuple(slice(i, i + n) for i, n in zip(first, box, strict=True))]
        data = torch.zeros(box, dtype=source.dtype)
        data[tuple(slice(0, n) for n in source.shape)] = source
        guard = self._barriers[barrier.place]
        poison(to.data)

        def done() -> None:
            to.data.copy_(data)
            guard.receive(data.numel() * data.element_size())

        self._arriving.insert(self._draw.randrange(len(self._arriving) + 1), done)
        self.here.pause()

    def arrive_after_copies(self, barrier: Shared, increment_count: bool) -> None:
        assert not increment_count
        at, copies = self._barriers[barrier.place], self.here.uncommitted
        self.here.uncommitted, at.threads_copy = [], True

        def done() -> None:
            for target, data in copies:
                target.copy_(data)
            at.arrive(THREADS)

        self._arriving.append(done)
        self.here.pause()

    def fence(self) -> None:
        """fence.proxy.async: what the last barrier let through is there for wgmma too."""
        if self._current is not None:
            self.here.fenced = True

    def multiply(
        self, a: Tensor | Shared, b: Shared, acc: Tensor, is_async: bool, use_acc: bool = True
    ) -> Tensor:
        assert is_async
        assert self.here.fenced, "a wgmma reads what cp.async wrote without a fence of the proxies"
        result, left = Tensor(None), a if isinstance(a, Shared) else Tensor(a.data)
        self.here.running.append(
            lambda: result.complete(left.data.float() @ b.data.float() + (acc.data if use_acc else 0))
        )
        self.here.pause()
        return result

    def retire(self, running: int, deps: Sequence[Tensor]) -> Sequence[Tensor] | Tensor:
        self.here.pause()
        while len(self.here.running) > running:
            self.here.running.popleft()()
        return deps if len(deps) > 1 else deps[0]


class Bound(ast.NodeTransformer):
    """x.to(dtype) -> _to(x, dtype), for integers that Gluon would make tensors of."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            name = ast.copy_location(ast.Name("_to", ast.Load()), node)
            return ast.copy_location(ast.Call(name, [node.func.value, *node.args], node.keywords), node)
        return node


def _to(value: Any, dtype: torch.dtype, bitcast: bool = False) -> Tensor:
    known = torch.as_tensor(plain(value))
    return Tensor(known.view(dtype) if bitcast else known.to(dtype))


class Code:
    """Kernel functions as Python functions of one program."""

    def __init__(self, program: Program, mutants: Mutants) -> None:
        gl = type("ProgramGl", (Gl,), {})
        gl.program_id = staticmethod(lambda axis: program.number)
        gl.num_programs = staticmethod(lambda axis: program.grid)
        gl.allocate_shared_memory = program.allocate_shared_memory
        gl.warp_specialize = lambda partitions, warps, registers: program.run(
            [lambda f=f, args=args: f(*args) for f, args in partitions]
        )
        barriers = type("Mbarrier", (), {})
        barriers.init, barriers.wait, barriers.arrive = program.init, program.wait, program.arrive
        barriers.expect = program.expect
        barriers.MBarrierLayout = staticmethod(lambda: None)
        copies = type("AsyncCopy", (), {"mbarrier_arrive": staticmethod(program.arrive_after_copies)})
        self._names: dict[str, Any] = {
            "gl": gl, "tl": gl, "mbarrier": barriers, "async_copy": copies, "copy_async": program.copy,
            "fence_async_shared": program.fence, "warpgroup_mma": program.multiply, "_to": _to,
            "warpgroup_mma_wait": program.retire, "tma_copy": program.copy_box,
        }  # fmt: skip
        self._mutants = mutants
        self._made: dict[Any, Callable[..., Any]] = {}

    def of(self, kernel: Any) -> Callable[..., Any]:
        """The Python function of a jitted one, whose globals are those of the machine."""
        function = kernel.fn
        if function in self._made:
            return self._made[function]
        text = textwrap.dedent(inspect.getsource(function))
        if function.__name__ in self._mutants:
            old, new = self._mutants[function.__name__]
            assert old in text
            text = text.replace(old, new)
        tree = ast.parse(text)
        definition = tree.body[0]
        assert isinstance(definition, ast.FunctionDef)
        definition.decorator_list, definition.returns = [], None
        for argument in definition.args.args:
            argument.annotation = None
        ast.increment_lineno(Bound().visit(tree), function.__code__.co_firstlineno - 1)
        names: dict[str, Any] = {}
        exec(compile(ast.fix_missing_locations(tree), function.__code__.co_filename, "exec"), names)
        made: Callable[..., Any] = names[function.__name__]
        self._made[function] = made
        names.update({name: self._global(name, value) for name, value in function.__globals__.items()})
        names.update(self._names)
        return made

    def _global(self, name: str, value: Any) -> Any:
        if hasattr(value, "fn") and name not in self._names:
            return lambda *args: self.of(value)(*args)
        return getattr(value, "value", value) if type(value).__name__ == "constexpr" else value


def _sent(argument: Any) -> Any:
    """An argument as a kernel has it: tensors are pointers, in groups too."""
    if isinstance(argument, tuple):
        return type(argument)(*map(_sent, argument))
    return Pointer.to_start(argument) if isinstance(argument, torch.Tensor) else argument


class GluonMachine:
    """Stands for a Gluon kernel: machine[grid](*args, **meta) runs its programs one after another.

    mutants: what is to be changed in the text of functions, by their names: a test that the machine notices.
    """

    def __init__(self, kernel: Any, seed: int = 0, mutants: Mutants | None = None) -> None:
        self.__name__, self.params = kernel.__name__, kernel.params
        self._kernel, self._seed, self._mutants = kernel, seed, mutants or {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **meta: Any) -> None:
            known = inspect.signature(self._kernel.fn).parameters
            constants = {name: value for name, value in meta.items() if name in known}
            sent = [_sent(a) for a in args]
            draw = random.Random(self._seed)
            for number in range(grid[0]):
                program = Program(number, grid[0], draw)
                Code(program, self._mutants).of(self._kernel)(*sent, **constants)

        return launch
