"""Every distribution-matching objective on Gaussians, where all expectations are known.

Teacher N(m, S^2), student x = mu + rho z with a perfect fake score N(mu, rho^2). With v = (1-t)^2 S^2 + t^2,

    E[F - T] = (t^2 / v) (mu - m)

and in many dimensions the L1 normaliser is the constant E|x - T|, the mean of a folded normal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from worlds import FLOW, Affine, Points, build_objective, gaussian, trained

from fewstep.distill.critics import denoising_loss, denoising_target, importance_weight, weighted_clean_loss
from fewstep.distill.loop import Loop
from fewstep.distill.roles import Role, Roles
from fewstep.distill.update import StudentSample
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser

M, S, MU, RHO = 1.0, 0.8, -0.5, 0.5


@dataclass(frozen=True)
class Case:
    """An objective whose student is one step from noise to x0, and the uniform range of its renoise time."""

    name: str
    settings: dict[str, object]
    low: float
    high: float
    factor: float = 1.0  # of the loss, for squares without 1/2


ONE_STEP = {"steps": 1, "guidance": 1.0, "critic_updates": 1}
CASES = [
    Case("dmd2", {**ONE_STEP, "renoise_times": {"low": 0.02, "high": 0.98}}, 0.02, 0.98),
    Case("dmd2", {**ONE_STEP, "renoise_times": {"low": 0.5, "high": 0.5}}, 0.5, 0.5),
    Case("dmd", {"guidance": 1.0, "regression": 0.0}, 0.02, 0.98),
    Case("decoupled_dmd", ONE_STEP, 0.02, 0.98),
    Case("decoupled_dmd", {**ONE_STEP, "normaliser": "separate"}, 0.02, 0.98),
    Case("cdm", {"max_steps": 1, "guidance": 1.0, "off_trajectory": 0.0, "floor": 1e-6}, 0.02, 0.98, factor=2.0),
    Case("tdm", {"steps": 1, "guidance": 1.0, "huber": 0.0, "margin": 0.02}, 0.02, 0.98),
]


def student_gradient(
    case: Case, mu: float, rho: float, batch: int = 2000, dimensions: int = 256
) -> tuple[float, float]:
    """The gradients of mu and rho after one student update in the loop."""
    student = Denoiser(Affine(mu, rho), FLOW, "x0")
    roles = Roles(
        {
            "teacher": Role(gaussian(M, S, dimensions)),
            "student": trained(student),
            "fake": Role(gaussian(mu, rho, dimensions)),
        }
    )
    objective = build_objective(case.name, roles, **case.settings)
    loop = Loop(roles, objective, {"data": Points(dimensions)}, batch)
    update = next(u for u in objective.updates if u.roles == ("student",))
    loop.update(update, 0, {0: {}})
    assert isinstance(student.backbone, Affine)
    gradients = student.backbone.mu.grad, student.backbone.rho.grad
    return tuple(0.0 if g is None else g.item() for g in gradients)  # type: ignore[return-value]


def expected_gradient(case: Case, mu: float, rho: float) -> float:
    """d loss / d mu = E_t[ (t^2 / v)(mu - m) / E|x - T| ], by quadrature over t."""
    n = 4001
    t = torch.linspace(case.low, case.high, n, dtype=torch.float64)
    v = (1 - t) ** 2 * S**2 + t**2
    gain = (1 - t) * S**2 / v  # T = m + gain (x_t - (1-t) m)
    mean = (mu - M) * (1 - gain * (1 - t))  # of x - T, with x_t = (1-t) x + t n
    std = torch.sqrt((rho * (1 - gain * (1 - t))) ** 2 + (gain * t) ** 2)
    folded = std * math.sqrt(2 / math.pi) * torch.exp(-((mean / std) ** 2) / 2) + mean * torch.erf(
        mean / std / math.sqrt(2)
    )
    return case.factor * float(((t**2 / v) * (mu - M) / folded).mean())


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name}-{c.low}-{c.high}-{len(c.settings)}")
def test_the_gradient_of_the_students_mean_is_the_expected_one(case: Case) -> None:
    gradient, _ = student_gradient(case, MU, RHO)
    assert gradient == pytest.approx(expected_gradient(case, MU, RHO), rel=0.02)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name}-{c.low}-{c.high}-{len(c.settings)}")
def test_the_teacher_is_a_fixed_point_for_every_sample(case: Case) -> None:
    assert student_gradient(case, M, S, batch=64) == pytest.approx((0.0, 0.0), abs=1e-7)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name}-{c.low}-{c.high}-{len(c.settings)}")
@pytest.mark.parametrize(("rho", "sign"), [(0.5, -1), (1.1, 1)])
def test_the_students_deviation_moves_towards_the_teachers(case: Case, rho: float, sign: int) -> None:
    """E[(F - T) z] = t^2 rho (1/v_teacher - 1/v_student) changes its sign at rho = S."""
    _, gradient = student_gradient(case, M, rho, batch=500)
    assert gradient * sign > 0


@pytest.mark.parametrize("times", ["segment", "nested"])
def test_a_trajectory_is_matched_at_the_times_of_its_segments_or_at_all_noisier_ones(times: str) -> None:
    """A student that always predicts ``mu`` passes through x_s = (1 - s) mu + s z, its noised clean samples: the
    gradient of each segment is that of one step with the segment's range of t."""
    case = Case("tdm", {"steps": 4, "guidance": 1.0, "huber": 0.0, "margin": 0.02, "renoise_times": times}, 0, 0)
    ranges = [(s + 0.02, (top if times == "segment" else 1.0) - 0.02) for top, s in pairwise((1, 0.75, 0.5, 0.25, 0))]
    by_segment = [expected_gradient(replace(case, low=low, high=high), MU, 0.0) for low, high in ranges]
    gradient, _ = student_gradient(case, MU, 0.0)
    assert gradient == pytest.approx(sum(by_segment) / 4, rel=0.02)


