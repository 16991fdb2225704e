"""What gpu_record.py records, in an order of value: models in the formats that they are published in, and their peers.

A step tunes each pair of a format and an input format, and times them beside the peers. Steps of one wave are compiled
together. Sizes are those of docs/peers.md.
"""

from __future__ import annotations

from typing import NamedTuple

from moestro.bench.models import MoeShape, find, from_sizes

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
SKEWED = ("zipf:1.0", "dirichlet:0.3", "trained")
BESIDE_UNIFORM = ("uniform", *SKEWED)  # in the same run


class Step(NamedTuple):
    """One row of the plan: a layer, tuned and timed."""

    wave: int
    name: str
    model: str
    formats: tuple[str, ...]
    inputs: tuple[str | None, ...] = (None,)
    peers: tuple[str, ...] = ()
    tokens: tuple[int, ...] = TOKENS
    routings: tuple[str, ...] = ("uniform",)
    timed: bool = True
    ranks: int = 1
    local_pairs: bool = True

    @property
    def layers(self) -> list[tuple[str, str | None]]:
        """(format, input format) of what is tuned."""
        return [(fmt, taken) for fmt in self.formats for taken in self.inputs]

    @property
    def shape(self) -> MoeShape:
        return find(self.model).on_ranks(self.ranks, self.local_pairs and self.ranks > 1)

    def words(self) -> str:
        """On one line."""
        ranks = f" EP{self.ranks}" if self.ranks > 1 else ""
        tuned = ", ".join("+".join(filter(None, pair)) for pair in self.layers)
        beside = f"; beside {', '.join(self.peers) or 'nobody'}, {', '.join(self.routings)}"
        return (
            f"{self.wave} {self.name}: {self.model}{ranks} {tuned}{beside if self.timed else '; tuned only'}"
        )


def _deepseek(wave: int, name: str, *rest: object, **more: object) -> Step:
    return Step(wave, name, "deepseek-v3", *rest, **more)._replace(ranks=8)  # type: ignore[arg-type]


def _tuned_only(model: str, ranks: int = 1) -> Step:
    name = f"{model}-tuned" + (f"-ep{ranks}" if ranks > 1 else "")
    return Step(5, name, model, ("nvfp4",), timed=False, ranks=ranks, local_pairs=False)


FP8, BOTH = ("fp8",), (None, "fp8")
MX_PEERS = ("humming_mxfp4", "triton_kernels_mxfp4")
BLOCK_PEERS = ("deep_gemm", "deep_gemm_products")
PLAN = (
    _deepseek(1, "deepseek-fp8", ("nvfp4", "mxfp4"), FP8, ("humming_fp8",)),
    _deepseek(1, "deepseek-block", ("fp8_block",), FP8, BLOCK_PEERS),
    Step(1, "qwen3-fp8", "qwen3-30b-a3b", ("nvfp4", "mxfp4"), FP8, ("humming_fp8",)),
    Step(1, "gpt-oss-20b", "gpt-oss-20b", ("mxfp4",), BOTH, (*MX_PEERS, "humming_fp8")),
    _deepseek(2, "deepseek", ("nvfp4",), (None,), ("humming",)),
    Step(2, "qwen3", "qwen3-30b-a3b", ("nvfp4",), (None,), ("humming",)),
    Step(2, "mixtral", "mixtral-8x7b", ("nvfp4",), BOTH, ("humming",)),
    Step(3, "qwen3-bf16", "qwen3-30b-a3b", ("bf16",), (None,), ("grouped_mm", "triton_kernels")),
    Step(3, "mixtral-bf16", "mixtral-8x7b", ("bf16",), (None,), ("grouped_mm", "triton_kernels")),
    _deepseek(3, "deepseek-bf16", ("bf16",), (None,), ("grouped_mm", "triton_kernels")),
    Step(3, "gpt-oss-120b", "gpt-oss-120b", ("mxfp4",), BOTH, (*MX_PEERS, "humming_fp8")),
    Step(3, "qwen3-block", "qwen3-30b-a3b", ("fp8_block",), FP8, BLOCK_PEERS),
    Step(3, "mixtral-block", "mixtral-8x7b", ("fp8_block",), FP8, BLOCK_PEERS),
    _deepseek(3, "deepseek-skewed", ("nvfp4",), (None,), ("humming",), TOKENS[1:], BESIDE_UNIFORM),
    Step(3, "qwen3-skewed", "qwen3-30b-a3b", ("nvfp4",), (None,), ("humming",), TOKENS[1:], BESIDE_UNIFORM),
    Step(3, "mixtral-skewed", "mixtral-8x7b", ("nvfp4",), (None,), ("humming",), TOKENS[1:], BESIDE_UNIFORM),
    _deepseek(4, "deepseek-mxfp4", ("mxfp4",), (None,), MX_PEERS),
    Step(4, "qwen3-mxfp4", "qwen3-30b-a3b", ("mxfp4",), (None,), MX_PEERS),
    Step(4, "mixtral-mxfp4", "mixtral-8x7b", ("mxfp4",), BOTH, (*MX_PEERS, "humming_fp8")),
    _deepseek(4, "deepseek-block-bf16", ("fp8_block",), (None,)),
    _tuned_only("deepseek-v3", 8),
    *map(_tuned_only, ("qwen3-235b-a22b", "glm-4.5", "qwen3-next-80b-a3b", "llama-4-scout", "olmoe-1b-7b",
                       "nemotron-3-nano-30b")),
    _tuned_only("kimi-k2", 8),
)  # fmt: skip


def tiny(step: Step) -> MoeShape:
    """A layer of a step's kind that a CPU runs in a moment."""
    shape = find(step.model)
    small = from_sizes("8,2,64,32", shape.activation)
    return MoeShape(step.model, 64, 32, 8, 2, small.router, shape.activation, shape.biases)
