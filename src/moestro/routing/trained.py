"""Routing as a trained model's, for layers of any number of experts: what real imbalance looks like.

The package ships what a small mixture of experts, trained on text, did with text that it had not seen
(`benchmarks/train_moe.py`): ids [tokens, layers, K] in `recordings/e<experts>-k<top_k>-<name>.npy`.

A layer with as many experts and choices gets those ids as they were, of one recorded layer. For another one the
*profile* is kept, which expert of a layer gets which share of the pairs: the shares of WINDOW tokens in a row, sorted,
averaged over windows and layers. It is read as a function of the rank's fraction and cut into as many equal parts as
there are experts, so the busiest tenth of the experts has the share that the busiest tenth had. An expert is then among
a token's K with the probability that its share asks for, at most CAP: K draws without replacement at rates
-log(1 - probability) come to that (they are the arrivals of a Poisson process up to the time at which K of them are
expected). Which expert has which rank, the seed says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from moestro.errors import RoutingError
from moestro.routing.distributions import check_sample, gumbel_top_k
from moestro.routing.recorded import Recorded, read

__all__ = ["RECORDINGS", "Trained", "profile_of", "resampled"]

RECORDINGS = Path(__file__).parent / "recordings"
WINDOW = 512  # tokens: a prompt's, or a few seconds of decoding
CAP = 0.95  # of tokens that one expert gets at most, where there are few experts

Shares = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Trained:
    """The routing of a trained model; see the module. `path`: another recording's, by name e<E>-k<K>-<name>.npy.

    Raises RoutingError, when first asked, where there is no such recording.
    """

    path: Path | None = None

    @property
    def name(self) -> str:
        """ "trained(e<E>-k<K>-<name>@HASH)": another recording is another name."""
        return f"trained({Path(self._recorded.path).stem}@{self._recorded._digest})"

    def sample(self, num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
        """int32 [N, K]; see Distribution. Recorded ids where E and K are the recording's, else its profile."""
        check_sample(num_tokens, num_experts, top_k, seed)
        if (num_experts, top_k) == self._sizes:
            layer = (
                seed % self._ids.shape[1]
            )  # of one layer: those of several together are more even than each
            return Recorded(self._recorded.path, layer).sample(num_tokens, num_experts, top_k, seed)
        rng = np.random.default_rng(seed)
        chosen = inclusion(resampled(self._profile, num_experts), top_k)
        return gumbel_top_k(np.log(-np.log1p(-rng.permutation(chosen))), num_tokens, top_k, rng)

    @cached_property
    def _recorded(self) -> Recorded:
        if self.path is not None:
            return Recorded(self.path)
        found = sorted(RECORDINGS.glob("e*-k*-*.npy"))
        if not found:
            raise RoutingError(f"expected a recording e<E>-k<K>-<name>.npy in {RECORDINGS}, found none")
        return Recorded(found[0])

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        """(E, K) of the recording."""
        match = re.match(r"e(\d+)-k(\d+)-", Path(self._recorded.path).name)
        if match is None:
            raise RoutingError(
                f"a recording of a trained model must be named e<E>-k<K>-<name>.npy, got {self._recorded.path}"
            )
        return int(match[1]), int(match[2])

    @cached_property
    def _ids(self) -> torch.Tensor:
        ids = read(Path(self._recorded.path))[0]
        return ids if ids.ndim == 3 else ids[:, None]

    @cached_property
    def _profile(self) -> Shares:
        return profile_of(self._ids, self._sizes[0])


def profile_of(ids: torch.Tensor, num_experts: int, window: int = WINDOW) -> Shares:
    """Shares of the pairs [E], largest first, of `window` tokens in a row, averaged over windows and layers.

    ids: [tokens, layers, K]. A last window that is not full counts only where it is the only one.
    """
    rows = []
    for layer in ids.unbind(1):
        for part in [p for p in torch.split(layer, window) if len(p) == window] or [layer]:
            counts = torch.bincount(part.flatten(), minlength=num_experts).double()
            rows.append((counts / counts.sum()).sort(descending=True).values)
    return np.asarray(torch.stack(rows).mean(0).numpy(), dtype=np.float64)


def resampled(profile: Shares, num_experts: int) -> Shares:
    """The profile's shares for another number of experts: equal parts of its cumulative share, straight between ranks."""
    cumulative = np.concatenate([[0.0], np.cumsum(profile)])
    at = np.linspace(0, len(profile), num_experts + 1)
    return np.asarray(np.diff(np.interp(at, np.arange(len(profile) + 1), cumulative)), dtype=np.float64)


def inclusion(shares: Shares, top_k: int) -> Shares:
    """The probability [E] that a token has an expert among its top_k: top_k times its share, at most CAP, what is above
    it going to the others."""
    if top_k >= CAP * len(shares):
        return np.full(len(shares), CAP)
    chosen = np.maximum(shares, 1e-6) * top_k
    for _ in range(len(shares)):
        full = chosen >= CAP
        chosen[full] = CAP
        left = top_k - CAP * full.sum()
        if np.isclose(chosen[~full].sum(), left):
            break
        chosen[~full] *= left / chosen[~full].sum()
    return np.asarray(np.minimum(chosen, CAP), dtype=np.float64)
