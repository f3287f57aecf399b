"""The torture test of the interfaces: methods of very different build, each a few lines over the unchanged loop."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from worlds import FLOW, Affine, Points, gaussian

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.checkpoint import restore_role, role_tensors
from fewstep.distill.critics import denoising_loss
from fewstep.distill.data.batch import Batch, Source
from fewstep.distill.loop import Loop
from fewstep.distill.matching import l1_weight, renoise, surrogate_loss
from fewstep.distill.roles import Role, Roles
from fewstep.distill.rollouts import add_noise, backward_simulation, start
from fewstep.distill.stage import RoleConfig, enter_stage, make_role
from fewstep.distill.update import Every, LossTerm, MicroBatch, Objective, StudentSample, Update
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, Routed
from fewstep.models.mixture import GaussianMixture, MixtureBackbone
from fewstep.samplers.euler import euler
from fewstep.samplers.predictor import Predictor

MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [1.0, -0.5]], [0.3, 0.3])
TEACHER = Denoiser(MixtureBackbone(MIXTURE, FLOW), FLOW, "x0")
NOTHING = Condition()


class MLP(nn.Module):
    """A small network ``(x_t [B, 2], t [B], condition) -> [B, 2]`` whose ``hidden`` layers can be tapped."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, 2)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        angles = t.to(x_t)[:, None] * torch.tensor([1.0, 2.0, 4.0])
        return self.out(self.hidden(torch.cat([x_t, angles.sin(), angles.cos()], 1)))


def images(random: KeyedRandom, size: int) -> Batch:
    return Batch(size, (2,), NOTHING, {"x0": MIXTURE.sample(size, int(random.integers(1, 2**31))).float()})


def flow_matching(m: MicroBatch, x0: Tensor) -> Tensor:
    """The per-sample velocity error [B] of the student at random times."""
    t, noise = m.random.uniform(len(x0), stream="flow_t"), m.random.normal(x0.shape, "flow")
    velocity = m.roles.predict("student", add_noise(FLOW, x0, noise, t), t, NOTHING).out.velocity
    return (velocity - (noise - x0)).square().mean(1)


