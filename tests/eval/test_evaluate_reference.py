"""Evaluation by a bundled reference: its scores, and the direction that each of them declares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from worlds import tiny_teacher

from fewstep.api.evaluate import evaluate, evaluate_images
from fewstep.core.errors import UserError
from fewstep.eval.evaluate_reference import DIRECTIONS, ReferenceEvaluator, conditional_metrics, reference_direction
from fewstep.eval.hashes import model_sha256
from fewstep.eval.metrics.frechet import frechet_error, grouped_moments
from fewstep.eval.networks.features import extract_features
from fewstep.eval.protocol import load_protocol
from fewstep.eval.references import load_reference, real_images
from fewstep.eval.toy_captions import CaptionSet, prompt_following, tint
from fewstep.models.loading import Model, load_model

REFERENCE = load_reference("fashion")
IMAGES, LABELS = real_images("fashion")


def in_turn(n: int) -> torch.Tensor:
    """Indices of ``n`` real images that show the ten classes in turn."""
    by_class = [(label == LABELS).nonzero()[:, 0] for label in range(10)]
    return torch.stack([by_class[k % 10][k // 10] for k in range(n)])


def test_real_images_have_high_scores() -> None:
    rows = in_turn(600)
    values = conditional_metrics(REFERENCE, IMAGES[rows], LABELS[rows], 10)
    assert set(values) == {"fd_fashion", "kid", "precision", "recall", "accuracy", "diversity"}
    assert values["accuracy"].value > 0.85
    features = extract_features(REFERENCE.network, IMAGES[rows])
    expected = frechet_error(grouped_moments(features, 10), REFERENCE.statistics)
    assert values["fd_fashion"].error == expected, "of ten classes in turn"
    assert values["precision"].value > 0.7


def test_every_score_has_a_direction_in_which_damage_is_worse() -> None:
    """The damaged images all show the same noise, with the colours of other captions."""
    rows = in_turn(200)
    noise = torch.randint(0, 256, (1, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    damaged = noise.repeat(200, 1, 1, 1)
    captions = CaptionSet.sample(LABELS[rows], torch.Generator().manual_seed(0))
    other = CaptionSet.sample(LABELS[rows].flip(0), torch.Generator().manual_seed(1))
    good, bad = (
        {name: each.value for name, each in conditional_metrics(REFERENCE, images, LABELS[rows], 10).items()}
        | prompt_following(REFERENCE.network, tint(images, shown), captions)
        for images, shown in ((IMAGES[rows], captions), (damaged, other))
    )
    of_emoji = {"name", "style", "motion", "weakest_motion", "agreement"}  # test_emoji.py, test_clip_scores.py
    assert set(good) == {"fd_fashion", *DIRECTIONS} - of_emoji
    for name, value in good.items():
        assert reference_direction(name) is not None, name
        assert (value < bad[name]) == (reference_direction(name) == "lower"), name
    assert reference_direction("sharpness") is None


def test_images_of_the_bundled_reference_are_scored_by_its_protocol(tmp_path: Path) -> None:
    for k, image in enumerate(IMAGES[:200]):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{k}.png")
    with pytest.raises(UserError, match="200 scorable images, 10,000 are required"):
        evaluate_images(tmp_path, load_protocol("fashion"), device="cpu")
    seen: list[tuple[str, int]] = []
    scores = evaluate_images(
        tmp_path, load_protocol("fashion", n=200), device="cpu", progress=lambda what, done: seen.append((what, done))
    )
    values = {score.metric: score.value for score in scores}
    assert set(values) == {"fd_fashion", "kid", "precision", "recall"}
    assert values["precision"] > 0.7
    assert seen[-1] == ("images", 200)
    assert {score.reference_sha256 for score in scores} == {REFERENCE.sha256}
    errors = {score.metric: score.error_of for score in scores if score.error is not None}
    assert errors == {
        "kid": "standard deviation over 100 subsets",
        "fd_fashion": "standard error over samples (jackknife, 10 groups)",
        "precision": "half of Wilson's 68 % interval of a share of the images",
    }
    assert {score.metric for score in scores if score.bias is not None} == {"fd_fashion"}


def test_a_model_of_another_size_and_too_few_samples_are_refused(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"need uint8 images of shape \[1, 28, 28\]"):
        evaluate(teacher, reference="fashion", n=20, steps=[1], device="cpu")
    for model, minimum in (("fashion", 20), ("fashion-text", 1440)):
        if model == "fashion-text":
            pytest.importorskip("diffusers")
        with pytest.raises(UserError, match=f"at least {minimum} \\(two samples per class or caption\\)"):
            ReferenceEvaluator(REFERENCE, minimum - 1, (0,)).check(load_model(model))


def test_a_grid_that_lists_its_times_has_their_number_of_steps() -> None:
    for grid, steps in (("times:1,0.6,0.3", [3]), ("time", [1, 2, 4])):
        found = evaluate("fashion", n=20, grid=grid, device="cpu")
        assert sorted({score.steps for score in found}) == steps
    with pytest.raises(UserError, match="it has 3 steps, but 2 were requested"):
        evaluate("fashion", n=20, grid="times:1,0.6,0.3", steps=[2], device="cpu")


def test_names_of_classes_are_no_part_of_a_models_hash(tmp_path: Path) -> None:
    """A score stays that of its model, and hashes from before there were names stay valid."""
    model = load_model(tiny_teacher(tmp_path))

    def changed(**changes: Any) -> Model:
        return Model(denoiser=model.denoiser, config=model.config.model_copy(update=changes))

    assert model_sha256(changed(class_names=tuple("abcdefghij"))) == model_sha256(model)
    assert model_sha256(changed(shift=2.0)) != model_sha256(model)
