"""A model of words end to end: the source of emoji, a teacher, its student, and everything that shows them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refused, succeeds
from PIL import Image

import fewstep
from fewstep.api.app import AppModels
from fewstep.api.app_page import click
from fewstep.api.reference import reference_for
from fewstep.api.report import compare_images
from fewstep.core.errors import UserError
from fewstep.core.image_files import to_unit
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import load_config
from fewstep.distill.data.emoji import Emoji
from fewstep.distill.memory import plan_memory
from fewstep.models.emoji import BACKGROUNDS, STYLES, EmojiCaptions, load_art
from fewstep.models.loading import load_model
from fewstep.models.model_config import ModelConfig
from fewstep.models.vocabulary import split_words

TEACHER = load_config("configs/emoji/teacher.yaml")
MODEL = TEACHER.model
assert MODEL is not None
assert MODEL.vocabulary is not None
TRAIN = EmojiCaptions.of("train")
SMALL = [
    "model.backbone.widths=[8]", "model.backbone.blocks=[1]", "model.backbone.patch=4", "model.backbone.embedding=8",
    "batch=8", "device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("words") / "teacher"
    changes = [f"out={out}", "stages.0.steps=3", "previews.every=2", "previews.n=3", "validation={every: 0}"]
    return fewstep.train("configs/emoji/teacher.yaml", *SMALL, *changes, progress=False)


@pytest.fixture(scope="module")
def student(teacher: Path) -> Path:
    changes = ["batch=8", "device=cpu", "stages.0.steps=2", "log_every=1", "health.every=1", "validation.images=5"]
    shown = ["validation.every=1", f"out={teacher.parent / 'run'}", f"teacher={teacher}", "previews.n=3"]
    return fewstep.train("configs/emoji/demo.yaml", *changes, *shown, progress=False)


def test_the_shipped_teacher_knows_exactly_the_words_of_captions() -> None:
    assert MODEL.vocabulary.words == (*STYLES, *BACKGROUNDS, *load_art().names)  # type: ignore[union-attr]
    numbers = MODEL.vocabulary.encode(EmojiCaptions.all().texts).words  # type: ignore[union-attr]
    assert (numbers > 0).all(), "a caption does not fill its words"
    assert len(numbers.unique(dim=0)) == len(numbers), "two captions are one prompt"


def test_a_batch_shows_what_its_words_say() -> None:
    batch = Emoji.create("emoji", MODEL, images=True)(KeyedRandom(3, 4, "data", 1), 16)
    rows = KeyedRandom(3, 4, "data", 1).integers(16, len(TRAIN))
    expected = TRAIN.select(rows)
    words = MODEL.vocabulary.encode(expected.texts).words  # type: ignore[union-attr]
    assert batch.condition["words"].equal(words)
    assert batch["x0"].equal(to_unit(expected.render(KeyedRandom(3, 4, "data", 1))))
    assert batch.shape == (3, 32, 32)
    assert batch.condition.null()["words"].eq(0).all()


def test_batches_cover_all_training_captions_and_no_others() -> None:
    source = Emoji.create("emoji", MODEL, images=False)
    words = source(KeyedRandom(0, 0, "data", 0), 20_000).condition["words"]
    trained = MODEL.vocabulary.encode(TRAIN.texts).words  # type: ignore[union-attr]
    found, counts = words.unique(dim=0, return_counts=True)
    assert found.equal(trained.unique(dim=0))
    assert counts.max() < 4 * counts.float().mean()


def test_captions_with_a_repeated_word_are_sampled_so_many_times_as_often() -> None:
    source = Emoji.create("emoji", MODEL, images=False, repeat={"flat": 3, "red": 5})
    assert source(KeyedRandom(0, 0, "data", 0), 4).condition["words"].shape == (4, 3)
    counts = Counter(frozenset(split_words(text)) for text in source.captions.texts)
    assert counts.keys() == {frozenset(split_words(text)) for text in TRAIN.texts}
    for words, count in counts.items():
        assert count == (5 if "red" in words else 3 if "flat" in words else 1)
    assert MODEL.vocabulary.encode(source.captions.texts).words.equal(source.prompts.words)  # type: ignore[union-attr]


def test_images_are_rendered_only_for_objectives_that_need_them(teacher: Path) -> None:
    device, random = torch.device("cpu"), KeyedRandom(0, 0, "data", 0)
    pretraining = build_inputs(load_config("configs/emoji/teacher.yaml", SMALL), device)
    assert set(pretraining.sources["data"](random, 2)) == {"x0"}
    distillation = build_inputs(load_config("configs/emoji/demo.yaml", [f"teacher={teacher}"]), device)
    assert not set(distillation.sources["data"](random, 2))
    assert distillation.prompts is not None
    assert len(distillation.prompts) == len(TRAIN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.path=x"], "ships with the package: leave path out"),
        (["data.crop=true"], "crop is for images"),
        (["data.repeat={shinny: 2}"], r"no caption of the training split has the word 'shinny'.*shiny"),
        (["data.repeat={shiny: 0}"], "greater than or equal to 1"),
        (["data.kind=labels", "data.repeat={shiny: 2}"], "repeat is for captions of emoji"),
        (["model.vocabulary=null"], "needs a model that takes words"),
        (["model.vocabulary.words=[fox]"], "does not know the word 'shiny'"),
        (["model.vocabulary.words=[Fox]"], "not one word in lower case"),
        (["model.shape=[3, 28, 28]"], r"its samples are \[3, 32, 32\]"),
        (["data.kind=labels"], "takes words, which data.kind=labels does not have"),
        (["model.classes=3"], "either classes or vocabulary"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_inputs(load_config("configs/emoji/teacher.yaml", [*SMALL, *changes]), torch.device("cpu"))


def test_a_backbone_that_takes_no_words_is_refused() -> None:
    with pytest.raises(UserError, match="vocabulary"):
        ModelConfig.model_validate(
            {"backbone": {"name": "unet", "vocabulary": 3}, "shape": (3, 32, 32), "vocabulary": MODEL.vocabulary}
        ).build()


def test_runs_show_previews_health_and_a_grid_for_prompts(teacher: Path, student: Path) -> None:
    assert sorted(file.name for file in (teacher / "previews").iterdir()) == ["step-0000002.png", "step-0000003.png"]
    assert len(list((student / "previews").glob("*.png"))) == 2
    with Image.open(student / "samples" / "step-0000001.png") as grid:
        assert grid.width > 5 * 32
        assert grid.height == 32
    lines = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["health/diversity_ratio"]) for line in lines if "health/diversity_ratio" in line)
    assert any("health/diversity_ratio" in line for line in lines)
    assert load_model(student).config.vocabulary == MODEL.vocabulary  # type: ignore[union-attr]
    with Image.open(compare_images(student, "cpu", columns=3)) as comparison:
        assert comparison.width > 3 * 32


def test_runs_are_scored_by_the_reference_of_their_words(teacher: Path, tmp_path: Path) -> None:
    """A teacher's by the reference that its config names, and its student's by that of the teacher."""
    small = [*SMALL, "previews.every=0", "health.every=0", "validation.n=12"]
    own = fewstep.train(
        "configs/emoji/teacher.yaml", *small, "stages.0.steps=2", "validation.every=1", "validation.steps=1",
        f"out={tmp_path / 'teacher'}", progress=False,
    )  # fmt: skip
    assert len(validations(own)) == 2
    changes = ["batch=4", "device=cpu", "stages.0.steps=2", "health.every=0", "previews.every=0", f"teacher={own}"]
    scored = ["validation={every: 1, n: 12}", f"out={tmp_path / 'run'}"]
    run = fewstep.train("configs/emoji/demo.yaml", *changes, *scored, progress=False)
    assert len(validations(run)) == 2
    assert reference_for(run) == "emoji"
    other = ["validation={every: 1, reference: fashion}", f"out={tmp_path / 'other'}"]
    with pytest.raises(UserError, match=r"need uint8 images of shape \[1, 28, 28\]"):
        fewstep.train("configs/emoji/demo.yaml", *changes, *other, progress=False)


def validations(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["validation"] for line in lines if "validation" in line]


def test_prompts_on_the_command_line(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    succeeds("sample", student, "--prompt", "a shiny fox on blue", "--seeds", "0-1", "--out", out, "--device", "cpu")
    assert sorted(file.name for file in out.glob("*.png")) == ["00000-0.png", "00000-1.png"]
    expected = fewstep.sample(student, prompts=["a shiny fox on blue"], device="cpu")[0]
    with Image.open(out / "00000-0.png") as image:
        assert torch.from_numpy(np.array(image)).permute(2, 0, 1).equal(expected)
    (tmp_path / "prompts.txt").write_text("a flat cat on red\nheart-eyes\n")
    succeeds("sample", student, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "two", "--device", "cpu")
    assert len(list((tmp_path / "two").glob("*.png"))) == 2
    sample = ["sample", student, "--device", "cpu"]
    assert "did you mean 'fox'" in refused(
        capsys, *sample, "--prompt", "a shiny foxy on blue", "--out", tmp_path / "three"
    )
    assert not (tmp_path / "three").exists()
    assert "samples of other prompts" in refused(capsys, *sample, "--prompt", "a flat fox on blue", "--out", out)
    assert "give --prompt TEXT" in refused(capsys, *sample, "--out", tmp_path / "grid.png")
    assert "takes prompts" in refused(capsys, *sample, "--prompt", "fox", "--labels", "1")
    with pytest.raises(UserError, match="labels do not act beside prompts"):
        fewstep.sample(student, prompts=["fox"], labels=[1], device="cpu")


def test_the_app_takes_prompts(student: Path) -> None:
    models = AppModels.load(student, device="cpu")
    teacher, own = models.generate(models.check("a shiny fox on blue", 4, 5, 3))
    expected = fewstep.sample(
        student, prompts=["a shiny fox on blue"] * 3, sampling=fewstep.SamplingConfig(steps=4, seed=5), device="cpu"
    )
    assert own.images.equal(expected)
    assert teacher.images.shape == own.images.shape
    assert "did you mean &#x27;fox&#x27;" in click(models, "a foxy on blue", 4, 0, 2, [])[0]
    assert "Write a prompt" in click(models, "", 4, 0, 2, [])[0]


def test_a_teacher_of_other_words_is_refused(student: Path, tmp_path: Path) -> None:
    changes = {"vocabulary": MODEL.vocabulary.model_copy(update={"fillers": ()})}  # type: ignore[union-attr]
    config = load_model(student).config.model_copy(update=changes)
    fewstep.save_model(config.build(), config, tmp_path)
    with pytest.raises(UserError, match="different words"):
        AppModels.load(student, tmp_path, device="cpu")


def test_what_needs_a_reference_or_a_pipeline_is_refused(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="No reference is known"):
        reference_for(student)
    assert "needs a diffusers pipeline" in refused(capsys, "export", student, "--out", tmp_path / "export")


def test_the_memory_of_a_run_is_planned() -> None:
    plan = plan_memory(TEACHER)
    weights = plan.roles["student"].weights
    assert 3.0e6 * 4 < weights < 3.2e6 * 4
    assert plan.total > 4 * weights
