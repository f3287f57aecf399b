"""Renoising, normalisers and the surrogate losses."""

from __future__ import annotations

import pytest
import torch
from worlds import FLOW

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.matching import huber_surrogate_loss, l1_weight, renoise, surrogate_loss
from fewstep.distill.update import StudentSample
from fewstep.models.condition import Condition

GENERATOR = torch.Generator().manual_seed(0)
X, D, W = torch.randn(3, 4, 5, generator=GENERATOR, dtype=torch.float64)


def test_the_surrogate_loss_has_the_stated_gradient_and_value() -> None:
    x = X.clone().requires_grad_()
    loss = surrogate_loss(x, D, W)
    loss.backward()
    assert torch.allclose(x.grad, -W * D / x.numel())
    assert loss.item() == pytest.approx(0.5 * (W * D).square().mean().item())


def test_the_huber_surrogate_is_zero_without_a_direction_and_its_gradient_is_bounded_by_the_weight() -> None:
    x = X.clone().requires_grad_()
    huber_surrogate_loss(x, torch.zeros_like(x)).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    x.grad = None
    c = 1e-3
    huber_surrogate_loss(x, D, 2.0, c).backward()
    assert torch.allclose(x.grad, -2.0 * D / torch.sqrt(D**2 + c**2) / x.numel())
    assert x.grad.abs().max() <= 2.0 / x.numel()


def test_the_huber_surrogate_is_the_sign_for_a_small_constant_and_the_square_for_a_large_one() -> None:
    """Its gradient is -w d / sqrt(d^2 + c^2) / numel: -w sign(d) / numel as c -> 0, -w d / c / numel as c -> oo."""
    direction = torch.tensor([[0.5, -2.0, 1e-3, 0.0]])
    for c, limit in ((1e-8, direction.sign()), (1e4, direction / 1e4)):
        x = torch.zeros(1, 4, requires_grad=True)
        huber_surrogate_loss(x, direction, 3.0, c).backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, -3.0 * limit / 4, rtol=1e-5, atol=1e-12)


def test_the_l1_weight_is_per_sample_and_scale_free() -> None:
    x, reference = torch.randn(2, 3, 4, generator=GENERATOR)
    weight = l1_weight(x, reference)
    assert weight.shape == (3, 1)
    direction = x - reference
    assert torch.allclose(l1_weight(7 * x, 7 * reference) * 7 * direction, weight * direction, rtol=1e-5)
    changed = x.clone()
    changed[0] *= 100
    assert torch.equal(l1_weight(changed, reference)[1:], weight[1:])


def test_the_l1_weight_has_a_floor_and_carries_no_gradient() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    weight = l1_weight(x, torch.ones(2, 3), floor=0.1)
    assert torch.equal(weight, torch.full((2, 1), 10.0))
    assert not weight.requires_grad


def test_renoising_from_any_level_gives_the_marginal_of_a_clean_sample() -> None:
    """Samples of N(m, S^2) at level s, re-noised to t, have mean (1-t) m and variance (1-t)^2 S^2 + t^2."""
    n, m, std, s, t = 200_000, 1.5, 0.5, 0.3, 0.8
    z = torch.randn(2, n, 1, generator=torch.Generator().manual_seed(1))
    x_s = (1 - s) * (m + std * z[0]) + s * z[1]
    levels, times = torch.full((n,), s, dtype=torch.float64), torch.full((n,), t, dtype=torch.float64)
    x_t, _ = renoise(FLOW, StudentSample(x_s, levels, x_s, times, Condition()), times, KeyedRandom(0, 0, "test", 0))
    assert x_t.mean().item() == pytest.approx((1 - t) * m, abs=0.01)
    assert x_t.var().item() == pytest.approx((1 - t) ** 2 * std**2 + t**2, rel=0.01)


def test_by_default_directions_have_weight_one_and_the_huber_constant_of_the_paper() -> None:
    assert torch.equal(surrogate_loss(X, D), surrogate_loss(X, D, 1.0))
    assert torch.equal(huber_surrogate_loss(X, D), huber_surrogate_loss(X, D, 1.0, 1e-3))
