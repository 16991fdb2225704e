"""The layer that an experts module runs on, kept in the module's __dict__ (it is no submodule and no part of the state).

A module is live or packed. Live: its own parameters are there, the layer was made from them, and a Watch says when
they are no longer those. Packed: the parameters were let go, `weights` is all there is of the experts.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

from moestro import formats
from moestro.errors import BackendError, MoestroError
from moestro.integrations.transformers.activation import activation_of
from moestro.integrations.transformers.modules import biases, is_share, matrices, weight_names
from moestro.integrations.transformers.settings import Settings
from moestro.integrations.transformers.watch import Watch
from moestro.kernels import backends
from moestro.kernels.activations import Activation
from moestro.moe.layer import FusedMoE
from moestro.moe.options import Options, make_problem
from moestro.moe.weights import ExpertWeights
from moestro.tuning.forks import Lock

LAYER = "_moestro_layer"
NAME_IN_MODEL = "_moestro_name"
SIDE = ("gate_up_bias", "down_bias", "gate_up_input_scale", "down_input_scale", "gate_up_pre_scale")

# Keywords of FusedMoE that say what a backend must be able to do.
CALL_OPTIONS = ("input_format", "deterministic", "batch_invariant", "backend", "tactic")

_making = Lock(threading.RLock)


@dataclass
class Bound:
    """What a module runs on. Copies and pickles are made of packed weights; a live layer stays behind."""

    weights: ExpertWeights
    activation: Activation
    settings: Settings
    watch: Watch | None  # None: packed
    layer: FusedMoE | None = None
    given: bool = False  # the weights came packed: settings of another format do not make them again

    @property
    def packed(self) -> bool:
        """Whether this is all there is of the experts."""
        return self.watch is None

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound | None:
        return Bound(self.weights, self.activation, self.settings, None, None, True) if self.packed else None

    def __reduce__(self) -> Any:
        if not self.packed:
            return type(None), ()
        return _restored, (self.weights.unpacked(), self.activation, self.settings)


def _restored(weights: ExpertWeights, activation: Activation, settings: Settings) -> Bound:
    return Bound(for_backend(weights, activation, settings), activation, settings, None, None, True)


def bound_to(module: Any) -> Bound | None:
    """What the module runs on, if anything was made for it."""
    found: Bound | None = module.__dict__.get(LAYER)
    return found


def bind(module: Any, top_k: int, settings: Settings) -> FusedMoE:
    """The module's layer: the one that it has, or one of its weights as they are now."""
    found = bound_to(module)
    if found is not None and found.layer is not None and found.layer.top_k == top_k:
        if found.watch is None:
            return found.layer
        if _holds(found, module, settings):
            return found.layer
    with _making:  # another thread may have made it meanwhile
        found = bound_to(module)
        if found is None or not _holds(found, module, settings):
            found = make(module, settings)
            module.__dict__[LAYER] = found
        if found.layer is None or found.layer.top_k != top_k:
            found.layer = _layer(module, found, top_k)
        return found.layer


def _holds(found: Bound, module: Any, settings: Settings) -> bool:
    if found.watch is None:
        return True
    return (found.given or found.settings == settings) and found.watch.same(module, weight_names(module))


def make(module: Any, settings: Settings) -> Bound:
    """A live binding: the module's weights in the format and kernel layout that they will run in."""
    names = weight_names(module)
    with named_errors(module):
        check_module(module)
        watch = Watch(module, names)
        activation = module_activation(module)
        gate_up, down = matrices(module)
        side = biases(module)
        if settings.quantises and gate_up.format == "bf16":
            w = _quantised(gate_up, down, side, activation, settings)
        else:
            w = for_backend(ExpertWeights(gate_up, down, **side), activation, settings)  # type: ignore[arg-type]
    return Bound(w, activation, settings, watch)


def module_activation(module: Any) -> Activation:
    """The activation of ours that this module has."""
    return activation_of(module, gated=module.has_gate, concatenated=module.is_concatenated)


def for_backend(w: ExpertWeights, activation: Activation, settings: Settings) -> ExpertWeights:
    """Weights in the kernel layout that they will run in."""
    options = settings.options
    return w.prepare(
        settings.backend,
        activation=activation,
        input_format=options.get("input_format"),
        dtype=options.get("dtype") or w.dense_dtype or torch.bfloat16,
        batch_invariant=bool(options.get("batch_invariant")),
    )


def backend_for(w: ExpertWeights, activation: Activation, settings: Settings) -> str:
    """The name of the backend that will run such weights (one expert of them is enough to say)."""
    own = {name: settings.options[name] for name in CALL_OPTIONS if name in settings.options}
    options = Options(activation=activation, **own)
    dtype = settings.options.get("dtype") or w.dense_dtype or torch.bfloat16
    return backends.resolve(settings.backend, make_problem(w, options, top_k=1, dtype=dtype))[0].backend


def _quantised(
    gate_up: Any, down: Any, side: dict[str, Any], activation: Activation, settings: Settings
) -> ExpertWeights:
    """Dense weights quantised, one expert after the other, into the layout that they will run in."""
    assert settings.format is not None
    cls = formats.get(settings.format)
    one = {name: bias[:1] for name, bias in side.items()}
    some = ExpertWeights(cls.quantize(gate_up.data[:1]), cls.quantize(down.data[:1]), **one)
    backend = backend_for(some, activation, settings)
    input_format = settings.options.get("input_format")
    return ExpertWeights.from_dense(
        gate_up.data, down.data, settings.format, backend=backend, input_format=input_format, **side
    )


def _layer(module: Any, bound: Bound, top_k: int) -> FusedMoE:
    w = bound.weights
    # A rank's share of the experts: the index num_experts stands for those elsewhere, and top_k may exceed the share.
    share: dict[str, Any] = {"num_experts": max(w.num_experts + 1, top_k)} if is_share(module) else {}
    with named_errors(module):
        return FusedMoE(
            w,
            top_k,
            bound.settings.max_num_tokens,
            activation=bound.activation,
            **share,
            **bound.settings.options,
        )


def check_module(module: Any) -> None:
    """BackendError for an experts module that cannot run here, whatever its weights."""
    for name in weight_names(module):
        value = getattr(module, name)
        if value.device.type == "meta":
            raise BackendError(f"{name} must be loaded, got a tensor on the meta device")


class named_errors:  # noqa: N801  # a context manager, used like a function
    """Puts the module's name before the errors of ours that making its layer raises."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        where = self._module.__dict__.get(NAME_IN_MODEL)
        cls = type(self._module).__name__
        if isinstance(error, MoestroError) and not getattr(error, "moestro_named", False):
            text = str(error) if str(error).startswith(cls) else f"{cls}: {error}"
            named = type(error)(f"{text} (at {where})" if where else text)
            named.moestro_named = True  # type: ignore[attr-defined]
            raise named from error
