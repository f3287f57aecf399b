"""``explain``: equations, updates and evaluations of a config whose files do not exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import tiny_config

from fewstep.core.errors import UserError
from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import parse_config
from fewstep.distill.explain import explain
from fewstep.distill.objectives import OBJECTIVES
from fewstep.distill.trainer import Trainer

FILES_THAT_DO_NOT_EXIST: dict[str, Any] = {
    "teacher": "no/such/teacher", "data": {"kind": "prompts", "path": "no/such/prompts"}, "weights": "bfloat16",
}  # fmt: skip


def config_of(objective: dict[str, Any], *roles: str, **changes: object) -> Any:
    stage = {"steps": 9, "objective": objective, "roles": {role: {"lr": 1e-5} for role in roles}}
    return parse_config({**FILES_THAT_DO_NOT_EXIST, "stages": [stage], **changes}, "test")


def test_a_config_is_explained_without_any_file() -> None:
    config = config_of({"name": "dmd2", "steps": 1, "guidance": 3.0, "critic_updates": 4}, "student", "fake")
    (stage,) = explain(config)
    assert "min E | F(x_t) - x |^2" in stage.text
    student, fake = stage.updates
    assert student.evaluations == {"student": (0, 1), "teacher": (2, 0), "fake": (1, 0)}, "guidance counts twice"
    assert fake.evaluations["fake"] == (0, 1)
    assert (student.due.n, student.share, fake.share) == (4, 0.25, 1.0)
    # the student's sample of a step is generated once, by whichever update comes first
    assert stage.evaluations_per_step == pytest.approx(0.25 * 4 + 1 + 0.75)


def test_the_evaluations_are_those_of_training(tmp_path: Path) -> None:
    """With one step per rollout nothing is random, so that the counts agree exactly."""
    raw: dict[str, Any] = tiny_config(tmp_path, health={"every": 0})
    raw["stages"][0]["objective"] = {"name": "tdm", "steps": 1, "critic_updates": 3}
    config = parse_config(raw, "test")
    cpu = torch.device("cpu")
    trainer = Trainer(config, build_inputs(config, cpu), cpu)
    trainer.train()
    expected = explain(config)[0].evaluations_per_step * config.steps * config.batch
    assert trainer.evaluations == pytest.approx(expected)


def test_settings_that_are_published_or_changed_are_listed() -> None:
    config = config_of({"name": "dmd2", "guidance": 3.0, "shift": 2.0}, "student", "fake", batch=16, accumulate=2)
    rows = {name: rest for name, *rest in explain(config)[0].settings}
    assert rows["guidance"] == ["3.0", "2.0", OBJECTIVES.resolve("dmd2").published["guidance"]]
    assert rows["shift"] == ["2.0", "1.0", ""]
    assert rows["batch"][0] == "32"
    assert rows["student.lr"][0] == "1e-05"
    assert not {"name", "renoise_times", "critic_times"} & set(rows)


def test_a_pretraining_config_and_several_stages_are_explained() -> None:
    model = {
        "backbone": {"name": "unet", "widths": [8], "blocks": [1], "embedding": 8},
        "shape": [1, 8, 8],
        "classes": 2,
    }
    config = parse_config(
        {
            "model": model,
            "data": {"kind": "idx", "path": "no/such/folder"},
            "stages": [
                {"steps": 2, "objective": "flow_matching", "roles": {"student": {"init": "model", "lr": 1e-3}}},
                {"steps": 2, "objective": "flow_matching", "roles": {"student": {"init": "student", "lr": 1e-4}}},
            ],
        },
        "test",
    )
    stages = explain(config)
    assert [stage.evaluations_per_step for stage in stages] == [1.0, 1.0]
    assert stages[0].as_dict()["updates"][0] == {
        "name": "student", "roles": ("student",), "due": 1, "share": 1.0, "evaluations": {"student": (0.0, 1.0)},
    }  # fmt: skip


def test_a_missing_role_is_refused_as_in_training() -> None:
    with pytest.raises(UserError, match=r"needs the roles .*but \['fake'\] is missing"):
        explain(config_of({"name": "dmd2"}, "student"))
