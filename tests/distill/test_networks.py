"""Students and fake scores that are other networks than their teacher: smaller ones, and other checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import tiny_config, tiny_teacher

import fewstep
from fewstep.api.data import make_ode_pairs
from fewstep.core.errors import UserError
from fewstep.distill.checkpoint import checkpoints
from fewstep.distill.config import Config
from fewstep.distill.config_files import parse_config
from fewstep.distill.explain import explain
from fewstep.distill.memory import plan_memory
from fewstep.distill.run_folder import RunFolder, replay_step
from fewstep.distill.trainer import Trainer
from fewstep.models.loading import Model, load_model, read_config
from fewstep.models.model_config import ModelConfig
from fewstep.models.saving import save_model
from fewstep.models.unet import UNet

CPU = torch.device("cpu")
SMALL = {"small": {"backbone": {"widths": [8], "blocks": [1]}}}
RATE = {"lr": 1e-3}


def config(folder: Path, roles: dict[str, Any] | None = None, objective: Any = None, **changes: Any) -> Config:
    """Twelve steps on the tiny teacher with a student that starts from the network ``small``."""
    standard = {"device": "cpu", "networks": SMALL, "health": {"every": 6}}
    raw: dict[str, Any] = tiny_config(folder, **standard)
    stage = raw["stages"][0]
    stage["roles"]["student"]["init"] = "small"
    for name, role in (roles or {}).items():
        stage["roles"][name] = stage["roles"].get(name, RATE) | role
    stage["objective"] = objective or stage["objective"]
    return parse_config(raw | changes, "test")


def weights(model: Model) -> dict[str, torch.Tensor]:
    return model.denoiser.backbone.state_dict()


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return fewstep.train(config(folder, previews={"every": 6}), progress=False)


def saved(folder: Path, **changes: Any) -> str:
    """Another random model for the tiny teacher's samples."""
    origin = read_config(tiny_teacher(folder / "origin", seed=5))
    other = origin.model_copy(update={"backbone": {"name": "unet", "widths": [8], "blocks": [1]}, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_model(other.build(), other, folder / "other")
    return str(folder / "other")


# --- what a new network is --------------------------------------------------------------------------------------------


def test_a_new_network_has_the_teachers_settings_and_its_tensors_where_they_fit(tmp_path: Path) -> None:
    trainer = Trainer.create(config(tmp_path, networks={"small": {"backbone": {"widths": [8, 24]}}}), device="cpu")
    student, teacher = (trainer.roles.denoiser(name).backbone for name in ("student", "teacher"))
    assert isinstance(student, UNet)
    assert student.time[-1].out_features == 16, "embedding is the teacher's"
    assert [level[-1].out_channels for level in student.down] == [24]
    own, theirs = student.state_dict(), teacher.state_dict()
    equal = {name for name in own if name in theirs and own[name].shape == theirs[name].shape}
    assert "labels.weight" in equal
    assert "mid.0.conv1.weight" not in equal
    assert all(torch.equal(own[name], theirs[name]) for name in equal)
    assert list(trainer.inputs.notes) == [
        f"networks.small: {len(equal)} of {len(own)} tensors were copied from the teacher, the others initialised with "
        "the seed 0."
    ]
    assert set(trainer.roles) == {"teacher", "student", "fake"}, "a network is held by the roles that start from it"
    again = Trainer.create(config(tmp_path, networks={"small": {"backbone": {"widths": [8, 24]}}}), device="cpu")
    assert_same(again.roles.denoiser("student").backbone.state_dict(), own)
    seeded = Trainer.create(
        config(tmp_path, networks={"small": {"backbone": {"widths": [8, 24]}}}, seed=1), device="cpu"
    )
    other = seeded.roles.denoiser("student").backbone.state_dict()
    assert not torch.equal(other["mid.0.conv1.weight"], own["mid.0.conv1.weight"])


def test_a_small_student_of_the_bundled_teacher_learns_its_samples(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.safetensors"
    make_ode_pairs("fashion", pairs, n=16, sampling=fewstep.SamplingConfig("heun", 4), device="cpu")
    settings = {
        "teacher": "fashion", "batch": 8, "data": {"kind": "tensors", "path": str(pairs)},
        "networks": {"small": {"backbone": {"widths": [16, 32], "blocks": [1, 1]}}},
        "stages": [{
            "steps": 12, "objective": {"name": "dmd", "regression": 1.0},
            "roles": {"student": {"init": "small", "lr": 3e-3}, "fake": {"lr": 1e-4}},
        }],
    }  # fmt: skip
    trainer = Trainer.create(Config.model_validate(settings), device="cpu")
    losses = [trainer.advance(step)["loss/regression"] for step in range(1, 13)]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3]), losses
    sizes = [sum(p.numel() for p in trainer.roles.denoiser(name).parameters()) for name in ("student", "teacher")]
    assert 4 * sizes[0] < sizes[1]


# --- what follows from it ---------------------------------------------------------------------------------------------


def test_a_small_student_is_saved_and_reloaded_bit_for_bit(run: Path) -> None:
    model = fewstep.load(run, "cpu")
    assert model.config.backbone == {"name": "unet", "widths": [8], "blocks": [1], "embedding": 16, "heads": 2}
    newest = fewstep.load(checkpoints(run / "checkpoints")[-1], "cpu")
    assert newest.config == model.config
    assert_same(weights(newest), weights(model))
    trainer = RunFolder.reopen(run, CPU).trainer
    with trainer.roles["student"].averaged():
        assert_same(trainer.generator.backbone.state_dict(), weights(model))
    assert fewstep.sample(run, n=3, device="cpu").shape == (3, 1, 8, 8)
    assert [f"step-{n:07d}.png" for n in (6, 12)] == sorted(file.name for file in (run / "previews").iterdir())
    health = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("health/mean_drift" in line for line in health)


def test_resuming_with_a_small_student_equals_not_stopping_bit_for_bit(run: Path, tmp_path: Path) -> None:
    part = shutil.copytree(run, tmp_path / "part")
    for late in checkpoints(part / "checkpoints")[1:]:
        shutil.rmtree(late)
    shutil.rmtree(part / "student")
    fewstep.train(resume=part, progress=False)
    assert_same(weights(fewstep.load(part, "cpu")), weights(fewstep.load(run, "cpu")))
    logged, computed = replay_step(part, 10, CPU)
    assert logged == computed


def test_a_run_is_bound_to_its_networks(tmp_path: Path) -> None:
    other = saved(tmp_path)
    folder = fewstep.train(config(tmp_path, networks={"small": {"checkpoint": other}}), progress=False)
    model = load_model(other)
    next(model.denoiser.parameters()).data += 1
    save_model(model.denoiser, model.config, other)
    with pytest.raises(UserError, match=r"networks\.small had other weights"):
        fewstep.train(resume=folder, progress=False)


def test_experts_of_different_networks_are_saved_and_reloaded(tmp_path: Path) -> None:
    settings = config(tmp_path, objective={"name": "phased_dmd", "steps": 2, "phases": 2}, health={"every": 0})
    folder = fewstep.train(settings, progress=False)
    model, teacher = fewstep.load(folder, "cpu"), load_model(tmp_path / "teacher")
    assert model.config.expert_backbones == (
        {"name": "unet", "widths": [8], "blocks": [1], "embedding": 16, "heads": 2}, teacher.config.backbone,
    )  # fmt: skip
    newest = fewstep.load(checkpoints(folder / "checkpoints")[-1], "cpu")
    assert newest.config == model.config
    assert_same(weights(newest), weights(model))
    x, condition = torch.randn(2, 1, 8, 8), fewstep.Condition.of_labels(torch.tensor([1, 2]), 10)
    assert torch.equal(model.denoiser(x, 0.1, condition).x0, teacher.denoiser(x, 0.1, condition).x0)
    assert not torch.equal(model.denoiser(x, 0.9, condition).x0, teacher.denoiser(x, 0.9, condition).x0)


def test_later_stages_start_from_networks_and_keep_them(tmp_path: Path) -> None:
    second = {"objective": {"name": "phased_dmd", "steps": 2, "phases": 2, "phase": 2}, "steps": 2}
    first = {"objective": {"name": "phased_dmd", "steps": 2, "phases": 2, "phase": 1}, "steps": 2}
    roles = {"student": RATE | {"init": "small"}, "fake": RATE}
    stages = [first | {"roles": roles}, second | {"roles": roles, "freeze": {"expert1": "student"}}]
    for offload in (False, True):
        settings = config(tmp_path / str(offload), stages=stages, offload=offload)
        folder = fewstep.train(settings, progress=False)
        assert [settings.origins(1)[role] for role in ("expert1", "student", "fake")] == ["small", "small", "teacher"]
    model = fewstep.load(folder, "cpu")
    assert model.config.expert_backbones is None, "both experts are small"
    assert_same(weights(model), weights(fewstep.load(tmp_path / "False" / "run", "cpu")))


def test_a_frozen_copy_of_a_network_is_the_reference_of_preferences(tmp_path: Path) -> None:
    from fewstep.core.files import write_tensors

    samples = {name: torch.randn(20, 1, 8, 8) for name in ("winner", "loser")} | {"labels": torch.arange(20) % 10}
    write_tensors(samples, tmp_path / "pairs.safetensors")
    stage = {"steps": 2, "objective": "diffusion_dpo", "freeze": {"reference": "small"},
             "roles": {"student": RATE | {"init": "small"}}}  # fmt: skip
    data = {"kind": "tensors", "path": str(tmp_path / "pairs.safetensors")}
    trainer = Trainer.create(config(tmp_path, stages=[stage], data=data), device="cpu")
    assert trainer.advance(1)["loss/dpo"] == pytest.approx(0.6931, abs=1e-3), "student and reference are equal at first"
    student, reference = (trainer.roles.denoiser(name).backbone.enter.weight for name in ("student", "reference"))
    assert not torch.equal(student, reference), "each role has its own copy"


# --- schedules and features -------------------------------------------------------------------------------------------


def test_a_student_with_its_own_schedule_is_distilled_and_sampled_by_it(tmp_path: Path) -> None:
    own = {"noise_schedule": {"name": "vp_linear"}, "prediction": "noise"}
    networks = {"small": {"checkpoint": saved(tmp_path, **own)}}
    settings = config(tmp_path, objective={"name": "dmd2", "steps": 2}, networks=networks)
    folder = fewstep.train(settings, progress=False)
    model = fewstep.load(folder, "cpu")
    assert (model.config.noise_schedule["name"], model.config.prediction) == ("vp_linear", "noise")
    assert fewstep.sample(folder, n=2, device="cpu").shape == (2, 1, 8, 8)
    for objective in ({"name": "tdm", "steps": 2}, {"name": "decoupled_dmd", "steps": 2}, {"name": "dmd"}):
        with pytest.raises(UserError, match=r"one noise schedule for all roles, but that of student is VPLinear"):
            Trainer.create(config(tmp_path, objective=objective | {"regression": 0.0} if objective == {"name": "dmd"}
                                  else objective, networks=networks), device="cpu")  # fmt: skip
    fake = config(tmp_path, {"student": {"init": "teacher"}, "fake": {"init": "small"}},
                  {"name": "dmd2", "steps": 2}, networks=networks)  # fmt: skip
    with pytest.raises(UserError, match="that of fake is VPLinear"):
        Trainer.create(fake, device="cpu")


def test_another_prediction_type_is_no_other_schedule(tmp_path: Path) -> None:
    networks = {"small": {"checkpoint": saved(tmp_path, prediction="x0")}}
    roles = {"fake": {"init": "small"}}
    trainer = Trainer.create(config(tmp_path, roles, networks=networks), device="cpu")
    assert trainer.student_config.prediction == "x0"
    assert torch.isfinite(torch.tensor(list(trainer.advance(2).values()))).all()
    phased = config(tmp_path, objective={"name": "phased_dmd", "steps": 2}, networks=networks)
    with pytest.raises(UserError, match="student and teacher predict different quantities, x0 and velocity"):
        Trainer.create(phased, device="cpu")


def test_a_small_fake_has_no_features_for_a_discriminator(tmp_path: Path) -> None:
    settings = config(tmp_path, {"fake": {"init": "small"}, "discriminator": {"init": "new"}},
                      {"name": "dmd2", "steps": 2, "gan": {}})  # fmt: skip
    with pytest.raises(UserError, match=r"stages\.0\.roles\.fake: .* 'dmd2' uses features .* 'small'"):
        explain(settings)
    gan = {"name": "dmd2", "steps": 2, "gan": {"features": "teacher"}, "critic_updates": 1}
    settings = config(tmp_path, {"fake": {"init": "small"}, "discriminator": {"init": "new"}}, gan)
    assert explain(settings)[0].updates[1].roles == ("fake", "discriminator")


# --- planning ---------------------------------------------------------------------------------------------------------


def test_memory_is_planned_with_the_weights_of_the_small_student(tmp_path: Path) -> None:
    settings = config(tmp_path, {"fake": {"init": "other"}},
                      networks=SMALL | {"other": {"checkpoint": saved(tmp_path)}})  # fmt: skip
    plan = plan_memory(settings)
    trainer = Trainer.create(settings, device="cpu")
    for name in ("teacher", "student", "fake"):
        own = 4 * sum(p.numel() for p in trainer.roles.denoiser(name).parameters())
        assert plan.roles[name].weights == own
    assert plan.roles["student"].weights < plan.roles["teacher"].weights / 2
    teacher = plan_memory(config(tmp_path, {"student": {"init": "teacher"}, "fake": {"init": "small"}}))
    assert teacher.roles["student"].weights == plan.roles["teacher"].weights


def test_explain_counts_the_same_evaluations(tmp_path: Path) -> None:
    plain = parse_config(tiny_config(tmp_path), "test")
    assert explain(config(tmp_path))[0].evaluations_per_step == explain(plain)[0].evaluations_per_step


def test_with_adapters_a_small_student_is_a_network_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"stages\.0\.roles\.student\.init = 'small'.* set full_finetune: true"):
        config(tmp_path, adapters={"rank": 2})
    settings = config(tmp_path, {"student": {"full_finetune": True}}, adapters={"rank": 2})
    folder = fewstep.train(settings, progress=False)
    model = fewstep.load(folder, "cpu")
    assert (model.config.lora, model.config.base, model.config.backbone["widths"]) == (None, None, [8])
    newest = fewstep.load(checkpoints(folder / "checkpoints")[-1], "cpu")
    assert_same(weights(newest), weights(model))
    assert plan_memory(settings).roles["student"].weights == sum(value.nbytes for value in weights(model).values())
    phased = config(tmp_path, {"student": {"full_finetune": True}}, {"name": "phased_dmd", "steps": 2},
                    adapters={"rank": 2})  # fmt: skip
    with pytest.raises(UserError, match="Of the experts student, teacher, teacher are the network that adapters share"):
        Trainer.create(phased, device="cpu")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (1, 4, 4)}, r"networks\.small: its shape: \[1, 4, 4\], the teacher's: \[1, 8, 8\]"),
        ({"classes": 5}, r"networks\.small: its number of classes: 5, the teacher's: 10"),
        ({"classes": 0}, r"networks\.small: its condition: none, the teacher's: class labels"),
        ({"boundaries": (0.5, 0.0)}, r"networks\.small: it has several experts"),
    ],
)
def test_a_checkpoint_of_other_samples_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    networks = {"small": {"checkpoint": saved(tmp_path, **changes)}}
    with pytest.raises(UserError, match=message):
        Trainer.create(config(tmp_path, networks=networks), device="cpu")


