"""How a method class of ours takes the place of vLLM's: layer by layer, decided when the object is made.

vLLM picks a method class by the checkpoint and calls it. install() gives that class a __new__ which makes our
subclass instead, or vLLM's own object where kind.why_not() has a reason; that is logged. So every way to the
class is covered (FusedMoEMethodCls, mixed precision, a name imported long ago), isinstance checks hold, and a
layer that we leave is exactly vLLM's. All that runs layers is imported with the first one: a model without experts
pays nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moestro.integrations.vllm import log
from moestro.integrations.vllm.settings import Settings

if TYPE_CHECKING:
    from moestro.integrations.vllm.kinds import Kind

MARK = "_moestro_takes_over"


@functools.cache
def subclass(original: type, kind: Kind, settings: Settings) -> type:
    """Our method class for layers that vLLM gives to `original`.

    It has the original's name: vLLM's weight loaders ask for "ModelOpt" in it and for some names as a whole.
    """
    from moestro.integrations.vllm.method import MoestroMethod

    body = {"__module__": __name__, "__doc__": MoestroMethod.__doc__, "kind": kind, "settings": settings}
    return type(original.__name__, (MoestroMethod, original), body)


def install(original: type, kind: Kind | None, settings: Settings) -> None:
    """Let `original(...)` make ours where we can serve the layer. A second call changes nothing.

    kind: None is that of kinds.KINDS by the class's name.
    """
    if MARK in original.__dict__:
        return
    make: Any = original.__new__

    def choose(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is original:
            ours = _ours(original, kind, settings, args, kwargs)
            if ours is not None:
                return _bare(ours)
        return _bare(cls) if make is object.__new__ else make(cls, *args, **kwargs)

    original.__new__ = staticmethod(choose)  # type: ignore[assignment]
    setattr(original, MARK, True)


def _ours(
    original: type, kind: Kind | None, settings: Settings, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> type | None:
    """The class that serves a layer which vLLM makes with these arguments; None, with one line, if vLLM's does."""
    try:
        from moestro.integrations.vllm.kinds import KINDS
        from moestro.integrations.vllm.refusals import why_not

        kind = kind or KINDS[original.__name__]
        reason = why_not(kind, settings, args, kwargs)
        if reason is None:
            return subclass(original, kind, settings)
        log.info(f"{kind.format} experts are left to vLLM: {reason}")
    except Exception as error:  # another vLLM, a broken installation of ours: its server must start
        log.warning(f"{original.__name__}'s experts are left to vLLM: {type(error).__name__}: {error}")
    return None


def _bare(cls: Any) -> Any:
    """An object of the class, before __init__."""
    return object.__new__(cls)
