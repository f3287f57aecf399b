"""Health numbers: the critic's slope in closed form, the gap by range of times, and the profiles of samples."""

from __future__ import annotations

import pytest
import torch
from worlds import FLOW, Affine, Points, build_objective, gaussian, trained

from fewstep.distill.health import Profile
from fewstep.distill.loop import Loop
from fewstep.distill.metrics_logger import to_numbers
from fewstep.distill.roles import Role, Roles
from fewstep.models.denoiser import Denoiser


def roles_with_fake(mean: float, dimensions: int) -> Roles:
    """Teacher N(0, 1), student N(2, 1), and a fake with this mean."""
    return Roles(
        {
            "teacher": Role(gaussian(0.0, 1.0, dimensions)),
            "student": trained(Denoiser(Affine(2.0, 1.0), FLOW, "x0")),
            "fake": Role(gaussian(mean, 1.0, dimensions)),
        }
    )


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, -0.5])
def test_the_slope_shows_how_far_the_fake_has_followed(share: float) -> None:
    """A fake whose mean has covered a share q of the distance to the student has slope 1 / q."""
    roles = roles_with_fake(2.0 * share, 16)
    for name, settings in (("dmd2", {}), ("tdm", {"margin": 0.05})):
        objective = build_objective(name, roles, steps=1, guidance=1.0, critic_updates=1, **settings)
        loop = Loop(roles, objective, {"data": Points(16)}, 20_000)
        metrics = loop.update(objective.updates[0], 0, {0: {}})
        assert metrics["health/critic_slope"].item() == pytest.approx(1 / share, rel=0.02)


def test_the_gap_is_logged_for_the_ranges_of_times_that_have_samples() -> None:
    """The metric is a ratio of sums, so a range without samples in a shard has no weight."""
    roles = roles_with_fake(1.0, 4)
    times = {"low": 0.3, "high": 0.7}
    objective = build_objective("dmd2", roles, steps=1, guidance=1.0, critic_updates=1, renoise_times=times)
    metrics = Loop(roles, objective, {"data": Points(4)}, 64).update(objective.updates[0], 0, {0: {}})
    ranges = {name for name in to_numbers(metrics) if name.startswith("health/gap at")}
    assert ranges == {"health/gap at t 0.25 to 0.5", "health/gap at t 0.5 to 0.75"}


def test_profiles_compare_mean_deviation_and_seeds() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(50, 40, 3, generator=generator)
    centers = torch.randn(1, 40, 3, generator=generator)
    other = Profile.of(2 * teacher + 1).relative_to(Profile.of(teacher))
    assert other["health/mean_drift"] == pytest.approx(1.0, abs=0.05)
    assert other["health/sd_ratio"] == pytest.approx(2.0, abs=0.01)
    assert other["health/diversity_ratio"] == pytest.approx(2.0, rel=1e-5)
    same_for_all_seeds = Profile.of(centers.expand(50, -1, -1)).relative_to(Profile.of(teacher))
    assert same_for_all_seeds["health/diversity_ratio"] == pytest.approx(0.0, abs=1e-6)


def test_a_fake_that_still_is_the_teacher_has_no_slope() -> None:
    """Both directions are zero, or rounding: 0 / 0 and noise are not logged."""
    for rounding in (0.0, 1e-7):
        roles = roles_with_fake(rounding, 16)
        objective = build_objective("dmd2", roles, steps=1, guidance=1.0, critic_updates=1)
        metrics = Loop(roles, objective, {"data": Points(16)}, 64).update(objective.updates[0], 0, {0: {}})
        numbers = to_numbers(metrics)
        assert "health/critic_slope" not in numbers
        assert {"loss/match", "health/gap"} <= set(numbers)