def test_the_exact_denoisers_have_the_expected_difference() -> None:
    """(t^2 / v) (mu - m) at t = .2, .5, .9 for m = 1, S = .8, mu = -.5."""
    teacher, fake = gaussian(M, S, 1), gaussian(MU, RHO, 1)
    generator = torch.Generator().manual_seed(0)
    z, n = torch.randn(2, 400_000, 1, generator=generator, dtype=torch.float64)
    for t, value in [(0.2, -0.1334520), (0.5, -0.9146341), (0.9, -1.4882410)]:
        x_t = (1 - t) * (MU + RHO * z) + t * n
        gap = fake(x_t, t, Condition()).x0 - teacher(x_t, t, Condition()).x0
        assert gap.mean().item() == pytest.approx(value, abs=4e-3)


# --- three regressions of the fake ------------------------------------------------------------------------------------


class Slope(torch.nn.Module):
    """``x0 = a x_t``: the gradient of the loss in ``a`` is zero at the least-squares slope."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        return self.a * x_t


def slope_of(critic: str, n: int = 2_000_000) -> float:
    """p0 = N(0, 1); the student is the posterior mean at t = .75 on the true marginal; s = .5, re-noised to .7."""
    generator = torch.Generator().manual_seed(1)
    z, bridge_noise = torch.randn(2, n, 1, generator=generator, dtype=torch.float64)
    x_in = math.sqrt(0.25**2 + 0.75**2) * z
    x0, noise = 0.4 * x_in, 1.2 * x_in
    s, t = torch.full((n,), 0.5, dtype=torch.float64), torch.full((n,), 0.7, dtype=torch.float64)
    sample = StudentSample(0.5 * x0 + 0.5 * noise, s, x0, torch.full_like(s, 0.75), Condition())
    x_t = 0.6 * sample.x + math.sqrt(0.4) * bridge_noise
    fake = Denoiser(Slope(), FLOW, "x0")

    def gradient(a: float) -> float:
        fake.backbone.a.data.fill_(a)
        prediction = fake(x_t, t, Condition())
        if critic == "bridge":
            loss = denoising_loss(prediction, FLOW, sample, t, bridge_noise)
        else:
            weight = importance_weight(FLOW, sample, x0, t, bridge_noise, tempered=False) if critic == "exact" else 1.0
            loss = (weight * (prediction.x0 - x0).square()).mean()
        return torch.autograd.grad(loss, fake.backbone.a)[0].item()

    at_zero, at_one = gradient(0.0), gradient(1.0)  # the loss is a parabola in a
    return at_zero / (at_zero - at_one)


@pytest.mark.parametrize(("critic", "slope"), [("plain", 0.220588), ("bridge", 0.330882), ("exact", 0.060120)])
def test_the_three_critics_have_three_slopes(critic: str, slope: float) -> None:
    assert slope_of(critic) == pytest.approx(slope, abs=2.5e-3)


def test_the_bridge_target_of_a_clean_sample_is_the_ordinary_one() -> None:
    """At s = 0 the unbiased target is (x, n) itself and the weight is 1."""
    x, n = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    zero, t = torch.zeros(5, dtype=torch.float64), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x0, noise, weight = denoising_target(FLOW, StudentSample(x, zero, x, t, Condition()), t, n)
    assert torch.equal(x0, x)
    assert torch.allclose(noise, n)
    assert torch.allclose(weight, torch.ones(5, 1))


@pytest.mark.parametrize("s", [1e-3, 1e-5, 1e-7])
def test_the_bridge_target_tends_to_the_clean_one(s: float) -> None:
    """Linearly in s^2: the target is continuous at a clean sample."""
    x, n = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    level = torch.full((5,), s, dtype=torch.float64)
    sample = StudentSample((1 - s) * x, level, x, t, Condition())
    x0, noise, weight = denoising_target(FLOW, sample, t, n)
    for value, limit in ((x0, x), (noise, n), (weight, torch.ones(5, 1))):
        torch.testing.assert_close(value, limit.to(value), rtol=0, atol=max(300 * s * s, 1e-12))


def test_the_tempered_importance_weight_is_the_dth_root_of_the_exact_one() -> None:
    d, generator = 6, torch.Generator().manual_seed(0)
    x0, noise, n = torch.randn(3, 10, d, generator=generator, dtype=torch.float64)
    s, t = torch.full((10,), 0.3, dtype=torch.float64), torch.full((10,), 0.6, dtype=torch.float64)
    sample = StudentSample(0.7 * x0 + 0.3 * noise, s, x0, t, Condition())
    exact = importance_weight(FLOW, sample, x0, t, n, tempered=False)
    assert torch.allclose(importance_weight(FLOW, sample, x0, t, n) ** d, exact)


def test_the_exact_importance_weight_averages_to_one() -> None:
    n = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0, noise = torch.full_like(n, 0.4), torch.full_like(n, 1.2)
    s, t = torch.full((len(n),), 0.5, dtype=torch.float64), torch.full((len(n),), 0.7, dtype=torch.float64)
    sample = StudentSample(0.5 * x0 + 0.5 * noise, s, x0, t, Condition())
    assert importance_weight(FLOW, sample, x0, t, n, tempered=False).mean().item() == pytest.approx(1.0, abs=0.01)


def test_critic_losses_are_float32_though_times_are_float64() -> None:
    x, n = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    level, t = torch.full((4,), 0.25, dtype=torch.float64), torch.full((4,), 0.5, dtype=torch.float64)
    sample = StudentSample(x, level, x, t, Condition())
    fake = gaussian(0.0, 1.0, 3)(x, t, Condition())
    losses = [denoising_loss(fake, FLOW, sample, t, n), denoising_loss(fake, FLOW, sample, t, n, clamp=1.0)]
    weight = importance_weight(FLOW, sample, x, t, n)
    losses += [weighted_clean_loss(fake, sample, weight), *denoising_target(FLOW, sample, t, n), weight]
    assert {loss.dtype for loss in losses} == {torch.float32}
