"""Folders of samples: what is in one belongs together, whoever else writes to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep import SamplingConfig
from fewstep.api import sample
from fewstep.core.errors import UserError
from fewstep.models.loading import Model
from fewstep.models.model_config import ModelConfig
from fewstep.models.vocabulary import Vocabulary

ONE = SamplingConfig(steps=1)


@pytest.fixture
def model() -> Model:
    backbone = {"name": "unet", "widths": [8], "blocks": [1], "embedding": 8}
    config = ModelConfig(backbone=backbone, shape=(1, 8, 8), vocabulary=Vocabulary(words=("fox", "cat"), length=1))
    return Model(denoiser=config.build(), config=config)


def test_other_prompts_are_refused_also_with_seeds_that_no_sample_has(model: Model, tmp_path: Path) -> None:
    """Their record would stand beside the samples, which a later call would keep as its own."""
    sample.sample_files(model, ["fox"], tmp_path, seeds=[0], sampling=ONE)
    with pytest.raises(UserError, match="contains samples of other prompts"):
        sample.sample_files(model, ["cat"], tmp_path, seeds=[1], sampling=ONE)
    sample.sample_files(model, ["fox"], tmp_path, seeds=[1], sampling=ONE)


def test_a_call_that_wrote_no_sample_claims_nothing(model: Model, tmp_path: Path) -> None:
    sample.sample_files(model, ["fox"], tmp_path, seeds=[0], sampling=ONE)
    (tmp_path / "00000-0.png").unlink()
    sample.sample_files(model, ["cat"], tmp_path, seeds=[0], sampling=ONE)


def test_a_file_of_that_name_that_fewstep_did_not_write_is_kept(model: Model, tmp_path: Path) -> None:
    for content in ('{"mine": 1}', "[1, 2]", "no JSON"):
        (tmp_path / "samples.json").write_text(content)
        with pytest.raises(UserError, match=r"samples\.json"):
            sample.sample_files(model, ["fox"], tmp_path, sampling=ONE)
        assert (tmp_path / "samples.json").read_text() == content


def test_of_two_calls_at_once_the_one_whose_record_is_replaced_stops(model: Model, tmp_path: Path) -> None:
    """The second begins while the first still loads and encodes, so that no sample shows that the folder is in use."""

    class Slow(sample.ImageGenerator):
        def __call__(self, *arguments: object, **named: object):  # type: ignore[no-untyped-def]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sample, "ImageGenerator", Slow.__base__)
                sample.sample_files(model, ["cat"], tmp_path, sampling=ONE)
            return super().__call__(*arguments, **named)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "ImageGenerator", Slow)
        with pytest.raises(UserError, match="another command"):
            sample.sample_files(model, ["fox"], tmp_path, sampling=ONE)
    written = (tmp_path / "00000-0.png").read_bytes()
    sample.sample_files(model, ["cat"], tmp_path / "cat", sampling=ONE)
    assert written == (tmp_path / "cat" / "00000-0.png").read_bytes()


def test_one_prompt_is_not_taken_for_a_list_of_letters(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give at least one in prompts, a list"):
        sample.sample_files(model, "fox", tmp_path, sampling=ONE)
    assert not list(tmp_path.iterdir())
