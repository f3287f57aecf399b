"""A source that the policy refills: online, reward-weighted flow matching. The reward is the first coordinate."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from plane import NO_CONDITION, flow_matching, is_unchanged, loop_of, snapshot, trained
from torch import Tensor

from fewstep.core.files import write_tensors
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.checkpoint import StoredTensors, restore_role, role_tensors
from fewstep.distill.data.batch import Batch
from fewstep.distill.loop import Loop
from fewstep.distill.roles import Roles
from fewstep.distill.update import LossTerm, MicroBatch, Objective, Update
from fewstep.models.denoiser import Denoiser
from fewstep.samplers.euler import euler
from fewstep.samplers.predictor import Predictor


def online(base: Denoiser) -> Loop:
    roles = Roles({"student": trained(copy.deepcopy(base), 1e-3)})
    buffer = torch.zeros(512, 2)

    def source(random: KeyedRandom, size: int) -> Batch:
        return Batch(size, (2,), NO_CONDITION, {"x0": buffer[random.integers(size, len(buffer))]})

    @torch.no_grad()
    def refill(random: KeyedRandom, _: Mapping[str, Tensor]) -> None:
        if random.key[1] % 20 == 0:
            noise = random.normal(buffer.shape)
            predict = Predictor(roles.denoiser("student"), NO_CONDITION)
            buffer.copy_(euler(predict, noise, (1.0, 0.75, 0.5, 0.25, 0.0)))

    def student(micro: MicroBatch) -> Iterator[LossTerm]:
        x0 = micro.batch["x0"]
        micro.log("reward", x0[:, 0])
        yield LossTerm("policy", (x0[:, 0].softmax(0) * flow_matching(micro, x0)).sum())

    refill(KeyedRandom(0, 0, "refill", 0), {})
    update = Update("student", ("student",), student, after=refill)
    return loop_of(roles, Objective((update,), state={"buffer": buffer}), data=source)


def test_the_policy_refills_its_own_source_and_resumes_exactly(base: Denoiser, tmp_path: Path) -> None:
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
    write_tensors(saved, tmp_path / "state.safetensors")
    restore_role("student", resumed.roles["student"], StoredTensors({tmp_path / "state.safetensors": {}}))
    resumed.objective.state["buffer"].copy_(saved_buffer)
    for step in range(71, 201):
        resumed.step(step)
    assert torch.equal(resumed.objective.state["buffer"], buffer)
    assert is_unchanged(resumed.roles.denoiser("student"), snapshot(role.module))
