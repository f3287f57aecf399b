from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_pipelines import TINY, write_embeddings


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
