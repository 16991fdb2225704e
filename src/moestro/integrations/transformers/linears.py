"""Linear layers of a model on Moestro: which become packed, in what, and a line on each.

moestro_linear (of register(), from_pretrained and moestro.load) is one of
    None   Linear layers that the checkpoint has quantised stay packed where the core runs them, and are dequantised
           elsewhere; the others are torch's
    True   the others run on the core, too, in the dtype that they have; quantised ones stay packed everywhere (but
           MXFP8 on a CPU, whose values bf16 holds: it becomes that, and runs on the core)
    False  all are torch's, and quantised ones dequantised
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from moestro import formats
from moestro.errors import MoestroError
from moestro.formats import BF16, FormatTensor
from moestro.integrations.transformers.load_experts import Report
from moestro.integrations.transformers.settings import NAME, REGISTERED, Settings, need_quantised, of_model
from moestro.kernels.cpu import linear as cpu
from moestro.moe.linear import PackedLinear

log = logging.getLogger("moestro")
ASKED: ContextVar[bool | None] = ContextVar("moestro_linear", default=None)  # from_pretrained's keyword
# Left as they are unless asked for: heads, and routers, whose choice of experts a rounding changes.
EXCLUDED = ("lm_head", "*.lm_head", "*router*", "*.gate", "*_gate")


def wanted(model: Any) -> bool | None:
    """moestro_linear as it holds for a model that is being loaded."""
    asked = ASKED.get()
    return settings_of(model).linear if asked is None else asked


def settings_of(model: Any) -> Settings:
    """Those of the model's implementation, else of the one called "moestro"."""
    chosen = of_model(model)
    return chosen[1] if chosen is not None else REGISTERED.get(NAME, Settings())


def plain_linears(model: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    """(name, module) of torch's own Linear layers, adapters' and subclasses' left out."""
    return ((name, m) for name, m in model.named_modules() if type(m) is torch.nn.Linear)


def packed_linears(model: Any) -> Iterator[tuple[str, PackedLinear]]:
    """(name, module) of those that were packed."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, PackedLinear))


def why_dense(weight: FormatTensor, device: torch.device, settings: Settings) -> str | None:
    """Why the core does not run such a weight; None where it does."""
    if settings.backend not in ("auto", "cpu"):
        return f"backend={settings.backend!r} was asked for"
    if device.type != "cpu":
        return f"the cpu backend runs on the CPU, not on {device}"
    dense = weight.data.dtype if isinstance(weight, BF16) else None
    return cpu.why_not(weight.format, dense)


def put(model: Any, name: str, weight: FormatTensor, settings: Settings, **side: Any) -> PackedLinear:
    """A packed layer with this weight in the place of the model's Linear `name`."""
    old: Any = model.get_submodule(name)
    quantised = weight.format != "bf16"
    made = PackedLinear(
        weight,
        old._parameters["bias"],
        input_format=settings.options.get("input_format") if quantised else None,
        backend=settings.backend if settings.backend in ("auto", "cpu") else "portable",
        **side,
    )
    made.train(old.training)
    made.__dict__.update({n: v for n, v in old.__dict__.items() if n == "_is_hf_initialized"})
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = made
    return made


def unpack_linears(model: Any, dtype: torch.dtype | None) -> None:
    """torch's Linear layers again, with the values that packed ones stand for."""
    for name, packed in list(packed_linears(model)):
        dense = packed.dequantize(dtype)
        with torch.device("meta"):
            made = torch.nn.Linear(packed.in_features, packed.out_features, bias=False)
        made.weight = torch.nn.Parameter(dense, requires_grad=False)
        made._parameters["bias"] = packed._parameters["bias"]
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = made.train(packed.training)


def pack_linears(model: Any) -> list[Report]:
    """Let the core run every Linear layer of a loaded model that it can, in its own dtype; a line on each.

    A weight that another module has, too (a head tied to the embedding), stays: its copy would double it.
    """
    settings = settings_of(model)
    users = _users(model)
    made, left = [], []
    for name, module in list(plain_linears(model)):
        weight = module.weight
        reason = (
            why_dense(BF16(weight), weight.device, settings) if _held(weight) else f"it is {weight.dtype}"
        )
        if users.get(id(weight), 0) > 1:
            reason = "its weight is another module's, too"
        if reason is None:
            done = put(model, name, BF16(weight.detach()), settings)
            made.append(Report(name, "unquantised", "bf16", done.on, done.nbytes))
        else:
            left.append((name, reason))
    _say_left(left, "stay torch's")
    return made


def _held(weight: torch.Tensor) -> bool:
    return weight.dtype in (torch.bfloat16, torch.float16, torch.float32) and weight.ndim == 2


def _users(model: Any) -> dict[int, int]:
    """In how many places each parameter is."""
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    return users


def _say_left(left: Iterable[tuple[str, str]], what: str) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, reason in left:
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        log.warning("Linear layers %s: %s (%s)", what, reason, some)


def quantise(model: Any, format: str, exclude: Iterable[str], settings: Settings) -> list[Report]:
    """Quantise and pack Linear layers one after the other; see quantize_linear."""
    need_quantised(format)
    cls: Any = formats.get(format)
    users, exclude = _users(model), tuple(exclude)
    made, left = [], []
    layers: list[tuple[str, Any]] = [*plain_linears(model), *packed_linears(model)]
    for name, module in layers:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
            left.append((name, "excluded by name"))
            continue
        packed = isinstance(module, PackedLinear)
        if not packed and users.get(id(module.weight), 0) > 1:
            left.append((name, "its weight is another module's, too"))
            continue
        dense = module.dequantize(torch.float32) if packed else module.weight.detach()
        try:
            weight = cls.quantize(dense)
        except MoestroError as error:
            left.append((name, str(error)))
            continue
        done = put(model, name, weight, settings, dtype=module.dtype if packed else dense.dtype)
        made.append(Report(name, "unquantised", format, done.on, done.nbytes))
    _say_left(left, f"are not quantised to {format}")
    return made
