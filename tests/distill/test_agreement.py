"""Processes that differ in a setting, a file or a version end in words before they train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import settings
from worlds import tiny_config

from fewstep.core.errors import UserError
from fewstep.distill.agreement import fingerprints, require_same_inputs, require_same_settings
from fewstep.distill.build import build_inputs
from fewstep.distill.config import Config
from fewstep.distill.config_files import parse_config
from fewstep.distill.previews import Previews
from fewstep.distill.processes import ENDED, ProcessEnded, World
from fewstep.distill.trainer import Trainer
from fewstep.models.condition import Condition

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pair(World):
    """A process and what the other one sends, which ``other`` holds in the order of the exchanges."""

    size: int = 2
    other: Any = ()

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other.pop(0)]


class Sent(Pair):
    """Keeps what a process sends."""

    def gather(self, value: Any) -> list[Any]:
        self.other.append(value)
        return [value, value]


def trainer_of(config: Config, world: World) -> Trainer:
    return Trainer(config, build_inputs(config, CPU), CPU, world)


def sent_by(config: Config, change: Callable[[Trainer], object]) -> list[Any]:
    world = Sent(other=[])
    trainer = trainer_of(config, world)
    change(trainer)
    require_same_inputs(trainer)
    return world.other  # type: ignore[no-any-return]


def scale_a_weight(trainer: Trainer) -> None:
    with torch.no_grad():
        next(trainer.roles["fake"].module.parameters()).view(-1)[0].mul_(1.001)


def other_teacher(trainer: Trainer) -> None:
    object.__setattr__(trainer.inputs, "teacher_sha256", "0" * 64)


def other_data(trainer: Trainer) -> None:
    source = trainer.inputs.sources["data"]
    trainer.inputs.sources["data"] = lambda random, n: source(random.stream("other"), n)  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "named"),
    [(other_teacher, "teacher's weights"), (other_data, "data .labels of data"), (scale_a_weight, "fake/weights/")],
)
def test_processes_with_other_weights_or_data_are_refused(
    change: Callable[[Trainer], object], named: str, tmp_path: Path
) -> None:
    config = parse_config(settings("tdm", tmp_path, "cpu", "float32") | {"accumulate": 2}, "test")
    require_same_inputs(trainer_of(config, Pair(other=sent_by(config, lambda trainer: None))))
    with pytest.raises(UserError, match=f"Process 1 of this run differs from process 0 in its {named}"):
        require_same_inputs(trainer_of(config, Pair(other=sent_by(config, change))))


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    config = parse_config(settings("tdm", tmp_path, "cpu", "float32"), "test")
    other = Sent(other=[])
    require_same_settings(other, config.model_copy(update={"out": "elsewhere"}), resumed=False)
    require_same_settings(Pair(other=list(other.other)), config, resumed=False)
    require_same_settings(other, config.model_copy(update={"seed": 7, "batch": 3}), resumed=False)
    with pytest.raises(UserError, match=r"in its batch: 3, not \d+, and in 1 other value\. Start all"):
        require_same_settings(Pair(other=other.other[1:]), config, resumed=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_fingerprints_notice_one_bit_and_no_layout(dtype: torch.dtype) -> None:
    tensor = (torch.arange(12) % 2).to(dtype).reshape(3, 4)
    changed = tensor.clone()
    changed[2, 3] = 0
    assert fingerprints({"a": tensor}) == fingerprints({"a": tensor.T.contiguous().T})
    assert fingerprints({"a": tensor}) != fingerprints({"a": changed})
    assert fingerprints({"a": torch.zeros(0)}) != fingerprints({"a": torch.zeros(0, 2)})


def test_an_ended_process_is_not_blamed_on_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(tiny_config(tmp_path), "test")
    trainer = Trainer.create(config, device="cpu")

    def ended(function: object) -> None:
        raise ProcessEnded

    monkeypatch.setattr(trainer, "evaluate", ended)
    previews = Previews(1, 1, Condition({}), lambda samples: samples)
    for work in (
        lambda: trainer._score(lambda student, config, step: None),
        lambda: previews.render(trainer),
    ):
        with pytest.raises(ProcessEnded) as caught:
            work()
        assert str(caught.value) == ENDED
