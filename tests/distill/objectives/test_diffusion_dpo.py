"""Diffusion-DPO: the first loss, the closed form for a shifted policy, the symmetry, the effect of the preference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds import FLOW, build_objective, gaussian, tiny_config, trained

import fewstep
from fewstep.core.files import write_tensors
from fewstep.distill.config_files import parse_config
from fewstep.distill.data.sources import Stored
from fewstep.distill.loop import Loop
from fewstep.distill.roles import Role, Roles
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.loading import load_model

D = 3
REFERENCE = gaussian(0.0, 1.0, D)


class Shifted(nn.Module):
    """The reference's noise prediction plus a free vector."""

    def __init__(self, shift: list[float]) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return REFERENCE(x_t, t, condition).noise.to(x_t) + self.shift


def pairs(swap: bool = False, same: bool = False) -> Stored:
    generator = torch.Generator().manual_seed(0)
    loser = torch.randn(500, D, generator=generator)
    winner = loser if same else loser + torch.tensor([0.5, -0.3, 0.0])
    tensors = {"winner": loser, "loser": winner} if swap else {"winner": winner, "loser": loser}
    return Stored(tensors, torch.zeros(500, dtype=torch.long), 1)


def update(
    shift: list[float], data: Stored, lr: float = 0.0, **settings: object
) -> tuple[dict[str, float], Tensor, Roles]:
    student = trained(Denoiser(Shifted(shift), FLOW, "noise"), lr)
    roles = Roles({"student": student, "reference": Role(REFERENCE)})
    objective = build_objective("diffusion_dpo", roles, error="noise", **settings)
    metrics = Loop(roles, objective, {"data": data}, 64).update(objective.updates[0], 0, {0: {}})
    grad = roles.denoiser("student").backbone.shift.grad
    assert isinstance(grad, Tensor)
    return {name: value.item() for name, value in metrics.items()}, grad, roles


def test_the_loss_starts_at_log_2() -> None:
    metrics, _, _ = update([0.0] * D, pairs(), beta=3.0)
    assert metrics["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_loss_of_a_shifted_policy_is_a_logistic_regression() -> None:
    """If the noise predictions differ by d, z = beta d . (r_winner - r_loser) / D for residuals r. At t = .5 the
    reference of N(0, 1) predicts noise = x_t, so r_winner - r_loser = -(winner - loser) / 2 for any noise."""
    shift, beta = [0.2, 0.1, -0.4], 5.0
    metrics, grad, _ = update(shift, pairs(), beta=beta, student_times=(0.5,))
    difference = -0.5 * torch.tensor([0.5, -0.3, 0.0])
    z = beta / D * float(torch.tensor(shift) @ difference)
    assert metrics["loss/dpo"] == pytest.approx(math.log1p(math.exp(-z)), abs=1e-5)
    torch.testing.assert_close(grad, -beta / D / (1 + math.exp(z)) * difference, atol=1e-5, rtol=1e-4)


def test_the_first_gradient_and_its_antisymmetry() -> None:
    """At the reference it is -(beta / 2 D) (r_winner - r_loser); exchanging the two changes its sign."""
    _, grad, _ = update([0.0] * D, pairs(), beta=4.0, student_times=(0.5,))
    torch.testing.assert_close(grad, 4.0 / (2 * D) * 0.5 * torch.tensor([0.5, -0.3, 0.0]), atol=1e-6, rtol=1e-5)
    _, swapped, _ = update([0.0] * D, pairs(swap=True), beta=4.0, student_times=(0.5,))
    torch.testing.assert_close(swapped, -grad, atol=1e-6, rtol=1e-5)


def test_equal_samples_have_no_effect() -> None:
    metrics, grad, _ = update([0.3, 0.0, 0.1], pairs(same=True))
    assert metrics["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize(("swap", "sign"), [(False, 1), (True, -1)])
def test_the_samples_of_the_policy_move_towards_the_winners(swap: bool, sign: int) -> None:
    """A larger x0 is a smaller noise at the same x_t: a shift must fall where the winner is larger."""
    student = trained(Denoiser(Shifted([0.0] * D), FLOW, "noise"), 0.05)
    roles = Roles({"student": student, "reference": Role(REFERENCE)})
    objective = build_objective("diffusion_dpo", roles, error="noise", beta=2.0)
    loop = Loop(roles, objective, {"data": pairs(swap)}, 64)
    for step in range(30):
        loop.step(step)
    shift = roles.denoiser("student").backbone.shift
    assert isinstance(shift, Tensor)
    assert shift[0].item() * sign < -0.1
    assert shift[1].item() * sign > 0.05


def test_a_few_step_student_that_is_tuned_in_a_second_stage_stays_few_step(tmp_path: Path) -> None:
    samples = {name: torch.randn(40, 1, 8, 8) for name in ("winner", "loser")}
    write_tensors(samples | {"labels": torch.arange(40) % 10}, tmp_path / "pairs.safetensors")
    raw: dict[str, Any] = tiny_config(tmp_path, data={"kind": "tensors", "path": str(tmp_path / "pairs.safetensors")})
    raw["stages"][0]["steps"] = 2
    raw["stages"].append(
        {
            "steps": 2,
            "objective": {"name": "diffusion_dpo", "student_times": [1.0, 0.5]},
            "freeze": {"reference": "student"},
            "roles": {"student": {"init": "student", "lr": 1e-3}},
        }
    )
    run = fewstep.train(parse_config(raw, "test"))
    few = load_model(run / "student").config.few_step
    assert few is not None
    assert few.times == (1.0, 0.5)
