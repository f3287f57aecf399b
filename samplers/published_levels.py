"""Grids that were published as noise levels: formulas of the fraction of the run, and tables of Align Your Steps."""

from __future__ import annotations

import math

import numpy as np

TABLES: dict[str, tuple[float, ...]] = {  # sigma / alpha; the last is replaced by 0
    "ays_sd15": (
        14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092, 0.9642583904, 0.6523686016,
        0.3977456272, 0.1515232662, 0.0291671582,
    ),
    "ays_sdxl": (
        14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141, 0.5550693289, 0.3798540708,
        0.2332364134, 0.1114188177, 0.0291671582,
    ),
    "ays_svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}  # fmt: skip


def align_your_steps(name: str, steps: int) -> list[float]:
    """The ``steps + 1`` levels sigma / alpha of a table (arXiv 2404.14507), interpolated linearly in their logarithm as
    its authors' page does for other numbers of steps than ten; the last is 0."""
    table = TABLES[name]
    at = np.linspace(0, len(table) - 1, steps + 1)
    levels = np.exp(np.interp(at, np.arange(len(table)), np.log(table)))
    return [*levels[:-1].tolist(), 0.0]


def linear_quadratic(steps: int, threshold: float = 0.025) -> list[float]:
    """The ``steps + 1`` levels from 1 to 0 of Mochi 1 and ComfyUI: half of the steps remove ``threshold`` of the noise
    in equal parts, the others follow the parabola with the same slope at their start that ends at 0."""
    linear = steps // 2
    if not linear:
        return [1.0, 0.0]
    curved, slope = steps - linear, threshold / linear
    curvature = (1 - threshold - curved * slope) / curved**2
    removed = [slope * k for k in range(linear)]
    removed += [threshold + slope * k + curvature * k**2 for k in range(curved)]
    return [*(1 - value for value in removed), 0.0]


def bong_tangent(steps: int) -> list[float]:
    """The ``steps + 1`` levels from 1 to 0 of RES4LYF: an arctangent from 1 to 1/2 that is steepest at its end, then
    one from 1/2 to 0 that is steepest at its start, joined after 60 % of the steps."""
    if steps == 1:
        return [1.0, 0.0]
    join, slope = int((steps + 2) * 0.6), 8 / (steps + 2)
    first = _arctangent(join, slope, join, 1.0, 0.5)
    return [*first[:-1], *_arctangent(steps + 2 - join, slope, 0, 0.5, 0.0)]


def _arctangent(count: int, slope: float, pivot: int, high: float, low: float) -> list[float]:
    values = [math.atan(slope * (k - pivot)) for k in range(count)]
    return [low + (high - low) * (value - values[-1]) / (values[0] - values[-1]) for value in values]
