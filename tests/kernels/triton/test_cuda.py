"""Kernels in CUDA C++ as launches: what reaches the driver, what is compiled and loaded when, and replays of them."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton", minversion="3.6")

import torch
from fake_cuda import Launched, Library
from stub_driver import StubDriver
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from moestro.errors import BackendError
from moestro.kernels.triton import cuda, cuda_driver, fp8_layout, nvrtc, replay
from moestro.kernels.triton.call import Launch

SOURCE = """struct Params {{ long long words[{words}]; }};
extern "C" __global__ void move(const __grid_constant__ Params p) {{}}"""


class Recipe(NamedTuple):
    rows: int
    even: bool


class Group(NamedTuple):
    scale: torch.Tensor | None
    boxes: Any


def variant(HOW: Recipe, TILE: int = 1) -> cuda.Variant:
    return cuda.Variant(SOURCE.format(words=HOW.rows * TILE), 128 * TILE, 1000 * HOW.rows)


def kernel() -> cuda.CudaKernel:
    return cuda.CudaKernel("move", ("x", "out", "group", "boxes", "stride", "bias"), variant)


META = {"HOW": Recipe(2, True), "TILE": 3, "launch_pdl": True, "PDL": True}


@pytest.fixture
def active(monkeypatch: pytest.MonkeyPatch) -> StubDriver:
    stub = StubDriver()
    monkeypatch.setattr(cuda.triton.runtime.driver, "_active", stub)
    return stub


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, active: StubDriver) -> Library:
    made = Library(words=5, maps=2)
    driver = cuda_driver.Driver(made)
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    return made


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is compiled, which takes a moment."""
    seen: list[str] = []

    def compile(source: str, name: str) -> nvrtc.Cubin:
        seen.append(source)
        time.sleep(0.02)
        return nvrtc.Cubin(source.encode(), f"{name}: fine")

    monkeypatch.setattr(nvrtc, "compile", compile)
    return seen


def arguments() -> tuple[Any, ...]:
    x, out, scale = (torch.zeros(64) for _ in range(3))
    rows = torch.zeros(256, 256, dtype=torch.uint8)
    group = Group(scale, fp8_layout.descriptor(rows, 64))
    return x, out, group, cuda.boxes(rows, (88, 128)), -3, None


def launched(library: Library) -> Launched:
    (one,) = library.launched
    return one


# --- what reaches the driver --------------------------------------------------------------------------------
@pytest.mark.usefixtures("sources")
def test_a_launch_is_what_its_arguments_and_its_variant_say(library: Library, active: StubDriver) -> None:
    active.stream = 1 << 40
    args = x, out, group, boxes, _, _ = arguments()
    Launch(kernel(), (7, 2), args, META).run()
    words = (x.data_ptr(), out.data_ptr(), group.scale.data_ptr(), -3, 0)
    maps = (group.boxes.base.data_ptr(), boxes.base.data_ptr())
    assert launched(library) == (1, (7, 2, 1), 384, 2000, 1 << 40, True, words, maps)
    assert library.loaded == [(SOURCE.format(words=6).encode(), b"move")]
    assert library.shared == [2000]
    assert (library.context, library.mode) == (1000, 0)


@pytest.mark.usefixtures("sources")
def test_without_pdl_a_launch_waits_for_the_one_ahead(library: Library) -> None:
    Launch(kernel(), (1,), arguments(), {"HOW": Recipe(2, True), "PDL": False}).run()
    assert launched(library).pdl is False


def test_groups_are_taken_apart_in_order_and_switches_are_words() -> None:
    words: list[int] = []
    maps: list[Any] = []
    one, two = (fp8_layout.descriptor(torch.zeros(64, 128, dtype=torch.uint8), 64) for _ in range(2))
    cuda.split((1, (2, (None, one), -3), True, two, torch.Size([4, 5])), words, maps)
    assert words == [1, 2, 0, -3, 1, 4, 5]
    assert [id(m) for m in maps] == [id(one), id(two)]
    with pytest.raises(
        BackendError, match="takes tensors, integers, None and tensor descriptors, got a float"
    ):
        cuda.split((1.0,), words, maps)


def test_a_map_says_what_the_descriptor_says(library: Library) -> None:
    rows = torch.zeros(3, 96, 64, dtype=torch.int16)
    cuda.driver().map(cuda.boxes(rows, (1, 40, 64)))
    half = torch.zeros(96, 64, dtype=torch.uint8)
    cuda.driver().map(GluonDescriptor.from_tensor(half, [32, 32], gl.NVMMASharedLayout(32, 8, 2)))
    whole, part = library.encoded
    assert whole == {"element": 1, "at": rows.data_ptr(), "shape": [64, 96, 3], "strides": [128, 96 * 128],
                     "box": [64, 40, 1], "every": [1, 1, 1], "rest": (0, 3, 2, 0)}  # fmt: skip
    assert (part["element"], part["strides"], part["rest"]) == (0, [64], (0, 1, 2, 0))


