"""Phased DMD: matching at a noisy end, its fixed point, and experts that are trained, saved and routed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import FLOW, Affine, Points, build_objective, gaussian, tiny_config, trained

import fewstep
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors
from fewstep.distill.config_files import parse_config
from fewstep.distill.loop import Loop
from fewstep.distill.roles import Role, Roles
from fewstep.distill.update import LossTerm, MicroBatch, StudentSample
from fewstep.models.denoiser import Denoiser, Routed
from fewstep.models.loading import load_model
from fewstep.models.model_config import FewStep

M, S, END = 1.0, 0.8, 0.5  # the teacher, and the noise level at which phase 1 of 2 ends


def gradients(mu: float, rho: float, match_on: str, batch: int, dimensions: int = 64) -> tuple[float, float]:
    """The student's x_s is N(a mu, (a rho + s)^2), as if data of N(mu, effective^2) had been noised to s."""
    effective = math.sqrt(((1 - END) * rho + END) ** 2 - END**2) / (1 - END)
    roles = Roles(
        {
            "teacher": Role(gaussian(M, S, dimensions)),
            "student": trained(Denoiser(Affine(mu, rho), FLOW, "x0")),
            "fake": Role(gaussian(mu, effective, dimensions)),
        }
    )
    settings = {"steps": 2, "phases": 2, "guidance": 1.0, "critic_updates": 1, "match_on": match_on}
    objective = build_objective("phased_dmd", roles, **settings)
    Loop(roles, objective, {"data": Points(dimensions)}, batch).update(objective.updates[0], 0, {0: {}})
    affine = roles.denoiser("student").backbone
    return affine.mu.grad.item(), affine.rho.grad.item()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("match_on", ["x0", "x_s"])
def test_the_fixed_point_is_the_teachers_distribution_at_the_end_of_the_phase(match_on: str) -> None:
    """mu = m and (a rho + s)^2 = a^2 S^2 + s^2: the student's own x0 is narrower than the data there."""
    rho = (math.sqrt((1 - END) ** 2 * S**2 + END**2) - END) / (1 - END)
    assert rho < S
    assert gradients(M, rho, match_on, batch=64) == pytest.approx((0.0, 0.0), abs=1e-6)


def test_the_expected_gradient_at_the_noisy_end() -> None:
    """d / d mu = a_s (mu - m) E[a_ts a_t / v], v = a_t^2 S^2 + t^2, over t ~ U(s, 1): the KL of the diffused laws."""
    mu = -0.5
    t = torch.linspace(END, 1, 20_001, dtype=torch.float64)
    law = (1 - t) / (1 - END) * (1 - t) / ((1 - t) ** 2 * S**2 + t**2)
    expected = (1 - END) * (mu - M) * law.mean().item()
    assert gradients(mu, 0.5, "x_s", batch=20_000)[0] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("match_on", ["x0", "x_s"])
def test_the_student_is_trained_at_the_shifted_times_of_its_sampler(match_on: str) -> None:
    roles = Roles(
        {
            name: Role(gaussian(M, S, 2)) if name == "teacher" else trained(Denoiser(Affine(0.0, 1.0), FLOW, "x0"))
            for name in ("teacher", "student", "fake")
        }
    )
    settings = {"steps": 4, "phases": 2, "phase": 1, "shift": 3.0, "critic_updates": 1, "match_on": match_on}
    objective = build_objective("phased_dmd", roles, **settings)
    assert objective.few_step == FewStep(times=(1.0, 0.9, 0.75, 0.5), rule="deterministic", shift=3.0)
    seen: list[StudentSample] = []
    rollout = objective.rollout
    assert rollout is not None

    def record(micro: MicroBatch) -> StudentSample:
        seen.append(rollout(micro))
        return seen[-1]

    update, losses = objective.updates[0], []

    def terms(micro: MicroBatch) -> Iterator[LossTerm]:
        for term in update.terms(micro):
            losses.append(term.loss)
            yield term

    watched = replace(objective, updates=(replace(update, terms=terms),), rollout=record)
    loop = Loop(roles, watched, {"data": Points(2)}, batch=64)
    for k in range(8):
        loop.step(k)
    levels = {
        (t, level) for each in seen for t, level in zip(each.t_student.tolist(), each.level.tolist(), strict=True)
    }
    assert levels == {(1.0, 0.75), (0.9, 0.75)}
    assert {loss.dtype for loss in losses} == {torch.float32}


def phased(folder: Path, steps: int = 2) -> dict[str, Any]:
    raw: dict[str, Any] = tiny_config(folder)
    phase = {"steps": steps, "roles": {"student": {"lr": 1e-3, "ema": 0.5}, "fake": {"lr": 1e-3}}}
    objective = {"name": "phased_dmd", "critic_updates": 1}
    raw["stages"] = [
        {**phase, "objective": {**objective, "phase": 1}},
        {**phase, "objective": {**objective, "phase": 2}, "freeze": {"expert1": "student"}},
    ]
    return raw


def test_experts_are_frozen_saved_and_routed(tmp_path: Path) -> None:
    raw = phased(tmp_path)
    both = fewstep.train(parse_config(raw, "test"))
    model = load_model(both / "student")
    assert isinstance(model.denoiser.backbone, Routed)
    assert model.config.boundaries == (0.625, 0.0)  # between the steps from .75 and from .5
    alone = fewstep.train(parse_config({**raw, "stages": raw["stages"][:1], "out": str(tmp_path / "one")}, "test"))
    two, one = (read_tensors(run / "student" / "model.safetensors") for run in (both, alone))
    teacher = read_tensors(tmp_path / "teacher" / "model.safetensors")
    for name, value in teacher.items():
        assert torch.equal(two[f"experts.0.{name}"], one[f"experts.0.{name}"]), "phase 2 changed the frozen expert"
        assert torch.equal(one[f"experts.1.{name}"], value), "after phase 1 the cleaner levels are the teacher's"
    assert any(not torch.equal(two[f"experts.1.{name}"], value) for name, value in teacher.items())
    assert fewstep.sample(both, n=4, device="cpu").shape == (4, 1, 8, 8)


def test_a_phase_without_the_experts_before_it_is_refused(tmp_path: Path) -> None:
    raw = phased(tmp_path)
    raw["stages"] = raw["stages"][1:]
    raw["stages"][0]["freeze"] = {}
    with pytest.raises(UserError, match="expert1"):
        fewstep.train(parse_config(raw, "test"))


def test_steps_must_divide_into_phases(tmp_path: Path) -> None:
    raw = phased(tmp_path)
    raw["stages"][0]["objective"]["phases"] = 3
    with pytest.raises(UserError, match="must divide into phases"):
        parse_config(raw, "test")
