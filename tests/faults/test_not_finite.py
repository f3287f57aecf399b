"""Numbers that are not finite: where they come from is named, and they reach no checkpoint, file or student."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from worlds import Points, mlp, tiny_config, tiny_teacher

from fewstep.core.errors import UserError
from fewstep.core.files import write_tensors
from fewstep.distill.callback import Callback, Interrupted
from fewstep.distill.checkpoint import checkpoints
from fewstep.distill.config_files import parse_config
from fewstep.distill.loop import LostUpdate
from fewstep.distill.run_folder import RunFolder
from fewstep.distill.trainer import Trainer
from fewstep.models.loading import load_model
from fewstep.models.saving import save_model

CPU = torch.device("cpu")


def run_of(folder: Path, **changes: object) -> RunFolder:
    return RunFolder.create(parse_config(tiny_config(folder, **changes), "test"), CPU)


def trainer_of(**changes: object) -> Trainer:
    roles = {"student": {"lr": 1e-3}, "fake": {"lr": 1e-3}}
    stage = {"steps": 30, "objective": {"name": "dmd2", "guidance": 1.0, "critic_updates": 1}, "roles": roles}
    config = parse_config({"batch": 8, "health": {"every": 0}, "stages": [stage], **changes}, "test")
    return Trainer.create(config, teacher=mlp(4, seed=0), data=Points(4), device="cpu")


class Damages(Callback):
    """Sets one weight of a role after a step."""

    def __init__(self, step: int, role: str, value: float) -> None:
        self.step, self.role, self.value = step, role, value

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            trainer.roles[self.role].parameters[0].data.view(-1)[0] = self.value


class Lost(Callback):
    def __init__(self) -> None:
        self.causes: list[str] = []

    def on_lost_update(self, trainer: Trainer, lost: LostUpdate) -> None:
        self.causes.append(f"{lost.update}: {lost.cause}")


def test_a_teacher_with_a_damaged_weight_is_refused_before_training(tmp_path: Path) -> None:
    config = parse_config(tiny_config(tmp_path), "test")
    model = load_model(tmp_path / "teacher")
    name, weight = next(iter(model.denoiser.backbone.named_parameters()))
    weight.data.view(-1)[3] = float("nan")
    with pytest.raises(UserError, match=rf"weights of the teacher are damaged: {name} has numbers that are not finite"):
        Trainer.create(config.model_copy(update={"teacher": None}), teacher=model, device="cpu")


@pytest.mark.parametrize("role", ["student", "fake", "teacher"])
def test_the_role_layer_and_weight_of_a_number_that_is_not_finite_are_named(role: str) -> None:
    trainer, lost = trainer_of(), Lost()
    trainer.callbacks = [Damages(2, role, float("nan")), lost]
    with pytest.raises(UserError, match="in a row"):
        trainer.train()
    assert (
        f"the output of layers.0 in the {role} is not finite for sample 0: its weight is not finite" in lost.causes[0]
    )


def test_the_sample_whose_layer_overflows_is_named() -> None:
    """Finite weights and inputs: the fourth sample's activation is beyond float32."""

    class Overflow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scale = torch.ones(len(x), 1)
            scale[3] = float("inf") if self.on else 1.0
            return x * scale.clamp(max=3e38) * (1.0 if not self.on else 1e38)

        on = False

    trainer, lost, layer = trainer_of(), Lost(), Overflow()
    network = trainer.roles.denoiser("teacher").backbone.layers
    network.append(layer)
    trainer.advance(2)
    layer.on, trainer.callbacks = True, [lost]
    with pytest.raises(UserError, match="in a row"):
        trainer.train()
    assert "the output of layers.5 in the teacher is not finite for sample 3: its inputs, up to" in lost.causes[0]