def test_maps_of_other_descriptors_are_refused() -> None:
    driver = cuda_driver.Driver(Library())
    rows = torch.zeros(64, 128)
    with pytest.raises(BackendError, match=r"Gluon's TensorDescriptor.*got triton\.tools"):
        driver.map(TensorDescriptor.from_tensor(rows, [64, 64]))
    nan = GluonDescriptor.from_tensor(rows, [64, 32], gl.NVMMASharedLayout(128, 32, 2), padding="nan")
    with pytest.raises(BackendError, match="padding must be 'zero', got 'nan'"):
        driver.map(nan)


def test_a_map_is_encoded_once_as_long_as_it_says_the_same(library: Library) -> None:
    driver, rows = cuda.driver(), torch.zeros(256, 128, dtype=torch.uint8)
    template = fp8_layout.descriptor(rows, 64)
    described = replay.Described(replay.with_base(template, None))
    first, memory = driver.map(template)
    assert [driver.map(described(rows.data_ptr()))[0] for _ in range(3)] == [first] * 3
    assert driver.map(copy.copy(template)) == (first, memory)
    others = (
        described(rows.data_ptr() + 128),
        fp8_layout.descriptor(rows, 32),
        fp8_layout.descriptor(rows[:128], 64),
    )
    assert first not in {driver.map(other)[0] for other in others}
    assert library.calls["cuTensorMapEncodeTiled"] == 4


def test_no_more_maps_than_are_kept(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "KEPT", 4)
    driver = cuda.driver()
    described = replay.Described(fp8_layout.descriptor(torch.zeros(64, 128, dtype=torch.uint8), 64))
    held = [driver.map(described(4096 * i)) for i in range(1, 10)]
    assert len(driver._maps) <= 4
    assert len({at for at, _ in held}) == 9  # none in another's place


# --- what the driver refuses --------------------------------------------------------------------------------
@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize(
    "name", ["cuModuleLoadData", "cuFuncSetAttribute", "cuTensorMapEncodeTiled", "cuLaunchKernelEx"]
)
def test_a_refusal_names_the_function_and_the_status(library: Library, name: str) -> None:
    library.refuses[name] = [719, 999]
    launch = Launch(kernel(), (1,), arguments(), META)
    with pytest.raises(BackendError, match=rf"{name} must return 0, got 719 \(CUDA_ERROR_ODD\)"):
        launch.run()
    with pytest.raises(BackendError, match=rf"{name} must return 0, got 999$"):
        launch.run()
    assert library.mode == 0
    launch.run()
    assert launched(library).threads == 384


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("status", cuda_driver.OTHER_CONTEXT)
def test_a_thread_that_has_not_used_the_device_gets_its_context(library: Library, status: int) -> None:
    launch = Launch(kernel(), (1,), arguments(), META)
    launch.run()
    library.context = 0
    library.refuses["cuLaunchKernelEx"] = [status]
    launch.run()
    assert library.context == 1000
    assert len(library.launched) == 2
    library.refuses["cuLaunchKernelEx"] = [status, status]
    with pytest.raises(BackendError, match=f"got {status}"):
        launch.run()


def test_a_library_that_is_too_old_is_an_error_that_names_the_function() -> None:
    class Bare:
        pass

    with pytest.raises(AttributeError, match="cuGetErrorName"):
        cuda_driver.Driver(Bare())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_the_error_says_what_is_missing() -> None:
    with pytest.raises(BackendError, match="launched by CUDA's driver, 12"):
        cuda_driver.driver()


# --- what is compiled and loaded ----------------------------------------------------------------------------
def test_each_variant_is_compiled_once_and_loaded_once_on_each_device(
    library: Library, active: StubDriver, sources: list[str]
) -> None:
    move = kernel()
    for device in (0, 1, 0):
        active.device = device
        for tile in (1, 2, 1):
            Launch(move, (1,), arguments(), {**META, "TILE": tile}).run()
    assert len(sources) == len(set(sources)) == 2
    assert [one.function for one in library.launched] == [1, 2, 1, 3, 4, 3, 1, 2, 1]
    assert library.context == 1001  # as loading on device 1 left it


def test_constants_are_told_apart_as_they_are_written(sources: list[str]) -> None:
    """True equals 1, but makes another text; options of the launch make none."""
    move = kernel()
    for how in (Recipe(1, True), Recipe(1, 1), Recipe(1, True)):  # type: ignore[arg-type]
        Launch(move, (1,), arguments(), {"HOW": how, "num_warps": 4, "maxnreg": 96}).compile()
    assert len(sources) == 2
    assert move.cubin(HOW=Recipe(1, True)).log == "move: fine"
    assert len(sources) == 2


