"""What was registered under a name: the format of weights, and keywords of the layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from transformers.integrations.moe import ExpertsInterface

from moestro import formats
from moestro.errors import BackendError, FormatError, ShapeError, as_flag, unknown_name
from moestro.kernels import backends
from moestro.kernels.problem import INPUT_FORMATS
from moestro.moe.layer import FusedMoE

NAME = "moestro"
# Keywords of FusedMoE that are the module's own business here.
OURS = {
    "self",
    "w",
    "top_k",
    "max_num_tokens",
    "activation",
    "workspace",
    "expert_offset",
    "num_experts",
    "donate",
}


@dataclass(frozen=True)
class Settings:
    """format: of the weights, None: as the module or the checkpoint has them. options: keywords of FusedMoE."""

    format: str | None = None
    max_num_tokens: int = 8192
    release: bool = True  # let go of a loaded model's own parameters once they are packed
    options: dict[str, Any] = field(default_factory=dict)
    linear: bool | None = None  # moestro_linear: see linears.py

    def __post_init__(self) -> None:
        if self.format is not None:
            formats.get(self.format)
        if self.format == "bf16":  # what dense weights are anyway
            object.__setattr__(self, "format", None)
        size = self.max_num_tokens
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ShapeError(f"max_num_tokens must be a positive integer, got {size!r}")
        if self.linear is not None and not isinstance(self.linear, bool):
            raise TypeError(f"moestro_linear must be True, False or None, got {self.linear!r}")
        known = set(inspect.signature(FusedMoE.__init__).parameters) - OURS
        for name in self.options:
            if name not in known:
                raise TypeError(
                    unknown_name(
                        "keyword of register", name, known | {"format", "max_num_tokens", "moestro_linear"}
                    )
                )
        self._check_values()

    def _check_values(self) -> None:
        """What no layer could have is an error here, not at the first forward."""
        given, backend = self.options.get("input_format"), self.options.get("backend", backends.AUTO)
        if given is not None and given not in INPUT_FORMATS:
            raise FormatError(unknown_name("input_format", str(given), INPUT_FORMATS))
        if backend not in (backends.AUTO, *backends.BACKENDS):
            raise BackendError(unknown_name("backend", str(backend), (backends.AUTO, *backends.BACKENDS)))
        for name in ("deterministic", "batch_invariant", "use_cuda_graph", "own_output"):
            as_flag(name, self.options.get(name, False), BackendError)

    @property
    def quantises(self) -> bool:
        """Whether dense weights are to become another format."""
        return self.format is not None

    @property
    def backend(self) -> str:
        return str(self.options.get("backend", "auto"))


class _Registered(MutableMapping[str, Settings]):
    """Name -> settings of the implementations of ours that Transformers knows now: its own registry, looked at, so
    that what is taken out of it, or replaced there, is gone here too.
    """

    def __getitem__(self, name: str) -> Settings:
        found = getattr(ExpertsInterface._global_mapping.get(name), SETTINGS, None)
        if found is None:
            raise KeyError(name)
        return found  # type: ignore[no-any-return]

    def __setitem__(self, name: str, settings: Settings) -> None:
        raise TypeError("register() makes an implementation known")

    def __delitem__(self, name: str) -> None:
        self[name]
        del ExpertsInterface._global_mapping[name]

    def __iter__(self) -> Iterator[str]:
        return (n for n, f in list(ExpertsInterface._global_mapping.items()) if hasattr(f, SETTINGS))

    def __len__(self) -> int:
        return sum(1 for _ in self)


SETTINGS = "moestro_settings"  # attribute of a function that register() has given to Transformers
REGISTERED = _Registered()


def of_model(model: Any) -> tuple[str, Settings] | None:
    """(name, settings) of the implementation that a model's experts have, if it is one of ours."""
    configs = [getattr(module, "config", None) for module in (model, *model.modules())]
    for config in configs:
        name = getattr(config, "_experts_implementation", None)
        if isinstance(name, str) and name in REGISTERED:
            return name, REGISTERED[name]
    return None


def need_quantised(format: str) -> str:
    """The name of a format to quantise to. Raises FormatError for "bf16" and unknown ones."""
    if format == "bf16":
        raise FormatError(
            "format must be a quantised one ('nvfp4', 'mxfp4', 'mxfp8', 'fp8_block', 'int4'), got 'bf16'"
        )
    formats.get(format)
    return format
