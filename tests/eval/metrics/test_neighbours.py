"""Precision, recall, density and coverage: sets whose values are known."""

from __future__ import annotations

import pytest
import torch
from random_sets import normal

from fewstep.core.errors import UserError
from fewstep.eval.metrics.density_coverage import density_coverage
from fewstep.eval.metrics.precision_recall import precision_error, precision_recall


def test_precision_and_recall_of_disjoint_clusters_are_zero() -> None:
    assert precision_recall(normal(50, 3), normal(50, 3, seed=1) + 100) == (0, 0)


def test_precision_and_recall_of_identical_sets_are_one() -> None:
    assert precision_recall(normal(50, 3), normal(50, 3)) == (1, 1)


def test_repeating_one_real_point_has_full_precision_and_no_recall() -> None:
    """The generated balls have radius 0, so they contain that point at most."""
    real = normal(50, 3)
    precision, recall = precision_recall(real, real[:1].repeat(50, 1))
    assert (precision, recall <= 1 / 50) == (1, True)


def test_a_missing_mode_costs_recall_and_an_invented_one_precision() -> None:
    near, far = normal(60, 3), normal(20, 3, seed=1) + 100
    assert precision_recall(torch.cat([near, far]), near) == (1, 60 / 80)
    assert precision_recall(near, torch.cat([near, far])) == (60 / 80, 1)


@pytest.mark.parametrize(("k", "reached"), [(1, False), (2, True)])
def test_balls_reach_to_the_kth_neighbour_other_than_the_point(k: int, reached: bool) -> None:
    """Real points 0, 1, 3: the ball around 3 reaches to 1 (k = 1) or 0 (k = 2), so up to 5 or 6: 5.5 lies between."""
    real, generated = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[5.5], [50.0], [60.0]])
    assert precision_recall(real, generated, k)[0] == (1 / 3 if reached else 0)


def test_values_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = normal(70, 3), normal(90, 3, seed=1) * 1.5
    precision, recall = precision_recall(real, generated)
    density, coverage = density_coverage(real, generated)
    monkeypatch.setattr("fewstep.eval.metrics.neighbours.BLOCK_ROWS", 7)
    assert precision_recall(real, generated) == (precision, recall)
    assert density_coverage(real, generated) == (density, coverage)
    assert 0 < precision < recall <= 1  # too wide a generator is less precise than complete


def test_a_point_at_the_radius_is_inside_for_precision_and_recall() -> None:
    """Real 0, 1, 2, 3 and generated -1, 6, 7 with k = 1, balls of radius 1: -1 touches that of 0; 0 that of -1, of
    radius 7, which reaches all."""
    real, generated = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[-1.0], [6.0], [7.0]])
    assert precision_recall(real, generated, k=1) == (1 / 3, 1)
    assert precision_recall(real, torch.tensor([[4.0], [5.0]]), k=1) == (1 / 2, 1 / 4)


def test_the_error_of_precision_is_that_of_a_share() -> None:
    """The ends of Wilson's interval are the shares p of which the observed one is a standard error away."""
    assert precision_error(0.2, 400) == pytest.approx(0.02, rel=5e-3)
    for share, n in ((0.3, 50), (0.0, 20), (1.0, 20)):
        centre = (share + 1 / (2 * n)) / (1 + 1 / n)
        for end in (centre - precision_error(share, n), centre + precision_error(share, n)):
            assert (share - end) ** 2 == pytest.approx(end * (1 - end) / n, abs=1e-12)
    assert precision_error(1.0, 20) == pytest.approx(1 / 42)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("copies", [4, 6, 20])
def test_repeated_points_lie_in_each_others_balls_whatever_the_rounding(copies: int, scale: float) -> None:
    """With more copies than neighbours all radii are 0: the closed balls of precision contain the copies, the open ones
    of density contain nothing."""
    real = (scale * (normal(50, 64) + 5)).repeat(copies, 1)
    generated = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]
    assert precision_recall(real, generated) == (1, 1)
    assert precision_recall(real, generated[:30])[0] == 1
    if copies > 5:
        assert density_coverage(real, generated) == density_coverage(real, generated[:30]) == (0, 0)


def test_distances_keep_their_digits_far_from_the_origin() -> None:
    real, generated = normal(50, 2), normal(50, 2, seed=1) * 1.5
    offset = torch.tensor([1e8, -1e8], dtype=torch.float64)
    assert precision_recall(real + offset, generated + offset) == precision_recall(real, generated)


def test_too_few_points_for_k_are_refused() -> None:
    with pytest.raises(UserError, match="k = 0"):
        precision_recall(normal(50, 2), normal(50, 2), k=0)
    with pytest.raises(UserError, match="k = 3"):
        precision_recall(normal(50, 2), normal(3, 2))
    with pytest.raises(UserError, match="k = 5"):
        density_coverage(normal(5, 2), normal(50, 2))


def test_density_and_coverage_by_hand() -> None:
    """Real points 0, 1, 3, 7 with k = 1 have balls of radius 1, 1, 2 and 4, open: 2 lies in that of 3 alone, 0.5 in
    those of 0 and 1, and 100 in none: (1 + 2) / 3, and three of four balls contain a point."""
    real, generated = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([[2.0], [0.5], [100.0]])
    assert density_coverage(real, generated, k=1) == (pytest.approx(1), 0.75)


def test_density_and_coverage_of_one_distribution_and_of_distant_sets() -> None:
    real, generated = normal(400, 2), normal(400, 2, seed=1)
    density, coverage = density_coverage(real, generated)
    assert density == pytest.approx(1, abs=0.1)
    assert coverage > 0.9
    assert density_coverage(real, generated + 50) == (0, 0)
