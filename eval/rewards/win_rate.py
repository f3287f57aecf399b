"""How often one model's samples have more of a reward than another's."""

from __future__ import annotations

import math

from torch import Tensor


def win_rate(ours: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """How often a reward of ours [N] is above theirs [N] (a tie is half a win), with Wilson's 95 % interval."""
    n, z = len(ours), 1.959964
    rate = ((ours > theirs).double() + 0.5 * (ours == theirs).double()).mean().item()
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return rate, middle - half, middle + half
