"""Behaviour on mixtures that follows from the methods' mathematics; what was only observed is in docs/methods.md."""

from __future__ import annotations

import pytest
from mixtures import lesser_mode


@pytest.mark.parametrize("learned", [False, True], ids=["exact", "learned"])
@pytest.mark.parametrize("divergence", ["jensen_shannon", "squared_hellinger", "forward_kl", "jeffreys"])
def test_an_increasing_weight_finds_the_mode_that_the_student_does_not_cover(divergence: str, learned: bool) -> None:
    assert lesser_mode(divergence, learned) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("learned", [False, True], ids=["exact", "learned"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "softened_reverse_kl", "neyman"])
def test_a_constant_or_decreasing_weight_stays_in_one_mode(divergence: str, learned: bool) -> None:
    assert lesser_mode(divergence, learned) < 0.05
