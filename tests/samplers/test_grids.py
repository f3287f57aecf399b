"""Time grids."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import special
from scipy.integrate import quad
from worlds import FLOW

from fewstep.core.errors import UserError
from fewstep.models.schedules import VE, NoiseSchedule, RectifiedFlow, VPDiscrete, VPLinear
from fewstep.samplers.grids import (
    PUBLISHED,
    T_MAX,
    End,
    Spacing,
    check_times,
    given_steps,
    grid,
    grid_of,
    respace,
    time_uniform,
)
from fewstep.samplers.published_levels import align_your_steps, bong_tangent, linear_quadratic

SCHEDULES: dict[str, NoiseSchedule] = {
    "vp": VPLinear(), "flow": RectifiedFlow(), "edm": VE(), "discrete": VPDiscrete.scaled_linear()
}  # fmt: skip


@pytest.mark.parametrize("spacing", get_args(Spacing))
@pytest.mark.parametrize("end", get_args(End))
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
def test_grids_decrease_and_end_as_requested(spacing: Spacing, end: End, schedule: NoiseSchedule) -> None:
    if spacing in PUBLISHED and end != "zero":
        with pytest.raises(ValueError, match="it ends at 0, not with end="):
            grid(schedule, 9, spacing, end=end)
        return
    if spacing == "ays_svd" and isinstance(schedule, VPDiscrete):
        with pytest.raises(ValueError, match="decreasing times within"):  # its noise exceeds the schedule's
            grid(schedule, 9, spacing)
        return
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


def test_beta57_takes_quantiles_over_the_time_of_every_schedule() -> None:
    """t = ppf(1 - k / N; 0.5, 0.7), as RES4LYF's scheduler; checked by the distribution's integral."""
    for schedule in SCHEDULES.values():
        times = grid(schedule, 5, "beta57")
        for k, t in enumerate(times):
            mass = quad(lambda u: u**-0.5 * (1 - u) ** -0.3, 0, t, epsabs=1e-10)[0] / special.beta(0.5, 0.7)
            assert mass == pytest.approx(1 - k / 5, abs=1e-6)
    shifted = [3 * t / (1 + 2 * t) for t in times]
    assert grid(FLOW, 5, "beta57", factor=3.0) == pytest.approx(shifted)


def test_sgm_uniform_ends_with_a_step_from_the_second_smallest_time() -> None:
    """ComfyUI: linspace(999, 0, N + 1) of the timesteps without its last, then 0."""
    labels = np.linspace(999, 0, 6)[:-1]
    assert grid(VPDiscrete.scaled_linear(), 5, "sgm_uniform") == pytest.approx([*((labels + 1) / 1000), 0.0])


def test_kl_optimal_is_uniform_in_the_arctangent_of_sigma_by_alpha() -> None:
    """sigma_i = tan(i / N arctan(sigma_min) + (1 - i / N) arctan(sigma_max)), the theorem's formula."""
    times = grid(VE(0.01, 50.0), 7, "kl_optimal", end="minimum", t_min=0.0)
    sigma = VE(0.01, 50.0).sigma(torch.tensor(times, dtype=torch.float64))
    expected = [math.tan(i / 7 * math.atan(0.01) + (1 - i / 7) * math.atan(50.0)) for i in range(8)]
    assert sigma.tolist() == pytest.approx(expected, rel=1e-6)


def test_linear_quadratic_takes_mochis_values() -> None:
    """The coefficients of its published code: of i^2, of i, and constant, for i from half of the steps."""
    for steps in (2, 5, 8, 30):
        linear, threshold = steps // 2, 0.025
        rest = linear - threshold * steps
        square = rest / (linear * (steps - linear) ** 2)
        slope = threshold / linear - 2 * rest / (steps - linear) ** 2
        values = [threshold * i / linear for i in range(linear)]
        values += [square * i**2 + slope * i + square * linear**2 for i in range(linear, steps)]
        expected = [*(1 - value for value in values), 0.0]
        assert grid(FLOW, steps, "linear_quadratic") == pytest.approx(expected, abs=1e-12)
        assert grid(FLOW, steps, "linear_quadratic", factor=3.0) == pytest.approx(expected, abs=1e-12), "not shifted"
        sigma = VE().sigma(torch.tensor(grid(VE(), steps, "linear_quadratic")[:-1], dtype=torch.float64))
        assert sigma.tolist() == pytest.approx([80 * value for value in expected[:-1]], rel=1e-9)
    assert grid(FLOW, 1, "linear_quadratic") == (1.0, 0.0)
    assert grid(FLOW, 4, "linear_quadratic", t_max=0.999) == pytest.approx([0.999, 0.9865125, 0.974025, 0.724275, 0])


