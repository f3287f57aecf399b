"""The delete-a-group jackknife (Quenouille, 1956; Tukey, 1958): errors of values that are no means over images.

A value is computed again without each of ten random groups of the images. The bootstrap is not used: a resample with
replacement has fewer distinct images, so that its Fréchet distance is larger, and varies more, than that of a new set.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

GROUPS = 10
MINIMUM_N = 2 * GROUPS  # below, a value has no error bar
ERROR_OF = f"standard error over samples (jackknife, {GROUPS} groups)"


def jackknife_error(left_out: Sequence[float]) -> float:
    """The standard error of a value, from the values without each group: ``sqrt((G - 1) / G sum (v - mean v)^2)``.

    With 10 groups it is itself uncertain by about a quarter.
    """
    values = torch.tensor(left_out, dtype=torch.float64)
    return float(((len(values) - 1) * values.var(correction=0)).sqrt())


def groups_of(numbers: Tensor, conditions: int = 1) -> Tensor:
    """The groups, int64 in 0..9, of images by their numbers [N], counted from 0; image k shows class or caption
    ``k % conditions``.

    They are always the same random ones. Ten images of one condition are in ten groups, so that the error is that of
    sets with equally many images of each condition; with one condition, sizes differ by at most one.
    """
    order = _random_order()
    turns, condition = numbers // conditions, numbers % conditions
    permutation = turns // GROUPS * conditions + condition
    return order[(permutation * GROUPS + turns % GROUPS) % len(order)]


def strata(n: int, conditions: int) -> int:
    """The ``conditions`` of ``groups_of`` for ``n`` images: 1, a plain random sample, if they are unknown (0) or have
    fewer than ten images each."""
    return conditions if conditions and n >= GROUPS * conditions else 1


@lru_cache(maxsize=1)
def _random_order() -> Tensor:
    """1009 permutations of the groups; a prime number, so that periods of classes are no periods of groups."""
    return torch.rand(1009, GROUPS, generator=torch.Generator().manual_seed(0)).argsort(1).flatten()
