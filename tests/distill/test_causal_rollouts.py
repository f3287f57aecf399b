"""Videos frame by frame: the rollout against the same without a cache, its gradients, and runs of causal students."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_students import CLASSES, SHAPE, TIMES, TINY, micro_batch, network, student_roles
from torch import Tensor, nn
from worlds import FLOW, build_objective, gaussian, trained

import fewstep
from fewstep.api.data import make_ode_pairs
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors
from fewstep.distill.causal_rollouts import causal_rollout
from fewstep.distill.checkpoint import checkpoints
from fewstep.distill.config import Config
from fewstep.distill.config_files import load_config, parse_config
from fewstep.distill.explain import explain
from fewstep.distill.roles import Role, Roles
from fewstep.distill.rollouts import backward_simulation, in_turn, initial_noise
from fewstep.distill.run_folder import replay_step
from fewstep.distill.update import MicroBatch
from fewstep.models.backbone import Backbone, Past
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.model_config import ModelConfig
from fewstep.models.saving import save_model
from fewstep.samplers.generate import SampleNoise
from fewstep.samplers.plan import plan
from fewstep.samplers.predictor import Predictor

CPU = torch.device("cpu")


# --- the rollout ------------------------------------------------------------------------------------------------------


def without_cache(micro: MicroBatch, roles: Roles) -> tuple[Tensor, Tensor]:
    """The same clips by evaluations of all frames so far, with a time per frame, of whole clips without a cache; and
    the noisy frames from which each was predicted."""
    last, start = in_turn(micro, len(TIMES), "exit"), initial_noise(micro, FLOW, 1.0)
    clean = noisy = start[:, :, :0]
    for k in range(start.shape[2]):
        x, inputs, exits = start[:, :, k : k + 1], [], []
        for t, following in pairwise((*TIMES, 0.0)):
            times = torch.zeros(len(x), 1, k + 1, 1, 1, dtype=torch.float64)
            times[:, :, k] = t
            seen = torch.cat([clean, x], 2)
            inputs.append(x)
            exits.append(roles.predict("student", seen, times, micro.batch.condition).out.x0[:, :, k:])
            if following:
                x = (1 - following) * exits[-1] + following * micro.random.normal(x.shape, "renoise")
        noisy, clean = (
            torch.cat([before, torch.stack(each)[last, range(len(x))]], 2)
            for before, each in ((noisy, inputs), (clean, exits))
        )
    return clean, noisy


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("context", [None, 2])
def test_clips_are_those_without_a_cache_and_gradients_those_of_each_frame_alone(context: int | None) -> None:
    """The gradient is the sum over frames, each with what is kept of the clean ones before it as a constant."""
    roles = student_roles(network(context=context))
    student, micro = roles.denoiser("student"), micro_batch(roles)
    weight = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    parameters = roles["student"].parameters
    with roles.updating(("student",)):
        sample = causal_rollout(micro, roles, TIMES)
        ours = flat(torch.autograd.grad((sample.output * weight).sum(), parameters))
    assert sample.x is sample.output
    assert not sample.level.any()
    clean, noisy = without_cache(micro_batch(roles), roles)
    torch.testing.assert_close(sample.x, clean, rtol=1e-5, atol=1e-5)
    total = torch.zeros(())
    for k in range(SHAPE[1]):
        past = None
        if k:
            with torch.no_grad():
                _, past = student.after(None, clean[:, :, :k], 0.0, micro.batch.condition)
        frame, _ = student.after(past, noisy[:, :, k : k + 1], sample.t_student, micro.batch.condition)
        total = total + (frame.x0 * weight[:, :, k : k + 1]).sum()
    theirs = flat(torch.autograd.grad(total, parameters))
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


class Linear(Backbone):
    """x0 of a frame: ``a`` times its input, and ``b`` times what is kept of the frame before, ``c`` times its input."""

    causal = True

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor(value)) for value in (0.5, 0.25, 2.0))

    def after(self, past: Past | None, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Past]:
        kept = torch.zeros_like(x_t) if past is None else past[0]
        return self.a * x_t + self.b * kept, (self.c * x_t,)


def test_no_gradient_flows_through_the_cache() -> None:
    """One step of a linear student: the frame f_k = a z_k + b c f_(k-1) has the derivatives z_k and c f_(k-1) by a and
    b, and none by c, which acts in the cache alone."""
    model = Linear()
    roles = Roles({"student": trained(Denoiser(model, FLOW, "x0"))})
    micro = micro_batch(roles, 2, (1, 5, 1, 1))
    with roles.updating(("student",)):
        x0 = causal_rollout(micro, roles, (1.0,)).output
        x0.sum().backward()
    z = initial_noise(micro_batch(roles, 2, (1, 5, 1, 1)), FLOW, 1.0)
    frames = [0.5 * z[:, :, 0]]
    for k in range(1, 5):
        frames.append(0.5 * z[:, :, k] + 0.25 * 2.0 * frames[-1])
    torch.testing.assert_close(x0, torch.stack(frames, 2))
    assert model.a.grad.item() == pytest.approx(z.sum().item(), rel=1e-5)
    assert model.b.grad.item() == pytest.approx(2.0 * sum(frame.sum().item() for frame in frames[:-1]), rel=1e-5)
    assert not model.c.grad, "zero or None"


class Recorded(Linear):
    """Records the times of its evaluations, and whether they have a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[float], bool]] = []

    def after(self, past: Past | None, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Past]:
        self.calls.append((t.tolist(), torch.is_grad_enabled()))
        return super().after(past, x_t, t, condition)


