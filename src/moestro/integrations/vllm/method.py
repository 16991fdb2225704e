"""MoestroMethod: what our method classes have in common.

hooks.subclass() makes one per vLLM method class, with MoestroMethod in front: parameters and their loading are
vLLM's, repacking and calls are ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from moestro.errors import BackendError, RoutingError
from moestro.integrations.vllm import execute, log, repack, tuning
from moestro.integrations.vllm.activation import activation_of
from moestro.integrations.vllm.kinds import Kind
from moestro.integrations.vllm.refusals import wants_batch_invariance
from moestro.integrations.vllm.settings import Settings
from moestro.moe.layer import FusedMoE
from moestro.moe.weights import ExpertWeights
from moestro.moe.workspace import Workspace

FP4_UNITS = (10, 0)  # the compute capability from which tensor cores multiply FP4
DONE = (
    "_already_called_process_weights_after_loading"  # vLLM's: layers that it loads one by one are asked twice
)
_workspaces: dict[torch.device, Workspace] = {}


@contextlib.contextmanager
def float32_by_default() -> Iterator[None]:
    """Torch's own default dtype: while vLLM loads a model, it is the model's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class MoestroMethod:
    """vLLM's method class for a layer's experts, run by Moestro."""

    kind: ClassVar[Kind]
    settings: ClassVar[Settings]
    quantize_to: ClassVar[str | None] = None  # the format that dense weights are quantised to after loading
    supports_pre_processed_weights = False  # of another process' kernel layout
    moe: Any  # vLLM's FusedMoEConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM calls it, less the original's choice of a backend."""
        base = next(cls for cls in type(self).__mro__ if cls.__name__ == "FusedMoEMethodBase")
        base.__init__(self, self.kind.moe_of(*args, **kwargs))  # type: ignore[misc]
        self.kind.set_up(self, *args, **kwargs)
        self.experts: FusedMoE | None = None
        self.tactic: int | None = None  # -1 where the layer's ranks could not agree on decisions

    # --- what vLLM asks ------------------------------------------------------------------------------
    @property
    def is_monolithic(self) -> bool:
        """Routing is vLLM's: it hands over ids and weights."""
        return False

    @property
    def supports_eplb(self) -> bool:
        return False

    @property
    def skip_forward_padding(self) -> bool:
        """There is nothing to pad."""
        return False

    @property
    def has_unpadded_output(self) -> bool:
        return False

    def maybe_roundup_sizes(self, hidden_size: int, inter: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Sizes stay as they are."""
        return hidden_size, inter

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Scales live in the packed weights."""
        return None

    # --- weights -------------------------------------------------------------------------------------
    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)  # type: ignore[misc]
        repack.blank(self.kind, layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Repack, once and at every reload. BackendError for a reload under CUDA graphs, which keep addresses."""
        if getattr(layer, DONE, False):
            return
        if layer.apply_router_weight_on_input and self.moe.experts_per_token != 1:
            raise RoutingError(
                f"{layer.layer_name}: router weights on the input must come with top_k 1, "
                f"got {self.moe.experts_per_token}"
            )
        again = self.experts is not None
        if again and self._graphs():
            raise BackendError(
                f"{layer.layer_name}: weights must not be reloaded where CUDA graphs may hold the packed ones; "
                "restart the server, or serve with enforce_eager"
            )
        self.experts = None  # the memory of the old ones is the new ones'
        with float32_by_default():
            self.experts = self._make(layer)
            freed = repack.release(layer)
            setattr(layer, DONE, True)
            if not again:
                log.LOGGER.debug("moestro: %s: %d bytes of parameters repacked", layer.layer_name, freed)
                if not tuning.settle(self.experts, self.moe, self.settings):
                    self.tactic = -1
                    self.experts = self._layer(self.experts.weights, self.experts.options.input_format)
                tuning.report(self.experts, self.kind.format, self.moe)

    def _make(self, layer: Any) -> FusedMoE:
        input_format = self._input_format()
        with torch.no_grad():
            w = repack.expert_weights(self.kind, self, layer, input_format)
            if self.quantize_to is not None:
                w = repack.quantized(w, self.quantize_to)
            return self._layer(w, input_format)

    def _layer(self, w: ExpertWeights, input_format: str | None) -> FusedMoE:
        activation = activation_of(self.moe)
        assert not isinstance(activation, str)
        parallel = self.moe.moe_parallel_config
        options: dict[str, Any] = {"batch_invariant": True} if wants_batch_invariance() else {}
        return FusedMoE(
            w,
            self.moe.experts_per_token,
            max_num_tokens=self.moe.max_num_tokens * parallel.dp_size * parallel.pcp_size,
            use_cuda_graph=self._graphs(),
            activation=activation,
            input_format=input_format,
            num_experts=self.moe.num_experts,
            dtype=self.moe.in_dtype,
            tactic=self.tactic,
            workspace=_workspaces.setdefault(w.device, Workspace(w.device)),
            tuner=tuning.tuner(self.settings),
            donate=True,
            own_output=False,  # a call of ours always has out=
            **options,
        )

    def _graphs(self) -> bool:
        device: str = torch.device(self.moe.device).type
        return device == "cuda" and self.moe.max_capture_size > 0

    def _input_format(self) -> str | None:
        if not self.kind.quantizes_input(self):
            return None
        wanted = self.settings.quantize_input
        if wanted is None:
            wanted = torch.device(self.moe.device).type == "cuda" and (
                torch.cuda.get_device_capability() >= FP4_UNITS
            )
            if not wanted:
                log.info(
                    f"activations of this W4A4 checkpoint stay in {self.moe.in_dtype}, which is more exact "
                    "(MOESTRO_VLLM_W4A4=1 quantises them)"
                )
        return "nvfp4" if wanted else None

    # --- calls ---------------------------------------------------------------------------------------
    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This rank's sum over its experts. Shared experts, scaling and the sum over ranks are vLLM's runner's."""
        return execute.call(self, layer, x, topk_weights, topk_ids)

    def run(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        if self.experts is None:
            raise BackendError(f"{layer.layer_name}: weights must be loaded and processed before a call")
        return execute.run(
            self.experts, x, topk_weights, topk_ids, layer.expert_map, layer.apply_router_weight_on_input
        )