def train(loop: Loop, steps: int) -> dict[str, Tensor]:
    """Runs ``steps`` steps; the mean of the last fifth of each metric."""
    seen: dict[str, list[Tensor]] = {}
    for step in range(steps):
        for name, value in loop.step(step).items():
            seen.setdefault(name, []).append(value)
    return {name: torch.stack(values[-steps // 5 :]).mean() for name, values in seen.items()}


def trained(module: nn.Module, lr: float = 2e-3) -> Role:
    return make_role(module, RoleConfig(lr=lr, betas=(0.5, 0.99)))


def loop_of(roles: Roles, objective: Objective, batch: int = 256, **sources: Source) -> Loop:
    return Loop(roles, objective, sources or {"data": Points(2)}, batch)


@pytest.fixture(scope="module")
def base() -> Denoiser:
    """A network taught by flow matching on the mixture, with a tap: where students and fakes start."""
    torch.manual_seed(0)
    denoiser = Denoiser(MLP(), FLOW, "velocity", feature_layers=["hidden.2"])

    def student(m: MicroBatch) -> Iterator[LossTerm]:
        yield LossTerm("flow", flow_matching(m, m.batch["x0"]).mean())

    objective = Objective((Update("student", ("student",), student),))
    train(loop_of(Roles({"student": trained(denoiser, 5e-3)}), objective, data=images), 500)
    return denoiser


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Zero only for equal laws (Szekely & Rizzo): 2 E|x - y| - E|x - x'| - E|y - y'|, of samples [N, D]."""
    n = len(x)
    inside = (torch.cdist(x, x).sum() + torch.cdist(y, y).sum()) / (n * (n - 1))
    return float(2 * torch.cdist(x, y).mean() - inside)


@torch.no_grad()
def distance(denoiser: Denoiser, times: tuple[float, ...] = (1.0, 0.0)) -> float:
    """Energy distance to the mixture of 2000 samples drawn by Euler steps over ``times``."""
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    return energy_distance(euler(Predictor(denoiser, NOTHING), noise, times), MIXTURE.sample(2000, 2).float())


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def gradients(role: Role) -> list[Tensor | None]:
    return [p.grad for p in role.parameters]


def critic(roles: Roles, low: float = 0.0, start: int = 0) -> Update:
    """The fake score's update at times from ``low``, the anchor's level, to 1."""

    def fake(m: MicroBatch) -> Iterator[LossTerm]:
        a, t = m.sample, m.random.uniform(len(m.sample.s), low, 1.0)
        x_t, n = renoise(FLOW, a, t, m.random)
        yield LossTerm("critic", denoising_loss(roles.predict("fake", x_t, t, a.condition).out, FLOW, a, t, n))

    return Update("fake", ("fake",), fake, Every(start=start))


# 1. SiD (arXiv 2404.04057): gradient through the inputs of both frozen score networks.


def sid(roles: Roles, low: float, high: float, *, through: bool = True, normalised: bool = True) -> Objective:
    """``(x0_T - x0_F) ((x0_T - x) - a (x0_T - x0_F)) / omega`` with a = 1, after an ordinary fake update."""

    def student(m: MicroBatch) -> Iterator[LossTerm]:
        a, t = m.sample, m.random.uniform(len(m.sample.s), low, high)
        x_t, _ = renoise(FLOW, a, t, m.random)
        T = roles.predict("teacher", x_t, t, a.condition, through=through).out.x0
        F = roles.predict("fake", x_t, t, a.condition, through=through).out.x0
        omega = 1 / l1_weight(a.x, T, 1e-5) if normalised else 1.0
        yield LossTerm("sid", ((T - F) * ((T - a.x) - (T - F)) / omega).sum(1).mean())

    updates = critic(roles, start=1), Update("student", ("student",), student)
    return Objective(updates, lambda m: backward_simulation(m, roles, [1.0]))


@pytest.mark.parametrize(("through", "expected"), [(True, (0.134228, -0.160803)), (False, (0.2, -0.119799))])
def test_sid_gradient_is_the_closed_form(through, expected):
    """Data N(0, 1), student N(0.4, 0.7^2) and its exact fake at t = 1/2: ``methods/sid.md`` section 10; without the way
    through the networks it is DMD's gradient, which is another one."""
    roles = Roles(
        {
            "teacher": Role(gaussian(0.0, 1.0, 2)),
            "fake": Role(gaussian(0.4, 0.7, 2)),
            "student": trained(Denoiser(Affine(0.4, 0.7), FLOW, "x0")),
        }
    )
    loop_of(roles, sid(roles, 0.5, 0.5, through=through, normalised=False), batch=200_000).step(0)
    measured = torch.stack([g / 2 for g in gradients(roles["student"])])  # two equal dimensions
    torch.testing.assert_close(measured, torch.tensor(expected), atol=0.006, rtol=0)


def test_sid_trains_through_frozen_networks(base):
    roles = Roles(
        {
            "teacher": Role(copy.deepcopy(base)),
            "fake": trained(copy.deepcopy(base)),
            "student": trained(copy.deepcopy(base), 1e-3),
        }
    )
    before = distance(roles.denoiser("student"))
    loop = loop_of(roles, sid(roles, 0.02, 0.9))
    loop.step(0)
    assert all(g is not None for g in gradients(roles["student"]))
    assert gradients(roles["fake"]) == [None] * 6
    train(loop, 250)
    assert gradients(roles["teacher"]) == [None] * 6
    assert same(roles.denoiser("teacher"), snapshot(base))
    assert distance(roles.denoiser("student")) < 0.2 * before


# 2. A GAN term (as DMD2 and f-distill add): taps on the frozen teacher, the discriminator's head an own role.


class Head(nn.Module):
    """Logits [B] that a sample is data, from the teacher's features of it and the time they were taken at."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width + 1, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([features, t.to(features)[:, None]], 1))[:, 0]


def gan(roles: Roles, head: nn.Module) -> Objective:
    def logits(m: MicroBatch, x0: Tensor, name: str, through: bool) -> Tensor:
        t = m.random.uniform(len(x0), 0.02, 0.7, stream=f"{name}_t")
        x_t = add_noise(FLOW, x0, m.random.normal(x0.shape, name), t)
        return head(roles.predict("teacher", x_t, t, NOTHING, through=through).cond.features["hidden.2"], t)

    def student(m: MicroBatch) -> Iterator[LossTerm]:
        yield LossTerm("gan", softplus(-logits(m, m.sample.x, "generated", through=True)).mean())

    def discriminator(m: MicroBatch) -> Iterator[LossTerm]:
        generated = softplus(logits(m, m.sample.x, "generated", through=False)).mean()
        yield LossTerm("discriminator", generated + softplus(-logits(m, m.batch["x0"], "data", through=False)).mean())

    updates = (
        Update("student", ("student",), student),
        Update("head", ("discriminator",), discriminator, Every(start=1)),
    )
    return Objective(updates, lambda m: backward_simulation(m, roles, [1.0]))


def test_gan_on_the_taps_of_the_frozen_teacher(base):
    torch.manual_seed(1)
    head = Head()
    roles = Roles(
        {
            "teacher": Role(copy.deepcopy(base)),
            "student": trained(copy.deepcopy(base), 1e-3),
            "discriminator": trained(head, 4e-3),
        }
    )
    before = distance(roles.denoiser("student"))
    loop = loop_of(roles, gan(roles, head), data=images)
    loop.step(0)
    # the way to the student leads through the teacher and the head, and leaves nothing on either
    assert all(g.abs().sum() > 0 for g in gradients(roles["student"]))
    assert gradients(roles["discriminator"]) == [None] * 4
    train(loop, 300)
    assert gradients(roles["teacher"]) == [None] * 6
    assert same(roles.denoiser("teacher"), snapshot(base))
    assert distance(roles.denoiser("student")) < 0.2 * before


# 3. Phased DMD (arXiv 2510.27684): the high-noise expert learns the law of x_s, is frozen, and feeds the low-noise one.

MIDDLE = 0.5


def phase(roles: Roles, t_student: float, s: float) -> Objective:
    """The student goes from ``t_in`` to ``s`` in one Euler step; what comes before is the frozen role ``expert``."""

    def rollout(m: MicroBatch) -> StudentSample:
        x = start(m, FLOW, 1.0)
        if t_student < 1:
            x = x + (t_student - 1) * roles.predict("expert", x, 1.0, NOTHING).out.velocity
        x_s = x + (s - t_student) * roles.predict("student", x, t_student, NOTHING).out.velocity
        times = torch.ones(len(x), dtype=torch.float64)
        return StudentSample(x_s, s * times, x_s, t_student * times, NOTHING)

    def student(m: MicroBatch) -> Iterator[LossTerm]:
        a, t = m.sample, m.random.uniform(len(m.sample.s), s + 0.02, 0.98)
        x_t, _ = renoise(FLOW, a, t, m.random)
        T = roles.predict("teacher", x_t, t, NOTHING).out.x0
        F = roles.predict("fake", x_t, t, NOTHING).out.x0
        yield LossTerm("match", surrogate_loss(a.output, T - F, l1_weight(a.x, T, 0.1)))

    updates = Update("student", ("student",), student, Every(every=2)), critic(roles, s)
    return Objective(updates, rollout)


def test_phased_dmd_trains_the_second_expert_behind_the_frozen_first(base):
    learns = RoleConfig(init="base", lr=1e-3, betas=(0.5, 0.99))
    first = Roles(
        enter_stage(
            {"teacher": Role(TEACHER), "base": Role(base)},
            {"student": learns, "fake": learns},
            freeze={},
        )
    )
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(3))
    x0 = MIXTURE.sample(2000, 4).float()
    x_s = add_noise(FLOW, x0, noise.roll(1, 0), torch.full((2000,), MIDDLE, dtype=torch.float64))

    @torch.no_grad()
    def distance_at_s(denoiser: Denoiser) -> float:
        return energy_distance(euler(Predictor(denoiser, NOTHING), noise, (1.0, MIDDLE)), x_s)

    train(loop_of(first, phase(first, 1.0, MIDDLE)), 400)
    assert distance_at_s(first.denoiser("student")) < 0.3 * distance_at_s(base)

    second = Roles(enter_stage(first, {"student": learns, "fake": learns}, freeze={"expert": "student"}))
    expert, student = second.denoiser("expert"), second.denoiser("student")
    before = snapshot(expert)
    assert same(first.denoiser("student"), before)
    assert same(student, snapshot(base))
    train(loop_of(second, phase(second, MIDDLE, 0.0)), 600)
    assert same(expert, before)
    assert gradients(second["expert"]) == [None] * 6

    routed = Denoiser(Routed([expert.backbone, student.backbone], (0.75, 0.0)), FLOW)
    swapped = Denoiser(Routed([student.backbone, expert.backbone], (0.75, 0.0)), FLOW)
    way = (1.0, MIDDLE, 0.0)
    x = noise + (MIDDLE - 1) * expert(noise, 1.0, NOTHING).velocity
    by_hand = x - MIDDLE * student(x, MIDDLE, NOTHING).velocity
    assert torch.equal(euler(Predictor(routed, NOTHING), noise, way), by_hand)
    assert distance(routed, way) < 0.5 * min(distance(d, way) for d in (base, expert, student, swapped))


# 4. Matching and a preference (Diffusion-DPO, arXiv 2311.12908) in one update, from two sources.


def pairs(random: KeyedRandom, size: int) -> Batch:
    """Two samples of the data each; the winner is the one further to the right."""
    x0 = images(random, 2 * size)["x0"]
    order = x0[:, 0].view(2, size).argsort(0)[:, :, None].expand(2, size, 2)
    loser, winner = x0.view(2, size, 2).gather(0, order)
    return Batch(size, (2,), NOTHING, {"winner": winner, "loser": loser})


def joint(roles: Roles, beta: float, terms: tuple[str, ...] = ("match", "preference")) -> Objective:
    def match(m: MicroBatch) -> Tensor:
        a, t = m.sample, m.random.uniform(len(m.sample.s), 0.02, 0.98)
        x_t, _ = renoise(FLOW, a, t, m.random)
        T, F = (roles.predict(name, x_t, t, NOTHING).out.x0 for name in ("teacher", "fake"))
        return surrogate_loss(a.output, T - F, l1_weight(a.x, T, 0.1))

    def preference(m: MicroBatch) -> Tensor:
        pair = m.batches["pairs"]
        t = m.random.uniform(pair.size, stream="pair_t").repeat(2)
        noise = m.random.normal((pair.size, 2), "pair").repeat(2, 1)  # shared by winner and loser, as t is
        x0 = torch.cat([pair["winner"], pair["loser"]])
        x_t, velocity = add_noise(FLOW, x0, noise, t), noise - x0
        policy, reference = (
            (roles.predict(name, x_t, t, NOTHING).out.velocity - velocity).square().mean(1)
            for name in ("student", "reference")
        )
        winner, loser = (policy - reference).chunk(2)
        m.note("accuracy", (winner < loser).float())
        return softplus(beta / 2 * (winner - loser)).mean()

    def student(m: MicroBatch) -> Iterator[LossTerm]:
        for name, loss in (("match", match), ("preference", preference)):
            if name in terms:
                yield LossTerm(name, loss(m))

    updates = Update("student", ("student",), student), critic(roles)
    return Objective(updates, lambda m: backward_simulation(m, roles, [1.0]))


def joint_loop(base: Denoiser, beta: float, *terms: str) -> Loop:
    roles = Roles(
        {
            "teacher": Role(TEACHER),
            "reference": Role(base),
            "fake": trained(copy.deepcopy(base)),
            "student": trained(copy.deepcopy(base), 1e-3),
        }
    )
    return loop_of(roles, joint(roles, beta, terms), data=Points(2), pairs=pairs)


def test_joint_terms_add_their_gradients_and_both_do_their_work(base):
    loops = [joint_loop(base, 2.0, *terms) for terms in (("match", "preference"), ("match",), ("preference",))]
    first = [loop.step(0) for loop in loops]
    torch.testing.assert_close(first[0]["loss/preference"], torch.tensor(2.0).log())  # the policy is the reference
    for whole, match, preference in zip(*(gradients(loop.roles["student"]) for loop in loops), strict=True):
        assert match.abs().sum() > 0
        assert preference.abs().sum() > 0
        torch.testing.assert_close(whole, match + preference, atol=1e-7, rtol=1e-4)

    before = distance(base)
    metrics = [train(loop, 300) for loop in loops]
    both, only_match, only_preference = (distance(loop.roles.denoiser("student")) for loop in loops)
    assert metrics[0]["loss/preference"] < 0.3
    assert only_match < both < 0.5 * before < only_preference  # alone the preference runs away from the data


# 5. A source that the policy itself refills: online, reward-weighted flow matching; the reward is the first coordinate.


def online(base: Denoiser) -> Loop:
    roles = Roles({"student": trained(copy.deepcopy(base), 1e-3)})
    buffer = torch.zeros(512, 2)

    def source(random: KeyedRandom, size: int) -> Batch:
        return Batch(size, (2,), NOTHING, {"x0": buffer[random.integers(size, len(buffer))]})

    @torch.no_grad()
    def refill(random: KeyedRandom) -> None:
        if random.key[1] % 20 == 0:
            noise = random.normal(buffer.shape)
            buffer.copy_(euler(Predictor(roles.denoiser("student"), NOTHING), noise, (1.0, 0.75, 0.5, 0.25, 0.0)))

    def student(m: MicroBatch) -> Iterator[LossTerm]:
        x0 = m.batch["x0"]
        m.note("reward", x0[:, 0])
        yield LossTerm("policy", (x0[:, 0].softmax(0) * flow_matching(m, x0)).sum())

    refill(KeyedRandom(0, 0, "refill", 0))
    update = Update("student", ("student",), student, after=refill)
    return loop_of(roles, Objective((update,), state={"buffer": buffer}), data=source)


def test_the_policy_refills_its_own_source_and_resumes_exactly(base):
    loop = online(base)
    buffer, role = loop.objective.state["buffer"], loop.roles["student"]
    contents, rewards = [], []
    for step in range(1, 201):
        rewards.append(float(loop.step(step)["reward"]))
        contents.append(buffer.clone())
        if step == 70:
            saved = {name: value.clone() for name, value in role_tensors("student", role).items()}
            saved_buffer = buffer.clone()
    changed = [step for step in range(2, 201) if not torch.equal(contents[step - 1], contents[step - 2])]
    assert changed == list(range(20, 201, 20))
    assert rewards[-1] > rewards[0] + 0.5

    resumed = online(base)
    restore_role("student", resumed.roles["student"], saved)
    resumed.objective.state["buffer"].copy_(saved_buffer)
    for step in range(71, 201):
        resumed.step(step)
    assert torch.equal(resumed.objective.state["buffer"], buffer)
    assert same(resumed.roles.denoiser("student"), snapshot(role.module))