def test_a_replay_that_finds_the_layer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update of one step is lost; afterwards the run is that in which the step had no such update."""
    first, second = trainer_of(), trainer_of()
    monkeypatch.setattr(first.loop, "_origin", lambda update, step: None)
    for trainer in (first, second):
        trainer.advance(2)
        weight = trainer.roles["student"].parameters[0].data
        kept = weight.clone()
        weight.view(-1)[0] = float("inf")
        trainer.advance(3)
        weight.copy_(kept)
        trainer.advance(6)
    assert first.evaluations == second.evaluations
    for name in ("student", "fake"):
        pairs = zip(first.roles[name].parameters, second.roles[name].parameters, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_no_checkpoint_is_written_while_updates_are_lost(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    with pytest.raises(UserError, match=r"No checkpoint of step 12 was written: fake/weights/.* not finite"):
        run.train(callbacks=[Damages(6, "fake", float("nan"))])
    assert [path.name for path in checkpoints(run.folder / "checkpoints")] == ["step-0000004"]
    resumed = RunFolder.reopen(run.folder, CPU)
    resumed.train()
    assert all(p.isfinite().all() for p in resumed.trainer.roles["fake"].parameters)


def test_a_stop_while_updates_are_lost_says_that_it_saved_nothing(tmp_path: Path) -> None:
    class StopAt(Callback):
        def on_step(self, trainer: Trainer) -> None:
            if trainer.step == 8:
                os.kill(os.getpid(), signal.SIGTERM)

    run = run_of(tmp_path)
    with pytest.raises(Interrupted, match="updates are being lost: the last checkpoint is an earlier one"):
        run.train(callbacks=[Damages(6, "fake", float("nan")), StopAt()])
    assert [path.name for path in checkpoints(run.folder / "checkpoints")] == ["step-0000004"]


def test_a_checkpoint_postponed_by_a_lost_update_is_written_after_the_next_sound_step(tmp_path: Path) -> None:
    class OneBadStep(Callback):
        def on_step(self, trainer: Trainer) -> None:
            weight = trainer.roles["fake"].parameters[0].data.view(-1)
            if trainer.step == 3:
                self.kept = weight[0].clone()
                weight[0] = float("inf")
            elif trainer.step == 4:
                weight[0] = self.kept

    run = run_of(tmp_path)
    run.train(callbacks=[OneBadStep()])
    assert [path.name[-2:] for path in checkpoints(run.folder / "checkpoints")] == ["05", "08", "12"]


def test_weights_that_are_not_finite_reach_no_checkpoint_and_no_student(tmp_path: Path) -> None:
    """The average of the student is damaged; no gradient shows it."""

    class DamagesAverage(Callback):
        def on_step(self, trainer: Trainer) -> None:
            if trainer.step == 7:
                next(iter(trainer.roles["student"].average.values())).view(-1)[0] = float("nan")

    run = run_of(tmp_path, health={"every": 0})
    with pytest.raises(UserError, match=r"No checkpoint of step 8 was written: student/average/.* not finite"):
        run.train(callbacks=[DamagesAverage()])
    assert [path.name for path in checkpoints(run.folder / "checkpoints")] == ["step-0000004"]
    assert not (run.folder / "student").exists()


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_no_best(tmp_path: Path, score: float) -> None:
    run = run_of(tmp_path, validation={"every": 2})
    with pytest.raises(UserError, match=r"Validation \(the keys under validation:\) at step 2: The score is"):
        run.train(validate=lambda student, config, step: score)
    assert not (run.folder / "best").exists()


def test_a_file_of_tensors_has_finite_numbers_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="x was not written: b has numbers that are not finite"):
        write_tensors({"a": torch.zeros(2), "b": torch.tensor([0.0, float("inf")])}, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_damaged_student_is_not_saved(tmp_path: Path) -> None:
    model = load_model(tiny_teacher(tmp_path / "teacher"))
    next(iter(model.denoiser.parameters())).data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        save_model(model.denoiser, model.config, tmp_path / "saved")


@pytest.mark.parametrize("clip", [None, 1.0])
def test_only_the_parameter_whose_gradient_is_not_finite_is_named(clip: float | None) -> None:
    trainer, lost = trainer_of(), Lost()
    trainer.loop.clip, trainer.callbacks = clip, [lost]
    bias = dict(trainer.roles["student"].module.named_parameters())["backbone.layers.0.bias"]
    bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(UserError, match="in a row"):
        trainer.train()
    assert "not the gradient of student.backbone.layers.0.bias" in lost.causes[0]
    assert "other parameters" not in lost.causes[0]