def test_each_sample_is_evaluated_up_to_its_own_step_and_once_to_be_kept() -> None:
    """Eight samples whose last steps are 0, 1, 2, 3 in turn: 6, 4 and 2 of them take a step before their last one."""
    model = Recorded()
    roles = Roles({"student": trained(Denoiser(model, FLOW, "x0"))})
    with roles.updating(("student",)):
        sample = causal_rollout(micro_batch(roles, 8, (1, 3, 1, 1)), roles, TIMES)
        sample.output.sum().backward()  # of a network that keeps its input for it, which no later frame changes
    steps = [([1.0] * 6, False), ([0.75] * 4, False), ([0.5] * 2, False)]
    frame = [*steps, (sample.t_student.tolist(), True), ([0.0] * 8, False)]
    assert model.calls == frame * 3
    assert sorted(sample.t_student.tolist()) == sorted(TIMES * 2)
    assert roles.evaluations == 6 + 4 + 2 + 8 + 8, "of the whole clip"
    causal_rollout(micro_batch(roles, 8, (1, 3, 1, 1)), roles, TIMES)
    assert not any(graph for _, graph in model.calls[len(frame) * 3 :]), "the student is not being updated"


def test_a_clip_of_one_frame_is_that_of_backward_simulation() -> None:
    roles, shape = student_roles(network()), (3, 1, 8, 8)
    ours = causal_rollout(micro_batch(roles, 8, shape), roles, TIMES)
    theirs = backward_simulation(micro_batch(roles, 8, shape), roles, TIMES)
    assert ours.x.equal(theirs.x)
    assert ours.t_student.equal(theirs.t_student)


def test_the_samples_of_divided_batches_take_turns() -> None:
    roles = student_roles(network())
    whole = causal_rollout(micro_batch(roles, 4), roles, TIMES).t_student
    parts = [causal_rollout(micro_batch(roles, 1, shard=shard), roles, TIMES).t_student for shard in range(4)]
    assert torch.cat(parts).equal(whole)


@pytest.mark.parametrize("student", [Denoiser(nn.Linear(2, 2), FLOW), Denoiser(network(causal=False), FLOW)])
def test_a_student_that_is_not_causal_is_refused(student: Denoiser) -> None:
    roles = Roles({"teacher": Role(gaussian(0.0, 1.0, 2)), "student": trained(student), "fake": trained(student)})
    with pytest.raises(UserError, match=r"rollout: causal needs a causal student.*init: causal"):
        build_objective("dmd2", roles, rollout="causal")
    with pytest.raises(UserError, match="is not causal"):
        roles.after("student", None, torch.zeros(1, *SHAPE), 0.5, Condition())


def test_a_student_that_is_split_over_processes_is_refused() -> None:
    roles = Roles({name: trained(Denoiser(network(), FLOW)) for name in ("teacher", "student", "fake")})
    roles.split = True
    with pytest.raises(UserError, match="shard: false"):
        build_objective("dmd2", roles, rollout="causal")


# --- runs -------------------------------------------------------------------------------------------------------------


def saved(folder: Path, *, causal: bool) -> str:
    backbone = {"name": "video_unet", **TINY, **({"causal": True, "context": 3} if causal else {})}
    config = ModelConfig.model_validate({"backbone": backbone, "shape": SHAPE, "classes": CLASSES})
    save_model(Denoiser(network(causal=causal), FLOW), config, folder)
    return str(folder)