def test_compiling_needs_no_gpu(sources: list[str]) -> None:
    compiled = Launch(kernel(), (1,), arguments(), META).compile()
    assert compiled.packed_metadata == (384, 2000, True)
    assert len(sources) == 1


def test_threads_that_want_the_same_compile_and_load_it_once(library: Library, sources: list[str]) -> None:
    launch = Launch(kernel(), (1,), arguments(), META)
    others = [Launch(launch.kernel, (1,), arguments(), {**META, "TILE": tile}) for tile in (1, 2)]
    gate = threading.Barrier(6)

    def work(one: Launch) -> None:
        gate.wait()
        for _ in range(50):
            one.run()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, [launch, *others] * 2))
    assert len(sources) == len(library.loaded) == 3
    assert len(library.launched) == 300
    want = {(384, launch.args[0].data_ptr()), *((128 * o.meta["TILE"], o.args[0].data_ptr()) for o in others)}
    assert {(one.threads, one.words[0]) for one in library.launched} == want


def test_a_wrong_number_of_arguments_is_an_error_that_names_them() -> None:
    with pytest.raises(
        BackendError, match=r"move must get 6 arguments \(x, out, group, boxes, stride, bias\), got 2"
    ):
        Launch(kernel(), (1,), (1, 2), META).compile()


def test_what_does_not_compile_is_told_each_time_it_is_wanted() -> None:
    if reason := nvrtc.why_missing():
        pytest.skip(reason)
    bad = cuda.CudaKernel("bad", (), lambda: cuda.Variant("int f() { return y; }", 32, 0))
    for _ in range(2):
        with pytest.raises(BackendError, match=r"(?s)bad\.cu\(1\): error: .*\"y\" is undefined"):
            bad.cubin()


def test_a_real_variant_is_real_machine_code() -> None:
    if reason := nvrtc.why_missing():
        pytest.skip(reason)
    image, log = kernel().cubin(HOW=Recipe(2, True))
    assert image[:4] == b"\x7fELF"
    assert "'move' for 'sm_90a'" in log


def test_launches_of_one_key_share_a_compiled_kernel(sources: list[str]) -> None:
    """Sizes are no part of it, as they are of what Triton specialises."""
    move, (*args, _, bias) = kernel(), arguments()
    launches = [Launch(move, (1,), (*args, stride, bias), META) for stride in (1, 16, 7)]
    assert len({launch.key for launch in launches}) == 1
    assert Launch(move, (1,), launches[0].args, {**META, "TILE": 1}).key != launches[0].key


# --- replays ------------------------------------------------------------------------------------------------
def call(
    scratch: torch.Tensor, inputs: list[torch.Tensor], weights: torch.Tensor, move: cuda.CudaKernel
) -> list[Launch]:
    """Two launches of a call: all that arguments can come from, and a descriptor of scratch."""
    x, ids, routing, out = inputs
    rows = scratch[4096 : 4096 + 64 * 128].view(64, 128)
    group = Group(routing, fp8_layout.descriptor(rows, 64))
    one = (x, out, group, cuda.boxes(rows, (24, 128)), 5, None)
    two = (weights, scratch[1024:], Group(None, group.boxes), group.boxes, x.shape[0], ids)
    return [Launch(move, (9,), one, META), Launch(move, (2, 3), two, {**META, "TILE": 1})]


def memory() -> tuple[torch.Tensor, list[torch.Tensor]]:
    scratch = torch.zeros(64 << 10, dtype=torch.uint8)
    scratch = scratch[-scratch.data_ptr() % 256 :][: 32 << 10]
    return scratch, [torch.zeros(16, 64) for _ in range(4)]


@pytest.mark.usefixtures("sources")
def test_a_replay_launches_what_an_ordinary_call_does(
    library: Library, active: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(replay.VARIABLE, "replay")
    move, weights, (scratch, inputs) = kernel(), torch.zeros(64), memory()
    launches = call(scratch, inputs, weights, move)
    counters = torch.zeros(64, dtype=torch.int32)
    compiled = [launch.run() for launch in launches]
    made = replay.bind(
        launches, compiled, replay.Origin(inputs, scratch, counters, [weights], scratch.numel())
    )
    assert isinstance(made, replay.Replay), made
    kept = [memory() for _ in range(3)]
    for i in (0, 1, 2, 0):
        other, given = kept[i]
        active.stream = 70 + i
        ready = made.ready(given, other)
        assert ready is not None
        library.launched.clear()
        made.run(ready, 0)
        got = list(library.launched)
        library.launched.clear()
        for launch in call(other, given, weights, move):
            launch.run()
        assert got == library.launched
        assert len(got) == 2
    assert library.calls["cuTensorMapEncodeTiled"] == 2 * 4  # two kinds of boxes at each of four places
