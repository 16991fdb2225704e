"""A distribution from a word on the command line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from moestro.errors import RoutingError, unknown_name
from moestro.routing.distributions import Balanced, Correlated, Dirichlet, Distribution, Uniform, Zipf
from moestro.routing.recorded import Recorded
from moestro.routing.trained import Trained

# name -> (what the argument is, or None; the class)
KNOWN: Final[dict[str, tuple[str | None, Callable[..., Distribution]]]] = {
    "balanced": (None, Balanced),
    "uniform": (None, Uniform),
    "zipf": ("alpha", Zipf),
    "dirichlet": ("effective_fraction", Dirichlet),
    "correlated": ("overlap", Correlated),
    "recorded": ("path", Recorded),
    "trained": (None, Trained),
}


def parse(text: str) -> Distribution:
    """The distribution that `text` names: "balanced", "uniform", "zipf[:ALPHA]", "dirichlet[:FRACTION]",
    "correlated[:OVERLAP]", "recorded:PATH" or "trained". "zipf(1.2)", as reports print it, is read as well.

    Raises RoutingError for an unknown name, with the nearest known ones, and for an argument that does not
    fit.
    """
    match = re.fullmatch(r"\s*([\w-]+)\s*(?::(.+)|\((.+)\))?\s*", text)
    name = match[1].lower() if match else text
    if match is None or name not in KNOWN:
        raise RoutingError(unknown_name("routing distribution", name, KNOWN))
    parameter, make = KNOWN[name]
    argument = match[2] or match[3]
    if argument is None:
        if name == "recorded":
            raise RoutingError("recorded needs its file, as in 'recorded:routing.npy'")
        return make()
    if parameter is None:
        raise RoutingError(f"{name} takes no argument, got {argument!r}")
    if name == "recorded":
        return make(argument.strip())
    try:
        return make(float(argument))
    except ValueError as error:
        if isinstance(error, RoutingError):
            raise
        raise RoutingError(f"{parameter} of {name} must be a number, got {argument!r}") from None
