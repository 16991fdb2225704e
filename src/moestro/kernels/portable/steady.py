"""A sigmoid whose bits do not depend on where in a tensor a value stands."""

from __future__ import annotations

import torch

# The polynomial of Cephes' expf (Moshier), good to 2 units in the last place; ln 2 in two parts, the first exact times
# any exponent.
LOG2_E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
TERMS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def steady_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x)) of float32, the same bits for the same value anywhere in a tensor.

    torch.sigmoid takes another exp for the last elements of a tensor (and of each thread's part) than for the vectors
    before; here each step is one addition, product or division, which IEEE 754 rounds alike in both.
    """
    y = x.neg().clamp_(-87.0, 88.0)
    exponent = (y * LOG2_E).round_()
    r = (y - exponent * LN2_HIGH) - exponent * LN2_LOW
    p = torch.full_like(r, TERMS[0])
    for term in TERMS[1:]:
        p = p.mul_(r).add_(term)
    p = p.mul_(r).mul_(r).add_(r).add_(1.0)
    power = ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
    p = p.mul_(power).add_(1.0)
    return torch.ones_like(p).div_(p)
