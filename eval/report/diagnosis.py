"""What logged numbers say about a run's health, in words. The quantities are those that ``distill.health`` records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

WINDOW = 20  # logged lines that a diagnosis looks back on
ENOUGH = 5  # values of a quantity without which it says nothing


class Finding(NamedTuple):
    """Something that looks wrong: a short name, and a sentence with the numbers, their meaning and what helps."""

    name: str
    text: str


def diagnose(logged: Sequence[Mapping[str, float]]) -> list[Finding]:
    """What the last lines of a log say about a run's health; empty where nothing looks wrong.

    The thresholds lie between runs that were made sick on purpose and healthy ones (tests/distill/test_health.py,
    results/health); they are hints, not verdicts.
    """

    def values(name: str) -> list[float]:
        return [line[f"health/{name}"] for line in logged[-WINDOW:] if f"health/{name}" in line]

    def latest(name: str) -> float:
        return next((line[f"health/{name}"] for line in reversed(logged) if f"health/{name}" in line), math.nan)

    found = []
    if (diversity := latest("diversity_ratio")) < 0.5:
        text = f"samples of one condition differ {diversity:.2f} times as much as the teacher's: the student collapses"
        found.append(Finding("collapse", f"{text}. More critic updates or a lower student rate keep modes."))
    if (ratio := latest("sd_ratio")) > 1.25 or ratio < 0.75:
        what = "saturate" if ratio > 1 else "wash out"
        text = f"the deviation of the samples is {ratio:.2f} times the teacher's: they {what}"
        found.append(Finding("contrast", f"{text}. Look at guidance and at the student's rate."))
    if (drift := latest("mean_drift")) > 0.5:
        text = f"the mean of the samples is {drift:.2f} deviations away from the teacher's"
        found.append(Finding("drift", f"{text}: lower the student's rate, or give the critic more updates."))
    shares = values("ca_share")
    too_guided = len(shares) >= ENOUGH and statistics.median(shares) > 0.75
    if too_guided:
        text = f"guidance makes {statistics.median(shares):.0%} of the direction and matching does not balance it"
        found.append(Finding("guidance", f"{text}: lower guidance, or give the critic more updates."))
    slopes, deviations = values("critic_slope"), values("sample_sd")
    slope = statistics.median(slopes) if len(slopes) >= ENOUGH else 1.0
    swing = statistics.pstdev(deviations) / statistics.mean(deviations) if len(deviations) >= ENOUGH else 0.0
    if slope > 1.6 or (swing > 0.12 and not too_guided):
        text = f"the critic's slope is {slope:.2f} (1 is up to date) and the samples' deviation swings by {swing:.0%}"
        found.append(Finding("critic", f"{text}: the fake score lags; raise its rate or critic_updates."))
    for update in sorted({name for line in logged[-WINDOW:] for name in line if name.startswith("grad_norm/")}):
        norms = [line[update] for line in logged[-WINDOW:] if update in line]
        if len(norms) >= ENOUGH and norms[-1] > 10 * statistics.median(norms):
            text = f"the last {update} is {norms[-1] / statistics.median(norms):.0f} times its median"
            found.append(Finding("gradient", f"{text}: one more sign of a rate that is too high."))
    return found
