"""CMMD in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from random_sets import normal

from fewstep.eval.metrics.cmmd import cmmd, cmmd_and_error


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


def test_the_error_by_hand() -> None:
    """Real images at e1, and one of four images there and three at e2; k = 1 or ``q = exp(-2 / 200)``: the mean kernels
    to the images are (1 + 3q)/4 and (3 + q)/4, to the real ones 1 and q: they differ by ``-v, v, v, v``, whose standard
    deviation is v.
    """
    e1, e2 = torch.eye(2)
    error = cmmd_and_error(torch.stack([e1, e1]), torch.stack([e1, e2, e2, e2]))[1]
    q = math.exp(-2 / 200)
    v = 3 * (1 - q) / 4
    assert error == pytest.approx(1000 * 2 * v / 4**0.5, rel=1e-6)
