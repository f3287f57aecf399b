from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exported import ADAPTERS
from tiny_pipelines import STEPS, TINY, settings, write_embeddings

import fewstep
from fewstep.distill.config_files import parse_config

Saved = Callable[[str], Path]
Runs = Callable[..., Path]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Creates the folder of a tiny pipeline once, containing ``prompts/`` with random embeddings."""
    folders: dict[str, Path] = {}

    def create(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            TINY[name].build().save_pretrained(folders[name])
            write_embeddings(name, folders[name])
        return folders[name]

    return create


@pytest.fixture(scope="session")
def runs(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Trains a student, once per setting, and returns its run."""
    folders: dict[Any, Path] = {}

    def train(family: str, adapters: dict[str, Any] | None = ADAPTERS, experts: int = 1, shift: float = 1.0) -> Path:
        key = family, str(adapters), experts, shift
        if key not in folders:
            raw = settings(saved(family), family, tmp_path_factory.mktemp("my runs") / "run", adapters)
            tdm = {"name": "tdm", "steps": STEPS, "shift": shift}
            roles = {role: {"lr": 0.03} for role in ("student", "fake")}  # the experts must differ visibly
            raw["stages"] = [{"steps": 2, "objective": tdm, "roles": roles}]
            if experts > 1:
                phased = {"name": "phased_dmd", "steps": STEPS, "phases": experts, "shift": shift, "critic_updates": 1}
                raw["stages"] = [
                    {
                        "steps": 1, "objective": phased | {"phase": phase}, "roles": roles,
                        "freeze": {f"expert{phase - 1}": "student"} if phase > 1 else {},
                    }
                    for phase in range(1, experts + 1)
                ]  # fmt: skip
            folders[key] = fewstep.train(parse_config(raw, "test"))
        return folders[key]

    return train
