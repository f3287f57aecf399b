"""Rewards by hand, and win rates with their intervals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.core.errors import UserError
from fewstep.eval.networks.features import ClassifierFeatures, extract_features
from fewstep.eval.references import real_images
from fewstep.eval.rewards.brightness import brightness
from fewstep.eval.rewards.confidence import confidence
from fewstep.eval.rewards.prompt import prompt
from fewstep.eval.rewards.registry import find_prompt_reward, find_reward, rate
from fewstep.eval.rewards.symmetry import symmetry
from fewstep.eval.rewards.win_rate import win_rate
from fewstep.eval.toy_captions import NAMES, CaptionSet, read_back, tint

NETWORK = ClassifierFeatures.load()


def test_brightness_and_symmetry_by_hand() -> None:
    half = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    half[..., :14] = 200
    uniform = torch.full((1, 1, 28, 28), 200, dtype=torch.uint8)
    images, labels = torch.cat([half, uniform]), torch.zeros(2, dtype=torch.long)
    assert brightness(NETWORK, images, labels).tolist() == [100, 200]
    assert symmetry(NETWORK, images, labels).tolist() == [-200, 0]


def test_confidence_is_the_classifiers_log_probability_of_the_label() -> None:
    images, labels = real_images("fashion")
    images, labels = images[:50], labels[:50]
    correct = confidence(NETWORK, images, labels)
    assert correct.shape == (50,)
    assert (correct <= 0).all()
    every = torch.stack([confidence(NETWORK, images, torch.full_like(labels, k)) for k in range(10)])
    torch.testing.assert_close(every.exp().sum(0), torch.ones(50))
    predicted = NETWORK.classes(extract_features(NETWORK, images))
    assert torch.equal(every.argmax(0), predicted)
    assert (correct > confidence(NETWORK, images, (labels + 1) % 10)).float().mean() > 0.8


def test_the_prompt_reward_is_the_probability_of_the_garment_if_the_colours_are_right() -> None:
    grey, labels = real_images("fashion")
    grey, labels = grey[:60], labels[:60]
    captions = CaptionSet.sample(labels, torch.Generator().manual_seed(0))
    images = tint(grey, captions)
    texts = captions.captions
    values = prompt(NETWORK, images, texts)
    torch.testing.assert_close(values, confidence(NETWORK, read_back(images).grey, labels).exp())
    for part in ("garments", "backgrounds"):
        other = replace(captions, **{part: (getattr(captions, part) + 1) % len(NAMES)})
        different = other.garments != other.backgrounds
        wrong = prompt(NETWORK, images[different], other.select(different.nonzero()[:, 0]).captions)
        assert (wrong == 0).all()
    of_others = prompt(NETWORK, images, replace(captions, labels=(labels + 1) % 10).captions)
    assert (of_others < values).float().mean() > 0.8
    assert torch.equal(prompt(NETWORK, images.flip(0), texts[::-1]), values.flip(0))


def test_prompts_and_images_that_are_no_coloured_garments_are_refused() -> None:
    with pytest.raises(UserError, match="'a red hat on blue' is not a caption of a coloured garment"):
        prompt(NETWORK, torch.zeros(2, 3, 32, 32, dtype=torch.uint8), ["a red coat on blue", "a red hat on blue"])
    with pytest.raises(UserError, match=r"Coloured garments are 3 x 32 x 32, got images of shape \[3, 16, 16\]"):
        prompt(NETWORK, torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["a red coat on blue"])


def test_a_caption_set_reads_its_own_captions() -> None:
    captions = CaptionSet.all().select(torch.tensor([700, 3, 3, 250]))
    again = CaptionSet.parse(captions.captions)
    for name in ("labels", "garments", "backgrounds"):
        assert torch.equal(getattr(again, name), getattr(captions, name))


@pytest.mark.parametrize("values", [[1.0], [1.0, torch.nan], [1.0, torch.inf], [[1.0, 2.0]]])
def test_a_reward_must_give_one_finite_number_per_image(values: list[float]) -> None:
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    with pytest.raises(UserError, match="The reward mine must return one finite number for each of 2 images"):
        rate("mine", lambda *_: torch.tensor(values), NETWORK, images, torch.zeros(2))
    assert rate("brightness", brightness, NETWORK, images, ["a", "b"]).tolist() == [0, 0]


def test_win_rate_and_wilsons_interval() -> None:
    """80 wins of 100: Wilson's interval is 0.7112 to 0.8666."""
    ours, theirs = torch.ones(100), torch.ones(100)
    ours[:80], ours[80:] = 2, 0
    rate, low, high = win_rate(ours, theirs)
    assert (rate, low, high) == pytest.approx((0.8, 0.7112, 0.8666), abs=1e-4)
    assert win_rate(theirs, theirs)[0] == 0.5


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), st.integers(0, 100))
def test_the_win_rates_of_both_sides_add_up_to_one(values: list[float], seed: int) -> None:
    ours = torch.tensor(values)
    theirs = torch.randn(len(values), generator=torch.Generator().manual_seed(seed))
    rate, low, high = win_rate(ours, theirs)
    reverse = win_rate(theirs, ours)
    assert 0 <= low <= rate + 1e-9 <= high + 2e-9 <= 1 + 3e-9
    assert (1 - reverse[0], 1 - reverse[2], 1 - reverse[1]) == pytest.approx((rate, low, high))


def test_an_unknown_reward_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="symmetry"):
        find_reward("symetry")
    with pytest.raises(UserError, match=r"Unknown prompt_reward 'promt'.*prompt"):
        find_prompt_reward("promt")
    with pytest.raises(UserError, match="Unknown reward 'prompt'"):
        find_reward("prompt")
