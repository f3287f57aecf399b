"""Scores of clips generated for captions such as "a shiny ghost jumping on red".

They say whether clips show what their captions describe, how they move, and how far they are from rendered clips
(``models.emoji_clips``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.emoji import in_turn, made_from, renders, shuffled
from fewstep.eval.metrics.diversity import cross_seed_diversity
from fewstep.eval.metrics.frechet import Statistics, frechet_distance, small_sample_bias
from fewstep.eval.metrics.metric import NOTED_BIAS, Measurement
from fewstep.eval.motion import MotionReading, read_motion
from fewstep.eval.networks.features import ClassifierFeatures, ReferenceNetwork, extract_features
from fewstep.models.emoji_clips import ART, MOTIONS, SHAPE, ClipCaptions, Split, directions, load_animations

# Names of references: all have one classifier, and differ in the captions of their renders.
SPLITS: dict[str, Split] = {
    "emoji-video": "train", "emoji-video-motion": "motion", "emoji-video-background": "background",
}  # fmt: skip
FOLDER, NETWORK = "emoji_video", "clips"  # of the classifier: in reference/, and the name of its features
RENDERS, PART = 2_000, 100  # real clips of a reference; rendered at a time
STILL = 0.004  # change below which a clip stands still: "alive" is what remains without motion, and must move


def real_set(name: str, purpose: str) -> tuple[ClipCaptions, Tensor, str]:
    """The captions of a reference of ``SPLITS``, renders of them in turn, uint8 [RENDERS, 3, 8, 32, 32], and a hash of
    what these are made from."""
    captions = shuffled(ClipCaptions.of(SPLITS[name]))
    clips = renders(in_turn(captions, RENDERS), purpose, PART)
    return captions, clips, made_from(ART, SPLITS[name], purpose, RENDERS)


def clip_features(network: ReferenceNetwork, clips: Tensor) -> Tensor:
    """The features of every frame, float32 [N, F, D], of clips uint8 [N, 3, F, 32, 32]."""
    frames = clips.transpose(1, 2)
    return extract_features(network, frames.flatten(0, 1)).reshape(*frames.shape[:2], -1)


def summarise(features: Tensor) -> Tensor:
    """Features of clips [N, 2 D]: the mean of those of the frames [N, F, D], which is what a clip shows, and the last
    less the first, which is how this changes."""
    return torch.cat([features.mean(1), features[:, -1] - features[:, 0]], 1)


def majority(classes: Tensor) -> tuple[Tensor, Tensor]:
    """The most frequent class [N] of the frames of clips [N, F], the smallest of several, and its share of them [N]."""
    counts = (classes[:, :, None] == classes[:, None, :]).sum(2)
    most = counts.amax(1, keepdim=True)
    named = torch.where(counts == most, classes, classes.max() + 1).amin(1)
    return named, most[:, 0] / classes.shape[1]


def fd_clips(features: Tensor, real: Tensor) -> Measurement:
    """The Fréchet distance between the summaries of clips and of real ones, from features of frames [N, F, D]. It is no
    FVD: the network sees one frame at a time, and time enters as the difference of last and first frame alone."""
    reference, own = Statistics.of(summarise(real)), Statistics.of(summarise(features))
    distance, bias = frechet_distance(own, reference), small_sample_bias(reference, len(features))
    return Measurement(distance, bias=bias if bias > NOTED_BIAS * distance else None)


def relative_diversity(features: Tensor, real: Tensor, conditions: int) -> float:
    """How much clips of one caption differ, relative to real ones: the ratio of the mean distances between the
    summaries of two clips of a caption. Clip k, here and in the real set, shows caption ``k % conditions``; both are
    features of frames [N, F, D], N >= 2 ``conditions``. Raises ``UserError`` on fewer, and on real clips that are all
    the same."""
    own, expected = (_diversity(frames, conditions) for frames in (features, real))
    if expected == 0:
        raise UserError("The real clips of a caption do not differ from each other: render them with other numbers.")
    return own / expected


def _diversity(features: Tensor, conditions: int) -> float:
    seeds = len(features) // conditions
    if seeds < 2:
        raise UserError(f"{len(features)} clips of {conditions} captions: two clips of each caption are needed.")
    return cross_seed_diversity(summarise(features)[: seeds * conditions].reshape(seeds, conditions, -1))


def clip_scores(
    network: ClassifierFeatures, words: Sequence[str], clips: Tensor, real: Tensor, captions: ClipCaptions
) -> dict[str, Measurement]:
    """What clips, uint8 [N, 3, 8, 32, 32], one for each of ``captions``, show (``shown_words``), and ``fd_clips``,
    their distance from ``real`` clips [M, 3, 8, 32, 32]. Raises ``UserError`` if they do not fit together."""
    for what, given in (("the clips", clips), ("the real clips", real)):
        if given.dtype != torch.uint8 or given.shape[1:] != SHAPE or len(given) < 2:
            raise UserError(
                f"Clips of emoji are uint8 [N, {', '.join(map(str, SHAPE))}], at least two; {what} are {given.dtype} "
                f"{list(given.shape)}."
            )
    features = clip_features(network, clips)
    shown = shown_words(network, words, clips, features, captions)
    return shown | {"fd_clips": fd_clips(features, clip_features(network, real))}


def shows_motion(reading: MotionReading, captions: ClipCaptions) -> Tensor:
    """Which clips [N] move as their captions describe."""
    return (reading.motions == captions.motions) & (reading.change > STILL)


def shown_words(
    network: ClassifierFeatures, words: Sequence[str], clips: Tensor, features: Tensor, captions: ClipCaptions
) -> dict[str, Measurement]:
    """How clips, uint8 [N, 3, 8, 32, 32] with the ``features`` of their frames [N, 8, D], follow ``captions`` [N].

    ``motion``, ``name``, ``background``: the share (0..1) of clips that show this word of their caption, and ``prompt``
    that show all three; ``motion_left`` etc.: that of ``motion`` among the clips of one motion; ``agreement``: the
    share of frames that show the name of their clip, the most frequent one; ``speed`` and ``speed_deviation``: mean and
    standard deviation of the velocity in the direction of the caption, in pixels per frame, over the clips that should
    travel; ``change``: the mean difference of neighbouring frames, as a share of the range.

    ``network`` classifies frames; ``words`` has the name that each of its classes shows. Raises ``UserError`` if shapes
    or numbers do not fit together.
    """
    if len(clips) != len(captions):
        raise UserError(f"There are {len(clips)} clips for {len(captions)} captions; every clip needs its own.")
    if len(words) != network.classes_count:
        raise UserError(
            f"The classifier has {network.classes_count} classes, and {len(words)} names are given for them."
        )
    reading = read_motion(clips)
    names = load_animations().names
    numbers = torch.tensor([names.index(word) if word in names else -1 for word in words])
    shown, agreement = majority(numbers[network.classes(features.flatten(0, 1))].reshape(len(clips), -1))
    right = {
        "motion": shows_motion(reading, captions),
        "name": shown == captions.names,
        "background": reading.backgrounds == captions.backgrounds,
    }
    values = {"prompt": torch.stack(list(right.values())).all(0), **right}
    scores = {name: hits.float().mean().item() for name, hits in values.items()}
    for number, motion in enumerate(MOTIONS):
        if len(rows := (captions.motions == number).nonzero()[:, 0]):
            scores[f"motion_{motion}"] = right["motion"][rows].float().mean().item()
    scores |= {"agreement": agreement.mean().item(), "change": reading.change.mean().item()}
    asked = directions(captions.motions)
    speeds = (reading.velocity * asked).sum(1)[asked.any(1)]
    if len(speeds) > 1:
        scores |= {"speed": speeds.mean().item(), "speed_deviation": speeds.std().item()}
    return {name: Measurement(value) for name, value in scores.items()}
