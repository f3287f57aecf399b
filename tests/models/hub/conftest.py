from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_pipelines import TINY

from fewstep.models.hub.encoded import Index, fingerprint
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.store import write_tensors, write_text


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the folder of a tiny pipeline once, with ``prompts/`` of random embeddings inside it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            tiny = TINY[name]
            folder = tmp_path_factory.mktemp(name)
            tiny.build().save_pretrained(folder)
            prompts = folder / "prompts"
            prompts.mkdir()
            write_tensors(tiny.embeddings(8, 1), prompts / "shard-00000.safetensors")
            write_tensors(tiny.embeddings(1, 2), prompts / "null.safetensors")
            opened = PipelineFolder.open(folder)
            index = Index(
                pipeline=opened.index["_class_name"], encoders=fingerprint(opened), prompts="", count=8, rows=8
            )
            write_text(index.model_dump_json(), prompts / "index.json")
            made[name] = folder
        return made[name]

    return make