def test_bong_tangent_joins_two_arctangents() -> None:
    """RES4LYF: [1 + 2 / pi atan(-slope (k - pivot))] / 2, rescaled; pivots at 60 %, slopes 0.2 at 40 steps."""

    def part(count: int, slope: float, pivot: int, high: float, low: float) -> list[float]:
        f = [(2 / math.pi * math.atan(-slope * (k - pivot)) + 1) / 2 for k in range(count)]
        return [(value - f[-1]) / (f[0] - f[-1]) * (high - low) + low for value in f]

    for steps in (2, 3, 8, 20):
        total = steps + 2
        join, slope = int(total * 0.6), 0.2 / (total / 40)
        expected = [*part(join, slope, join, 1, 0.5)[:-1], *part(total - join, slope, 0, 0.5, 0)]
        assert len(expected) == steps + 1
        assert grid(FLOW, steps, "bong_tangent") == pytest.approx(expected, abs=1e-12)
    assert grid(FLOW, 1, "bong_tangent") == (1.0, 0.0)


def test_published_levels_run_from_1_to_0() -> None:
    assert linear_quadratic(1) == bong_tangent(1) == [1.0, 0.0]
    for levels in (linear_quadratic(7), bong_tangent(7)):
        assert (len(levels), levels[0], levels[-1]) == (8, 1.0, 0.0)
        assert levels == sorted(levels, reverse=True)
    svd = align_your_steps("ays_svd", 5)
    assert (len(svd), svd[0], svd[-1]) == (6, pytest.approx(700), 0.0)


def test_align_your_steps_takes_its_tables_and_interpolates_them_in_the_logarithm() -> None:
    schedule = VPDiscrete.scaled_linear()
    diffusers = pytest.importorskip("diffusers")
    for name, table in (("ays_sd15", "StableDiffusion"), ("ays_sdxl", "StableDiffusionXL")):
        times = torch.tensor(grid(schedule, 10, name)[:-1], dtype=torch.float64)  # type: ignore[arg-type]
        published = diffusers.schedulers.AysSchedules
        rho = (-schedule.log_snr(times)).exp()
        assert rho.tolist() == pytest.approx(published[f"{table}Sigmas"][:-1], abs=5e-3)  # rounded there
        assert (1000 * times - 1).tolist() == pytest.approx(published[f"{table}Timesteps"], abs=1.5)
        half = torch.tensor(grid(schedule, 5, name)[:-1], dtype=torch.float64)  # type: ignore[arg-type]
        torch.testing.assert_close(half, times[::2])
        twice = torch.tensor(grid(schedule, 20, name)[:-1], dtype=torch.float64)  # type: ignore[arg-type]
        between = (-schedule.log_snr(twice)).exp()[1:-1:2]
        torch.testing.assert_close(between, (rho[:-1] * rho[1:]).sqrt())
    svd = VE(0.002, 700.0)
    rho = svd.sigma(torch.tensor(grid(svd, 10, "ays_svd")[:-1], dtype=torch.float64))
    assert rho.tolist() == pytest.approx(diffusers.schedulers.AysSchedules["StableDiffusionVideoSigmas"][:-1])


def test_the_levels_of_a_flow_are_spaced_again_over_sigma_between_their_ends() -> None:
    """diffusers' FlowMatchEulerDiscreteScheduler: of 0.9 to 0.1 in five levels, whatever lies between them."""
    levels = torch.tensor([0.9, 0.89, 0.88, 0.87, 0.1], dtype=torch.float64)
    karras = [(0.9 ** (1 / 7) + k / 4 * (0.1 ** (1 / 7) - 0.9 ** (1 / 7))) ** 7 for k in range(5)]
    assert respace(levels, "karras").tolist() == pytest.approx(karras)
    assert respace(levels, "exponential").tolist() == pytest.approx([0.9 * 9 ** (-k / 4) for k in range(5)])
    quantiles = [1.0, 0.824320, 0.5, 0.175680, 0.0]
    assert respace(levels, "beta").tolist() == pytest.approx([0.1 + 0.8 * q for q in quantiles], abs=1e-6)
    with pytest.raises(ValueError, match="the spacing 'log_snr' does not apply to a flow's sigmas"):
        respace(levels, "log_snr")


