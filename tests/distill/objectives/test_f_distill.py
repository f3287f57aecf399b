"""f-distill: the weights of the seven divergences against their integrals, and the two normalisations."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus
from worlds import FLOW, Affine, Points, build_objective, gaussian, trained

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.adversarial import Heads, density_ratio, discriminator_loss, generator_loss
from fewstep.distill.data.batch import Batch
from fewstep.distill.loop import Loop
from fewstep.distill.objectives.f_distill import WEIGHTS, divergence_weight
from fewstep.distill.roles import Role, Roles
from fewstep.models.denoiser import Denoiser

X = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
F: dict[str, Callable[[Tensor], Tensor]] = {  # the divergences themselves, D_f(p | q) = E_q f(p / q)
    "reverse_kl": lambda r: -r.log(),
    "softened_reverse_kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "squared_hellinger": lambda r: 2 * (r.sqrt() - 1).square(),  # twice the usual, so that h is sqrt(r)
    "forward_kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r).square() / (2 * r),
}


def log_normal(x: Tensor, mean: float, std: float = 1.0) -> Tensor:
    return -0.5 * ((x - mean) / std).square() - math.log(std * math.sqrt(2 * math.pi))


def integral(values: Tensor) -> float:
    return torch.trapezoid(values, X).item()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("reverse_kl", (1, 1, 1)),
        ("forward_kl", (1, 1, 1)),
        ("jeffreys", (2, 2, 2)),
        ("squared_hellinger", (0.96923, 0.88250, 0.60653)),
        ("neyman", (math.exp(0.25), math.exp(1), math.exp(4))),
        ("jensen_shannon", (0.47053, 0.39797, 0.22480)),
        ("softened_reverse_kl", (0.52947, 0.60203, 0.77520)),
    ],
)
def test_the_expected_weight_between_two_gaussians(name: str, values: tuple[float, ...]) -> None:
    """E_q h(p / q) for p = N(0, 1) and q = N(d, 1), d = 0.5, 1, 2."""
    for d, value in zip((0.5, 1.0, 2.0), values, strict=True):
        log_q = log_normal(X, d)
        ratio = (log_normal(X, 0) - log_q).exp()
        assert integral(log_q.exp() * WEIGHTS[name](ratio)) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_the_weighted_gradient_is_that_of_the_divergence(name: str) -> None:
    """d/d mean of D_f(p | q) by finite differences, against -E_q h(r) (s_p - s_q); p = N(0, 1), q = N(.7, 1.1^2)."""

    def divergence(mean: float) -> float:
        log_q = log_normal(X, mean, 1.1)
        ratio = (log_normal(X, 0) - log_q).clamp(-300, 300).exp()
        return integral(torch.where(log_q > -300, log_q.exp() * F[name](ratio), 0.0))

    step = 1e-4
    measured = (divergence(0.7 + step) - divergence(0.7 - step)) / (2 * step)
    log_q = log_normal(X, 0.7, 1.1)
    ratio = (log_normal(X, 0) - log_q).clamp(-300, 300).exp()
    scores = -X + (X - 0.7) / 1.1**2
    assert -integral(log_q.exp() * WEIGHTS[name](ratio) * scores) == pytest.approx(measured, rel=1e-4)


def test_the_weight_is_normalised_by_time_and_over_the_batch() -> None:
    """The ratio's mean is 1 in every range of times, the weight's over the batch; a constant factor changes nothing."""
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(4000, generator=generator, dtype=torch.float64)
    ratio = torch.rand(4000, generator=generator) * (1 + 5 * t).float()
    weight = divergence_weight("forward_kl", ratio, t, (0.0, 1.0), 10)
    assert weight.mean().item() == pytest.approx(1, abs=1e-5)
    for low, high in pairwise(torch.linspace(0, 1, 11).tolist()):
        assert weight[(t >= low) & (t < high)].mean().item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(divergence_weight("forward_kl", 3 * ratio, t, (0.0, 1.0), 10), weight)


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_an_uninformative_discriminator_gives_equal_weights(name: str) -> None:
    t = torch.linspace(0, 1, 64, dtype=torch.float64)
    ratio = density_ratio(torch.full((64, 2), 0.3))
    torch.testing.assert_close(divergence_weight(name, ratio, t, (0.0, 1.0), 10), torch.ones(64))


def test_the_ratio_is_bounded_and_detached() -> None:
    logits = torch.tensor([[-50.0, -50.0], [0.0, 0.0], [50.0, 50.0]], requires_grad=True)
    ratio = density_ratio(logits)
    assert ratio.tolist() == pytest.approx([0.1, 1.0, 20.0])
    assert not ratio.requires_grad


def test_the_losses_of_an_uninformative_discriminator() -> None:
    zero = torch.zeros(5, 2)
    assert generator_loss(zero).item() == pytest.approx(math.log(2))
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert discriminator_loss(zero - 3, zero + 3).item() == pytest.approx(2 * softplus(torch.tensor(-3.0)).item())


def images(random: KeyedRandom, size: int) -> Batch:
    points = Points(16)(random, size)
    return Batch(size, points.shape, points.condition, {"x0": random.normal((size, 16), "data")})


def student_gradient(name: str) -> float:
    """d / d mu of the student's loss, with heads that give every sample the same logit."""
    teacher = Denoiser(gaussian(1.0, 0.8, 16).backbone, FLOW, "x0", feature_layers=("",))
    student = trained(Denoiser(Affine(-0.5, 0.5), FLOW, "x0"))
    heads = Heads({"": 16})
    for parameter in heads.parameters():
        torch.nn.init.zeros_(parameter)
    roles = Roles(
        {
            "teacher": Role(teacher),
            "student": student,
            "fake": Role(gaussian(-0.5, 0.5, 16)),
            "discriminator": trained(heads),
        }
    )
    settings = {"gan_weight": 0.0} if name == "f_distill" else {}
    built = build_objective(name, roles, steps=1, guidance=1.0, critic_updates=1, **settings)
    Loop(roles, built, {"data": images}, 64).update(built.updates[0], 0, {0: {}})
    grad = roles.denoiser("student").backbone.mu.grad
    assert isinstance(grad, Tensor)
    return grad.item()


def test_with_constant_logits_it_equals_dmd2() -> None:
    assert student_gradient("f_distill") == student_gradient("dmd2")
