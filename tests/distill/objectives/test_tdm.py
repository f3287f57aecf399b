"""TDM-unify: one student that is conditioned on its number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import tiny_config, tiny_teacher

import fewstep
from fewstep.core.errors import UserError
from fewstep.distill.config_files import parse_config
from fewstep.models.condition import Condition
from fewstep.models.loading import load_model
from fewstep.models.unet import UNet


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
