"""DMD: the regression on pairs of the teacher's noise and samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from worlds import FLOW, Affine, build_objective, gaussian, tiny_config, tiny_teacher, trained

import fewstep
from fewstep.api.data import make_ode_pairs
from fewstep.core.errors import UserError
from fewstep.core.files import write_tensors
from fewstep.distill.config_files import parse_config
from fewstep.distill.data.sources import Stored
from fewstep.distill.data.stored_files import read_stored
from fewstep.distill.loop import Loop
from fewstep.distill.roles import Role, Roles
from fewstep.models.condition import LabelRows
from fewstep.models.denoiser import Denoiser
from fewstep.models.loading import load_model
from fewstep.samplers.heun import heun
from fewstep.samplers.predictor import Predictor


def test_a_pair_is_noise_and_the_end_of_its_ode(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    sampling = fewstep.SamplingConfig("heun", 3, guidance=2.0)
    make_ode_pairs(teacher, tmp_path / "pairs.safetensors", n=25, sampling=sampling, device="cpu")
    pairs = read_stored(tmp_path / "pairs.safetensors", 10)
    condition = pairs.conditions(torch.arange(25))
    assert condition["labels"].tolist() == [k % 10 for k in range(25)]
    predict = Predictor(load_model(teacher).denoiser, condition, fewstep.Guidance(2.0))
    with torch.no_grad():
        torch.testing.assert_close(
            heun(predict, pairs.tensors["noise"], (1.0, 2 / 3, 1 / 3, 0.0)), pairs.tensors["x0"], atol=1e-5, rtol=1e-5
        )


def test_the_regression_is_the_mean_square_on_the_pairs() -> None:
    """At the teacher's distribution the matching vanishes; the gradient of mu is 2 regression mean(mu + rho z - y)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100, 4, generator=generator)
    pairs = Stored({"noise": noise, "x0": 2 + noise}, LabelRows(torch.zeros(100, dtype=torch.long), 1))
    student = trained(Denoiser(Affine(1.0, 0.8), FLOW, "x0"))
    roles = Roles({"teacher": Role(gaussian(1.0, 0.8, 4)), "student": student, "fake": Role(gaussian(1.0, 0.8, 4))})
    objective = build_objective("dmd", roles, guidance=1.0, regression=0.5)
    metrics = Loop(roles, objective, {"data": pairs}, 5000).update(objective.updates[0], 0, {0: {}})
    affine = roles.denoiser("student").backbone
    assert metrics["loss/match"].item() == pytest.approx(0, abs=1e-9)
    expected = (1 - 2 + (0.8 - 1) * noise.mean()).item()  # 2 * 0.5 * mean
    assert affine.mu.grad.item() == pytest.approx(expected, abs=0.02)  # type: ignore[union-attr, operator]


def test_without_pairs_the_regression_is_refused_with_a_hint_how_to_create_them(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path)
    raw["stages"][0]["objective"] = {"name": "dmd"}  # type: ignore[index]
    with pytest.raises(UserError, match="fewstep data ode-pairs creates one"):
        fewstep.train(parse_config(raw, "test"))


def test_a_file_without_samples_is_refused(tmp_path: Path) -> None:
    write_tensors({"noise": torch.zeros(3, 1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="must contain labels and samples"):
        read_stored(tmp_path / "x.safetensors", 10)
    with pytest.raises(UserError, match=r"none.safetensors was not found\. fewstep data ode-pairs"):
        read_stored(tmp_path / "none.safetensors", 10)