def test_a_checkpoint_of_other_class_names_is_refused(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    named = read_config(teacher).model_dump() | {"class_names": list("abcdefghij")}
    (teacher / "config.json").write_text(ModelConfig.model_validate(named).model_dump_json(exclude_none=True))
    networks = {"small": {"checkpoint": saved(tmp_path, class_names=tuple("bacdefghij"))}}
    with pytest.raises(UserError, match=r"its class_names: \['b', 'a'"):
        Trainer.create(config(tmp_path, networks=networks), device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": {"small": {}}}, r"networks\.small.*give either checkpoint .* or backbone"),
        ({"networks": {"small": {"backbone": {}, "checkpoint": "x"}}}, "give either checkpoint"),
        ({"networks": SMALL | {"unused": SMALL["small"]}}, r"networks\.unused: no role starts from it"),
        ({"networks": SMALL | {"fake": SMALL["small"]}}, r"networks\.fake: roles and values of init have this name"),
        ({"networks": {"smal": SMALL["small"]}}, r"networks\.smal: no role starts from it"),
        (
            {"teacher": None, "model": {"backbone": {"name": "unet"}, "shape": [1, 8, 8]}},
            "networks are for a teacher's",
        ),
    ],
)
def test_networks_that_do_not_fit_the_config_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"width": [8]}, r"networks\.small: Cannot build a network .*'width'"),
        ({"widths": [8, 8, 8]}, r"networks\.small: Cannot build a network"),
        ({"name": "unets"}, r"networks\.small: Unknown backbone 'unets'; did you mean 'unet'"),
    ],
)
def test_settings_of_no_network_are_refused(tmp_path: Path, backbone: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer.create(config(tmp_path, networks={"small": {"backbone": backbone}}), device="cpu")


def test_a_role_that_starts_from_no_network_is_told_the_networks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'fake' starts from 'smal'.*did you mean 'small'"):
        Trainer.create(config(tmp_path, {"fake": {"init": "smal"}}), device="cpu")


def test_different_networks_cannot_be_blended(tmp_path: Path) -> None:
    objective = {"name": "cdm", "max_steps": 2, "blend": 1e-3}
    with pytest.raises(UserError, match="blend interpolates fake and student, but these are different networks"):
        Trainer.create(config(tmp_path, objective=objective), device="cpu")
    trainer = Trainer.create(config(tmp_path, {"fake": {"init": "small"}}, objective), device="cpu")
    assert "loss/critic" in trainer.advance(2)
