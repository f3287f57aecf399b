"""The extrapolation of the Fréchet distance to infinitely many samples."""

from __future__ import annotations

import pytest
import torch
from random_sets import normal
from scipy.stats import linregress

from fewstep.eval.metrics.fid_infinity import frechet_infinity
from fewstep.eval.metrics.frechet import Statistics, frechet_distance


def test_infinitely_many_samples_of_one_distribution_have_distance_zero() -> None:
    reference = Statistics(torch.zeros(16).double(), torch.eye(16).double(), 0)
    sets = [normal(4_000, 16, seed=seed) for seed in range(12)]
    plain = sum(frechet_distance(Statistics.of(x), reference) for x in sets) / 12
    extrapolated = sum(frechet_infinity(x, reference, smallest=1000)[0] for x in sets) / 12
    assert abs(extrapolated) < plain / 6


def test_the_error_of_the_fit_is_zero_on_a_line_and_grows_with_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """``a + b/n`` is fitted exactly; noise of known size gives the textbook standard error of an intercept."""
    reference = Statistics(torch.zeros(2).double(), torch.eye(2).double(), 0)
    x, module = normal(400, 2), "fewstep.eval.metrics.fid_infinity.frechet_distance"
    monkeypatch.setattr(module, lambda a, b: 3 + 50 / a.count)
    value, error = frechet_infinity(x, reference)
    assert (value, error) == (pytest.approx(3), pytest.approx(0, abs=1e-6))
    noise = iter(0.1 * normal(15))
    monkeypatch.setattr(module, lambda a, b: 3 + 50 / a.count + float(next(noise)))
    value, error = frechet_infinity(x, reference)
    counts = torch.linspace(200, 400, 15).round()
    line = linregress((1 / counts).double().numpy(), (3 + 50 / counts.double() + 0.1 * normal(15)).numpy())
    assert value == pytest.approx(line.intercept)
    assert error == pytest.approx(line.intercept_stderr)


def test_the_seed_alone_shuffles_the_features() -> None:
    reference, x = Statistics(torch.zeros(2).double(), torch.eye(2).double(), 0), normal(40, 2)
    values = [frechet_infinity(x, reference, seed=seed) for seed in (0, 0, 1)]
    # Not bit for bit: sums of a vectorised library end in other last digits where an array lies elsewhere in memory.
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert values[0] == pytest.approx(frechet_infinity(x, reference), rel=1e-9)
    assert values[2] != pytest.approx(values[0], rel=1e-3)
