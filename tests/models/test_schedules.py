"""Schedules: two curves, their derivatives, the time of a log-SNR, and the bridge between two noise levels."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fewstep.models.schedules import (
    VE,
    NoiseSchedule,
    RectifiedFlow,
    VPCosine,
    VPDiscrete,
    VPLinear,
    bridge,
    schedule_from_dict,
    schedule_to_dict,
    shift,
)

VP = [VPLinear(), VPLinear(1.0, 1.0), VPCosine(), VPDiscrete.scaled_linear(), VPDiscrete.linear()]
SCHEDULES = [RectifiedFlow(), *VP, VE()]
INSIDE = torch.linspace(
    0.0137, 0.9931, 97, dtype=torch.float64
)  # avoids the nodes of discrete schedules, where slopes jump
unit = st.floats(0, 1)

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
every_vp = pytest.mark.parametrize("schedule", VP, ids=lambda s: type(s).__name__)


def time(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- the curves


@every_schedule
@pytest.mark.parametrize("curve", ["alpha", "sigma"])
def test_derivatives_equal_autograds(schedule: NoiseSchedule, curve: str) -> None:
    t = INSIDE.clone().requires_grad_()
    value = getattr(schedule, curve)(t) + 0 * t  # VE's alpha does not depend on t
    (slope,) = torch.autograd.grad(value.sum(), t)
    assert_close(getattr(schedule, f"d_{curve}")(INSIDE), slope, rtol=1e-11, atol=1e-11)


@every_schedule
def test_log_snr_is_the_log_of_alpha_over_sigma_and_decreases(schedule: NoiseSchedule) -> None:
    log_snr = schedule.log_snr(INSIDE)
    assert_close(log_snr, torch.log(schedule.alpha(INSIDE)) - torch.log(schedule.sigma(INSIDE)), rtol=1e-11, atol=1e-11)
    assert (log_snr.diff() < 0).all()


@every_schedule
@given(t=unit)
def test_time_of_log_snr_is_the_inverse_of_log_snr(schedule: NoiseSchedule, t: float) -> None:
    assert schedule.time_of_log_snr(schedule.log_snr(time(t))).item() == pytest.approx(t, rel=0, abs=1e-13)


@every_vp
@given(t=unit)
def test_variance_is_preserved(schedule: NoiseSchedule, t: float) -> None:
    assert (schedule.alpha(time(t)) ** 2 + schedule.sigma(time(t)) ** 2).item() == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), *VP], ids=lambda s: type(s).__name__)
def test_time_zero_is_clean(schedule: NoiseSchedule) -> None:
    assert (schedule.alpha(time(0)).item(), schedule.sigma(time(0)).item()) == (1, 0)
    assert schedule.log_snr(time(0)).item() == math.inf


@every_schedule
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 1)])
@pytest.mark.parametrize("curve", ["alpha", "sigma", "d_alpha", "d_sigma", "log_snr"])
def test_results_have_the_shape_of_the_times_in_float64(
    schedule: NoiseSchedule, shape: tuple[int, ...], curve: str
) -> None:
    value = getattr(schedule, curve)(torch.full(shape, 0.3, dtype=torch.float64))
    assert (value.shape, value.dtype) == (shape, torch.float64)


# ---- known values


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [
        (VPDiscrete.scaled_linear(), np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),  # Stable Diffusion
        (VPDiscrete.linear(), np.linspace(1e-4, 0.02, 1000)),  # DDPM
    ],
)
def test_discrete_nodes_equal_the_cumulative_products(schedule: VPDiscrete, betas: np.ndarray) -> None:
    nodes = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert_close(schedule.alpha(nodes) ** 2, torch.from_numpy(np.cumprod(1 - betas)), rtol=1e-11, atol=0)


def test_betas_are_linear_in_themselves_or_in_their_roots() -> None:
    """In float64: Stable Diffusion's and DDPM's defaults, and others."""
    for scaled, linear, (start, end, steps) in (
        (VPDiscrete.scaled_linear(), None, (0.00085, 0.012, 1000)),
        (None, VPDiscrete.linear(), (1e-4, 0.02, 1000)),
        (VPDiscrete.scaled_linear(0.01, 0.2, 7), VPDiscrete.linear(0.01, 0.2, 7), (0.01, 0.2, 7)),
    ):
        if scaled is not None:
            expected = np.linspace(start**0.5, end**0.5, steps) ** 2
            np.testing.assert_allclose(scaled.betas, expected, rtol=1e-13)
        if linear is not None:
            np.testing.assert_allclose(linear.betas, np.linspace(start, end, steps), rtol=1e-13)


@pytest.mark.parametrize(
    ("schedule", "t", "alpha_squared"),
    [
        (VPDiscrete.scaled_linear(), 1 / 1000, 0.99915),  # diffusers' alphas_cumprod[0] and [999]
        (VPDiscrete.scaled_linear(), 1.0, 0.0046601),
        (VPDiscrete.linear(), 1.0, 4.0358e-5),
        (VPLinear(), 1.0, math.exp(-10.05)),
        (VPCosine(), 0.5, (math.cos(0.5053 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2),
    ],
)
def test_vp_schedules_have_their_known_values(schedule: NoiseSchedule, t: float, alpha_squared: float) -> None:
    assert schedule.alpha(time(t)).item() ** 2 == pytest.approx(alpha_squared, rel=1e-5)


@pytest.mark.parametrize(("t", "sigma"), [(0, 0.002), (0.5, 2.515219), (1, 80)])
def test_the_ve_schedule_has_karras_sigmas(t: float, sigma: float) -> None:
    assert VE().sigma(time(t)).item() == pytest.approx(sigma, rel=1e-6)


# ---- the bridge: x_t = scale x_s + std n


@every_schedule
@given(times=st.lists(unit, min_size=3, max_size=3).map(sorted))
def test_bridges_compose(schedule: NoiseSchedule, times: list[float]) -> None:
    """Clean to s to t equals clean to t, and s to u to t equals s to t."""
    s, u, t = map(time, times)
    scale, std = bridge(schedule, s, t)
    if schedule.alpha(s) > 0:
        assert_close(scale * schedule.alpha(s), schedule.alpha(t), rtol=1e-13, atol=0)
    assert_close(scale**2 * schedule.sigma(s) ** 2 + std**2, schedule.sigma(t) ** 2, rtol=1e-12, atol=1e-14)
    if schedule.alpha(u) > 0:
        (first, first_std), (second, second_std) = bridge(schedule, s, u), bridge(schedule, u, t)
        assert_close(second * first, scale, rtol=1e-13, atol=0)
        assert_close(second**2 * first_std**2 + second_std**2, std**2, rtol=1e-12, atol=1e-14)


def test_the_bridge_of_a_rectified_flow_has_its_closed_form() -> None:
    scale, std = bridge(RectifiedFlow(), time(0.5), time(0.75))
    assert scale.item() == pytest.approx(0.5)
    assert std.item() ** 2 == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), *VP], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_the_bridge_from_clean_is_the_forward_process(schedule: NoiseSchedule, t: float) -> None:
    assert bridge(schedule, time(0), time(t)) == (schedule.alpha(time(t)), schedule.sigma(time(t)))


@every_schedule
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_the_bridge_to_the_same_level_is_the_identity(schedule: NoiseSchedule, t: float) -> None:
    assert bridge(schedule, time(t), time(t)) == (1, 0)


def flow_variance(s: Fraction, t: Fraction) -> float:
    """``(t - s)(t + s - 2 s t) / (1 - s)^2``, exactly."""
    return float((t - s) * (t + s - 2 * s * t) / (1 - s) ** 2)


def vp_linear_variance(s: Fraction, t: Fraction) -> float:
    """``1 - alpha_t^2 / alpha_s^2``, the exponent exactly."""
    low, high = Fraction(0.1), Fraction(20.0)
    return -math.expm1(-float((t**2 - s**2) * (high - low) / 2 + (t - s) * low))


@pytest.mark.parametrize(("schedule", "exact"), [(RectifiedFlow(), flow_variance), (VPLinear(), vp_linear_variance)])
@pytest.mark.parametrize("s", [1e-3, 0.02, 0.3, 0.9])
@pytest.mark.parametrize("gap", [1e-2, 1e-5, 1e-8, 1e-12])
def test_the_bridge_stays_accurate_as_t_approaches_s(schedule: NoiseSchedule, exact: Any, s: float, gap: float) -> None:
    """Against rational arithmetic; rounding the times to float64 alone causes an error of about 1e-16 / gap."""
    _, std = bridge(schedule, time(s), time(s + gap))
    assert std.item() ** 2 == pytest.approx(exact(Fraction(s), Fraction(s + gap)), rel=1e-14 + 1e-16 / gap)


@every_schedule
def test_the_bridge_to_the_next_float_is_finite(schedule: NoiseSchedule) -> None:
    """A difference of variances could round to a negative number, whose root is nan."""
    s = torch.linspace(0.001, 0.999, 5000, dtype=torch.float64)
    _, std = bridge(schedule, s, torch.nextafter(s, torch.ones_like(s)))
    assert ((std >= 0) & (std < 1e-4)).all()


@every_schedule
def test_a_level_above_the_next_by_rounding_counts_as_equal(schedule: NoiseSchedule) -> None:
    t = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    _, std = bridge(schedule, torch.nextafter(t, torch.ones_like(t)), t)
    assert (std == 0).all()


# ---- the flow shift


@given(t=st.floats(0.001, 0.999), factor=st.floats(0.1, 20))
def test_shift_subtracts_a_constant_from_log_snr(t: float, factor: float) -> None:
    flow = RectifiedFlow()
    moved = flow.log_snr(shift(time(t), factor)) - flow.log_snr(time(t))
    assert moved.item() == pytest.approx(-math.log(factor), abs=1e-11)


def test_shift_keeps_the_ends() -> None:
    assert shift(time(0, 0.5, 1), 3.0).tolist() == pytest.approx([0, 0.75, 1])


# ---- schedules in files


@every_schedule
def test_a_schedule_round_trips_through_json(schedule: NoiseSchedule) -> None:
    assert schedule_from_dict(json.loads(json.dumps(schedule_to_dict(schedule)))) == schedule


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vp_linaer"}, "unknown noise schedule 'vp_linaer'; known: rectified_flow, vp_linear"),
        ({}, "unknown noise schedule None"),
        ({"name": "ve", "sigma_mx": 3.0}, r"'ve' has no setting \['sigma_mx'\]"),
        ({"name": "vp_discrete"}, "needs betas between 0 and 1"),
        ({"name": "vp_discrete", "betas": [0.1, 1.5]}, "^noise schedule 'vp_discrete' needs betas between 0 and 1$"),
        ({"name": "vp_discrete", "betas": [0.1, 1.0]}, "needs betas between 0 and 1"),
        ({"name": "vp_discrete", "betas": [0.0, 0.1]}, "needs betas between 0 and 1"),
    ],
)
def test_invalid_settings_are_reported(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_from_dict(settings)


def test_an_unknown_schedule_type_is_refused() -> None:
    class Mine(RectifiedFlow):
        pass

    with pytest.raises(ValueError, match="no name for a schedule of type Mine"):
        schedule_to_dict(Mine())
