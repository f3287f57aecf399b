"""A model of words on a user's own captions: pretrained, distilled, paired, preferred, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import image_sets
import pytest
import torch

import fewstep
from fewstep.api.data import make_ode_pairs, make_preferences
from fewstep.api.evaluate import win_rates
from fewstep.api.report import compare_images
from fewstep.core.errors import UserError
from fewstep.core.files import read_metadata, read_tensors, write_tensors
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.build import TrainingInputs, build_inputs
from fewstep.distill.config_files import parse_config
from fewstep.distill.data.stored_files import read_stored, write_stored
from fewstep.eval.emoji import backgrounds_of, shuffled
from fewstep.eval.networks.features import REFERENCES, ClassifierFeatures
from fewstep.eval.rewards.prompt import prompt
from fewstep.models.emoji import STYLES, EmojiCaptions
from fewstep.models.vocabulary import Vocabulary

WORDS = Vocabulary(words=("bee", "cat", "dog", "drawn"), fillers=("na",), length=2)
ROLE = {"lr": 1.0e-3}
ROLES = {"student": {"init": "teacher", **ROLE}, "fake": {"init": "teacher", **ROLE}}


def run(folder: Path, data: dict[str, Any], **settings: Any) -> Path:
    return fewstep.train(
        parse_config({"out": str(folder), "data": data, "batch": 4, "health": {"every": 0}, **settings}, "test")
    )


def pretrained(folder: Path, data: dict[str, Any]) -> Path:
    model = {
        "backbone": {"name": "unet", "widths": [8], "blocks": [1], "embedding": 8},
        "shape": [3, 4, 6], "vocabulary": WORDS.model_dump(mode="json"),
    }  # fmt: skip
    objective = {"name": "flow_matching", "drop_condition": 0.1}
    stages = [{"steps": 2, "objective": objective, "roles": {"student": {"init": "model", **ROLE}}}]
    return run(folder, data, model=model, stages=stages, previews={"every": 2, "n": 2})


def distilled(
    folder: Path, teacher: Path, data: dict[str, Any], objective: dict[str, Any], roles: Any = ROLES, freeze: Any = ()
) -> Path:
    stages = [{"steps": 2, "objective": objective, "roles": roles, "freeze": dict(freeze)}]
    return run(folder, data, teacher=str(teacher), stages=stages, previews={"every": 2, "n": 2})


def inputs_of(teacher: Path, data: dict[str, Any], objective: str) -> TrainingInputs:
    stages = [{"steps": 1, "objective": {"name": objective}, "roles": ROLES}]
    config = parse_config({"teacher": str(teacher), "data": data, "out": "x", "stages": stages}, "test")
    return build_inputs(config, torch.device("cpu"))


def batch_of(teacher: Path, data: dict[str, Any], objective: str) -> Any:
    return inputs_of(teacher, data, objective).sources["data"](KeyedRandom(0, 0, "data", 0), 40)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioned")
    image_sets.csv(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(captioned: Path) -> Path:
    return pretrained(captioned / "teacher", {"kind": "dataset", "path": str(captioned / "a.csv")})


def test_each_image_comes_with_the_words_of_its_own_caption(captioned: Path, teacher: Path) -> None:
    batch = batch_of(teacher, {"kind": "dataset", "path": str(captioned / "a.csv")}, "f_distill")
    known = torch.from_numpy(image_sets.PIXELS).permute(0, 3, 1, 2)
    images = ((batch["x0"] + 1) * 127.5).round().byte()
    expected = WORDS.encode(image_sets.CAPTIONS).words
    for image, words in zip(images, batch.condition["words"], strict=True):
        (row,) = (known == image).flatten(1).all(1).nonzero().flatten().tolist()
        assert torch.equal(words, expected[row])
    assert len(batch.condition["words"].unique(dim=0)) == 3
    assert (teacher / "previews").is_dir()


def test_images_with_captions_are_mirrored_on_request(captioned: Path, teacher: Path) -> None:
    known = torch.from_numpy(image_sets.PIXELS).permute(0, 3, 1, 2)
    for flip in (False, True):
        data = {"kind": "dataset", "path": str(captioned / "a.csv"), "flip": flip}
        images = ((batch_of(teacher, data, "f_distill")["x0"] + 1) * 127.5).round().byte()
        kept = (images[:, None] == known).flatten(2).all(2).any(1)
        mirrored = (images[:, None] == known.flip(-1)).flatten(2).all(2).any(1)
        assert (kept ^ mirrored).all()
        assert mirrored.any() == flip


def test_a_student_is_distilled_from_captions_alone(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("\n".join(image_sets.CAPTIONS[:2]))
    data = {"kind": "prompts", "path": str(tmp_path / "captions.txt")}
    words = batch_of(teacher, data, "tdm").condition["words"]
    assert {tuple(row) for row in words.tolist()} == {(2, 4), (3, 4)}
    student = distilled(tmp_path / "run", teacher, data, {"name": "tdm", "steps": 2, "guidance": 1.5})
    assert compare_images(student, "cpu", columns=2).is_file()
    assert fewstep.sample(student, prompts=["a bee, drawn".replace("a ", "NA ")], device="cpu").shape == (1, 3, 4, 6)


def test_pairs_and_preferences_keep_the_captions_of_their_samples(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("dog\nNA cat\nbee drawn\n")
    captions, pairs, preferred = (tmp_path / name for name in ("captions.txt", "pairs.safetensors", "won.safetensors"))
    make_ode_pairs(teacher, pairs, n=7, captions=captions, sampling=fewstep.SamplingConfig("euler", 2), device="cpu")
    stored = read_tensors(pairs)
    assert (stored["prompt"].tolist(), sorted(stored)) == ([0, 1, 2, 0, 1, 2, 0], ["noise", "prompt", "x0"])
    again = fewstep.sample(
        teacher, prompts=["dog", "cat", "bee drawn"], sampling=fewstep.SamplingConfig("euler", 2), device="cpu"
    )
    difference = (stored["x0"][:3].clamp(-1, 1) + 1) * 127.5 - again
    assert difference.abs().max() <= 0.51
    data = {"kind": "tensors", "path": str(pairs)}
    batch = batch_of(teacher, data, "dmd")
    by_prompt = {(row[0], row[1]) for row in batch.condition["words"].tolist()}
    assert by_prompt == {(3, 0), (2, 0), (1, 4)}
    student = distilled(tmp_path / "dmd", teacher, data, {"name": "dmd"})
    assert inputs_of(teacher, data, "dmd").prompts.words[:3].tolist() == [[3, 0], [2, 0], [1, 4]]  # what is shown
    assert compare_images(student, "cpu", columns=2).is_file()

    few = fewstep.SamplingConfig("euler", 2)
    make_preferences(
        teacher, preferred, reward="brightness", n=4, captions=captions, candidates=2, sampling=few, device="cpu"
    )
    won = read_tensors(preferred)
    assert (won["winner"].flatten(1).mean(1) >= won["loser"].flatten(1).mean(1)).all()
    assert (won["winner"] != won["loser"]).flatten(1).any(1).all(), "of two candidates, the other one"
    tuned = distilled(
        tmp_path / "dpo", teacher, {"kind": "tensors", "path": str(preferred)}, {"name": "diffusion_dpo"},
        {"student": {"init": "teacher", **ROLE}}, {"reference": "teacher"},
    )  # fmt: skip
    (row,) = win_rates(tuned, teacher, n=3, captions=captions, rewards=["symmetry"], sampling=few, device="cpu")
    assert 0 <= row["win_rate"] <= 1
    (tmp_path / "dog.txt").write_text("dog\n")
    with pytest.raises(UserError, match=r"generates \[3, 4, 6\], emoji \[3, 32, 32\]"):
        win_rates(tuned, "emoji", n=1, captions=tmp_path / "dog.txt", rewards=["symmetry"], sampling=few, device="cpu")


def test_captions_are_needed_where_words_are_taken_and_only_there(
    captioned: Path, teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "captions.txt").write_text("dog\n")
    (tmp_path / "wolf.txt").write_text("wolf\n")
    (tmp_path / "two.txt").write_text("wolf\nyak wolf\n")
    out = tmp_path / "pairs.safetensors"
    with pytest.raises(UserError, match=r"the word 'wolf' of .* Nor does it know 'yak', of other prompts"):
        make_ode_pairs(teacher, out, n=2, captions=tmp_path / "two.txt", device="cpu")
    with pytest.raises(UserError, match="takes words: give captions"):
        make_ode_pairs(teacher, out, n=2, device="cpu")
    with pytest.raises(UserError, match="does not know the word 'wolf'"):
        make_ode_pairs(teacher, out, n=2, captions=tmp_path / "wolf.txt", device="cpu")
    with pytest.raises(UserError, match="leave captions out"):
        make_ode_pairs("fashion", out, n=2, captions=tmp_path / "captions.txt", device="cpu")
    assert not out.exists()
    for data, message in (
        ({"kind": "labels"}, "takes words, which data.kind=labels does not have"),
        (
            {"kind": "folder", "path": str(captioned / "pictures")},
            "pictures has no captions, and the model takes words",
        ),
        (
            {"kind": "dataset", "path": str(captioned / "a.csv"), "columns": {"label": "label"}},
            "columns.label does not",
        ),
        ({"kind": "prompts", "path": str(tmp_path / "wolf.txt")}, "does not know the word 'wolf'"),
    ):
        with pytest.raises(UserError, match=message):
            batch_of(teacher, data, "f_distill")


def test_stored_prompts_are_checked(tmp_path: Path) -> None:
    file, x0 = tmp_path / "a.safetensors", torch.zeros(3, 1, 2, 2)
    write_stored(file, {"x0": x0}, torch.tensor([0, 1, 0]), ["dog", "cat bee"])
    assert read_metadata(file) == {"captions": '["dog", "cat bee"]'}
    conditions = read_stored(file, 0, WORDS).conditions
    assert conditions(torch.tensor([1, 2]))["words"].tolist() == [[1, 2], [3, 0]]
    with pytest.raises(UserError, match="must contain labels and samples"):
        read_stored(file, 3)
    for numbers in ([0, 2, 0], [-1, 0, 0]):
        write_stored(file, {"x0": x0}, torch.tensor(numbers), ["dog", "cat bee"])
        with pytest.raises(UserError, match=r"prompt outside 0\.\.1, its captions"):
            read_stored(file, 0, WORDS)
    for metadata in ({"captions": "[1]"}, {"captions": "{"}, {"captions": "[]"}):
        write_tensors({"x0": x0, "prompt": torch.zeros(3, dtype=torch.long)}, file, metadata)
        with pytest.raises(UserError, match="not a readable list of captions"):
            read_stored(file, 0, WORDS)
    for samples, message in (({"images": x0}, "images must be uint8"), ({"x0": x0.byte()}, "samples of integers")):
        write_stored(file, samples, torch.zeros(3, dtype=torch.long), ["dog"])
        with pytest.raises(UserError, match=message):
            read_stored(file, 0, WORDS)
    write_stored(file, {"x0": x0}, torch.zeros(3, dtype=torch.long))
    with pytest.raises(UserError, match="has no captions, which this model needs"):
        read_stored(file, 0, WORDS)


def test_the_prompt_reward_of_an_emoji_is_the_probability_of_its_drawing_if_the_background_is_right() -> None:
    network = ClassifierFeatures.load(REFERENCES / "emoji")
    captions = shuffled(EmojiCaptions.of("train")).select(torch.arange(40))
    images = captions.render(KeyedRandom(0, 0, "test", 0))
    right = prompt(network, images, captions.texts)
    assert ((right >= 0) & (right <= 1)).all()
    assert right.median() > 0.7
    other = EmojiCaptions(captions.names, (captions.styles + 1) % len(STYLES), captions.backgrounds)
    assert (prompt(network, images, other.texts) < right).float().mean() > 0.9
    elsewhere = EmojiCaptions(captions.names, captions.styles, (backgrounds_of(images) + 1) % 9)
    assert (prompt(network, images, elsewhere.texts) == 0).all()
    with pytest.raises(UserError, match="'a hat' is not a caption of an emoji"):
        prompt(network, images[:1], ["a hat"])
