"""Networks other than the teacher's, of a teacher that takes prompts of the words in a vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from worlds import tiny_config

from fewstep.core.errors import UserError
from fewstep.distill.config_files import parse_config
from fewstep.distill.networks import load_networks
from fewstep.models.loading import load_model
from fewstep.models.model_config import ModelConfig
from fewstep.models.saving import save_model


def test_networks_of_a_teacher_with_a_vocabulary_have_its_words(tmp_path: Path) -> None:
    """Such a model takes prompts without being a pipeline."""
    unet = {"name": "unet", "widths": [8], "blocks": [1], "embedding": 8}
    words, turned = ({"words": order, "length": 1} for order in (("fox", "cat"), ("cat", "fox")))
    teacher: dict[str, Any] = {"backbone": unet, "shape": (1, 8, 8), "vocabulary": words}
    wide = teacher | {"backbone": unet | {"widths": [16]}}
    models = {
        "teacher": teacher,
        "wide": wide,
        "larger": wide | {"shape": (1, 16, 16)},
        "labelled": wide | {"vocabulary": None, "classes": 2},
        "turned": wide | {"vocabulary": turned},
    }
    for name, changes in models.items():
        config = ModelConfig.model_validate(changes)
        save_model(config.build(), config, tmp_path / name)

    def student(settings: dict[str, Any]) -> nn.Module:
        raw: dict[str, Any] = tiny_config(tmp_path, networks={"small": settings})
        raw["stages"][0]["roles"]["student"]["init"] = "small"
        run = parse_config(raw, "test")
        return load_networks(run, load_model(tmp_path / "teacher"))[0]["small"].denoiser.backbone

    def saved(name: str) -> dict[str, Tensor]:
        return load_model(tmp_path / name).denoiser.backbone.state_dict()

    new = student({"backbone": {"widths": [24]}}).state_dict()
    assert new["words.weight"].equal(saved("teacher")["words.weight"]), "a tensor that fits is the teacher's"
    loaded = student({"checkpoint": str(tmp_path / "wide")}).state_dict()
    assert all(loaded[name].equal(value) for name, value in saved("wide").items())
    for name, message in (("turned", "vocabulary is not"), ("labelled", "its condition"), ("larger", "its shape")):
        with pytest.raises(UserError, match=message):
            student({"checkpoint": str(tmp_path / name)})
