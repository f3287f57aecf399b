"""Teachers whose network takes the guidance scale as an input (FLUX.1-dev): it acts, or the method is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from worlds import FLOW, Points, build_objective, mlp, trained

from fewstep.core.errors import UserError
from fewstep.distill.explain import evaluations_of
from fewstep.distill.loop import Loop
from fewstep.distill.roles import Role, Roles
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, GuidanceStyle


class Embedded(nn.Module):
    """The exact denoiser of N(scale, 1), for the scale that it receives."""

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        t, mean = t[:, None].to(x_t), condition["guidance"][:, None]
        return mean + (1 - t) / ((1 - t) ** 2 + t**2) * (x_t - (1 - t) * mean)


def roles() -> Roles:
    teacher = Denoiser(Embedded(), FLOW, "x0", style=GuidanceStyle(embedded=True))
    return Roles({"teacher": Role(teacher), "student": trained(mlp(2, 1)), "fake": trained(mlp(2, 2))})


@pytest.mark.parametrize("name", ["dmd", "dmd2", "tdm", "phased_dmd"])
def test_the_scale_reaches_the_network_and_changes_the_update(name: str) -> None:
    extra = {"regression": 0.0} if name == "dmd" else {}
    losses = []
    for scale in (1.0, 3.5, 8.0):
        world = roles()
        objective = build_objective(name, world, guidance=scale, critic_updates=1, **extra)
        loop = Loop(world, objective, {"data": Points(2)}, 16)
        student = next(update for update in objective.updates if update.name == "student")
        metrics: dict[str, Tensor] = {}
        calls = evaluations_of(world, lambda: metrics.update(loop.update(student, 0, {0: {}})))  # noqa: B023
        matched = [call for call in calls if call.role == "teacher"][-1]
        assert (matched.condition["guidance"] == scale).all()
        assert len(matched.x) == 16, "one evaluation, not two"
        losses.append(metrics["grad_norm/student"].item())
    assert len(set(losses)) == 3


@pytest.mark.parametrize("name", ["cdm", "decoupled_dmd"])
@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_a_method_that_needs_both_branches_is_refused_with_the_reason(name: str, scale: float) -> None:
    """The direction of guidance, T_w - T_c, would be exactly zero at every scale."""
    with pytest.raises(UserError, match=rf"{name} needs the conditional and the unconditional.*guidance-distilled"):
        build_objective(name, roles(), guidance=scale)
    with pytest.raises(UserError, match="needs only the guided prediction"):
        build_objective(name, roles(), guidance=torch.pi)
