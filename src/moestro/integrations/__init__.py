"""Moestro inside other libraries; each module imports its library when it is imported itself."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from moestro.errors import PackageError

__all__ = ["need_transformers", "no_transformers"]


def need_transformers() -> Any:
    """The module transformers. Raises PackageError where it is not installed, or has no experts interface."""
    try:
        importlib.import_module("transformers.integrations.moe")
        return importlib.import_module("transformers")
    except ImportError as error:
        raise no_transformers(error) from error


def no_transformers(error: ImportError) -> PackageError:
    """What to raise where importing Transformers' experts interface failed so."""
    try:
        here = f"here is {metadata.version('transformers')}"
    except metadata.PackageNotFoundError:
        here = "here is none"
    return PackageError(
        f"models of Transformers need version 5.7 or newer: pip install 'moestro[hf]'; {here} ({error})"
    )