@pytest.mark.parametrize("name", ["time", "beta57", *PUBLISHED])
def test_a_published_grid_takes_no_smallest_time(name: str) -> None:
    with pytest.raises(UserError, match=f"The grid '{name}' ends at 0 here, so it takes no smallest time"):
        grid_of(FLOW, 5, f"{name}:0.02")


@pytest.mark.parametrize(("spacing", "near"), [("karass", "karras"), ("log_snr:0.05", "log_snr"), ("Beta", "beta")])
def test_an_unknown_spacing_is_refused_with_the_nearest_name(spacing: str, near: str) -> None:
    with pytest.raises(UserError, match=f"Unknown grid '{spacing}'; did you mean '{near}'"):
        grid(FLOW, 5, spacing)  # type: ignore[arg-type]


@pytest.mark.parametrize("spacing", ["quadratic", "karras", "log_snr"])
@pytest.mark.parametrize("smallest", [-0.1, 1.0, math.nan])
def test_a_smallest_time_out_of_range_is_refused(spacing: Spacing, smallest: float) -> None:
    with pytest.raises(ValueError, match="smallest time must lie between 0 and 1, got"):
        grid(FLOW, 5, spacing, t_min=smallest)


def test_a_grid_in_words_is_the_one_of_its_spacing() -> None:
    assert grid_of(FLOW, 4, "time") == time_uniform(4)
    assert grid_of(FLOW, 4, "quadratic:0.1", factor=3.0, t_max=0.9) == grid(
        FLOW, 4, "quadratic", factor=3.0, t_max=0.9, t_min=0.1
    )
    assert grid_of(FLOW, 4, "quadratic") == grid(FLOW, 4, "quadratic")
    vp = VPDiscrete.scaled_linear()
    for name in ("beta", "log_snr"):
        assert grid_of(vp, 4, f"{name}:0.02") == grid(vp, 4, name, t_min=0.02)  # type: ignore[arg-type]
    assert grid(FLOW, 4) == grid(FLOW, 4, "time")


def test_uniform_times_are_exact_in_float64() -> None:
    for times in (time_uniform(3), grid(FLOW, 3)):
        assert times == pytest.approx((1, 2 / 3, 1 / 3, 0), abs=1e-15)


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
    for times in ([0.5, 0.6], [0.5, 0.5], [1.0], [1.5, 0.5], [0.5, -0.1], [0.5, 0.2, -0.1]):
        with pytest.raises(ValueError, match="two or more decreasing times within"):
            check_times(times)


@pytest.mark.parametrize("spacing", ["log_snr", "karras", "kl_optimal"])
def test_a_smallest_time_acts_also_where_the_grid_starts_at_pure_noise(spacing: Spacing) -> None:
    """Together with the time 1, which is replaced there, times below ``T_MIN`` once were."""
    assert grid(FLOW, 6, spacing, end="minimum", t_min=1e-5)[-1] == pytest.approx(1e-5)
    assert grid(FLOW, 6, spacing, end="minimum", t_min=1e-5)[0] == T_MAX
    for schedule in (FLOW, VPLinear()):
        with pytest.raises(UserError, match="its smallest time must lie above 0 on this schedule, got 0"):
            grid_of(schedule, 6, f"{spacing}:0")
    assert grid_of(VE(), 6, f"{spacing}:0")[-1] == 0


def test_times_that_start_where_there_is_signal_are_refused() -> None:
    """A state of noise alone is none of the model's there, and the samples were wrong without a word."""
    for schedule, text in ((FLOW, "times:0.6,0.3"), (VPLinear(), "times:0.2,0.1"), (VE(), "times:0.3,0.1")):
        with pytest.raises(UserError, match="sampling starts from noise alone, so its first time must lie near 1"):
            grid_of(schedule, 2, text)
    assert grid_of(FLOW, 2, "times:0.9,0.5") == (0.9, 0.5, 0.0)
    assert grid_of(VE(sigma_max=1.0), 2, "times:1,0.5") == (1.0, 0.5, 0.0), "the noisiest time that it has"


def test_quadratic_is_uniform_in_the_root_of_time() -> None:
    assert grid(FLOW, 4, "quadratic", t_min=0.0) == pytest.approx((1, 9 / 16, 1 / 4, 1 / 16, 0))
    times = torch.tensor(grid(FLOW, 8, "quadratic", end="minimum", t_max=0.81, t_min=0.01), dtype=torch.float64)
    torch.testing.assert_close(times.sqrt().diff(), torch.full((8,), -0.1, dtype=torch.float64))
