"""A user's own objective and data source, named in a config as ``module:attribute``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import own_objective
import pytest
import torch
import yaml
from own_objective import Labelled, Shrink
from worlds import tiny_config

from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import dump_config, load_config, parse_config
from fewstep.distill.explain import explain
from fewstep.distill.run_folder import RunFolder, run_config
from fewstep.distill.stage import StageContext

CPU = torch.device("cpu")


def own_config(folder: Path, steps: tuple[int, ...] = (3,), **changes: object) -> dict[str, Any]:
    """Stages of the user's own objective."""
    objective = {"name": "own_objective:Shrink", "strength": 0.5}
    stages = [
        {"steps": n, "objective": objective, "roles": {"student": {"init": "student" if k else "teacher", "lr": 1e-3}}}
        for k, n in enumerate(steps)
    ]
    return tiny_config(folder, stages=stages, health={"every": 0}, **changes)


def test_an_objective_with_a_dotted_name_trains_and_survives_yaml(tmp_path: Path) -> None:
    config = parse_config(own_config(tmp_path, checkpoint={"every": 2}), "test")
    assert config.stages[0].objective == Shrink(strength=0.5)
    assert config.stages[0].objective.name == "own_objective:Shrink"
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    RunFolder.create(config, CPU).train()
    losses = [json.loads(line)["loss/shrink"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] > losses[-1] > 0
    assert RunFolder.reopen(tmp_path / "run", CPU, before=2).trainer.step == 2


def test_the_settings_of_an_own_objective_are_checked_by_its_class(tmp_path: Path) -> None:
    raw = own_config(tmp_path)
    raw["stages"][0]["objective"] = {"name": "own_objective:Shrink", "strenght": 1.0}
    with pytest.raises(UserError) as caught:
        parse_config(raw, "a.yaml")
    assert str(caught.value).splitlines() == [
        "a.yaml: the key 'stages.0.objective.strength' is missing.",
        "a.yaml: unknown key 'stages.0.objective.strenght'; did you mean 'strength'? (known: name, strength).",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_objective:Missing", "cannot be imported"),
        ("no_such_module:Shrink", "cannot be imported"),
        ("own_objective:Labelled", "is not a subclass of fewstep.distill.stage.ObjectiveConfig"),
    ],
)
def test_a_dotted_name_that_is_no_objective_is_refused(tmp_path: Path, name: str, message: str) -> None:
    raw = own_config(tmp_path)
    raw["stages"][0]["objective"] = {"name": name}
    with pytest.raises(UserError, match=message):
        parse_config(raw, "a.yaml")


def test_an_objective_receives_the_first_step_and_the_length_of_its_stage(tmp_path: Path) -> None:
    own_objective.built.clear()
    RunFolder.create(parse_config(own_config(tmp_path, (3, 2)), "test"), CPU).train()
    assert own_objective.built == [StageContext(0, 0, 3), StageContext(1, 3, 2)]


def test_an_own_objective_with_a_required_setting_is_explained(tmp_path: Path) -> None:
    (stage,) = explain(parse_config(own_config(tmp_path), "test"))
    assert stage.text == "Shrinks what the student predicts: min strength |x0|^2."
    assert [(update.name, update.evaluations) for update in stage.updates] == [("student", {"student": (0.0, 1.0)})]


def test_a_data_source_with_a_dotted_name_receives_its_options(tmp_path: Path) -> None:
    config = parse_config(
        tiny_config(tmp_path, data={"kind": "own_objective:Labelled", "options": {"label": 7}}), "test"
    )
    source = build_inputs(config, CPU).sources["data"]
    assert isinstance(source, Labelled)
    assert source(KeyedRandom(0, 0, "data", 0), 3).condition["labels"].tolist() == [7, 7, 7]
    RunFolder.create(config, CPU).train()
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"kind": "own_objective:Labelled", "options": {"lable": 7}},
            "data.options do not fit 'own_objective:Labelled'",
        ),
        ({"kind": "own_objective:Missing"}, "'own_objective:Missing' cannot be imported"),
    ],
)
def test_an_own_source_that_cannot_be_created_is_named(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    config = parse_config(tiny_config(tmp_path, data=data), "test")
    with pytest.raises(UserError, match=message):
        build_inputs(config, CPU)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "lables"}, "unknown kind; did you mean 'labels'"),
        ({"kind": "labels", "options": {"label": 7}}, "options are for your own sources, not for kind labels"),
    ],
)
def test_a_wrong_kind_of_data_is_refused(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(tiny_config(tmp_path, data=data), "test")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"stages": [{"steps": 1, "objective": {"name": "not_there:X"}, "roles": {}}]}, "objective"),
        ({"stages": [{"steps": 1, "objective": "not_there:X", "roles": {}}]}, "objective"),
        ({"data": {"kind": "not_there:X"}}, "data"),
        ({"teacher": "not_there:X"}, "teacher"),
        ({"validation": {"solver": "not_there:X"}}, "solver"),
        ({"teacher": None, "model": {"backbone": {"name": "not_there:X"}, "shape": [1, 8, 8]}}, "backbone"),
    ],
)
def test_a_run_folder_never_causes_an_import(tmp_path: Path, change: dict[str, object], kind: str) -> None:
    """A config that the user names may import; one that lies in a run folder may come from somebody else."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps(own_config(tmp_path) | change))
    with pytest.raises(UserError, match=f"The saved model or run uses the {kind} 'not_there:X'.*--import not_there"):
        RunFolder.reopen(run, CPU)


@pytest.mark.parametrize("network", [{"checkpoint": "not_mine:model"}, {"backbone": {"name": "not_mine:Net"}}])
def test_opening_a_run_imports_no_module_of_its_networks(tmp_path: Path, network: dict[str, Any]) -> None:
    raw: Any = tiny_config(tmp_path, networks={"small": network})
    raw["stages"][0]["roles"]["student"]["init"] = "small"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match="neither ever causes an import"):
        run_config(tmp_path)
