"""Settings of data act or are refused; stored samples are finite in the type in which they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fewstep.core.errors import UserError
from fewstep.distill.build import _word_source
from fewstep.distill.config import DataConfig
from fewstep.distill.data.emoji import repeated_rows
from fewstep.distill.data.stored_files import read_stored
from fewstep.models.model_config import ModelConfig
from fewstep.models.vocabulary import Vocabulary


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "photos"}, "kind labels needs no data: leave path out, or set the kind of photos"),
        ({"kind": "mine.source:Mine", "path": "photos"}, "path does not reach a source of your own"),
    ],
)
def test_a_path_that_nothing_reads_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate(data)


def test_sizes_do_not_act_for_words(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("bee\n")
    data = DataConfig(kind="prompts", path=str(tmp_path / "a.txt"), sizes=((8, 8, 1),))
    words = Vocabulary(words=("bee",), length=1)
    model = ModelConfig(backbone={"name": "unet"}, shape=(3, 8, 8), vocabulary=words)
    with pytest.raises(UserError, match=r"data\.sizes does not act"):
        _word_source(data, model, words)


def test_a_word_of_every_caption_cannot_be_repeated() -> None:
    captions = ["a bee", "a cat"]
    assert repeated_rows(captions, {"cat": 3}).tolist() == [0, 1, 1, 1]
    with pytest.raises(UserError, match="every caption has the word 'a'"):
        repeated_rows(captions, {"a": 3})


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.float8_e4m3fn])
def test_stored_samples_of_any_precision_are_read(kind: torch.dtype, tmp_path: Path) -> None:
    labels = torch.tensor([0, 1, 0], dtype=torch.uint16)
    save_file({"x0": torch.ones(3, 1, 2, 2).to(kind), "labels": labels}, tmp_path / "a.safetensors")
    stored = read_stored(tmp_path / "a.safetensors", 2)
    assert stored.tensors["x0"].equal(torch.ones(3, 1, 2, 2))
    with pytest.raises(UserError, match=r"labels outside 0\.\.0"):
        read_stored(tmp_path / "a.safetensors", 1)


def test_numbers_beyond_single_precision_are_not_finite(tmp_path: Path) -> None:
    samples = torch.full((3, 1, 2, 2), 1e39, dtype=torch.float64)
    save_file({"x0": samples, "labels": torch.zeros(3, dtype=torch.int64)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="finite, real samples"):
        read_stored(tmp_path / "a.safetensors", 1)
