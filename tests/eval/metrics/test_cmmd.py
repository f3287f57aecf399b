"""CMMD in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from random_sets import normal

from fewstep.eval.metrics.cmmd import cmmd


def test_cmmd_of_single_pairs() -> None:
    """Unit vectors of cosine c: ``2000 (1 - exp(-(1 - c) / 100))``; 7.696 for c = 0.6145, 39.6 for opposites."""
    for cosine, expected in ((0.6145, 7.696), (-1.0, 39.603), (1.0, 0.0)):
        x = torch.tensor([[1.0, 0.0]]).repeat(2, 1)
        y = torch.tensor([[cosine, math.sqrt(1 - cosine**2)]]).repeat(2, 1)
        assert cmmd(x, y) == pytest.approx(expected, abs=2e-3)


def test_cmmd_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (torch.nn.functional.normalize(normal(n, 6, seed=n), dim=1) for n in (50, 40))
    one_block = cmmd(x, y)
    monkeypatch.setattr("fewstep.eval.metrics.cmmd.BLOCK_ROWS", 7)
    assert cmmd(x, y) == pytest.approx(one_block, rel=1e-12)
