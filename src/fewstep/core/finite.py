"""Numbers that are not finite never reach a file."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a number that is not finite."""
    return next((name for name, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()), None)
