"""The trainer: counts, learning rates, several processes, and training in Python without a run folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import settings
from worlds import Points, mlp, tiny_config, write_idx

from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill import build, matching
from fewstep.distill.build import build_inputs
from fewstep.distill.callback import Callback
from fewstep.distill.config import Config
from fewstep.distill.config_files import parse_config
from fewstep.distill.data.batch import Batch
from fewstep.distill.explain import evaluations_of
from fewstep.distill.processes import World
from fewstep.distill.trainer import Trainer
from fewstep.models.condition import Condition
from fewstep.models.loading import load_model

CPU = torch.device("cpu")


def trainer_of(raw: dict[str, object], callbacks: tuple[Callback, ...] = ()) -> Trainer:
    config = parse_config(raw, "test")
    return Trainer(config, build_inputs(config, CPU), CPU, callbacks=callbacks)


def test_evaluations_are_counted_as_the_networks_receive_them(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path)
    raw["stages"][0]["objective"]["guidance"] = 2.0  # type: ignore[index]
    trainer = trainer_of(raw)
    calls = evaluations_of(trainer.roles, lambda: trainer.advance(3))
    assert trainer.evaluations == sum(len(call.x) for call in calls) > 0
    assert any(len(call.x) == 2 * trainer.config.batch for call in calls), "guided evaluations are among them"


def test_a_cosine_ends_at_zero_for_a_role_with_fewer_updates_too(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path)
    stage = raw["stages"][0]  # type: ignore[index]
    stage["objective"]["critic_updates"] = 3
    for role in stage["roles"].values():
        role["lr_schedule"] = "cosine"
    trainer = trainer_of(raw)
    trainer.train()
    assert (trainer.roles["student"].updates, trainer.roles["fake"].updates) == (4, 12)
    for name in ("student", "fake"):
        role = trainer.roles[name]
        assert role.lr_factor(role.updates) == pytest.approx(0)
        assert role.lr_factor(0) == 1


class Recorder(Callback):
    """Records the events of training in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def on_log(self, trainer: Trainer, values: dict[str, float]) -> None:
        assert "loss/match" in values
        self.events.append(("log", trainer.step))

    def on_step(self, trainer: Trainer) -> None:
        self.events.append(("step", trainer.step))

    def on_validation(self, trainer: Trainer, value: float) -> None:
        self.events.append(("validation", trainer.step))

    def on_checkpoint(self, trainer: Trainer) -> None:
        self.events.append(("checkpoint", trainer.step))

    def on_end(self, trainer: Trainer) -> None:
        self.events.append(("end", trainer.step))


def test_callbacks_receive_every_event_in_order(tmp_path: Path) -> None:
    recorder = Recorder()
    raw = tiny_config(tmp_path, log_every=2, checkpoint={"every": 4}, validation={"every": 3})
    raw["stages"][0]["steps"] = 4  # type: ignore[index]
    trainer = trainer_of(raw, (recorder,))
    trainer.validate = lambda student, config, step: 1.0
    trainer.train()
    assert recorder.events == [
        ("step", 1),
        ("log", 2), ("step", 2),
        ("step", 3), ("validation", 3),
        ("log", 4), ("step", 4), ("validation", 4), ("checkpoint", 4), ("end", 4),
    ]  # fmt: skip
    assert not (tmp_path / "run").exists(), "a trainer writes no files"


def test_a_trainer_accepts_a_denoiser_and_a_source_without_any_file() -> None:
    recorder = Recorder()
    roles = {"student": {"lr": 1e-3}, "fake": {"lr": 1e-3}}
    stage = {"steps": 3, "objective": {"name": "dmd2", "guidance": 1.0, "critic_updates": 1}, "roles": roles}
    config = parse_config({"batch": 8, "log_every": 1, "health": {"every": 2}, "stages": [stage]}, "test")
    trainer = Trainer.create(config, teacher=mlp(4, seed=0), data=Points(4), callbacks=[recorder], device="cpu")
    trainer.train()
    assert recorder.events[-1] == ("end", 3)
    assert trainer.student.config.shape == (4,)
    assert trainer.student.config.few_step is not None


def own_run(**changes: object) -> Config:
    """Three steps of a one-step DMD2 whose teacher and data are Python objects."""
    roles = {"student": {"lr": 1e-3}, "fake": {"lr": 1e-3}}
    stage = {"steps": 3, "objective": {"name": "dmd2", "guidance": 1.0, "critic_updates": 1}, "roles": roles}
    return parse_config({"batch": 8, "health": {"every": 0}, "stages": [stage], **changes}, "test")


