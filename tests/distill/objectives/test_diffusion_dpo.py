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
from fewstep.core.errors import UserError
from fewstep.core.files import write_tensors
from fewstep.distill.config_files import parse_config
from fewstep.distill.data.sources import Prompts, Stored
from fewstep.distill.loop import Loop
from fewstep.distill.roles import Role, Roles
from fewstep.models.condition import Condition, LabelRows
from fewstep.models.denoiser import Denoiser, GuidanceStyle
from fewstep.models.hub.encoded import EncodedPrompts, Index
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
    return Stored(tensors, LabelRows(torch.zeros(500, dtype=torch.long), 1))


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


# ---- pairs keyed by prompt


class Directed(nn.Module):
    """The reference's noise prediction plus the embedding of the prompt [B, 1, D], mapped by a matrix; keeps what it
    saw."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)
        self.seen: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.seen.append(condition["prompt"])
        return REFERENCE(x_t, t, condition).noise.to(x_t) + condition["prompt"][:, 0] @ self.matrix.T


def prompted(folder: Path, swap: bool) -> tuple[Prompts, Tensor, Tensor]:
    """Encoded prompts with pairs whose difference depends on the prompt; their embeddings and differences [N, D]."""
    generator = torch.Generator().manual_seed(1)
    embeddings, differences = torch.randn(2, 5, D, generator=generator).unbind()
    prompt = torch.arange(40) % 5
    loser = torch.randn(40, D, generator=generator)
    winner = loser + differences[prompt]
    latents = {"winner": loser, "loser": winner} if swap else {"winner": winner, "loser": loser}
    write_tensors({"prompt": embeddings[:, None]}, folder / "shard-00000.safetensors")
    write_tensors({"prompt": torch.zeros(1, 1, D)}, folder / "null.safetensors")
    write_tensors(latents | {"prompt": prompt}, folder / "pairs-00000.safetensors")
    index = Index(pipeline="", encoders="", prompts="", count=5, rows=5, pairs=40)
    (folder / "index.json").write_text(index.model_dump_json())
    return Prompts(EncodedPrompts(folder), [(D,)]), embeddings, differences


def update_on_prompts(
    folder: Path, matrix: Tensor, swap: bool = False, beta: float = 5.0
) -> tuple[float, float, Tensor, Roles, Tensor]:
    """Loss and accuracy, the matrix's gradient, the roles, and z of each pair of the batch in closed form."""
    source, embeddings, differences = prompted(folder, swap)
    policy, reference = (Denoiser(Directed(start), FLOW, "noise") for start in (matrix, torch.zeros(D, D)))
    roles = Roles({"student": trained(policy, 0.0), "reference": Role(reference)})
    objective = build_objective("diffusion_dpo", roles, error="noise", beta=beta, student_times=(0.5,))
    metrics = Loop(roles, objective, {"data": source}, 64).update(objective.updates[0], 0, {0: {}})
    seen = policy.backbone.seen[0][:64, 0]
    number = torch.cdist(seen, embeddings).argmin(1)
    z = beta / D * ((embeddings[number] @ matrix.T) * (-0.5 * differences[number] * (-1 if swap else 1))).sum(1)
    grad = policy.backbone.matrix.grad
    assert isinstance(grad, Tensor)
    return metrics["loss/dpo"].item(), metrics["health/accuracy"].item(), grad, roles, z


@pytest.mark.parametrize("swap", [False, True])
def test_the_margin_of_each_pair_is_that_of_its_own_prompt(tmp_path: Path, swap: bool) -> None:
    """The policy differs from the reference by d = M c for the prompt's embedding c: z = beta d . (r_w - r_l) / D."""
    matrix = 0.3 * torch.randn(D, D, generator=torch.Generator().manual_seed(2))
    loss, accuracy, _, _, z = update_on_prompts(tmp_path, matrix, swap)
    assert z.unique(return_counts=True)[1].min() > 1, "every prompt should occur"
    assert loss == pytest.approx(torch.nn.functional.softplus(-z).mean().item(), abs=1e-5)
    assert accuracy == pytest.approx((z > 0).float().mean().item(), abs=1e-6)


def test_exchanging_winner_and_loser_changes_the_sign_of_the_margin(tmp_path: Path) -> None:
    matrix = 0.3 * torch.randn(D, D, generator=torch.Generator().manual_seed(2))
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
    loss, accuracy, _, _, z = update_on_prompts(tmp_path / "a", matrix)
    swapped_loss, swapped_accuracy, _, _, _ = update_on_prompts(tmp_path / "b", matrix, swap=True)
    assert swapped_loss - loss == pytest.approx(z.mean().item(), abs=1e-5)  # softplus(z) - softplus(-z) = z
    assert accuracy + swapped_accuracy == pytest.approx(1)
    _, _, grad, _, _ = update_on_prompts(tmp_path / "c", torch.zeros(D, D))
    _, _, swapped, _, _ = update_on_prompts(tmp_path / "d", torch.zeros(D, D), swap=True)
    assert grad.abs().max() > 1e-3
    torch.testing.assert_close(swapped, -grad, atol=1e-6, rtol=1e-4)


def test_both_networks_see_the_prompts_of_the_pairs_and_only_the_student_gets_a_gradient(tmp_path: Path) -> None:
    _, _, _, roles, _ = update_on_prompts(tmp_path, torch.zeros(D, D))
    student, reference = (roles.denoiser(name).backbone for name in ("student", "reference"))
    assert isinstance(student, Directed)
    assert isinstance(reference, Directed)
    [seen], [also] = student.seen, reference.seen
    assert torch.equal(seen, also)
    assert torch.equal(seen[:64], seen[64:]), "winners, then losers, with the same prompts"
    assert len(seen[:64].flatten(1).unique(dim=0)) == 5
    assert student.matrix.grad is not None
    assert reference.matrix.grad is None


def test_guidance_is_for_networks_that_take_it_as_an_input() -> None:
    roles = Roles({"student": trained(Denoiser(Shifted([0.0] * D), FLOW, "noise")), "reference": Role(REFERENCE)})
    with pytest.raises(UserError, match=r"guidance = 3\.5 is for a network that takes the scale as an input"):
        build_objective("diffusion_dpo", roles, guidance=3.5)


def test_a_network_that_takes_the_scale_as_an_input_gets_the_guidance(tmp_path: Path) -> None:
    class Scaled(Directed):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            self.seen.append(condition["guidance"])
            return REFERENCE(x_t, t, condition).noise.to(x_t) + condition["prompt"][:, 0] @ self.matrix.T

    networks = [Denoiser(Scaled(torch.zeros(D, D)), FLOW, "noise", style=GuidanceStyle(True, None)) for _ in range(2)]
    roles = Roles({"student": trained(networks[0]), "reference": Role(networks[1])})
    objective = build_objective("diffusion_dpo", roles, guidance=3.5)
    Loop(roles, objective, {"data": prompted(tmp_path, False)[0]}, 4).step(0)
    for network in networks:
        assert torch.equal(network.backbone.seen[0], torch.full((8,), 3.5))


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
