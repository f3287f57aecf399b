"""TDM: the times of its segments; TDM-unify, one student that is conditioned on its number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import Points, build_objective, gaussian, mlp_roles, tiny_config, tiny_teacher

import fewstep
from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill import matching
from fewstep.distill.config_files import parse_config
from fewstep.distill.loop import Loop
from fewstep.distill.objectives.tdm import TDM
from fewstep.distill.update import StudentSample
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, GuidanceStyle
from fewstep.models.loading import load_model
from fewstep.models.model_config import FewStep
from fewstep.models.schedules import NoiseSchedule
from fewstep.models.unet import UNet
from fewstep.samplers.grids import time_uniform


def unified(folder: Path) -> dict[str, Any]:
    raw: dict[str, Any] = tiny_config(folder)
    raw["stages"][0] |= {"steps": 6, "objective": {"name": "tdm", "steps": 4, "unify": [1, 2, 4]}}
    for role in raw["stages"][0]["roles"].values():
        role["init"] = "new"
    return raw


def sample(run: Path, steps: int) -> Tensor:
    return fewstep.sample(run, n=10, sampling=fewstep.SamplingConfig(steps=steps), device="cpu")


def test_a_network_conditioned_on_the_count_starts_equal_to_the_unconditioned_one(tmp_path: Path) -> None:
    teacher = load_model(tiny_teacher(tmp_path)).denoiser
    assert isinstance(teacher.backbone, UNet)
    conditioned = teacher.backbone.with_step_counts(4)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    condition = Condition.of_labels(torch.tensor([0, 3, 9]), 10)
    with torch.no_grad():
        plain = teacher.backbone(x, t, condition)
        for steps in (1, 4):
            assert torch.equal(conditioned(x, t, condition.replace(steps=torch.full((3,), steps))), plain)


def test_one_student_supports_its_counts_and_no_others(tmp_path: Path) -> None:
    run = fewstep.train(parse_config(unified(tmp_path), "test"))
    model = load_model(run / "student")
    assert model.config.few_step is not None
    assert model.config.few_step.counts == (1, 2, 4)
    assert isinstance(model.denoiser.backbone, UNet)
    assert model.denoiser.backbone.steps is not None
    vectors = model.denoiser.backbone.steps.weight
    assert all(vectors[k].abs().sum() > 0 for k in (1, 2, 4)), "every count was sampled and trained"
    assert vectors[3].abs().sum() == 0
    images = [sample(run, steps) for steps in (1, 2, 4)]
    assert not torch.equal(images[0], images[1])
    with pytest.raises(UserError, match="supports 1, 2, 4, got 3"):
        sample(run, 3)


def test_unify_needs_its_own_networks(tmp_path: Path) -> None:
    raw = unified(tmp_path)
    raw["stages"][0]["roles"]["fake"]["init"] = "teacher"
    with pytest.raises(UserError, match=r"stages\.0\.roles\.fake\.init = 'teacher'.*use init: new"):
        fewstep.train(parse_config(raw, "test"))
    raw["stages"][0]["objective"]["unify"] = [1, 2]
    with pytest.raises(UserError, match="must contain steps=4"):
        parse_config(raw, "test")


# --- times ------------------------------------------------------------------------------------------------------------


def renoised(monkeypatch: pytest.MonkeyPatch, **settings: object) -> tuple[dict[str, list[Tensor]], Loop]:
    """(level, t, t_student) of all re-noised samples, by update, in 30 steps; and the loop."""
    seen: dict[str, list[Tensor]] = {"student": [], "fake": []}
    original = matching.renoise

    def record(schedule: NoiseSchedule, sample: StudentSample, t: Tensor, random: KeyedRandom) -> tuple[Tensor, Tensor]:
        seen[random.key[2]].append(torch.stack([sample.level, t, sample.t_student], 1))
        return original(schedule, sample, t, random)

    monkeypatch.setattr(matching, "renoise", record)
    roles = mlp_roles()
    loop = Loop(roles, build_objective("tdm", roles, **settings), {"data": Points(2)}, batch=16, clip=1.0)
    for step in range(30):
        loop.step(step)
        assert not loop.lost
    return seen, loop


@pytest.mark.parametrize(("steps", "factor"), [(4, 1.0), (4, 17.0), (16, 5.0)])
@pytest.mark.parametrize("within", ["segment", "nested"])
def test_no_update_is_lost_and_every_time_lies_in_its_range(
    steps: int, factor: float, within: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With shift 17 the first of four segments is .019 wide, less than twice the margin of .02."""
    seen, loop = renoised(monkeypatch, steps=steps, shift=factor, renoise_times=within)
    for update, rows in seen.items():
        level, t, t_student = torch.cat(rows).unbind(1)
        top = t_student if within == "segment" else torch.ones_like(t)
        margin = ((top - level) / 4).clamp(max=0.02)
        assert (t >= level + margin).all(), update
        assert (t <= top - margin).all(), update
        assert (t > t_student).any() == (within == "nested")
        assert set(t_student.tolist()) <= set(time_uniform(steps, factor)[:-1]), "the times of the shifted sampler"
    assert loop.roles["student"].updates == loop.roles["fake"].updates == 30
    few_step = FewStep(times=time_uniform(steps, factor)[:-1], rule="deterministic", shift=factor)
    assert loop.objective.few_step == few_step


def test_the_critic_is_updated_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    _, loop = renoised(monkeypatch, critic_updates=3)
    assert (loop.roles["student"].updates, loop.roles["fake"].updates) == (10, 30)


def test_the_networks_of_unify_keep_the_teachers_kind_and_guidance_style(tmp_path: Path) -> None:
    plain = load_model(tiny_teacher(tmp_path)).denoiser
    teacher = Denoiser(plain.backbone, plain.schedule, "noise", style=GuidanceStyle(True, None))
    networks = TDM(steps=4, unify=(2, 4)).networks(teacher, (1, 8, 8), Condition())
    assert set(networks) == {"student", "fake"}
    for network in networks.values():
        assert isinstance(network, Denoiser)
        assert (network.kind, network.schedule, network.style) == ("noise", teacher.schedule, teacher.style)
    with pytest.raises(UserError, match="A MixtureBackbone cannot be conditioned on a step count"):
        TDM(steps=4, unify=(2, 4)).networks(gaussian(0.0, 1.0, 2), (2,), Condition())


def test_the_critic_can_have_its_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    nested = {"within": "nested", "shift": 3.0, "low": 0.3}
    seen, _ = renoised(monkeypatch, steps=4, renoise_times="segment", critic_times=nested)
    student, fake = (torch.cat(seen[update]) for update in ("student", "fake"))
    assert (student[:, 1] <= student[:, 2]).all()
    assert (fake[:, 1] > fake[:, 2]).any()
    assert fake[:, 1].min() >= 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 8, "shift": 400.0}, r"steps=8 with shift=400 has the segment .*, shorter than 0.001"),
        ({"renoise_times": {"high": 0.7}}, r"segment 0.75 to 1, in which the law .*on 0 to 0.7\) has none"),
        ({"critic_times": {"kind": "grid", "steps": 2}}, "segment 0.75 to 1, in which the law"),
        ({"steps": 2, "unify": [2, 100], "shift": 20.0}, r"steps=100 with shift=20 has the segment"),
    ],
)
def test_a_grid_that_cannot_be_trained_is_refused_at_load(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    raw = tiny_config(tmp_path)
    raw["stages"][0]["objective"] = {"name": "tdm", **settings}  # type: ignore[index]
    with pytest.raises(UserError, match=message):
        parse_config(raw, "test")
