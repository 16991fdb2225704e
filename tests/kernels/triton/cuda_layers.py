"""Layers on the CPU whose kernels in CUDA C++ run in cuda_machine.py, beside what their reference makes of inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuda_machine
import pytest
import torch
from cuda_machine import CudaMachine
from fp8_rows import Quantize
from test_kernels import inputs_of, make, poisoned

from moestro.kernels.activations import Activation
from moestro.kernels.triton import call, nvrtc
from moestro.kernels.triton.device import fp8 as fp8_device
from moestro.kernels.triton.paths import by_place, fp8
from moestro.kernels.triton.tactic import Tactic
from moestro.moe import reference

TOLERANCE = 1e-2
Start = Callable[..., None]


def name(tactic: Tactic) -> str:
    return f"{tactic.pairs1}x{tactic.gemm1.rows}"


class Sum:
    """sum_pairs in torch: in the interpreter it takes longer than all else."""

    __name__, params = "sum_pairs", ()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(
            rows: Any, ids: Any, weights: Any, out: Any, done: Any, num_done: int, hidden: int, **meta: Any
        ) -> None:
            here = (ids >= meta["OFFSET"]) & (ids < meta["OFFSET"] + meta["L"])
            each = rows.view(*ids.shape, hidden).float() * weights[..., None]
            out.copy_(torch.where(here[..., None], each, 0).sum(1))

        return launch


def on_machines(path: Any, monkeypatch: pytest.MonkeyPatch) -> Start:
    """start(seed, mutant..., of=name): from then on a path's kernels run on the machine, one of them mutated."""
    kernels = [
        (path, "PRODUCT", path.PRODUCT),
        *((by_place, one, getattr(by_place, one)) for one in ("INVERT", "SPREAD")),
    ]
    monkeypatch.setattr(fp8, "has_wgmma", lambda: True)
    monkeypatch.setattr(nvrtc, "why_missing", lambda: None)
    for module in (by_place, path):
        monkeypatch.setattr(module, "source", cuda_machine.source)
    monkeypatch.setattr(fp8_device, "quantize_fp8", Quantize())
    monkeypatch.setattr(call, "sum_pairs", Sum())

    def start(seed: int, *mutants: tuple[str, str], of: str = "PRODUCT") -> None:
        for module, one, kernel in kernels:
            monkeypatch.setattr(module, one, CudaMachine(kernel, seed, mutants if one == of else ()))

    return start


class Layer:
    """A layer, and what its reference makes of inputs."""

    def __init__(self, *sizes: int, fmt: str = "nvfp4", act: Activation | None = None, biases: torch.dtype | None = None,
                 foreign: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:  # fmt: skip
        self.runner, self.plain = make(
            sizes,
            fmt,
            act,
            biases is not None,
            "fp8",
            foreign,
            dtype=dtype,  # type: ignore[arg-type]
        )
        if biases is not None:
            for experts in (self.runner._experts, self.plain):
                experts.gate_up_bias, experts.down_bias = (
                    b.to(biases) for b in (experts.gate_up_bias, experts.down_bias)
                )

    def inputs(self, tokens: int) -> list[torch.Tensor]:
        return inputs_of(self.runner, tokens)

    def truth(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        p = self.runner.problem
        return reference.fused_moe(*inputs[:3], self.plain, activation=p.activation, input_format="fp8",
                                   expert_offset=p.expert_offset, weight_rounding="e4m3")  # fmt: skip

    def run(self, inputs: list[torch.Tensor], tactic: Tactic) -> torch.Tensor:
        inputs[3].fill_(torch.nan)
        poisoned(self.runner, len(inputs[1]), tactic)
        cuda_machine.compile_all(self.runner.plan(inputs, tactic))
        self.runner.forward(inputs, tactic)
        return inputs[3].clone()

    def ragged(self, tokens: int) -> list[torch.Tensor]:
        """Inputs that leave expert 2 without pairs, and whose last token has an id of no rank."""
        inputs = self.inputs(tokens)
        inputs[1][inputs[1] == 2] = 3
        inputs[1][tokens - 1] = torch.tensor([-7, 1])
        return inputs

    def check_orders(self, tokens: int, tactic: Tactic, on_machine: Start) -> None:
        """The order in which threads run changes no bit, and the numbers are right."""
        inputs, found = self.inputs(tokens), []
        for seed in range(6):
            on_machine(seed)
            found.append(self.run(inputs, tactic))
        assert all(torch.equal(other, found[0]) for other in found[1:])
        assert error(found[0], self.truth(inputs)) < TOLERANCE


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.float() - truth).norm() / truth.norm())


def misplaced(t: torch.Tensor, elements: int) -> torch.Tensor:
    """The same values, so many elements behind an address that is a multiple of 64."""
    memory = torch.empty(t.numel() + 64, dtype=t.dtype)
    first = -memory.data_ptr() // t.element_size() % (64 // t.element_size()) + elements
    return memory[first : first + t.numel()].view(t.shape).copy_(t)
