"""Diagnostics: the critic's slope in closed form, and sickness provoked on purpose and recognised by its name."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from fewstep.distill.run import numbers
from mixtures import CLASSES, guided_ring, pretrained_guided
from worlds import FLOW, Affine, Points, gaussian, trained

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.config import HealthConfig
from fewstep.distill.data.sources import Labels
from fewstep.distill.health import Probe, Profile, diagnose
from fewstep.distill.loop import Loop
from fewstep.distill.objectives import dmd2, tdm
from fewstep.distill.roles import Role, Roles
from fewstep.distill.stage import RoleConfig, make_role
from fewstep.models.denoiser import Denoiser
from fewstep.models.model_config import ModelConfig


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, -0.5])
def test_the_slope_says_how_far_the_fake_has_followed(share: float) -> None:
    """Teacher N(0, 1), student N(2, 1): a fake whose mean has gone a share q of the way has slope 1 / q."""
    roles = Roles(
        {
            "teacher": Role(gaussian(0.0, 1.0, 16)),
            "student": trained(Denoiser(Affine(2.0, 1.0), FLOW, "x0")),
            "fake": Role(gaussian(2.0 * share, 1.0, 16)),
        }
    )
    for module, settings in ((dmd2, {"steps": 1}), (tdm, {"steps": 1, "margin": 0.05})):
        objective = module.build(module.Config(guidance=1.0, critic_updates=1, **settings), roles)
        loop = Loop(roles, objective, {"data": Points(16)}, 20_000)
        metrics = loop.update(objective.updates[0], 0, {0: {}})
        assert metrics["health/critic_slope"].item() == pytest.approx(1 / share, rel=0.02)


def test_a_gap_is_noted_for_each_range_of_times() -> None:
    """A note is a ratio of sums, so that a range that no sample of a shard fell into weighs nothing."""
    roles = Roles(
        {
            "teacher": Role(gaussian(0.0, 1.0, 4)),
            "student": trained(Denoiser(Affine(2.0, 1.0), FLOW, "x0")),
            "fake": Role(gaussian(1.0, 1.0, 4)),
        }
    )
    config = dmd2.Config(steps=1, guidance=1.0, critic_updates=1, t_range=(0.3, 0.7))
    objective = dmd2.build(config, roles)
    metrics = Loop(roles, objective, {"data": Points(4)}, 64).update(objective.updates[0], 0, {0: {}})
    logged = numbers(metrics)
    inside = {name for name in logged if name.startswith("health/gap at")}
    assert inside == {"health/gap at t 0.25 to 0.5", "health/gap at t 0.5 to 0.75"}


def test_profiles_compare_mean_deviation_and_seeds() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(50, 40, 3, generator=generator)
    centers = torch.randn(1, 40, 3, generator=generator)
    other = Profile.of(2 * teacher + 1).against(Profile.of(teacher))
    assert other["health/mean_drift"] == pytest.approx(1.0, abs=0.05)
    assert other["health/sd_ratio"] == pytest.approx(2.0, abs=0.01)
    assert other["health/diversity_ratio"] == pytest.approx(2.0, rel=1e-5)
    same_for_all_seeds = Profile.of(centers.expand(50, -1, -1)).against(Profile.of(teacher))
    assert same_for_all_seeds["health/diversity_ratio"] == pytest.approx(0.0, abs=1e-6)


def names(
    module: types.ModuleType, *, student_rate: float, fake_rate: float, steps: int = 400, **settings: Any
) -> set[str]:
    """What is found after training on the ring of two classes, recorded as a run records it."""
    start = pretrained_guided()
    teacher = Role(guided_ring())
    betas = (0.0, 0.999)
    roles = Roles(
        {
            "teacher": teacher,
            "student": make_role(pretrained_guided(), RoleConfig(lr=student_rate, betas=betas)),
            "fake": make_role(start, RoleConfig(lr=fake_rate, betas=betas)),
        }
    )
    objective = module.build(module.Config(steps=4, **settings), roles)
    source = Labels(CLASSES, (2,))
    loop = Loop(roles, objective, {"data": source}, 128)
    shape = ModelConfig(backbone={"name": "none"}, shape=(2,), classes=CLASSES)
    probe = Probe(
        source(KeyedRandom(0, 0, "health", 0), 8).condition, HealthConfig(seeds=16), shape, torch.device("cpu"), 128
    )
    logged: list[dict[str, float]] = []
    latest: dict[str, float] = {}
    for step in range(steps):
        latest |= numbers(loop.step(step))
        if step % 50 == 49:
            latest |= probe(
                roles.denoiser("student"), objective.few_step, roles.denoiser("teacher"), settings["guidance"]
            )
        if step % 10 == 9:
            logged.append(latest)
            latest = {}
    return {finding.name for finding in diagnose(logged)}


@pytest.mark.parametrize("module", [dmd2, tdm])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_nothing_is_found_in_a_healthy_run(module: types.ModuleType, guidance: float) -> None:
    assert names(module, student_rate=1e-3, fake_rate=3e-3, guidance=guidance, critic_updates=2) == set()


def test_a_lagging_critic_is_found() -> None:
    assert "critic" in names(tdm, student_rate=5e-3, fake_rate=1e-4, guidance=1.5, critic_updates=1)


def test_a_critic_that_does_not_learn_saturates_and_collapses_the_samples() -> None:
    found = names(dmd2, student_rate=1e-3, fake_rate=1e-12, guidance=1.5, critic_updates=1)
    assert {"critic", "contrast", "collapse", "drift"} <= found


def test_too_strong_guidance_is_found() -> None:
    assert "guidance" in names(dmd2, student_rate=1e-3, fake_rate=3e-3, guidance=20.0, critic_updates=2)


def test_a_jump_of_the_gradient_is_found() -> None:
    lines = [{"grad_norm/student": 1.0}] * 10
    assert diagnose(lines) == []
    assert [finding.name for finding in diagnose([*lines, {"grad_norm/student": 50.0}])] == ["gradient"]


@pytest.mark.parametrize(
    ("run", "found"), [("demo", set()), ("lagging", {"critic", "contrast"}), ("strong", {"guidance", "contrast"})]
)
def test_the_runs_that_the_docs_show_are_diagnosed_as_they_say(run: str, found: set[str]) -> None:
    """Real logs of the embedded teacher, read as they grew."""
    folder = Path(__file__).parents[2] / "results" / "health"
    lines = [json.loads(line) for line in (folder / f"{run}.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "validation" not in line]
    told: dict[str, str] = {}
    for n in range(1, len(logged) + 1):
        for finding in diagnose(logged[:n]):
            told.setdefault(finding.name, f"| `{run}` | {logged[n - 1]['step']} | {finding.text} |")
    assert set(told) == found
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert all(line in text for line in told.values())
