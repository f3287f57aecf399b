"""How often the samples of one model have a higher reward than those of another."""

from __future__ import annotations

import math

from torch import Tensor


def win_rate(ours: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """How often rewards of ``ours`` [N] are above ``theirs`` [N] (a tie counts half): the rate, and the lower and upper
    limit of Wilson's 95 % interval."""
    n, z = len(ours), 1.959964
    rate = ((ours > theirs).double() + 0.5 * (ours == theirs).double()).mean().item()
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return rate, middle - half, middle + half
