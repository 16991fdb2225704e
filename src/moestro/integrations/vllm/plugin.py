"""What the entry point does: look at the environment, then put our method classes in place."""

from __future__ import annotations

import importlib
import os

from moestro.errors import MoestroError
from moestro.integrations.vllm import log
from moestro.integrations.vllm.settings import Settings

TORCH = (2, 11)  # the oldest torch that moestro's operators run on


def install() -> None:
    """Idempotent. Whatever is not as we need it is one line in the log, and vLLM as it was."""
    try:
        settings = Settings.read(os.environ)
    except MoestroError as error:
        log.warning(f"the plugin is off: {error}")
        return
    if not settings.kinds:
        return
    if reason := wrong_torch():
        log.warning(f"the plugin is off: {reason}")
        return
    hooks = importlib.import_module("moestro.integrations.vllm.hooks")
    kinds = importlib.import_module("moestro.integrations.vllm.kinds")
    for kind in kinds.KINDS:
        if kind.name not in settings.kinds:
            continue
        try:
            original = getattr(importlib.import_module(kind.module), kind.method)
        except (ImportError, AttributeError) as error:
            log.info(f"{kind.name} experts of {kind.method} are left to vLLM: it has none here ({error})")
            continue
        hooks.install(original, kind, settings)
    if "nvfp4" in settings.kinds:
        importlib.import_module("moestro.integrations.vllm.online").install(settings)


def wrong_torch() -> str | None:
    """Why this torch cannot serve us; None if it can."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return f"torch must be there, got {error}"
    version: str = torch.__version__
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if found < TORCH:
        return f"torch must be {'.'.join(map(str, TORCH))} or newer, got {version}"
    return None
