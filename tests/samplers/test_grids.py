"""Time grids."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from worlds import FLOW

from fewstep.models.schedules import VE, NoiseSchedule, RectifiedFlow, VPDiscrete, VPLinear
from fewstep.samplers.grids import End, Spacing, check_times, grid, time_uniform

SCHEDULES: dict[str, NoiseSchedule] = {
    "vp": VPLinear(), "flow": RectifiedFlow(), "edm": VE(), "discrete": VPDiscrete.scaled_linear()
}  # fmt: skip


@pytest.mark.parametrize("spacing", get_args(Spacing))
@pytest.mark.parametrize("end", get_args(End))
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
def test_grids_decrease_and_end_as_requested(spacing: Spacing, end: End, schedule: NoiseSchedule) -> None:
    times = grid(schedule, 9, spacing, end=end)
    assert len(times) == 10
    assert check_times(times) == times
    assert (times[-1] == 0) == (end != "minimum")


def test_karras_is_uniform_in_the_seventh_root_of_sigma() -> None:
    times = torch.tensor(grid(VE(), 8, "karras", end="minimum", t_min=0.01), dtype=torch.float64)
    root = (-VE().log_snr(times)).exp() ** (1 / 7)
    torch.testing.assert_close(root.diff(), root.diff()[:1].expand(8), rtol=1e-6, atol=1e-9)


def test_log_snr_is_uniform_in_log_snr_and_is_also_called_exponential() -> None:
    times = torch.tensor(grid(FLOW, 8, "log_snr", end="minimum", t_max=0.99), dtype=torch.float64)
    steps = FLOW.log_snr(times).diff()
    torch.testing.assert_close(steps, steps[:1].expand(8))
    assert grid(FLOW, 8, "log_snr") == grid(FLOW, 8, "exponential")
    bounded = grid(FLOW, 6, "log_snr", t_max=0.95, t_min=0.05)
    assert (bounded[0], bounded[-1]) == (0.95, 0.0)
    steps = FLOW.log_snr(torch.tensor(bounded[:-1], dtype=torch.float64)).diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 2 * math.log(19) / 6))


def test_uniform_times_are_shifted_towards_noise() -> None:
    assert time_uniform(4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert time_uniform(4, 3.0) == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))
    assert grid(FLOW, 4, "time", factor=3.0) == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))


def test_invalid_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one step, got 0"):
        time_uniform(0)
    for times in ([0.5, 0.6], [1.0], [1.5, 0.5], [0.5, -0.1]):
        with pytest.raises(ValueError, match="two or more decreasing times within"):
            check_times(times)
