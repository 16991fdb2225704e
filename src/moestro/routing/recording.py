"""The routing of a model's layers while it runs: recorded, saved, and forced again.

    with moestro.routing.record(model) as recording:
        model(tokens)
    recording.ids                 # int32 [sequence, layers, K]: the contract that RL people call router replay
    recording.save("run.safetensors")
    with moestro.routing.replay(model, recording):
        model(tokens)             # every token goes to the experts that it went to

Layers are Transformers' experts modules and FusedMoE, in the order of the model. Tokens are in the order of the
calls, each call's [batch · sequence] flattened. A compiled model must be recorded uncompiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moestro.errors import RoutingError
from moestro.routing.recorded import read
from moestro.routing.recorded import record as write

EXPERTS = "is_concatenated"  # what Transformers gives every experts module
IDS, WEIGHTS = 1, 2  # places among a layer's arguments (x, ids, weights)
NAMES = {IDS: ("top_k_index", "ids"), WEIGHTS: ("top_k_weights", "weights")}


@dataclass
class Recording:
    """What was seen. ids and weights: [sequence, layers, K]."""

    layers: list[str] = field(default_factory=list)
    num_experts: int | None = None
    _ids: dict[str, list[torch.Tensor]] = field(default_factory=dict, repr=False)
    _weights: dict[str, list[torch.Tensor]] = field(default_factory=dict, repr=False)

    @property
    def ids(self) -> torch.Tensor:
        """int32 [sequence, layers, K]. Raises RoutingError where layers saw different numbers of tokens."""
        return self._stacked(self._ids, torch.int32)

    @property
    def weights(self) -> torch.Tensor:
        """float32 [sequence, layers, K]: the routing weights that went with them."""
        return self._stacked(self._weights, torch.float32)

    def _stacked(self, parts: dict[str, list[torch.Tensor]], dtype: torch.dtype) -> torch.Tensor:
        if not self.layers or not any(parts[name] for name in self.layers):
            raise RoutingError("the recording holds no token: no layer ran while it was made")
        columns = [torch.cat(parts[name]) if parts[name] else torch.empty(0, 0) for name in self.layers]
        if len({tuple(column.shape) for column in columns}) > 1:
            words = ", ".join(f"{n} {list(c.shape)}" for n, c in zip(self.layers, columns, strict=True))
            raise RoutingError(f"all layers must have seen the same tokens, got {words}")
        return torch.stack(columns, dim=1).to(dtype)

    def save(self, path: str | Path) -> None:
        """Write ids (and weights, in .pt and .safetensors) to a file that Recorded(path) reads."""
        write(path, self.ids, self.num_experts, weights=self.weights)

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """A recording from such a file; layers are numbered."""
        ids, num_experts, weights = read(Path(path))
        ids = ids if ids.ndim == 3 else ids[:, None]
        made = cls([str(i) for i in range(ids.shape[1])], num_experts)
        made._ids = {name: [ids[:, i]] for i, name in enumerate(made.layers)}
        if weights is not None:
            made._weights = {name: [weights[:, i]] for i, name in enumerate(made.layers)}
        return made


def moe_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """(name, module) of the layers whose routing can be seen. Raises RoutingError for a model that has none."""
    found = [(name, m) for name, m in model.named_modules() if hasattr(m, EXPERTS)]
    if not found:
        found = [(name, m) for name, m in model.named_modules() if type(m).__name__ == "FusedMoE"]
    if not found:
        raise RoutingError(f"{type(model).__name__} has no experts modules and no FusedMoE to record")
    return found


@contextmanager
def recording_of(model: torch.nn.Module) -> Iterator[Recording]:
    """Inside, every call of the model's layers is recorded (on the host).

    Where an exception breaks a call off, what some layers saw of it is dropped: the whole calls before it stay.
    """
    layers = moe_layers(model)
    recording = Recording([name for name, _ in layers], _num_experts(layers[0][1]))
    recording._ids = {name: [] for name, _ in layers}
    recording._weights = {name: [] for name, _ in layers}
    handles = []
    for name, module in layers:

        def see(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
            recording._ids[name].append(_argument(args, kwargs, IDS).detach().to("cpu", torch.int32))
            recording._weights[name].append(
                _argument(args, kwargs, WEIGHTS).detach().to("cpu", torch.float32)
            )

        handles.append(module.register_forward_pre_hook(see, with_kwargs=True))
    try:
        yield recording
    except BaseException:
        whole = min(map(len, recording._ids.values()))
        for seen in (recording._ids, recording._weights):
            for calls in seen.values():
                del calls[whole:]
        raise
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replay(model: torch.nn.Module, recording: Recording | str | Path) -> Iterator[None]:
    """Inside, the model's tokens go to the recorded experts with the recorded weights, call after call.

    recording: a Recording, or a file of one. Raises RoutingError for a recording of other layers or another top_k,
    one without weights (.npy), and for more tokens than were recorded.
    """
    layers = moe_layers(model)
    ids, weights = _to_replay(recording, len(layers))
    at = dict.fromkeys(range(len(layers)), 0)
    handles = []
    for i, (name, module) in enumerate(layers):

        def force(_: Any, args: Any, kwargs: Any, i: int = i, name: str = name) -> Any:
            theirs = _argument(args, kwargs, IDS)
            start, stop = at[i], at[i] + len(theirs)
            if stop > len(ids) or theirs.shape[1] != ids.shape[2]:
                raise RoutingError(
                    f"{name} wants tokens {start} to {stop} with top_k {theirs.shape[1]}, the recording has "
                    f"{len(ids)} with top_k {ids.shape[2]}"
                )
            at[i] = stop
            new = {
                IDS: ids[start:stop, i].contiguous().to(theirs),
                WEIGHTS: weights[start:stop, i].contiguous(),
            }
            new[WEIGHTS] = new[WEIGHTS].to(_argument(args, kwargs, WEIGHTS))
            return _with(args, kwargs, new)

        handles.append(module.register_forward_pre_hook(force, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _to_replay(recording: Recording | str | Path, layers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, weights) [sequence, layers, K] of a recording that fits a model of so many layers."""
    if not isinstance(recording, Recording):
        recording = Recording.load(recording)
    ids = recording.ids
    if ids.shape[1] != layers:
        raise RoutingError(f"recording must have the model's {layers} layers, got {ids.shape[1]}")
    if not recording._weights:
        raise RoutingError("recording must have routing weights to be replayed; .npy files hold ids alone")
    return ids, recording.weights


def _argument(args: Any, kwargs: Any, place: int) -> torch.Tensor:
    if len(args) > place:
        return args[place]  # type: ignore[no-any-return]
    for name in NAMES[place]:
        if name in kwargs:
            return kwargs[name]  # type: ignore[no-any-return]
    raise RoutingError(f"the layer was called without {' or '.join(NAMES[place])}")


def _with(args: Any, kwargs: Any, new: dict[int, torch.Tensor]) -> Any:
    args = tuple(new.get(place, value) for place, value in enumerate(args))
    kwargs = {
        key: next((v for place, v in new.items() if key in NAMES[place]), value)
        for key, value in kwargs.items()
    }
    return args, kwargs


def _num_experts(module: Any) -> int | None:
    value = getattr(module, "num_experts", None)
    return value if isinstance(value, int) else None
