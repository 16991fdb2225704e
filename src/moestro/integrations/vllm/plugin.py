"""What the entry point does: look at the environment, then put our method classes in place as vLLM imports its own."""

from __future__ import annotations

import functools
import importlib
import os
import types

from moestro.errors import MoestroError
from moestro.integrations.vllm import hooks, log
from moestro.integrations.vllm.imports import when_imported
from moestro.integrations.vllm.settings import CLASSES, Settings

TORCH = (2, 11)  # the oldest torch that moestro's operators run on
_installed: set[str] = set()


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
    for name, kind in CLASSES.items():
        if kind in settings.kinds and name not in _installed:
            _installed.add(name)
            module, _, method = name.rpartition(".")
            when_imported(module, functools.partial(_hook, method=method, settings=settings))
    if "nvfp4" in settings.kinds:
        importlib.import_module("moestro.integrations.vllm.online").install(settings)


def _hook(module: types.ModuleType, method: str, settings: Settings) -> None:
    try:
        hooks.install(getattr(module, method), None, settings)
    except Exception as error:  # an import of vLLM's must not fail for us
        log.warning(f"{method}'s experts are left to vLLM: {type(error).__name__}: {error}")


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