def config_of(folder: Path, **changes: Any) -> Config:
    roles = {"student": {"init": "causal", "lr": 1e-3, "ema": 0.5}, "fake": {"lr": 1e-3}}
    objective = {"name": "dmd2", "rollout": "causal", "steps": 2, "critic_updates": 2}
    raw = {
        "out": str(folder / "run"), "teacher": saved(folder / "teacher", causal=False), "batch": 3, "device": "cpu",
        "networks": {"causal": {"checkpoint": saved(folder / "causal", causal=True)}}, "log_every": 1,
        "health": {"every": 4, "conditions": 2, "seeds": 2, "teacher_steps": 2}, "checkpoint": {"every": 2},
        "previews": {"every": 4, "n": 2}, "stages": [{"steps": 4, "objective": objective, "roles": roles}],
    }  # fmt: skip
    return parse_config(raw | changes, "test")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fewstep.train(config_of(tmp_path_factory.mktemp("causal")), progress=False)


def test_a_run_replays_and_resumes_bit_for_bit(run: Path, tmp_path: Path) -> None:
    for step in range(1, 5):
        recorded, computed = replay_step(run, step, CPU)
        assert recorded == computed
    part = shutil.copytree(run, tmp_path / "part")
    shutil.rmtree(checkpoints(part / "checkpoints")[-1])
    shutil.rmtree(part / "student")
    fewstep.train(resume=part, progress=False)
    ours, theirs = (fewstep.load(folder, "cpu").denoiser.backbone.state_dict() for folder in (part, run))
    assert all(ours[name].equal(value) for name, value in theirs.items())


def test_the_student_is_causal_and_is_sampled_frame_by_frame(run: Path) -> None:
    model = fewstep.load(run, "cpu")
    assert model.config.few_step.frame_by_frame is True
    assert model.config.backbone["context"] == 3
    assert fewstep.sample(model, n=2).shape == (2, 4, 3, 8, 8)
    assert fewstep.sample(model, n=2, sampling=fewstep.SamplingConfig(frames=9)).shape == (2, 9, 3, 8, 8)
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert line["evaluations"] in (3 * 6 + 1, 3 * 6 + 2), "in turn, one or two of three samples take a first step"


def test_pairs_of_noise_and_sample_are_of_whole_clips_alone(run: Path, tmp_path: Path) -> None:
    euler, file = fewstep.SamplingConfig("euler", 2), tmp_path / "pairs.safetensors"
    teacher = run.parent / "causal"
    for model, sampling in ((run, euler), (teacher, replace(euler, frames=4)), (teacher, replace(euler, frames=9))):
        with pytest.raises(UserError, match="generates frame by frame"):
            make_ode_pairs(model, file, n=2, sampling=sampling, device="cpu")
    assert not file.exists()
    make_ode_pairs(teacher, file, n=2, sampling=euler, device="cpu")
    pairs, model = read_tensors(file), fewstep.load(teacher, "cpu")
    solver, times = plan(model, euler)
    condition = Condition.of_labels(pairs["labels"], CLASSES)
    with torch.no_grad():
        x0 = solver(Predictor(model.denoiser, condition), pairs["noise"], times, SampleNoise(0, [0], SHAPE, CPU))
    assert x0.sub(pairs["x0"]).abs().max() < 1e-6


def test_a_config_says_nothing_of_frames_unless_they_are_generated_in_turn(run: Path, tmp_path: Path) -> None:
    assert json.loads((run / "student" / "config.json").read_text())["few_step"]["frame_by_frame"] is True
    roles = Roles({name: trained(Denoiser(network(), FLOW)) for name in ("teacher", "student", "fake")})
    few_step = build_objective("dmd2", roles).few_step
    config = ModelConfig(backbone={"name": "video_unet"}, shape=SHAPE, few_step=few_step)
    save_model(Denoiser(network(), FLOW), config, tmp_path)
    assert "frame_by_frame" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", ["causal", "self_forcing"])
def test_the_shipped_configs_are_explained(name: str) -> None:
    (stage,) = explain(load_config(f"emoji_video/{name}.yaml"))
    if name == "self_forcing":
        assert stage.evaluations_per_step == pytest.approx((0.5 * 3 + 1) + (1.5 + 1 + 1))
