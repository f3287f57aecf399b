"""Prompts as words of a vocabulary, and the U-Net that takes them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import fewstep
from fewstep.core.errors import UserError
from fewstep.eval.hashes import json_sha256, model_sha256
from fewstep.models.condition import Condition
from fewstep.models.guidance import Guidance
from fewstep.models.loading import Model, load_model, pipeline_of
from fewstep.models.model_config import FewStep, ModelConfig
from fewstep.models.skeleton import skeleton_of
from fewstep.models.unet import UNet
from fewstep.models.vocabulary import Vocabulary
from fewstep.samplers.predictor import Predictor

WORDS = Vocabulary(words=("red", "blue", "heart-eyes", "fox"), fillers=("a", "on"), length=3)
TINY = {"channels": 3, "classes": 0, "widths": (8, 16), "blocks": (1, 1), "embedding": 8, "heads": 2, "vocabulary": 4}
CONFIG = ModelConfig(
    backbone={"name": "unet", "widths": [8], "blocks": [1], "embedding": 8}, shape=(3, 8, 8), vocabulary=WORDS
)
X_T = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


def encoded(*prompts: str) -> Condition:
    return WORDS.encode(prompts)(torch.arange(len(prompts)))


def perturbed(settings: dict[str, object] = TINY) -> UNet:
    """A network in which no layer is zero, so that every input matters."""
    torch.manual_seed(0)
    network = UNet(**settings)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        if network.words is not None:
            network.words.weight[0] = 0  # as it stays in training
    return network.eval()


def test_a_prompt_is_the_set_of_its_words() -> None:
    assert encoded("a red fox on blue")["words"].tolist() == [[1, 2, 4]]
    for same in ("blue fox red", "A Red fox, on blue!", "red red fox blue"):
        assert encoded(same)["words"].tolist() == [[1, 2, 4]], same
    assert encoded("heart-eyes", "a on", "")["words"].tolist() == [[3, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert encoded("fox")["words"].dtype == torch.int64


def test_the_null_condition_says_nothing() -> None:
    condition = encoded("a red fox", "blue")
    assert condition.null()["words"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert condition.null(torch.tensor([False, True]))["words"].tolist() == [[1, 4, 0], [0, 0, 0]]


def test_a_word_that_the_model_does_not_know_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"word 'foxx' of the prompt 'a foxx on blue'; did you mean 'fox'\?"):
        WORDS.encode(["fox", "a foxx on blue"])
    with pytest.raises(UserError, match="has 4 words; the model takes at most 3"):
        WORDS.encode(["red blue heart-eyes fox"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"words": ["Fox"], "length": 1}, "not one word"),
        ({"words": ["red fox"], "length": 1}, "not one word"),
        ({"words": ["fox."], "length": 1}, "not one word"),
        ({"words": ["fox", "fox"], "length": 1}, "must differ"),
        ({"words": ["fox", "a"], "fillers": ["a"], "length": 1}, "must differ"),
        ({"words": [], "length": 1}, "at least 1"),
        ({"words": ["fox"], "length": 0}, "greater than or equal to 1"),
        ({"words": ["fox"]}, "Field required"),
    ],
)
def test_a_vocabulary_that_cannot_be_meant_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Vocabulary.model_validate(settings)


def test_a_model_takes_labels_or_prompts() -> None:
    with pytest.raises(ValidationError, match="either classes or vocabulary"):
        ModelConfig(backbone={"name": "unet"}, shape=(3, 8, 8), classes=2, vocabulary=WORDS)
    assert CONFIG.takes_prompts
    assert not CONFIG.unconditional


def test_the_network_adds_the_vectors_of_words() -> None:
    """The embedding that blocks receive is silu(time + sum of the words' vectors); nothing said adds nothing."""
    network = perturbed()
    received: list[torch.Tensor] = []
    network.down[0][0].modulation.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))  # type: ignore[union-attr, index]
    network(X_T, T, encoded("a red fox on blue", "heart-eyes", ""))
    time = network.time.register_forward_hook(lambda module, inputs, output: received.append(output))
    network(X_T, T, encoded("", "", ""))
    time.remove()
    table = network.words.weight  # type: ignore[union-attr]
    said = torch.stack([table[1] + table[2] + table[4], table[3], torch.zeros(8)])
    torch.testing.assert_close(received[0], torch.nn.functional.silu(received[1] + said))


