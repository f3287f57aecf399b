"""Configs: the round trip through YAML, and messages that name file, key, value and the nearest or the new key."""

from __future__ import annotations

from collections.abc import Iterator
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
from fewstep.distill.objectives import OBJECTIVES
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
        ({"steps": 3}, "unknown key 'steps'; it is a key of a stage, such as 'stages.0.steps'"),
        ({"batch": 0}, "batch = 0: input should be greater than or equal to 1"),
        ({"batch": "many"}, "batch = 'many': input should be a valid integer"),
        ({"batch": True}, "batch = True: input should be a number, neither a text nor a truth value"),
        ({"batch": "3"}, "batch = '3': input should be a number, neither a text nor a truth value"),
        ({"batch": 10**12}, "batch = 1000000000000: input should be less than or equal to 1000000"),
        ({"offload": "yes"}, "offload = 'yes': input should be true or false"),
        ({"offload": 1}, "offload = 1: input should be true or false"),
        ({"seed": -1}, "seed = -1: input should be greater than or equal to 0"),
        ({"size": [64, 0, 1]}, "size.1 = 0: input should be greater than or equal to 1"),
        ({"size": [64, True, 1]}, "size = [64, True, 1]: input should be a number"),
        ({"validation": {"guidance": float("nan")}}, "validation.guidance = nan: input should be a finite number"),
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
        (("roles", "student", "lr"), float("nan"), "stages.0.roles.student.lr = nan: input should be a finite number"),
        (("roles", "student", "lr"), float("inf"), "stages.0.roles.student.lr = inf: input should be a finite number"),
        (("roles", "student", "betas"), [0.9, 5], "stages.0.roles.student.betas.1 = 5: input should be less than 1"),
        (
            ("roles", "student", "betas"),
            [False, 0.9],
            "stages.0.roles.student.betas = [False, 0.9]: input sh",
        ),
        (("objective", "guidance"), "2", "stages.0.objective.guidance = '2': input should be a number"),
        (("objective", "guidance"), -1.0, "stages.0.objective.guidance = -1.0: input should be greater than or equal"),
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
    ("name", "value"),
    [("base", "fashion"), ("base_sha256", "00"), ("lora", {"rank": 2, "alpha": 2.0, "targets": ["a"]}),
     ("precision", "bfloat16"), ("base_weights", "bfloat16")],
)  # fmt: skip
def test_what_describes_a_trained_model_is_refused_for_a_new_one(tmp_path: Path, name: str, value: Any) -> None:
    """None of these has an effect on a network that is created; the run's precision is a setting of its own."""
    model = {"backbone": {"name": "unet"}, "shape": [1, 8, 8], "classes": 10}
    parse_config(tiny_config(tmp_path, teacher=None, model=model), "a.yaml")
    with pytest.raises(UserError, match=rf"model\.{name} describes a trained model, not a new one"):
        parse_config(tiny_config(tmp_path, teacher=None, model=model | {name: value}), "a.yaml")


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


def bounds(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, bool, bool]]:
    """Every number in a JSON schema, and whether it has a lower and an upper bound."""
    if schema.get("type") in ("integer", "number"):
        lower, upper = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
        yield path, any(name in schema for name in lower), any(name in schema for name in upper)
    for name, value in schema.items():
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, dict):
                yield from bounds(node, f"{path}/{name}")


def test_every_number_of_every_config_has_a_range() -> None:
    classes = [Config, *map(OBJECTIVES.resolve, OBJECTIVES.names())]
    numbers = [number for cls in classes for number in bounds(cls.model_json_schema(), cls.__name__)]
    assert len(numbers) > 60
    assert [path for path, lower, upper in numbers if not (lower and upper)] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "must contain a mapping of settings, key: value; it is empty"),
        (b"- 1", "must contain a mapping of settings, key: value; it contains a list"),
        (b"seed: 1\nseed: 2", "line 2: the key 'seed' is repeated"),
        (b"seed: \xff", "is not a readable YAML file"),
        (b"seed: 2020-13-45", "seed = '2020-13-45': input should be a valid integer"),
        (b"batch: 1:30", "batch = '1:30': input should be a valid integer"),
        (b"batch: 1_000", "batch = '1_000': input should be a number, neither"),
        (b"1: 2", "unknown key '1'"),
    ],
)
def test_files_that_are_not_configs_are_named(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "run.yaml").write_bytes(text)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "run.yaml")
    assert f"{tmp_path / 'run.yaml'}" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=[1", "The override 'seed=[1' is not valid YAML: line 1"),
        ("seed=yes", "the override 'seed=yes': seed = 'yes': input should be a valid integer"),
        ("stages.x.steps=1", "stages is a list of 1; give the number of an item"),
        ("stages.7=1", "stages is a list of 1; give the number of an item"),
        ("seed.a.b=1", "seed is a single value without keys"),
    ],
)
def test_overrides_that_do_not_fit_are_named(tmp_path: Path, override: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(dump_config(parse_config(tiny_config(tmp_path), "test")))
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "a.yaml", [override])
    assert message in str(caught.value)


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
