"""How a method class of ours takes the place of vLLM's: layer by layer, decided when the object is made.

vLLM picks a method class by the checkpoint and calls it. install() gives that class a __new__ which makes our
subclass instead, or vLLM's own object where kind.why_not() has a reason; that is logged. So every way to the
class is covered (FusedMoEMethodCls, mixed precision, a name imported long ago), isinstance checks hold, and a
layer that we leave is exactly vLLM's.
"""

from __future__ import annotations

from typing import Any

from moestro.integrations.vllm import log
from moestro.integrations.vllm.kinds import Kind
from moestro.integrations.vllm.method import MoestroMethod
from moestro.integrations.vllm.refusals import why_not
from moestro.integrations.vllm.settings import Settings

MARK = "_moestro_takes_over"


def subclass(original: type, kind: Kind, settings: Settings) -> type:
    """Our method class for layers that vLLM gives to `original`.

    It has the original's name: vLLM's weight loaders ask for "ModelOpt" in it and for some names as a whole.
    """
    body = {"__module__": __name__, "__doc__": MoestroMethod.__doc__, "kind": kind, "settings": settings}
    return type(original.__name__, (MoestroMethod, original), body)


def install(original: type, kind: Kind, settings: Settings) -> None:
    """Let `original(...)` make ours where we can serve the layer. A second call changes nothing."""
    if MARK in original.__dict__:
        return
    ours = subclass(original, kind, settings)
    make: Any = original.__new__

    def choose(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is original:
            reason = why_not(kind, settings, args, kwargs)
            if reason is None:
                return _bare(ours)
            log.info(f"{kind.format} experts are left to vLLM: {reason}")
        return _bare(cls) if make is object.__new__ else make(cls, *args, **kwargs)

    original.__new__ = staticmethod(choose)  # type: ignore[assignment]
    setattr(original, MARK, ours)


def _bare(cls: Any) -> Any:
    """An object of the class, before __init__."""
    return object.__new__(cls)