def test_padding_and_order_change_nothing_and_every_word_something() -> None:
    network = perturbed()
    wide = Condition({"words": torch.tensor([[0, 4, 0, 0, 1, 2], [3, 0, 0, 0, 0, 0], [0] * 6])})
    plain = network(X_T, T, encoded("red fox blue", "heart-eyes", ""))
    torch.testing.assert_close(network(X_T, T, wide), plain)
    other = network(X_T, T, encoded("red fox", "fox", "blue"))
    assert ((other - plain).flatten(1).norm(dim=1) > 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_said_stays_zero_in_training(dtype: torch.dtype) -> None:
    network = perturbed().to(dtype).train()
    network(X_T.to(dtype), T, encoded("red", "", "fox")).square().sum().backward()
    gradient = network.words.weight.grad  # type: ignore[union-attr]
    assert gradient is not None
    used = gradient.abs().sum(1) > 0
    assert used.tolist() == [False, True, False, False, True]


def test_guidance_drops_all_words() -> None:
    denoiser = CONFIG.build()
    denoiser.backbone = perturbed()
    condition = encoded("red fox", "blue", "fox")
    x = X_T
    guided = Predictor(denoiser, condition, Guidance(3.0))(x, 0.5).velocity
    said, nothing = (
        Predictor(denoiser, one)(x, 0.5).velocity for one in (condition, encoded("", "", ""))
    )  # fmt: skip
    torch.testing.assert_close(guided, nothing + 3.0 * (said - nothing), atol=1e-4, rtol=1e-4)


def test_a_saved_model_keeps_its_vocabulary(tmp_path: Path) -> None:
    fewstep.save_model(CONFIG.build(), CONFIG, tmp_path)
    assert load_model(tmp_path).config == CONFIG


def test_models_without_a_vocabulary_are_as_they_were() -> None:
    """Their network has the same weights from the same seed, and their hash does not know of vocabularies."""
    plain = ModelConfig(backbone={"name": "unet", "widths": [8], "blocks": [1]}, shape=(1, 8, 8), classes=2)
    assert "words" not in {name.split(".")[0] for name in plain.build().backbone.state_dict()}
    without = json_sha256(
        plain.model_dump(mode="json", exclude={"base", "class_names", "vocabulary", "expert_backbones"})
    )
    empty = Model(denoiser=plain.build(), config=plain)
    empty.denoiser.backbone = torch.nn.Identity()
    assert model_sha256(empty) == hashlib.sha256(without.encode()).hexdigest()


def test_students_of_whole_samples_are_as_they_were() -> None:
    """Their hash does not know of videos that are generated frame by frame."""
    few_step = {"times": [1.0, 0.5], "rule": "renoise", "counts": [], "shift": 1.0}
    config = CONFIG.model_copy(update={"few_step": FewStep.model_validate(few_step)})
    denoiser = CONFIG.build()
    denoiser.backbone = torch.nn.Identity()
    settings = config.model_dump(mode="json", exclude={"base", "class_names", "expert_backbones"})
    before = hashlib.sha256(json_sha256({**settings, "few_step": few_step}).encode()).hexdigest()
    assert model_sha256(Model(denoiser=denoiser, config=config)) == before
    in_turn = config.model_copy(update={"few_step": FewStep.model_validate(few_step | {"frame_by_frame": True})})
    assert model_sha256(Model(denoiser=denoiser, config=in_turn)) != before


def test_other_vocabularies_are_other_models() -> None:
    denoiser = CONFIG.build()
    turned = Vocabulary(words=WORDS.words[::-1], fillers=WORDS.fillers, length=3)
    hashes = {
        model_sha256(Model(denoiser=denoiser, config=CONFIG.model_copy(update={"vocabulary": words})))
        for words in (WORDS, turned)
    }
    assert len(hashes) == 2


def test_what_needs_a_pipeline_or_labels_says_so() -> None:
    model = Model(denoiser=CONFIG.build(), config=CONFIG)
    with pytest.raises(UserError, match="needs a diffusers pipeline"):
        pipeline_of(model)
    with pytest.raises(UserError, match="takes prompts"):
        model.labels(3)
    with pytest.raises(UserError, match="give at least one"):
        fewstep.sample(model, n=3)


def test_the_skeleton_has_words() -> None:
    assert skeleton_of(CONFIG).condition == {"words": ((3,), torch.int64)}


def test_a_sample_is_that_of_its_prompt_whatever_stands_beside_it() -> None:
    model = Model(denoiser=CONFIG.build(), config=CONFIG)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    sampling = fewstep.SamplingConfig("euler", 2)
    images = fewstep.sample(model, prompts=["a red fox", "blue", "blue"], sampling=sampling)
    assert images.shape == (3, 3, 8, 8)
    assert images.dtype == torch.uint8
    again = fewstep.sample(model, prompts=["fox red", "a fox", "blue"], sampling=sampling)
    assert images[0].equal(again[0])
    assert not images[1].equal(again[1])
    assert images[2].equal(again[2])
