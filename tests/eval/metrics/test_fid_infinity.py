"""The extrapolation of the Fréchet distance to infinitely many samples."""

from __future__ import annotations

import torch
from random_sets import normal

from fewstep.eval.metrics.fid_infinity import frechet_infinity
from fewstep.eval.metrics.frechet import Statistics, frechet_distance


def test_infinitely_many_samples_of_one_law_have_distance_zero() -> None:
    reference = Statistics(torch.zeros(16).double(), torch.eye(16).double(), 0)
    sets = [normal(4_000, 16, seed=seed) for seed in range(12)]
    plain = sum(frechet_distance(Statistics.of(x), reference) for x in sets) / 12
    extrapolated = sum(frechet_infinity(x, reference, smallest=1000) for x in sets) / 12
    assert abs(extrapolated) < plain / 6
