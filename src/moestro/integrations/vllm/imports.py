"""Doing something to a module when it is imported, so that the plugin imports nothing that vLLM would not.

vLLM runs plugins before it knows the model; its quantisation modules alone take seconds to import.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence

Action = Callable[[types.ModuleType], None]


def when_imported(name: str, action: Action) -> None:
    """action(module) now if the module is there, else right after its import. It must not raise."""
    if (module := sys.modules.get(name)) is not None:
        action(module)
        return
    watch = next((finder for finder in sys.meta_path if isinstance(finder, _Watch)), None)
    if watch is None:
        watch = _Watch()
        sys.meta_path.insert(0, watch)
    watch.actions.setdefault(name, []).append(action)


class _Watch(importlib.abc.MetaPathFinder):
    """Finds nothing itself: hands a waited-for module to the others, with its loader wrapped."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        actions = self.actions.pop(name, None)  # first, since find_spec comes back here
        if actions is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, actions)
        return spec


class _Loader(importlib.abc.Loader):
    """A loader that runs the actions behind the module's own code."""

    def __init__(self, loader: importlib.abc.Loader, actions: list[Action]) -> None:
        self._loader, self._actions = loader, actions

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = (
            self._loader
        )  # resources and reloads are the loader's own
        self._loader.exec_module(module)
        for action in self._actions:
            action(module)
