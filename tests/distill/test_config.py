"""Configs: the round trip through YAML, and messages that name file, key, value and the nearest or the new key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from worlds import tiny_config

import fewstep
from fewstep.core.errors import UserError
from fewstep.distill.build import build_inputs
from fewstep.distill.config import Config
from fewstep.distill.config_files import dump_config, load_config, parse_config
from fewstep.distill.objectives.dmd2 import DMD2
from fewstep.distill.trainer import Trainer

CPU = torch.device("cpu")


def with_value(raw: dict[str, Any], path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    """The settings with one value below the first stage changed or added."""
    node = raw["stages"][0]
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return raw


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(raw, "a.yaml")
    return str(caught.value)


def test_a_config_survives_the_round_trip_through_yaml(tmp_path: Path) -> None:
    config = parse_config(tiny_config(tmp_path), "test")
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bach": 3}, "unknown key 'bach'; did you mean 'batch'"),
        ({"batch": 0}, "batch = 0: input should be greater than or equal to 1"),
        ({"batch": "many"}, "batch = 'many': input should be a valid integer"),
        ({"stages": []}, "stages = []: tuple should have at least 1 item"),
    ],
)
def test_mistakes_name_key_value_and_the_nearest_key(tmp_path: Path, change: dict[str, object], message: str) -> None:
    assert f"a.yaml: {message}" in refusal(tiny_config(tmp_path, **change))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("objective", "guidence"), 3.0, "unknown key 'stages.0.objective.guidence'; did you mean 'guidance'"),
        (("objective", "name"), "tmd", "stages.0.objective.name: Unknown objective 'tmd'; did you mean 'tdm'"),
        (("objective", "steps"), 0, "stages.0.objective.steps = 0: input should be greater"),
        (("roles", "student", "learning_rate"), 1, "unknown key 'stages.0.roles.student.learning_rate'"),
        (("roles", "student", "lr"), -1, "stages.0.roles.student.lr = -1"),
    ],
)
def test_mistakes_below_the_stages_are_one_line_each(
    tmp_path: Path, path: tuple[str, ...], value: object, message: str
) -> None:
    """A stage with a mistake does not also count as a missing one."""
    lines = refusal(with_value(tiny_config(tmp_path), path, value)).splitlines()
    assert len(lines) == 1
    assert f"a.yaml: {message}" in lines[0]


@pytest.mark.parametrize(
    ("path", "value", "new"),
    [
        (("roles", "student", "decay"), "cosine", "lr_schedule"),
        (("roles", "student", "whole"), True, "full_finetune"),
        (("objective", "times"), "nested", "renoise_times"),
        (("objective",), {"name": "diffusion_dpo", "times": [1.0]}, "student_times"),
        (("objective",), {"name": "phased_dmd", "pull": "x_s"}, "match_on"),
        (("objective",), {"name": "f_distill", "heads": ["auto"]}, "feature_layers"),
        (("objective",), {"name": "dmd2", "gan": {"taps": ["auto"]}}, "feature_layers"),
    ],
)
def test_a_renamed_key_is_answered_with_its_new_name(
    tmp_path: Path, path: tuple[str, ...], value: object, new: str
) -> None:
    assert f"; it is now called '{new}'." in refusal(with_value(tiny_config(tmp_path), path, value))


def test_a_renamed_key_of_the_validation_is_answered_with_its_new_name(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path, validation={"pictures": 4})
    assert "unknown key 'validation.pictures'; it is now called 'images'." in refusal(raw)


def test_a_mistake_in_an_override_names_the_override(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(dump_config(parse_config(tiny_config(tmp_path), "test")))
    with pytest.raises(UserError, match=r"the override 'stages\.0\.steps=none': stages\.0\.steps = 'none'"):
        load_config(tmp_path / "a.yaml", ["stages.0.steps=none"])


def test_a_run_without_teacher_or_model_is_refused(tmp_path: Path) -> None:
    config = parse_config(tiny_config(tmp_path, teacher=None), "a.yaml")
    with pytest.raises(UserError, match=r"neither teacher \(to distil\) nor model"):
        build_inputs(config, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda roles: roles.pop("fake"), r"needs the roles .*but \['fake'\] is missing"),
        (lambda roles: roles["student"].update(init="techer"), r"starts from 'techer'.*did you mean 'teacher'"),
        (lambda roles: roles["student"].update(init="new"), "creates no network 'student'.*change its init"),
    ],
)
def test_missing_and_unknown_roles_are_named(tmp_path: Path, change: Any, message: str) -> None:
    raw: Any = tiny_config(tmp_path)
    change(raw["stages"][0]["roles"])
    config = parse_config(raw, "a.yaml")
    with pytest.raises(UserError, match=message):
        Trainer(config, build_inputs(config, CPU), CPU)


def test_an_override_changes_its_key_alone_not_what_shares_a_yaml_anchor(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "teacher: fashion\nstages:\n- steps: 1\n  objective: dmd2\n"
        "  roles: {student: &role {lr: 1.0e-3}, fake: *role}\n"
    )
    roles = load_config(file, ["stages.0.roles.student.lr=0.5"]).stages[0].roles
    assert (roles["student"].lr, roles["fake"].lr) == (0.5, 1e-3)


def test_a_config_from_a_mapping_has_objectives_of_their_own_class() -> None:
    stage = {"steps": 1, "objective": {"name": "dmd2", "steps": 2}, "roles": {}}
    (made,) = Config.model_validate({"teacher": "fashion", "stages": [stage]}).stages
    assert made.objective == DMD2(steps=2)
    with pytest.raises(ValidationError, match="stpes"):
        Config.model_validate({"stages": [{**stage, "objective": {"name": "dmd2", "stpes": 2}}]})
    with pytest.raises(UserError, match="Unknown objective 'dmd3'; did you mean 'dmd"):
        Config.model_validate({"stages": [{**stage, "objective": "dmd3"}]})


def test_overrides_beside_a_config_object_are_refused(tmp_path: Path) -> None:
    config = parse_config(tiny_config(tmp_path), "test")
    with pytest.raises(UserError, match="'seed=7' are for a config file"):
        fewstep.train(config, "seed=7")
