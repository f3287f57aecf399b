"""LoRA adapters of several roles on one network: on a small network, then on networks of diffusers."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Iterator

import pytest
import torch
from tiny_diffusers import LORA_TARGETS, Family, stable_diffusion, wan
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.critics import critic_term
from fewstep.distill.loop import Loop
from fewstep.distill.matching import l1_weight, renoise, surrogate_loss
from fewstep.distill.roles import Role, Roles
from fewstep.distill.rollouts import backward_simulation
from fewstep.distill.stage import RoleConfig, make_role, roles_of_stage
from fewstep.distill.update import LossTerm, MicroBatch, Objective, StudentSample, Update
from fewstep.models.adapters import AdapterView, share_base
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import Guidance
from fewstep.models.schedules import RectifiedFlow

pytest.importorskip("peft")
NOTHING = Condition()


class Net(nn.Module):
    """Two linear layers, computed by ``run`` (with gradient checkpointing, or without)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 16), nn.Linear(16, 3)
        self.run = lambda function, *args: function(*args)

    def body(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.enter(x)))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.run(self.body, x_t)


def views(net: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[AdapterView, AdapterView, AdapterView]:
    """A view without an adapter and two with random ones."""
    teacher = share_base(net.to(dtype), rank=2, alpha=4, targets=["enter", "leave"])
    student, fake = teacher.fork(), teacher.fork()
    for seed, view in enumerate((student, fake)):
        randomise(view, seed)
    return teacher, student, fake


@torch.no_grad()
def randomise(view: nn.Module, seed: int, scale: float = 0.3) -> None:
    """Randomises B, so that the adapter changes the network and its A has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in view.named_parameters():
        if name.endswith("lora_B.weight"):
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def evaluate(view: nn.Module, x: Tensor) -> Tensor:
    return view(x, torch.ones(len(x), dtype=torch.float64), NOTHING)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(7))


def test_a_view_has_the_parameters_of_its_adapter_only(x):
    net = Net()
    before = evaluate(net, x)
    state = torch.get_rng_state()
    teacher = share_base(net, rank=2, alpha=4, targets=["enter", "leave"])
    student, fake = teacher.fork(), teacher.fork()
    assert torch.equal(torch.get_rng_state(), state)
    names = ["enter.lora_A.weight", "enter.lora_B.weight", "leave.lora_A.weight", "leave.lora_B.weight"]
    assert list(student.state_dict()) == list(dict(student.named_parameters())) == names
    assert list(teacher.parameters()) == []
    assert all(torch.equal(evaluate(view, x), before) for view in (teacher, student, fake, net))
    for own, other in zip(student.parameters(), fake.parameters(), strict=True):
        assert torch.equal(own, other)  # equal initial A, so that averages are meaningful
        assert own is not other
        assert own.requires_grad
    assert not [name for name, p in net.named_parameters() if p.requires_grad and "lora" not in name]


def test_switching_equals_set_adapter_and_keeps_requires_grad(x):
    from peft.tuners.tuners_utils import BaseTunerLayer

    net = Net()
    teacher, student, fake = views(net)
    ours = [evaluate(view, x) for view in (student, fake, teacher, student)]
    assert all(p.requires_grad for view in (student, fake) for p in view.parameters())
    assert torch.equal(ours[0], ours[3])
    assert not torch.equal(ours[0], ours[1])
    layers = [module for module in net.modules() if isinstance(module, BaseTunerLayer)]
    for name, expected in (("adapter0", ours[0]), ("adapter1", ours[1])):
        for layer in layers:
            layer.enable_adapters(True)
            layer.set_adapter(name)
        assert torch.equal(evaluate(net, x), expected)
    for layer in layers:
        layer.enable_adapters(False)
    assert torch.equal(evaluate(net, x), ours[2])


def test_an_evaluation_between_forward_and_backward_keeps_the_gradient(x):
    """PEFT's ``set_adapter`` would silently discard the student's gradient here."""
    teacher, student, fake = views(Net())
    loss = evaluate(student, x).square().mean()
    expected = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True)
    with torch.no_grad():
        evaluate(fake, x), evaluate(teacher, x)
    loss.backward(inputs=list(student.parameters()))
    assert all(torch.equal(p.grad, g) for p, g in zip(student.parameters(), expected, strict=True))
    assert all(p.grad is None for p in fake.parameters())


def test_checkpointing_recomputes_with_the_adapter_of_the_forward_pass(x):
    """One graph through the student's adapter, the fake's and the base (as in SiD), with an evaluation in between."""

    def gradients(run: str) -> list[Tensor]:
        torch.manual_seed(0)
        net = Net()
        teacher, student, fake = views(net)
        if run == "ours":
            net.run = student.checkpoint
        elif run == "torch":
            net.run = lambda function, *args: checkpoint(function, *args, use_reentrant=False)
        y = evaluate(student, x)
        loss = (evaluate(teacher, y) - evaluate(fake, y)).square().sum()
        with torch.no_grad():
            evaluate(fake, x)
        return list(torch.autograd.grad(loss, [*student.parameters(), *fake.parameters()]))

    for ours, plain in zip(gradients("ours"), gradients("none"), strict=True):
        torch.testing.assert_close(ours, plain, atol=0, rtol=0)
    with pytest.raises(CheckpointError):
        gradients("torch")


def test_a_deep_copy_is_a_new_adapter_on_the_same_network(x):
    net = Net()
    teacher, student, _ = views(net)
    frozen = {name: id(p) for name, p in net.named_parameters() if "lora" not in name}
    twin = copy.deepcopy(Denoiser(student, RectifiedFlow())).backbone
    beginner = copy.deepcopy(teacher)  # starts as the base and can be trained
    assert frozen == {name: id(p) for name, p in net.named_parameters() if "lora" not in name}
    assert torch.equal(evaluate(twin, x), evaluate(student, x))
    assert torch.equal(evaluate(beginner, x), evaluate(teacher, x))
    assert [p.shape for p in beginner.parameters()] == [p.shape for p in student.parameters()]
    before = evaluate(student, x)
    randomise(twin, 5)
    assert not torch.equal(evaluate(twin, x), before)
    assert torch.equal(evaluate(student, x), before)
    assert torch.equal(evaluate(beginner, x), evaluate(teacher, x))


def test_an_adapter_lives_as_long_as_its_view(x):
    net = Net()
    _, student, fake = views(net)
    before, layers = evaluate(student, x), (net.enter, net.leave)
    assert [len(layer.lora_A) for layer in layers] == [2, 2]
    del fake
    gc.collect()
    assert [len(layer.lora_A) for layer in layers] == [1, 1]
    assert torch.equal(evaluate(student, x), before)
    again = student.fork()
    assert torch.equal(evaluate(again, x), before)


def test_a_replaced_roles_adapter_is_freed():
    net = Net()
    teacher = Role(Denoiser(share_base(net, rank=2, alpha=2, targets=["enter", "leave"]), RectifiedFlow()))
    roles = {"teacher": teacher}
    for _ in range(3):
        roles = roles_of_stage(roles, {"student": RoleConfig(lr=0.1), "fake": RoleConfig(lr=0.1)}, {})
        gc.collect()
        assert len(net.enter.lora_A) == 2


def test_stages_initialise_roles_from_the_averages_of_others(x):
    net = Net()
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    teacher = Role(Denoiser(share_base(net, rank=2, alpha=2, targets=["enter", "leave"]), RectifiedFlow()))
    first = roles_of_stage({"teacher": teacher}, {"student": RoleConfig(lr=0.1, ema=0.5)}, {})
    student = first["student"]
    evaluate(student.module.backbone, x).square().sum().backward(inputs=student.parameters)
    student.step()
    second = roles_of_stage(first, {"fake": RoleConfig(init="student", lr=0.1)}, {"old": "student"})
    for name in ("fake", "old"):
        for own, average in zip(second[name].parameters, student.average.values(), strict=True):
            torch.testing.assert_close(own, average)
    assert not torch.equal(evaluate(second["fake"].module.backbone, x), evaluate(student.module.backbone, x))
    for name, value in weights.items():
        path, leaf = name.rsplit(".", 1)
        assert torch.equal(net.get_submodule(path).base_layer.get_parameter(leaf), value)


def test_adapters_are_float32_on_a_bfloat16_network(x):
    _, student, _ = views(Net(), torch.bfloat16)
    out = evaluate(student, x.bfloat16())
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {p.dtype for p in student.parameters()} == {p.grad.dtype for p in student.parameters()} == {torch.float32}


def test_moving_a_view_moves_the_network_and_keeps_the_parameter_objects(x):
    net = Net()
    _, student, fake = views(net)
    parameters = list(student.parameters())
    Denoiser(student, RectifiedFlow()).to(torch.float64)
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert all(a is b for a, b in zip(student.parameters(), parameters, strict=True))
    assert evaluate(fake, x.double()).dtype == torch.float64


def test_unmatched_targets_and_missing_peft_are_reported(monkeypatch):
    with pytest.raises(UserError, match="foo"):
        share_base(Net(), rank=2, alpha=2, targets=["foo"]).fork()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"fewstep\[lora\]"):
        share_base(Net(), rank=2, alpha=2, targets=["enter"]).fork()


# Networks of diffusers: two steps of a matching objective as copies, and as adapters on one checkpointed network.


@pytest.fixture(params=[stable_diffusion, wan], ids=["stable_diffusion", "wan"])
def family(request, tmp_path) -> Family:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return request.param(tmp_path)


def two_steps(family: Family, teacher: nn.Module, student: nn.Module, fake: nn.Module) -> tuple[Roles, list[Tensor]]:
    """Trains student and fake for two steps; returns the roles and the gradients of the last step."""
    config = RoleConfig(lr=1e-3)
    roles = Roles(
        {
            "teacher": Role(family.denoiser(teacher)),
            "student": make_role(family.denoiser(student), config),
            "fake": make_role(family.denoiser(fake), config),
        }
    )

    def match(m: MicroBatch) -> Iterator[LossTerm]:
        a, t = m.sample, m.random.uniform(len(m.sample.level), 0.02, 0.98)
        x_t, _ = renoise(family.schedule, a, t, m.random)
        T = roles.predict("teacher", x_t.detach(), t, a.condition, guidance=Guidance(2.0)).out.x0
        F = roles.predict("fake", x_t.detach(), t, a.condition).out.x0
        yield LossTerm("match", surrogate_loss(a.output, T - F, l1_weight(a.x, T)))

    def critic(m: MicroBatch) -> Iterator[LossTerm]:
        yield critic_term(m, roles, m.random.uniform(len(m.sample.level)))

    updates = Update("student", ("student",), match), Update("fake", ("fake",), critic)
    objective = Objective(updates, lambda m: backward_simulation(m, roles, [1.0, 0.5]))
    loop = Loop(roles, objective, {"data": family.prompts}, batch=2)
    for step in range(2):
        shared: dict[int, dict[str, StudentSample]] = {0: {}}
        gradients = []
        for update in objective.updates:
            assert all(torch.isfinite(value) for value in loop.update(update, step, shared).values())
            gradients += [p.grad for p in roles[update.name].parameters]
    return roles, gradients


def test_copies_of_a_diffusers_network_train_without_changing_the_teacher(family):
    original = family.network()
    roles, _ = two_steps(family, *(family.network() for _ in range(3)))
    assert all(p.grad is None for p in roles["teacher"].parameters)
    moved = {
        name: sum(not torch.equal(p, q) for p, q in zip(role.parameters, original.parameters(), strict=True))
        for name, role in roles.items()
    }
    assert moved == {"teacher": 0, "student": len(list(original.parameters())), "fake": moved["student"]}


def test_adapters_on_a_checkpointed_diffusers_network_train_as_without_checkpointing(family):
    def run(checkpointing: bool) -> tuple[nn.Module, Roles, list[Tensor]]:
        base = family.network()
        teacher = share_base(base, rank=2, alpha=2, targets=LORA_TARGETS)
        student, fake = teacher.fork(), teacher.fork()
        randomise(student, 1, 0.1)
        randomise(fake, 2, 0.1)
        if checkpointing:
            base.network.enable_gradient_checkpointing(teacher.checkpoint)
        return base, *two_steps(family, teacher, student, fake)

    base, roles, gradients = run(True)
    _, plain_roles, plain_gradients = run(False)
    for ours, plain in zip(gradients, plain_gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)
    for name in ("student", "fake"):
        for ours, plain in zip(roles[name].parameters, plain_roles[name].parameters, strict=True):
            torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)

    original = family.network()
    with_gradient = {name for name, p in base.named_parameters() if p.grad is not None}
    fake = {name for name, _ in base.named_parameters() if "adapter1" in name}
    assert with_gradient == fake, "which is updated last"
    weights = {
        name.replace(".base_layer", ""): value for name, value in base.state_dict().items() if "lora" not in name
    }
    assert weights.keys() == original.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in original.state_dict().items())
    batch = family.prompts(KeyedRandom(0, 0, "test", 0), 2)
    x, t = torch.randn(2, *family.shape), torch.tensor([0.3, 0.8], dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(roles.denoiser("teacher").backbone(x, t, batch.condition), original(x, t, batch.condition))
