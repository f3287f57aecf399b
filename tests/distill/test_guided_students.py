"""The student's update with guidance and conditions, computed again from the evaluations that it makes.

The gradient of the student's offset ``mu`` (x0 = ... + mu) is the mean of the gradients at x0.
"""

from __future__ import annotations

import pytest
import torch
from guided_worlds import REAL, B, W, World, fake_at, guided, per_sample, run, source, x0_of
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.core.keyed_random import KeyedRandom


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dmd", {"regression": 0.0}),
        ("dmd2", {"steps": 4}),
        ("dmd2", {"steps": 1}),
        ("tdm", {"steps": 4, "huber": 0.0}),
        ("phased_dmd", {"phase": 1}),
        ("phased_dmd", {"phase": 2}),
        ("f_distill", {"steps": 2, "gan_weight": 0.0, "divergence": "forward_kl"}),
    ],
)
def test_the_student_moves_along_guided_teacher_minus_conditional_fake(name: str, settings: dict[str, object]) -> None:
    """-mean(k (T_w - F)), with k = 1 / mean|x0 - T_w| per sample."""
    world = run(name, **settings)
    teacher = world.of("teacher")
    T, _ = guided(*teacher)
    x0, _, _ = world.sample()
    k = 1 / per_sample((x0 - T).abs())
    assert world.gradient == pytest.approx(-(k * (T - fake_at(world, teacher[0]))).mean().item(), rel=1e-4)


def test_the_graph_of_f_distill_holds_the_conditional_branch_alone() -> None:
    """The discriminator reads the features of that branch; a graph of both would keep twice the activations."""
    world = run("f_distill", steps=1)
    assert [(call.graph, call.condition["labels"].tolist()) for call in world.of("teacher")] == [
        (True, [0] * B),
        (False, [1] * B),
    ]


def test_the_huber_distance_of_tdm() -> None:
    world = run("tdm", huber=0.3)
    (teacher,) = world.of("teacher")
    T, _ = guided(teacher)
    x0, _, _ = world.sample()
    d, k = T - fake_at(world, teacher), 1 / per_sample((x0 - T).abs())
    assert world.gradient == pytest.approx(-(k * d / (d.square() + 0.09).sqrt()).mean().item(), rel=1e-4)


def test_phased_dmd_on_the_noisy_state() -> None:
    """-mean(w J (T_w - F)) with w = alpha_ts alpha_t / t^2 and J = d x_s / d x0 = alpha_s - s alpha / t_student."""
    world = run("phased_dmd", match_on="x_s", phase=1)
    teacher = world.of("teacher")[-1]
    T, _ = guided(teacher)
    _, _, t_student = world.sample()
    t, s = teacher.t[:B, None], 0.5
    w = (1 - t) / (1 - s) * (1 - t) / t.square()
    jacobian = (1 - s) - s * (1 - t_student) / t_student
    assert world.gradient == pytest.approx(-(w * jacobian * (T - fake_at(world, teacher))).mean().item(), rel=1e-4)


@pytest.mark.parametrize("normaliser", ["joint", "separate"])
def test_decoupled_dmd_matches_without_and_augments_with_guidance(normaliser: str) -> None:
    world = run("decoupled_dmd", normaliser=normaliser)
    at_dm, at_ca = world.of("teacher")
    x0, _, t_student = world.sample()
    T_w, T_c = guided(at_dm) if normaliser == "joint" else (x0_of("teacher", at_dm),) * 2
    ca_w, ca_c = guided(at_ca)
    dm, ca = T_c - fake_at(world, at_dm), ca_w - ca_c
    a = 1 / per_sample((x0 - T_w).abs())
    b = a if normaliser == "joint" else 1 / per_sample((x0 - ca_c).abs())
    assert world.gradient == pytest.approx(-(a * dm + b * ca).mean().item(), rel=1e-4)
    assert (at_ca.t[:B] <= t_student[:, 0]).all()
    assert (at_dm.t[:B] > t_student[:, 0]).any() or t_student.min() == 1


def test_the_three_terms_of_cdm() -> None:
    """Each -2 mean(k d) with k = 1 / max(mean|x - T_c|, .1); CA up to the student's time, the third at its own."""
    world = run("cdm", max_steps=6)
    student = [call for call in world.of("student") if call.graph]
    assert len(student) == 2
    at_ca, at_dm, at_off = world.of("teacher")
    fakes = world.of("fake")
    x0, noise, t_student = world.sample()
    ca_w, ca_c = guided(at_ca)
    assert (ca_w - ca_c).sub((W - 1) * (ca_c - x0_of("teacher", at_ca, null=True))).abs().max() < 1e-6
    off = student[1]
    t = off.t[:, None]
    torch.testing.assert_close(off.x.double(), (1 - t) * x0 + t * noise, atol=1e-4, rtol=1e-4)
    x0_off = x0_of("student", off)
    expected = 0.0
    for x, reference, d in (
        (x0, ca_c, ca_w - ca_c),
        (x0, x0_of("teacher", at_dm), x0_of("teacher", at_dm) - x0_of("fake", fakes[0])),
        (x0_off, x0_of("teacher", at_off), x0_of("teacher", at_off) - x0_of("fake", fakes[1])),
    ):
        k = 1 / per_sample((x - reference).abs()).clamp(min=0.1)
        expected -= 2 * (k * d).mean().item()
    assert world.gradient == pytest.approx(expected, rel=1e-4)
    assert {len(call.x) for call in (at_dm, at_off)} == {B}, "matching has no guidance"
    assert (at_ca.t[:B] <= t_student[:, 0].clamp(min=0.02)).all()
    assert t_student.min() < 0.9


def test_the_regression_of_dmd_is_one_step_from_pure_noise() -> None:
    world = run("dmd", regression=0.7)
    call = world.of("student")[-1]
    assert (call.t == 1).all()
    torch.testing.assert_close(call.x, source(KeyedRandom(0, 0, "data/data", 0), B)["noise"])
    expected = 0.7 * (x0_of("student", call) - REAL).square().mean().item()
    assert world.metrics["loss/regression"] == pytest.approx(expected, rel=1e-5)


# --- the GAN of DMD2 --------------------------------------------------------------------------------------------------


def logits_at(world: World, x: Tensor) -> Tensor:
    return world.roles["discriminator"].module({"inputs": x})  # type: ignore[no-any-return]


def test_the_gan_term_reaches_the_student_through_the_noised_sample() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        world = run("dmd2", steps=1, gan={"weight": 0.5, "feature_layers": ("inputs",)})
    matched, judged = world.of("fake")
    x0, _, _ = world.sample()
    T, _ = guided(world.of("teacher")[0])
    k = 1 / per_sample((x0 - T).abs())
    match = -(k * (T - x0_of("fake", matched))).mean()
    x = judged.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(softplus(-logits_at(world, x)).mean(), x)
    gan = 0.5 * ((1 - judged.t[:, None]) * slope).sum()
    assert gan.abs() > 1e-3
    assert world.gradient == pytest.approx((match + gan).item(), rel=1e-4)


def test_the_discriminator_learns_real_from_generated() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        world = run("dmd2", "fake", steps=1, gan={"critic_weight": 0.5, "feature_layers": ("inputs",)})
    judged = world.of("fake")[1:]
    generated, real = sorted(judged, key=lambda call: call.x.mean().item())
    assert real.x.mean() > generated.x.mean() + 1
    expected = softplus(logits_at(world, generated.x)).mean() + softplus(-logits_at(world, real.x)).mean()
    assert world.metrics["loss/discriminator"] == pytest.approx(0.5 * expected.item(), rel=1e-4)
