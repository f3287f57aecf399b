"""Explains the logged health numbers of a run. ``distill.health`` records them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

WINDOW = 20  # logged entries that a diagnosis considers
MINIMUM_VALUES = 5  # below this number of values a median or deviation is not used


class Finding(NamedTuple):
    """A problem: a short name, and a sentence with the numbers, their meaning and what helps."""

    name: str
    text: str


def diagnose(logged: Sequence[Mapping[str, float]]) -> list[Finding]:
    """The problems that the last entries of a log show; empty if there are none.

    The thresholds lie between deliberately broken runs and healthy ones (tests/eval/report/test_diagnosis.py,
    results/health); they are hints, not verdicts.
    """

    def values(name: str) -> list[float]:
        return [entry[f"health/{name}"] for entry in logged[-WINDOW:] if f"health/{name}" in entry]

    def latest(name: str) -> float:
        return next((entry[f"health/{name}"] for entry in reversed(logged) if f"health/{name}" in entry), math.nan)

    found = []
    if (diversity := latest("diversity_ratio")) < 0.5:
        text = f"samples of one condition differ {diversity:.2f} times as much as the teacher's: the student collapses"
        found.append(Finding("collapse", f"{text}. More critic updates or a lower student rate preserve modes."))
    if (ratio := latest("sd_ratio")) > 1.25 or ratio < 0.75:
        effect = "saturated" if ratio > 1 else "washed out"
        text = f"the standard deviation of the samples is {ratio:.2f} times the teacher's: they look {effect}"
        found.append(Finding("contrast", f"{text}. Check guidance and the student's rate."))
    if (drift := latest("mean_drift")) > 0.5:
        text = f"the mean of the samples is {drift:.2f} standard deviations away from the teacher's"
        found.append(Finding("drift", f"{text}: lower the student's rate, or give the critic more updates."))
    shares = values("ca_share")
    too_guided = len(shares) >= MINIMUM_VALUES and statistics.median(shares) > 0.75
    if too_guided:
        text = f"guidance makes up {statistics.median(shares):.0%} of the direction, and matching does not balance it"
        found.append(Finding("guidance", f"{text}: lower guidance, or give the critic more updates."))
    slopes, deviations = values("critic_slope"), values("sample_sd")
    slope = statistics.median(slopes) if len(slopes) >= MINIMUM_VALUES else 1.0
    enough = len(deviations) >= MINIMUM_VALUES
    swing = statistics.pstdev(deviations) / statistics.mean(deviations) if enough else 0.0
    if slope > 1.6 or (swing > 0.12 and not too_guided):
        signs = [f"the critic's slope is {slope:.2f} (1 is up to date)"] if slope > 1.6 else []
        signs += [f"the samples' standard deviation varies by {swing:.0%}"] if swing > 0.12 and not too_guided else []
        text = "the fake score lags; raise its rate or critic_updates."
        found.append(Finding("critic", f"{' and '.join(signs)}: {text}"))
    for update in sorted({name for entry in logged[-WINDOW:] for name in entry if name.startswith("grad_norm/")}):
        norms = [entry[update] for entry in logged[-WINDOW:] if update in entry]
        if len(norms) >= MINIMUM_VALUES and norms[-1] > 10 * (median := statistics.median(norms)) > 0:
            text = f"the last {update} is {norms[-1] / median:.0f} times its median"
            found.append(Finding("gradient", f"{text}: another sign that a rate is too high."))
    return found
