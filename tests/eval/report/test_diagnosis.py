"""The diagnosis of a run's log: problems that were provoked on purpose are found by name, and healthy runs pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mixtures import CLASSES, guided_ring, pretrained_guided
from worlds import build_objective

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.config import HealthConfig
from fewstep.distill.data.sources import Labels
from fewstep.distill.health import Probe
from fewstep.distill.loop import Loop
from fewstep.distill.metrics_logger import to_numbers
from fewstep.distill.roles import Role, Roles
from fewstep.distill.stage import RoleConfig, make_role
from fewstep.eval.report.diagnosis import diagnose
from fewstep.models.loading import Model
from fewstep.models.model_config import ModelConfig

ROOT = Path(__file__).parents[3]


def findings(name: str, *, student_lr: float, fake_lr: float, guidance: float, critic_updates: int) -> set[str]:
    """What is found after 400 steps of an objective on the ring of two classes, logged as in a run."""
    betas = (0.0, 0.999)
    roles = Roles(
        {
            "teacher": Role(guided_ring()),
            "student": make_role(pretrained_guided(), RoleConfig(lr=student_lr, betas=betas)),
            "fake": make_role(pretrained_guided(), RoleConfig(lr=fake_lr, betas=betas)),
        }
    )
    objective = build_objective(name, roles, steps=4, guidance=guidance, critic_updates=critic_updates)
    source = Labels(CLASSES, (2,))
    loop = Loop(roles, objective, {"data": source}, 128)
    config = ModelConfig(backbone={"name": "none"}, shape=(2,), classes=CLASSES)
    probe = Probe(source(KeyedRandom(0, 0, "health", 0), 8).condition, HealthConfig(seeds=16), config, 128)
    few_step = config.model_copy(update={"few_step": objective.few_step})
    student = Model(denoiser=roles.denoiser("student"), config=few_step)
    logged: list[dict[str, float]] = []
    latest: dict[str, Any] = {}
    for step in range(400):
        latest |= to_numbers(loop.step(step))
        if step % 50 == 49:
            latest |= probe(student, roles.denoiser("teacher"), guidance)
        if step % 10 == 9:
            logged.append(latest)
            latest = {}
    return {finding.name for finding in diagnose(logged)}


@pytest.mark.parametrize("name", ["dmd2", "tdm"])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_nothing_is_found_in_a_healthy_run(name: str, guidance: float) -> None:
    assert findings(name, student_lr=1e-3, fake_lr=3e-3, guidance=guidance, critic_updates=2) == set()


def test_a_lagging_critic_is_found() -> None:
    assert "critic" in findings("tdm", student_lr=5e-3, fake_lr=1e-4, guidance=1.5, critic_updates=1)


def test_a_critic_that_does_not_learn_saturates_and_collapses_the_samples() -> None:
    found = findings("dmd2", student_lr=1e-3, fake_lr=1e-12, guidance=1.5, critic_updates=1)
    assert {"critic", "contrast", "collapse", "drift"} <= found


def test_too_strong_guidance_is_found() -> None:
    assert "guidance" in findings("dmd2", student_lr=1e-3, fake_lr=3e-3, guidance=20.0, critic_updates=2)


def test_a_jump_of_the_gradient_is_found() -> None:
    lines = [{"grad_norm/student": 1.0}] * 10
    assert diagnose(lines) == []
    assert [finding.name for finding in diagnose([*lines, {"grad_norm/student": 50.0}])] == ["gradient"]
    assert diagnose([*[{"grad_norm/student": 0.0}] * 10, {"grad_norm/student": 1e-9}]) == []  # a loss that is 0


@pytest.mark.parametrize(
    ("run", "names"), [("demo", set()), ("lagging", {"critic", "contrast"}), ("strong", {"guidance", "contrast"})]
)
def test_the_documented_runs_are_diagnosed_as_documented(run: str, names: set[str]) -> None:
    """Logs of real runs on the bundled teacher, diagnosed while they grow."""
    lines = [json.loads(line) for line in (ROOT / "results" / "health" / f"{run}.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "validation" not in line]
    first: dict[str, str] = {}
    for n in range(1, len(logged) + 1):
        for finding in diagnose(logged[:n]):
            first.setdefault(finding.name, f"| `{run}` | {logged[n - 1]['step']} | {finding.text} |")
    assert set(first) == names
    text = (ROOT / "docs" / "health.md").read_text(encoding="utf-8")
    assert all(line in text for line in first.values())
