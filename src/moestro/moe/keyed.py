"""Modules that operators of ours find by a key when they run: a graph holds text, not a module.

A key is of one module; a copy of it, which has its attributes, gets another. Nothing is kept alive.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from moestro.errors import BackendError

KEY = "_moestro_key"
_modules: weakref.WeakValueDictionary[str, torch.nn.Module] = weakref.WeakValueDictionary()


def key_of(module: Any) -> str:
    """What `module_of` finds a module by, a constant to Dynamo."""
    # id() makes Dynamo guard on the module.
    return _key_of(module) if id(module) else ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _key_of(module: Any) -> str:
    key: str | None = module.__dict__.get(KEY)
    if key is None or _modules.get(key) is not module:
        key = f"{type(module).__name__} {id(module)}"
        module.__dict__[KEY] = key
        _modules[key] = module
    return key


def module_of(key: str) -> Any:
    """The module of a key. Raises BackendError where it is gone."""
    module = _modules.get(key)
    if module is None:
        raise BackendError(
            f"the module {key.split()[0]} of this graph is gone; compile the model again (torch._dynamo.reset())"
        )
    return module
