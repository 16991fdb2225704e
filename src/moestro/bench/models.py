"""The MoE layers of the models that people run: sizes, routing, activation, biases.

One literal table. `find("qwen3-30b-a3b")` gives an MoeShape, `from_sizes("128,8,2048,768")` one of any size.
Nothing here imports torch, so that the command line can check a name at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from moestro.errors import ModelError, unknown_name

__all__ = ["MODELS", "MoeShape", "RouterSpec", "find", "from_sizes"]


@dataclass(frozen=True)
class RouterSpec:
    """How a model turns logits into ids and weights: the arguments of `moestro.route` after top_k."""

    method: str = "softmax_renormalize"
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    weights_on_input: bool = False  # Llama-4: the weight multiplies the expert's input, not its output


@dataclass(frozen=True)
class MoeShape:
    """One MoE layer, by its static facts.

    `num_experts` is all ranks'; `ep` ranks hold num_experts / ep each. With `local_pairs` the tokens' pairs
    all fall on this rank's experts (what one rank computes after dispatch); without, ids are drawn over all
    experts and this rank computes its share of the pairs.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    router: RouterSpec = field(default_factory=RouterSpec)
    activation: str = "silu"  # a name of kernels.activations, or "swiglu_oai" (gpt-oss)
    biases: bool = False
    ep: int = 1
    local_pairs: bool = False

    @property
    def num_local_experts(self) -> int:
        """L, the experts of one rank."""
        return self.num_experts // self.ep

    @property
    def gated(self) -> bool:
        """Whether gate_up has a gate half."""
        return self.activation != "relu2"

    @property
    def gate_up_rows(self) -> int:
        """Rows of one expert's first matrix: 2I, or I without a gate."""
        return self.intermediate_size * (2 if self.gated else 1)

    @property
    def weights_per_expert(self) -> int:
        """Weights (elements) of one expert, biases not counted."""
        return self.hidden_size * (self.gate_up_rows + self.intermediate_size)

    @property
    def num_weights(self) -> int:
        """Weights (elements) of this rank's experts."""
        return self.num_local_experts * self.weights_per_expert

    def on_ranks(self, ep: int, local_pairs: bool = False) -> MoeShape:
        """The slice of one of `ep` ranks. Raises ModelError if the experts do not divide evenly."""
        if ep < 1 or self.num_experts % ep:
            raise ModelError(
                f"ep: expected a positive number of ranks that divides the {self.num_experts} experts of "
                f"{self.name}, got {ep}"
            )
        if local_pairs and self.num_experts // ep < self.top_k:
            raise ModelError(
                f"ep: {ep} ranks leave {self.num_experts // ep} experts each, fewer than "
                f"top_k = {self.top_k}; pairs cannot all be local"
            )
        return replace(self, ep=ep, local_pairs=local_pairs)

    def describe(self) -> str:
        """One line for tables and reports."""
        ranks = f" EP{self.ep}" + (" (all pairs local)" if self.local_pairs else "") if self.ep > 1 else ""
        sizes = f"E{self.num_experts} K{self.top_k} H{self.hidden_size} I{self.intermediate_size}"
        extras = ", biases" if self.biases else ""
        return f"{self.name}{ranks}: {sizes}, {self.activation}{extras}"

    def to_json(self) -> dict[str, Any]:
        """The shape as JSON values."""
        return {
            "name": self.name,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_experts": self.num_experts,
            "num_local_experts": self.num_local_experts,
            "top_k": self.top_k,
            "activation": self.activation,
            "biases": self.biases,
            "ep": self.ep,
            "local_pairs": self.local_pairs,
            "router": self.router.method,
        }


def _deepseek(groups: int, top_groups: int, scale: float) -> RouterSpec:
    return RouterSpec("deepseek_v3", groups, top_groups, scale)


_TOPK_SOFTMAX = RouterSpec("topk_softmax")
_SIGMOID_IN = RouterSpec("sigmoid", weights_on_input=True)

# Sizes from the models' published config.json files; n_group, topk_group and routed_scaling_factor likewise.
_TABLE = (
    #        name                     H     I      E    K
    MoeShape("deepseek-v3", 7168, 2048, 256, 8, _deepseek(8, 4, 2.5)),
    MoeShape("deepseek-r1", 7168, 2048, 256, 8, _deepseek(8, 4, 2.5)),
    MoeShape("qwen3-30b-a3b", 2048, 768, 128, 8),
    MoeShape("qwen3-235b-a22b", 4096, 1536, 128, 8),
    MoeShape("mixtral-8x7b", 4096, 14336, 8, 2),
    MoeShape("gpt-oss-20b", 2880, 2880, 32, 4, _TOPK_SOFTMAX, "swiglu_oai", biases=True),
    MoeShape("gpt-oss-120b", 2880, 2880, 128, 4, _TOPK_SOFTMAX, "swiglu_oai", biases=True),
    MoeShape("llama-4-scout", 5120, 8192, 16, 1, _SIGMOID_IN),
    MoeShape("llama-4-maverick", 5120, 8192, 128, 1, _SIGMOID_IN),
    MoeShape("glm-4.5", 5120, 1536, 160, 8, _deepseek(1, 1, 2.5)),
    MoeShape("glm-4.6", 5120, 1536, 160, 8, _deepseek(1, 1, 2.5)),
    MoeShape("kimi-k2", 7168, 2048, 384, 8, _deepseek(1, 1, 2.827)),
    MoeShape("qwen3-next-80b-a3b", 2048, 512, 512, 10),
    MoeShape("olmoe-1b-7b", 2048, 1024, 64, 8, RouterSpec("softmax")),
    MoeShape("nemotron-3-nano-30b", 2688, 1856, 128, 6, _deepseek(1, 1, 2.5), "relu2"),
)

MODELS: Mapping[str, MoeShape] = MappingProxyType({shape.name: shape for shape in _TABLE})


def find(name: str) -> MoeShape:
    """The layer of a model by name; capitals, spaces and underscores do not matter.

    Raises ModelError with the nearest known names.
    """
    key = name.strip().lower().replace("_", "-").replace(" ", "-").rsplit("/", 1)[-1]
    if key not in MODELS:
        raise ModelError(unknown_name("model", name, MODELS))
    return MODELS[key]


def from_sizes(text: str, activation: str = "silu") -> MoeShape:
    """The layer for "E,K,H,I". Raises ModelError if the text is not four positive integers with K ≤ E."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 4 or min(sizes) < 1:
        raise ModelError(
            "sizes: expected four positive integers E,K,H,I (experts, top_k, hidden, intermediate), "
            f"got {text!r}"
        )
    experts, top_k, hidden, intermediate = sizes
    if top_k > experts:
        raise ModelError(f"sizes: top_k = {top_k} is more than the {experts} experts in {text!r}")
    return MoeShape("custom", hidden, intermediate, experts, top_k, activation=activation)
