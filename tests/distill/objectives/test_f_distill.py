"""f-distill: the weights of the seven divergences against their integrals, and the two normalisations."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus
from worlds import FLOW, Affine, Points, build_objective, gaussian, trained

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.adversarial import Heads, density_ratio, discriminator_loss, generator_loss
from fewstep.distill.data.batch import Batch
from fewstep.distill.loop import Loop
from fewstep.distill.objectives.f_distill import WEIGHTS, RunningMean
from fewstep.distill.roles import Role, Roles
from fewstep.distill.update import MicroBatch, StudentSample
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


def micro_batch() -> MicroBatch:
    return MicroBatch({}, KeyedRandom(0, 0, "student", 0), 0, Roles({}))


def normalised(mean: RunningMean, value: Tensor, group: Tensor) -> Tensor:
    """``value`` divided by the running mean, which is updated afterwards."""
    micro = micro_batch()
    divided = mean.normalise(micro, value, group)
    mean.update(micro.totals)
    return divided


def test_a_running_mean_is_that_of_earlier_batches_with_falling_weights() -> None:
    mean = RunningMean("r", torch.ones(2), 0.5)
    group = torch.tensor([0, 0, 1])
    assert normalised(mean, torch.tensor([2.0, 4.0, 8.0]), group).tolist() == [2, 4, 8], "1 before the first batch"
    # group 0: (1/2 + 2 + 4) / (1/2 + 2) = 2.6; group 1: (1/2 + 8) / (1/2 + 1) = 17/3
    assert normalised(mean, torch.tensor([2.6, 5.2, 17 / 3]), group).tolist() == pytest.approx([1, 2, 1])
    # group 0: (6.5 / 2 + 7.8) / (2.5 / 2 + 2)
    assert normalised(mean, torch.tensor([3.4, 3.4, 1.0]), group)[0].item() == pytest.approx(1.0)
    empty = mean.sums[:, 1].clone()
    normalised(mean, torch.tensor([1.0]), torch.tensor([0]))
    assert torch.equal(mean.sums[:, 1], empty / 2), "a group without numbers keeps its mean"


def test_a_constant_factor_of_the_ratio_disappears() -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(10, (1000,), generator=generator)
    ratio = torch.rand(1000, generator=generator) * (1 + group)
    once, thrice = (RunningMean("r", torch.ones(10), 0.9) for _ in range(2))
    for _ in range(60):
        a, b = normalised(once, ratio, group), normalised(thrice, 3 * ratio, group)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=0)
    for k in range(10):
        assert a[group == k].mean().item() == pytest.approx(1, abs=1e-3)


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


def loop_of(name: str, heads: Heads, batch: int = 64, accumulate: int = 1, **settings: object) -> Loop:
    """One-step training in which only the student's mean would learn; all learning rates are 0."""
    roles = Roles(
        {
            "teacher": Role(Denoiser(gaussian(1.0, 0.8, 16).backbone, FLOW, "x0", feature_layers=("",))),
            "student": trained(Denoiser(Affine(-0.5, 0.5), FLOW, "x0"), lr=0.0),
            "fake": Role(gaussian(-0.5, 0.5, 16)),
            "discriminator": trained(heads, lr=0.0),
        }
    )
    built = build_objective(name, roles, steps=1, guidance=1.0, critic_updates=1, **settings)
    return Loop(roles, built, {"data": images}, batch, accumulate)


def update_student(loop: Loop, step: int = 0) -> tuple[float, float]:
    """d / d mu of the student's loss, and the metric h_max, of f-distill only."""
    shared: dict[int, dict[str, StudentSample]] = {shard: {} for shard in range(loop.accumulate)}
    metrics = loop.update(loop.objective.updates[0], step, shared)
    grad = loop.roles.denoiser("student").backbone.mu.grad
    assert isinstance(grad, Tensor)
    return grad.item(), float(metrics.get("health/h_max", 0.0))


def test_with_constant_logits_it_equals_dmd2() -> None:
    heads = Heads({"": 16})
    for parameter in heads.parameters():
        torch.nn.init.zeros_(parameter)
    f_distill, dmd2 = loop_of("f_distill", heads, gan_weight=0.0), loop_of("dmd2", heads)
    assert update_student(f_distill)[0] == update_student(dmd2)[0]


@pytest.mark.parametrize("divergence", ["forward_kl", "neyman"])
def test_one_sample_per_micro_batch_does_not_turn_it_into_dmd2(divergence: str) -> None:
    """A mean over such a micro-batch would make every weight 1. The means that divide are those of all samples."""
    torch.manual_seed(0)
    heads = Heads({"": 16})
    for parameter in heads.parameters():
        parameter.data *= 4
    settings = {"divergence": divergence, "gan_weight": 0.0}
    small = loop_of("f_distill", heads, 1, 64, **settings)
    plain = loop_of("dmd2", heads, 1, 64)
    weights = []
    for step in range(60):
        gradient, weight_of_one = update_student(small, step)
        weights.append(weight_of_one)
    assert abs(gradient / update_student(plain, 59)[0] - 1) > 0.002
    assert sum(weights[30:]) / 30 == pytest.approx(1, abs=0.03), "the weights average 1"
    ratio, weight = small.objective.state["ratio"], small.objective.state["weight"]
    assert ratio[1].sum().item() == pytest.approx(64 * 10, rel=0.06), "64 samples a step, each step .9 times as much"
    assert (ratio[0] / ratio[1] - 1).abs().max() > 0.02, "the discriminator is informative"
    assert abs((weight[0] / weight[1]).item() - 1) > 1e-3


def test_a_head_takes_feature_maps_and_tokens_alike() -> None:
    maps = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    heads = Heads({"layer": 5})
    tokens = maps.flatten(2).movedim(1, 2)  # [B, N, C]
    torch.testing.assert_close(heads({"layer": tokens}), heads({"layer": maps}))
