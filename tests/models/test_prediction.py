"""Predictions: one network output, converted to x0, noise, v, velocity or score, on any schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fewstep.models.prediction import KINDS, Coefficients, Kind, Prediction
from fewstep.models.schedules import VE, NoiseSchedule, RectifiedFlow, VPCosine, VPDiscrete, VPLinear

SCHEDULES = [RectifiedFlow(), VPLinear(), VPCosine(), VPDiscrete.scaled_linear(), VPDiscrete.linear(), VE()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
number, inside, kinds = st.floats(-3, 3), st.floats(0.02, 0.98), st.sampled_from(KINDS)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def predict(schedule: NoiseSchedule, t: float | Tensor, x_t: Tensor, kind: Kind, raw: Tensor) -> Prediction:
    return Prediction(raw, kind, x_t, Coefficients.at(schedule, torch.as_tensor(t, dtype=torch.float64)))


def quantities(schedule: NoiseSchedule, t: float, x0: Tensor, noise: Tensor) -> tuple[Tensor, dict[Kind, Tensor]]:
    """``x_t`` and the five quantities, from their definitions."""
    time = tensor(t)
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    return alpha * x0 + sigma * noise, {
        "x0": x0,
        "noise": noise,
        "v": alpha * noise - sigma * x0,
        "velocity": schedule.d_alpha(time) * x0 + schedule.d_sigma(time) * noise,
        "score": -noise / sigma,
    }


@every_schedule
@given(source=kinds, t=inside, x0=number, noise=number)
def test_every_kind_is_recovered_from_every_other(
    schedule: NoiseSchedule, source: Kind, t: float, x0: float, noise: float
) -> None:
    x_t, truth = quantities(schedule, t, tensor(x0), tensor(noise))
    prediction = predict(schedule, t, x_t, source, truth[source])
    for target in KINDS:
        assert_close(prediction.view(target), truth[target], rtol=1e-9, atol=1e-9)


@every_schedule
def test_a_row_holds_the_shares_of_x0_and_noise(schedule: NoiseSchedule) -> None:
    x0, noise = tensor(0.7), tensor(-1.3)
    _, truth = quantities(schedule, 0.4, x0, noise)
    coefficients = Coefficients.at(schedule, tensor(0.4))
    for kind in KINDS:
        a, b = coefficients.row(kind)
        assert_close(a * x0 + b * noise, truth[kind])


@every_schedule
@given(source=kinds, t=inside, x_t=number, raw=number)
def test_a_conversion_and_its_inverse_return_the_output(
    schedule: NoiseSchedule, source: Kind, t: float, x_t: float, raw: float
) -> None:
    """Conversions are invertible for any output, also one that is not consistent with any data."""
    for target in KINDS:
        there = predict(schedule, t, tensor(x_t), source, tensor(raw)).view(target)
        back = predict(schedule, t, tensor(x_t), target, there).view(source)
        assert_close(back, tensor(raw), rtol=1e-9, atol=1e-9)


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
def test_x0_and_noise_combine_to_x_t(schedule: NoiseSchedule, kind: Kind) -> None:
    x_t, raw = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = predict(schedule, 0.4, x_t, kind, raw)
    assert_close(p.coefficients.alpha * p.x0 + p.coefficients.sigma * p.noise, x_t)


@pytest.mark.parametrize("kind", KINDS)
def test_the_predicted_kind_is_the_raw_output_itself(kind: Kind) -> None:
    raw = tensor(1.5)
    assert predict(RectifiedFlow(), 0.3, tensor(0.7), kind, raw).view(kind) is raw


def test_the_velocity_of_a_rectified_flow_is_noise_minus_x0() -> None:
    """The conversions of the literature: u = noise - x0, x0 = x_t - t u, noise = x_t + (1 - t) u."""
    x_t, u, t = tensor(0.3, -1.2), tensor(0.8, 0.1), 0.6
    p = predict(RectifiedFlow(), t, x_t, "velocity", u)
    assert_close(p.velocity, p.noise - p.x0)
    assert_close(p.x0, x_t - t * u)
    assert_close(p.noise, x_t + (1 - t) * u)
    assert_close(p.score, -((1 - t) * u + x_t) / t)


@every_schedule
def test_the_x0_difference_of_two_networks_is_their_scaled_score_difference(schedule: NoiseSchedule) -> None:
    """``x0_fake - x0_real = sigma^2 / alpha (score_fake - score_real)``, the identity of distribution matching."""
    x_t = tensor(0.5)
    fake, real = (predict(schedule, 0.7, x_t, "noise", tensor(noise)) for noise in (0.2, -0.9))
    c = fake.coefficients
    assert_close(fake.x0 - real.x0, c.sigma**2 / c.alpha * (fake.score - real.score))


@pytest.mark.parametrize(
    ("schedule", "t", "kind", "view", "expected"),
    [
        (RectifiedFlow(), 0, "velocity", "x0", 2.0),  # clean: x0 is x_t, whatever the output
        (RectifiedFlow(), 0, "noise", "x0", 2.0),
        (RectifiedFlow(), 1, "velocity", "noise", 2.0),  # pure noise: noise is x_t
        (RectifiedFlow(), 1, "x0", "noise", 2.0),
        (RectifiedFlow(), 1, "velocity", "x0", -3.0),  # x_t - u
        (RectifiedFlow(), 1, "x0", "velocity", -3.0),
        (RectifiedFlow(), 1, "x0", "score", -2.0),
        (VPLinear(), 0, "v", "x0", 2.0),
        (VPLinear(), 0, "v", "noise", 5.0),
        (VPCosine(), 0, "noise", "x0", 2.0),
        (VPDiscrete.scaled_linear(), 0, "noise", "x0", 2.0),
    ],
)
def test_conversions_at_the_ends_are_exact_where_they_are_defined(
    schedule: NoiseSchedule, t: float, kind: Kind, view: Kind, expected: float
) -> None:
    p = predict(schedule, t, torch.tensor([2.0]), kind, torch.tensor([5.0]))
    assert p.view(view).item() == expected


@pytest.mark.parametrize(
    ("t", "kind", "view"), [(0, "velocity", "score"), (0, "x0", "noise"), (1, "noise", "x0"), (1, "score", "velocity")]
)
def test_undefined_conversions_at_the_ends_are_not_finite(t: float, kind: Kind, view: Kind) -> None:
    p = predict(RectifiedFlow(), t, torch.tensor([2.0]), kind, torch.tensor([5.0]))
    assert not p.view(view).isfinite()


def test_coefficients_are_float64_and_images_stay_float32() -> None:
    """At 1 - t = 1e-9 a float32 time is 1: the score would lose alpha, and x0 from noise would be infinite."""
    p = predict(RectifiedFlow(), 1 - 1e-9, torch.tensor([1.0]), "noise", torch.tensor([1.0]))
    assert p.x0.dtype == torch.float32
    assert p.x0.isfinite()
    batch = predict(RectifiedFlow(), tensor(0.3, 0.8), torch.ones(2), "noise", torch.ones(2))
    assert {batch.view(kind).dtype for kind in KINDS} == {torch.float32}


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_the_conversion_to_the_same_kind_is_exactly_the_identity(t: float) -> None:
    for kind in KINDS:
        assert Coefficients.at(RectifiedFlow(), tensor(t)).convert(kind, kind) == (0, 1)


def test_conversions_are_affine_in_the_raw_output() -> None:
    """Guidance combines raw outputs; every conversion must then combine in the same way."""
    t, x_t = tensor(0.3, 0.8), tensor(1.0, -1.0)
    one, two = (predict(RectifiedFlow(), t, x_t, "velocity", raw) for raw in (tensor(0.5, 0.1), tensor(-2.0, 0.4)))
    mixed = one.with_raw(2 * one.raw - two.raw)
    for kind in KINDS:
        assert_close(mixed.view(kind), 2 * one.view(kind) - two.view(kind))


def test_split_separates_a_batched_prediction() -> None:
    """Times per sample [2B] are split with the samples; one time for all [1] is kept."""
    x_t, raw = torch.arange(4.0)[:, None], torch.arange(4.0, 8.0)[:, None]
    for t in (tensor(0.1, 0.2, 0.3, 0.4)[:, None], tensor(0.5)[:, None], tensor(0.5)[0]):
        whole = predict(RectifiedFlow(), t, x_t, "velocity", raw)
        features = {"middle": torch.arange(12.0).reshape(4, 3)}
        first, second = replace(whole, features=features).split(2)
        assert first.features.keys() == {"middle"}
        assert torch.equal(torch.cat([first.features["middle"], second.features["middle"]]), features["middle"])
        assert_close(torch.cat([first.x0, second.x0]), whole.x0)
        assert first.x_t.tolist() == [[0], [1]]
