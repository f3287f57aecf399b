"""Trained weights are float32 whatever the type of the teacher's: small steps, averages and interpolations add up."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from worlds import Points, mlp

from fewstep.api import bench_cost
from fewstep.core.errors import UserError
from fewstep.distill.build import build_inputs
from fewstep.distill.config import Config
from fewstep.distill.config_files import parse_config
from fewstep.distill.roles import Role, Roles, blend, require_blendable
from fewstep.distill.stage import RoleConfig, roles_of_stage
from fewstep.distill.trainer import Trainer
from fewstep.models.adapters import share_network
from fewstep.models.denoiser import Denoiser

HALF = [torch.bfloat16, torch.float16]


def half(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Denoiser:
    return mlp(2, seed).to(dtype)


def constant_steps(role: Role, steps: int) -> None:
    for _ in range(steps):
        for parameter in role.parameters:
            parameter.grad = torch.ones_like(parameter)
        role.step()


@pytest.mark.parametrize("dtype", HALF)
def test_two_hundred_small_steps_move_every_weight_and_its_average(dtype: torch.dtype) -> None:
    """AdamW moves a weight by its rate, 5e-7, per step of a constant gradient; near .5 bfloat16 has steps of .002."""
    teacher = Role(half(dtype))
    role = roles_of_stage({"teacher": teacher}, {"student": RoleConfig(lr=5e-7, ema=0.9)}, {})["student"]
    constant_steps(role, 200)
    for before, after, average in zip(teacher.parameters, role.parameters, role.average.values(), strict=True):
        torch.testing.assert_close(after, before.float() - 1e-4, rtol=0, atol=1e-5)
        assert ((before.float() - average) > 5e-5).all()
    assert {p.dtype for p in teacher.parameters} == {dtype}, "the frozen teacher keeps its type"


def test_a_thousand_interpolations_by_a_thousandth_go_63_percent_of_the_way() -> None:
    rates = {"fake": RoleConfig(lr=1e-3), "student": RoleConfig(lr=1e-3, init="other")}
    roles = Roles(roles_of_stage({"teacher": Role(half(seed=1)), "other": Role(half(seed=2))}, rates, {}))
    start = [p.detach().clone() for p in roles["fake"].parameters]
    require_blendable(roles, "fake", "student")
    for _ in range(1000):
        blend(roles["fake"], roles["student"], 1e-3)
    for before, now, end in zip(start, roles["fake"].parameters, roles["student"].parameters, strict=True):
        torch.testing.assert_close(now - before, (1 - math.exp(-1)) * (end - before), rtol=2e-3, atol=1e-6)


def with_adapters() -> dict[str, Role]:
    teacher = half()
    share_network(teacher, rank=2, alpha=None, targets=["layers.0", "layers.2"])
    rate = {"lr": 5e-7}
    copies = {"student": RoleConfig(**rate), "fake": RoleConfig(**rate, full_finetune=True)}
    return roles_of_stage({"teacher": Role(teacher)}, copies, {})


def test_copies_and_adapters_on_a_half_precision_base_are_float32() -> None:
    pytest.importorskip("peft")
    roles = with_adapters()
    assert {p.dtype for name in ("student", "fake") for p in roles[name].parameters} == {torch.float32}
    base = roles["student"].module.backbone
    kept = [p for name, p in base.shared_network.named_parameters() if "lora" not in name]  # type: ignore[union-attr]
    assert {p.dtype for p in kept} == {torch.bfloat16}
    before = [p.detach().clone() for p in roles["fake"].parameters]
    constant_steps(roles["fake"], 200)
    assert all((a - b > 5e-5).all() for a, b in zip(before, roles["fake"].parameters, strict=True))


def test_interpolating_adapters_is_refused() -> None:
    """Of one adapter and one copy the tensors differ in number; of two adapters the product has twice the rank."""
    pytest.importorskip("peft")
    roles = Roles(with_adapters())
    with pytest.raises(
        UserError, match=r"these train adapters: student.*Set blend: 0, or full_finetune: true for both"
    ):
        require_blendable(roles, "fake", "student")


def config(**changes: object) -> Config:
    stage = {
        "steps": 4,
        "objective": {"name": "dmd2", "steps": 2, "guidance": 1.0, "critic_updates": 1},
        "roles": {"student": {"lr": 1e-3}, "fake": {"lr": 1e-3}},
    }
    return parse_config({"batch": 4, "health": {"every": 0}, "stages": [stage], **changes}, "test")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_networks_compute_in_the_precision_of_the_run(precision: str) -> None:
    trainer = Trainer.create(config(precision=precision), teacher=mlp(2, seed=0), data=Points(2), device="cpu")
    computed: set[torch.dtype] = set()
    student = trainer.roles.denoiser("student").backbone
    for layer in student.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda module, inputs, output: computed.add(output.dtype))
    trainer.train()
    assert computed == {getattr(torch, precision)}
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_a_half_precision_teacher_trains_float32_copies_in_half_precision() -> None:
    trainer = Trainer.create(config(precision="bfloat16"), teacher=half(), data=Points(2), device="cpu")
    before = {name: [p.detach().float().clone() for p in role.parameters] for name, role in trainer.roles.items()}
    trainer.train()
    for name in ("student", "fake"):
        moved = [(a != b).float().mean() for a, b in zip(before[name], trainer.roles[name].parameters, strict=True)]
        assert min(moved) > 0.9, name
    assert {p.dtype for p in trainer.roles["teacher"].parameters} == {torch.bfloat16}


def test_the_memory_benchmark_counts_the_float32_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bytes per weight of the teacher, four of the student's and of the fake's."""
    monkeypatch.setattr(bench_cost, "build_inputs", lambda c, device: build_inputs(c, device, half(), Points(2)))
    count = sum(p.numel() for p in half().parameters())
    assert bench_cost.memory_of(config(precision="bfloat16", device="cpu"))["parameters"] == count * (2 + 4 + 4)


def test_a_copy_of_a_quantized_network_is_refused() -> None:
    roles = {"student": {"lr": 1e-4}, "fake": {"lr": 1e-4, "full_finetune": True}}
    stage = {"steps": 2, "objective": "tdm", "roles": roles}
    raw = {"teacher": "x", "weights": "nf4", "adapters": {"rank": 2}, "stages": [stage]}
    with pytest.raises(UserError, match="nf4 cannot be trained, so no role can have full_finetune"):
        parse_config(raw, "test")
