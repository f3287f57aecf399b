from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_pipelines import TINY, write_embeddings


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the folder of a tiny pipeline once, with ``prompts/`` of random embeddings inside it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            TINY[name].build().save_pretrained(made[name])
            write_embeddings(name, made[name])
        return made[name]

    return make
