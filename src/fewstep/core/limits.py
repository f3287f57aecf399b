"""The most that a request may ask for: beyond it, the answer would be an allocation error, or would never come."""

from __future__ import annotations

from fewstep.core.errors import UserError

MOST_STEPS = 10_000  # of a solver; ten times as many as a model is trained on
MOST_SAMPLES = 1_000_000  # of a command that works on them in parts; seeds of each prompt
MOST_AT_ONCE = 100_000  # samples in one tensor


def check_count(name: str, value: int, most: int) -> None:
    """Raises ``UserError`` that names a number which is not between 1 and ``most``."""
    if value < 1:
        raise UserError(f"{name} must be at least 1, got {value}.")
    if value > most:
        raise UserError(f"{name} must be at most {most:,}, got {value:,}.")
