"""moestro.load: a checkpoint folder to a model whose experts are packed, on the right device, with a word on each."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers

from moestro.checkpoints.scheme import raw_scheme
from moestro.errors import BackendError, FormatError
from moestro.integrations import transformers as integration
from moestro.integrations.transformers.bound import bound_to
from moestro.integrations.transformers.linears import packed_linears
from moestro.integrations.transformers.modules import experts_modules
from moestro.integrations.transformers.settings import NAME, REGISTERED, Settings
from moestro.machine import bytes_text

log = logging.getLogger("moestro")


def load(
    path: str | Path,
    *,
    format: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    max_num_tokens: int | None = None,
    report: bool = True,
    moestro_linear: bool | None = None,
    auto_class: Any = None,
    **options: Any,
) -> Any:
    """The model of a checkpoint folder, with packed experts, in evaluation mode.

    format: what dense experts become ("nvfp4", ...); None: they stay as they are. device: "cuda" where there is one,
    else the CPU. dtype: of everything else; "auto": the checkpoint's. report: print a line a layer of what runs
    where. moestro_linear: which Linear layers run on Moestro, as in register(). options: keywords of register()
    (backend=, input_format=, ...).

    Raises FormatError for a folder that is no checkpoint, or has what no layout has a place for.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FormatError(f"path must be a folder with a config.json, got {folder}")
    raw_scheme(folder)  # an unreadable config is named before Transformers reads it
    name = _registered(format, max_num_tokens, options)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cls = auto_class or _class_of(folder)
    placed = {} if device.type == "cpu" else {"device_map": {"": device}}
    model = cls.from_pretrained(
        folder, experts_implementation=name, dtype=dtype, moestro_linear=moestro_linear, **placed
    ).eval()
    for line in describe(model):
        if report:
            print(line, flush=True)
        else:
            log.info("%s", line)
    return model


def _registered(format: str | None, max_num_tokens: int | None, options: dict[str, Any]) -> str:
    """An implementation with these settings: "moestro" where it has them."""
    if not options and format is None and max_num_tokens is None and NAME in REGISTERED:
        return NAME
    release = options.pop("release", True)
    wanted = Settings(format, max_num_tokens or 8192, release, options)
    for name, settings in REGISTERED.items():
        if settings == wanted:
            return name
    name = NAME if NAME not in REGISTERED else f"{NAME}_{len(REGISTERED)}"
    integration.register(
        name,
        format=format,
        max_num_tokens=max_num_tokens or 8192,
        release=release,
        **options,
    )
    return name


def _class_of(folder: Path) -> Any:
    """The class that the config names, else the one for causal language models."""
    config = transformers.AutoConfig.from_pretrained(folder)
    for architecture in config.architectures or []:
        if (found := getattr(transformers, architecture, None)) is not None:
            return found
    return transformers.AutoModelForCausalLM


def describe(model: Any) -> list[str]:
    """A line a layer: what runs where."""
    lines = []
    quantizer = getattr(model, "hf_quantizer", None)
    told = {line.name: str(line) for line in getattr(quantizer, "report", [])}
    known = set(told)
    for name, module in experts_modules(model):
        found = bound_to(module)
        if name in told:
            lines.append(told.pop(name))
        elif found is not None:
            w = found.weights
            lines.append(f"{name}: {w.format} in {w.layout}, {bytes_text(w.nbytes)}")
        else:
            lines.append(f"{name}: its own parameters, packed at the first call")
    lines += told.values()
    for name, linear in packed_linears(model):
        if name not in known:
            lines.append(f"{name}: {linear.format} on {linear.on}, {bytes_text(linear.nbytes)}")
    if not lines:
        raise BackendError(
            f"{type(model).__name__} has no experts that run through Transformers' interface, and no Linear layers "
            "that its checkpoint has quantised; moestro_linear=True runs those that it has"
        )
    return lines
