"""The fake's update with conditions, computed again from the evaluations that it makes, and the times of both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from guided_worlds import B, World, per_sample, run, x0_of
from torch import Tensor


def level_of(t_student: Tensor) -> Tensor:
    """The end of the segment of a four-step grid."""
    return t_student - 0.25


def expected_fake(world: World, level: Tensor, weigh: Callable[[Tensor, Tensor], Tensor]) -> float:
    """mean(weight |F - x0*|^2) with x0* = x_s / alpha_s - k n, k = alpha_t s^2 / (alpha_s^2 std); ``weigh(t, std)``."""
    (fake,) = world.of("fake")
    assert (fake.condition["labels"] == 0).all()
    x0, noise, _ = world.sample()
    x_s, t = (1 - level) * x0 + level * noise, fake.t[:, None]
    scale = (1 - t) / (1 - level)
    std = (t.square() - scale.square() * level.square()).sqrt()
    n = (fake.x - scale * x_s) / std
    target = x_s / (1 - level) - (1 - t) * level.square() / ((1 - level).square() * std) * n
    return (weigh(t, std) * (x0_of("fake", fake) - target).square()).mean().item()


@pytest.mark.parametrize("name", ["dmd", "dmd2", "decoupled_dmd", "f_distill", "cdm"])
def test_the_fake_of_a_clean_sample_is_a_plain_regression(name: str) -> None:
    world = run(name, "fake", **({"regression": 0.0} if name == "dmd" else {}))
    (fake,) = world.of("fake")
    x0, _, _ = world.sample()
    expected = (x0_of("fake", fake) - x0).square().mean().item()
    assert world.metrics["loss/critic"] == pytest.approx(expected, rel=1e-4)
    assert not world.of("teacher")


def test_the_bridge_critic_of_tdm_is_weighted_by_the_bridges_variance() -> None:
    world = run("tdm", "fake")
    _, _, t_student = world.sample()
    expected = expected_fake(world, level_of(t_student), lambda t, std: (std / t).square())
    assert world.metrics["loss/critic"] == pytest.approx(expected, rel=1e-3)


def test_the_importance_critic_of_tdm_has_the_ratio_and_the_capped_snr() -> None:
    world = run("tdm", "fake", critic="importance")
    (fake,) = world.of("fake")
    x0, noise, t_student = world.sample()
    level, t = level_of(t_student), fake.t[:, None]
    scale = (1 - t) / (1 - level)
    std = (t.square() - scale.square() * level.square()).sqrt()
    n = (fake.x - scale * ((1 - level) * x0 + level * noise)) / std
    m = (fake.x - (1 - t) * x0) / t
    ratio = std / t * (per_sample(n.square() - m.square()) / 2).exp()
    snr = ((1 - t) / t).square()
    assert snr.max() > 5
    assert snr.min() < 1
    expected = (ratio * snr.clamp(max=5) * (x0_of("fake", fake) - x0).square()).mean().item()
    assert world.metrics["loss/critic"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("clamp", [2.0, 10.0])
def test_the_critic_of_phased_dmd_is_clamped(clamp: float) -> None:
    world = run("phased_dmd", "fake", phase=1, clamp=clamp)
    level = torch.full((B, 1), 0.5, dtype=torch.float64)
    expected = expected_fake(world, level, lambda t, std: (clamp * std.square()).clamp(max=1))
    assert world.metrics["loss/critic"] == pytest.approx(expected, rel=1e-3)


# --- times and experts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "student", "fake"),
    [
        ("dmd", {"regression": 0.0}, (0.02, 0.98), (0.0, 1.0)),
        ("dmd2", {}, (0.02, 0.98), (0.0, 1.0)),
        ("decoupled_dmd", {}, (0.02, 0.98), (0.0, 1.0)),
        ("f_distill", {}, (0.02, 0.98), (0.0, 1.0)),
        ("cdm", {"max_steps": 2}, (0.02, 0.98), (0.02, 0.98)),
        ("phased_dmd", {"phase": 1}, (0.5, 1.0), (0.5, 1.0)),
        ("phased_dmd", {"phase": 2}, (0.0, 1.0), (0.0, 1.0)),
    ],
)
def test_the_default_times_fill_their_range_uniformly(
    name: str, settings: dict[str, object], student: tuple[float, float], fake: tuple[float, float]
) -> None:
    for update, (low, high) in (("student", student), ("fake", fake)):
        t = torch.cat([run(name, update, step, **settings).of("fake")[0].t for step in range(8)])
        assert t.min() >= low
        assert t.max() <= high
        for share in (0.1, 0.25, 0.5, 0.75, 0.9):
            assert (t < low + share * (high - low)).double().mean().item() == pytest.approx(share, abs=0.08)


@pytest.mark.parametrize("within", ["segment", "nested"])
@pytest.mark.parametrize("update", ["student", "fake"])
def test_student_and_fake_of_tdm_have_the_times_of_the_same_ranges(within: str, update: str) -> None:
    world = run("tdm", update, renoise_times=within)
    _, _, t_student = world.sample()
    t = world.of("fake")[0].t
    assert (t > level_of(t_student)[:, 0]).all()
    assert (t < t_student[:, 0]).all() == (within == "segment")


def test_each_step_of_a_phased_trajectory_is_taken_by_its_expert() -> None:
    """In the second of two phases the frozen expert takes the steps from 1 and .75, the student those from .5, .25."""
    seen = {"expert1": set(), "student": set()}  # type: dict[str, set[float]]
    for step in range(6):
        world = run("phased_dmd", "fake", step, phase=2)
        for role, times in seen.items():
            times |= {t for call in world.of(role) for t in call.t.tolist()}
        order = [call.t.max().item() for call in world.calls if call.role in seen]
        assert order == sorted(order, reverse=True)
        assert not world.of("teacher")
    assert seen == {"expert1": {1.0, 0.75}, "student": {0.5, 0.25}}
