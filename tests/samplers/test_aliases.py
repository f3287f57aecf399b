"""Names of ComfyUI, k-diffusion and diffusers: the same rule, or a refusal with the nearest one."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from worlds import NOISE, VP, by_log_snr, mixture

import fewstep
from fewstep.core import registry
from fewstep.core.errors import UserError
from fewstep.models.model_config import ModelConfig
from fewstep.samplers.aliases import ALIASES, NEAREST
from fewstep.samplers.plan import steps_within
from fewstep.samplers.solvers import SOLVERS, FitRequest, Solver, describe_solvers, find_solver

REQUEST = FitRequest(Path(), 3)


def x0(x: Tensor, t: float) -> Tensor:
    return mixture()(x, t).x0


def test_every_alias_names_a_solver_and_is_listed_with_it() -> None:
    listed = {row[0]: row[-1].split(", ") for row in describe_solvers()}
    for alias, name in ALIASES.items():
        assert find_solver(alias, REQUEST) is SOLVERS[name]
        assert alias in listed[name]
    assert set(NEAREST.values()) <= set(SOLVERS)
    assert not (set(ALIASES) | set(NEAREST)) & set(SOLVERS)
    assert not set(ALIASES) & set(NEAREST)


@pytest.mark.parametrize("name", list(NEAREST))
def test_a_rule_that_is_not_provided_is_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(UserError, match=f"The rule '{name}' is not provided; the nearest is '{NEAREST[name]}'"):
        find_solver(name, REQUEST)


def test_an_unknown_name_is_refused_with_the_nearest_name_or_alias() -> None:
    with pytest.raises(UserError, match="did you mean 'euler_ancestral'"):
        find_solver("euler_ancestrall", REQUEST)
    with pytest.raises(UserError, match="did you mean 'unipc_2'"):
        find_solver("unipc2", REQUEST)


def test_budgets_accept_aliases_and_an_own_solver_precedes_an_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(backbone={"name": "unet"}, shape=(2,))
    assert steps_within("dpm_2", 7, False, config) == steps_within("dpm_solver_2", 7, False, config) == 4
    monkeypatch.setattr(registry, "_registered", {})
    own = Solver(SOLVERS["heun"].run, 2, 2, "own")
    fewstep.register("solver", "lcm")(own)
    assert find_solver("lcm", REQUEST) is own


def sigmas(times: list[float]) -> list[float]:
    return [node.sigma / node.alpha for node in mixture().nodes(times)]


def test_dpm_2_steps_from_the_geometric_mean_of_the_noise_levels() -> None:
    """k-diffusion, in y = x / alpha: d at sigma_mid = sqrt(sigma sigma_next), then y + d (sigma_next - sigma)."""
    times = by_log_snr(VP, 4)
    levels, alphas = sigmas(times), [node.alpha for node in mixture().nodes(times)]
    y = NOISE / alphas[0]
    for (t, _), (a, b), alpha in zip(pairwise(times), pairwise(levels), alphas, strict=False):
        middle = math.sqrt(a * b)
        inner = mixture().nodes(VP.time_of_log_snr(torch.tensor([-math.log(middle)], dtype=torch.float64)).tolist())[0]
        slope = (y - x0(alpha * y, t)) / a
        y2 = y + slope * (middle - a)
        y = y + (y2 - x0(inner.alpha * y2, inner.t)) / middle * (b - a)
    got = find_solver("dpm_2", REQUEST)(mixture(), NOISE, times, lambda: NOISE)
    torch.testing.assert_close(got, alphas[-1] * y)


def test_euler_ancestral_goes_below_the_next_noise_level_and_back() -> None:
    """k-diffusion: up^2 = next^2 (sigma^2 - next^2) / sigma^2, down^2 = next^2 - up^2."""
    times = by_log_snr(VP, 4)
    levels, alphas = sigmas(times), [node.alpha for node in mixture().nodes(times)]
    y = NOISE / alphas[0]
    for t, (a, b), alpha in zip(times, pairwise(levels), alphas, strict=False):
        up = math.sqrt(b**2 * (a**2 - b**2) / a**2)
        y = y + (y - x0(alpha * y, t)) / a * (math.sqrt(b**2 - up**2) - a) + up * NOISE
    got = find_solver("euler_ancestral", REQUEST)(mixture(), NOISE, times, lambda: NOISE)
    torch.testing.assert_close(got, alphas[-1] * y)


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_2m_sde_heun"])
def test_dpmpp_2m_sde_takes_k_diffusions_weights(name: str) -> None:
    times = by_log_snr(VP, 5)
    nodes, predict = mixture().nodes(times), mixture()
    x, old = NOISE, None
    for i, (s, t) in enumerate(pairwise(nodes)):
        h, m = t.log_snr - s.log_snr, predict(x, s.t).x0
        x = t.sigma / s.sigma * math.exp(-h) * x - t.alpha * math.expm1(-2 * h) * m
        if old is not None and i < 4:  # the last step of a short run is of first order here
            difference = (m - old) * h / (s.log_snr - nodes[i - 1].log_snr)
            heun = math.expm1(-2 * h) / (2 * h) + 1
            x = x + t.alpha * difference * (heun if name.endswith("heun") else -0.5 * math.expm1(-2 * h))
        x, old = x + t.sigma * math.sqrt(-math.expm1(-2 * h)) * NOISE, m
    torch.testing.assert_close(find_solver(name, REQUEST)(mixture(), NOISE, times, lambda: NOISE), x)
