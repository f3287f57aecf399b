"""Time grids."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from worlds import FLOW

from fewstep.core.errors import UserError
from fewstep.models.schedules import VE, NoiseSchedule, RectifiedFlow, VPDiscrete, VPLinear
from fewstep.samplers.grids import End, Spacing, check_times, given_steps, grid, grid_of, time_uniform

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


def test_beta_quantiles_are_over_the_time_of_a_flow_before_its_shift() -> None:
    """The quantiles of Beta(0.6, 0.6) at k / 8, as the paper and ComfyUI's scheduler take them."""
    published = [1.0, 0.942844, 0.824320, 0.670618, 0.5, 0.329382, 0.175680, 0.057156, 0.0]
    assert grid(FLOW, 8, "beta") == pytest.approx(published, abs=1e-6)
    shifted = [3 * t / (1 + 2 * t) for t in published]
    assert grid(FLOW, 8, "beta", factor=3.0) == pytest.approx(shifted, abs=1e-6)
    bounded = [0.05 + 0.9 * t for t in published]
    assert grid(FLOW, 8, "beta", t_max=0.95, t_min=0.05, end="minimum") == pytest.approx(bounded, abs=1e-6)


def test_beta_quantiles_are_over_sigma_by_alpha_on_other_schedules() -> None:
    """diffusers' ``_convert_to_beta``: sigma_min + q (sigma_max - sigma_min)."""
    schedule = VPDiscrete.scaled_linear()
    times = torch.tensor(grid(schedule, 4, "beta", end="minimum"), dtype=torch.float64)
    rho = (-schedule.log_snr(times)).exp()
    fractions = (rho - rho[-1]) / (rho[0] - rho[-1])
    assert fractions.tolist() == pytest.approx([1.0, 0.824320, 0.5, 0.175680, 0.0], abs=1e-5)


@pytest.mark.parametrize(("spacing", "near"), [("karass", "karras"), ("log_snr:0.05", "log_snr"), ("Beta", "beta")])
def test_an_unknown_spacing_is_refused_with_the_nearest_name(spacing: str, near: str) -> None:
    with pytest.raises(UserError, match=f"Unknown grid '{spacing}'; did you mean '{near}'"):
        grid(FLOW, 5, spacing)  # type: ignore[arg-type]


@pytest.mark.parametrize("spacing", ["quadratic", "karras", "log_snr"])
@pytest.mark.parametrize("smallest", [-0.1, 1.0, math.nan])
def test_a_smallest_time_out_of_range_is_refused(spacing: Spacing, smallest: float) -> None:
    with pytest.raises(ValueError, match="smallest time must lie between 0 and 1, got"):
        grid(FLOW, 5, spacing, t_min=smallest)


def test_a_grid_can_be_given_as_its_times() -> None:
    assert grid_of(FLOW, 4, "times:1,0.9,0.75,0.5") == (1.0, 0.9, 0.75, 0.5, 0.0)
    assert grid_of(FLOW, 4, "times:1,0.9,0.75,0.5,0", factor=3.0) == (1.0, 0.9, 0.75, 0.5, 0.0), "after the shift"
    assert grid_of(FLOW, 2, "times:1,0.5", t_max=0.999) == (0.999, 0.5, 0.0)
    assert (given_steps("times:1,0.5"), given_steps("times:1,0.5,0.0"), given_steps("karras")) == (2, 2, None)
    for text, steps, message in (
        ("times:0.5,1", 2, "decreasing"),
        ("times:1,nan", 2, "decreasing"),
        ("times:1,x", 2, "could not convert"),
        ("times:1,0.5", 3, "has 2 steps, but 3 were requested"),
        ("tims:1", 1, "did you mean 'times'"),
    ):
        with pytest.raises(UserError, match=message):
            grid_of(FLOW, steps, text)


def test_invalid_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one step, got 0"):
        time_uniform(0)
    for times in ([0.5, 0.6], [1.0], [1.5, 0.5], [0.5, -0.1]):
        with pytest.raises(ValueError, match="two or more decreasing times within"):
            check_times(times)