def test_an_own_teacher_is_copied_evaluated_in_eval_mode_and_its_copies_learn() -> None:
    teacher = mlp(4, seed=0).train().requires_grad_(False)
    trainer = Trainer.create(own_run(), teacher=teacher, data=Points(4), device="cpu")
    start = [p.clone() for p in trainer.roles["student"].parameters]
    trainer.train()
    assert teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert trainer.roles["teacher"].module is not teacher
    assert not trainer.roles["teacher"].module.training
    assert any(not torch.equal(a, b) for a, b in zip(start, trainer.roles["student"].parameters, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "fashion"}, "names a teacher, and teacher=... is given as well"),
        ({"adapters": {"rank": 2}}, "must therefore have a name: register your teacher"),
    ],
)
def test_an_own_teacher_that_contradicts_the_config_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer.create(own_run(**changes), teacher=mlp(4, seed=0), data=Points(4), device="cpu")


@pytest.mark.parametrize("tensors", [{}, {"x0": (8, 6)}])
def test_own_data_of_another_shape_is_refused(tmp_path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    def source(random: KeyedRandom, size: int) -> Batch:
        shape = (1, 8, 8) if tensors else (3, 8, 8)
        labels = torch.zeros(size, dtype=torch.long)
        extra = {name: torch.zeros(size, 1, *shape) for name, shape in tensors.items()}
        return Batch(size, shape, Condition({"labels": labels}, {"labels": 10}), extra)

    config = parse_config(tiny_config(tmp_path), "test")
    with pytest.raises(UserError, match=r"does not fit the network: its samples|does not fit the network: x0"):
        Trainer.create(config, data=source, device="cpu")


def test_a_short_run_that_diverges_ends_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "surrogate_loss", lambda x, *rest: (x * torch.nan).mean())
    trainer = Trainer.create(own_run(), teacher=mlp(4, seed=0), data=Points(4), device="cpu")
    with pytest.raises(UserError, match=r"'student' of step 3 was not applied: loss/match is nan.*3 times in a row"):
        trainer.train()


def test_the_best_validation_is_that_of_the_current_stage(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path, validation={"every": 1})
    raw["stages"] = [raw["stages"][0] | {"steps": 2}] * 2  # type: ignore[index]
    trainer = trainer_of(raw)
    trainer.validate = lambda student, config, step: float(step)
    trainer.train()
    assert trainer.best == {"value": 3.0, "step": 3}, "step 1 was better, but belongs to the first stage"


class ThreeTimes(World):
    """A process among others that evaluate as much."""

    def total(self, number: int) -> int:
        return 3 * number


def test_evaluations_are_those_of_all_processes(tmp_path: Path) -> None:
    one, two = trainer_of(tiny_config(tmp_path)), trainer_of(tiny_config(tmp_path))
    two.world = ThreeTimes(0, 1)
    one.advance(2)
    two.advance(2)
    assert two.evaluations == 3 * one.evaluations > 0


def test_new_networks_depend_on_the_seed_alone(tmp_path: Path) -> None:
    def heads(seed: int, before: int) -> list[torch.Tensor]:
        torch.manual_seed(before)
        raw = settings("f_distill", tmp_path, "cpu", "float32") | {"seed": seed}
        return trainer_of(raw).roles["discriminator"].parameters

    first = heads(1, before=1)
    assert all(torch.equal(a, b) for a, b in zip(first, heads(1, before=2), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, heads(2, before=1), strict=True))


def test_the_features_of_an_own_teacher_are_recorded(tmp_path: Path) -> None:
    raw = settings("f_distill", tmp_path, "cpu", "float32")
    teacher = load_model(str(raw["teacher"]))
    Trainer.create(parse_config(raw | {"teacher": None}, "test"), teacher=teacher, device="cpu").advance(1)


def test_labels_beyond_the_classes_of_the_model_are_refused(tmp_path: Path) -> None:
    raw = settings("f_distill", tmp_path, "cpu", "float32")
    write_idx(tmp_path, torch.zeros(10, 8, 8, dtype=torch.uint8), torch.full((10,), 10, dtype=torch.uint8), "train")
    with pytest.raises(UserError, match=r"row 1: its label \(label\) is 10, .* model's classes, 0 to 9"):
        trainer_of(raw)


def test_the_attention_of_the_config_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[object] = []
    monkeypatch.setattr(build, "set_attention", lambda backbone, name, *_: chosen.append((backbone, name)))
    trainer = trainer_of(tiny_config(tmp_path, attention="math"))
    assert chosen == [(trainer.roles.denoiser("teacher").backbone, "math")]
