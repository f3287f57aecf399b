"""Creates the classifier of frames that scores clips of emoji (``eval/clip_scores.py``), and scores rendered clips.

    python benchmarks/make_emoji_clips_classifier.py
    python benchmarks/make_emoji_clips_classifier.py --scores results/emoji_video/renders.json

The classifier is ``eval/reference/emoji_video``, or a folder given instead. The first command trains it on frames of
rendered clips, one class per name, and stores it in float16: half a minute of one core. The second, with a classifier
that is there, writes the scores of new renders, which are those of a perfect generator: for each split of the captions,
of clips against others of the same split. ``relative_diversity`` is that of clips of one caption as a share of that of
other renders, near 1; ``diversity`` of ``fewstep eval`` is the distance itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args

import torch

from fewstep.core.files import read_tensors, write_tensors, write_text
from fewstep.core.keyed_random import KeyedRandom
from fewstep.eval.clip_scores import PART, clip_features, clip_scores, relative_diversity
from fewstep.eval.emoji import renders
from fewstep.eval.networks.classifier import WEIGHTS, accuracy, save_classifier, train_classifier
from fewstep.eval.networks.features import REFERENCES, ClassifierFeatures
from fewstep.models.emoji import SIDE
from fewstep.models.emoji_clips import FRAMES, ClipCaptions, Split, load_animations

TRAINED, TESTED, EPOCHS, WIDTHS = 6_000, 500, 5, (32, 48, 96, 96)  # clips, of which two and all frames are used
N, REAL, CONDITIONS = 1_024, 4_000, 256  # clips scored; compared with; captions of which two clips are compared


def random_captions(captions: ClipCaptions, n: int, purpose: str) -> ClipCaptions:
    return captions.select(KeyedRandom(0, 0, purpose, 0).integers(n, len(captions)))


def train(folder: Path) -> None:
    captions = random_captions(ClipCaptions.all(), TRAINED, "classifier/train")
    first = KeyedRandom(0, 0, "classifier/train", 0).integers(TRAINED, FRAMES // 2, "frames")
    clips, rows = renders(captions, "classifier/train", PART), torch.arange(TRAINED)
    frames = torch.cat([clips[rows, :, first], clips[rows, :, first + FRAMES // 2]])
    network = train_classifier(
        frames, captions.names.repeat(2), epochs=EPOCHS, seed=0, widths=WIDTHS,
        progress=lambda step, steps, loss: print(f"{step} of {steps}: {loss:.3f}") if step % 50 == 0 else None,
    )  # fmt: skip
    network.half().float()  # as it is stored
    captions = random_captions(ClipCaptions.all(), TESTED, "classifier/test")
    frames = renders(captions, "classifier/test", PART).transpose(1, 2).flatten(0, 1)
    found = accuracy(network, frames, captions.names.repeat_interleave(FRAMES))
    record = {"clips": TRAINED, "epochs": EPOCHS, "seed": 0, "test_accuracy": found}
    save_classifier(network, folder, name="clips", shape=(3, SIDE, SIDE), training=record)
    tensors = read_tensors(folder / WEIGHTS)
    write_tensors({k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}, folder / WEIGHTS)
    print(f"Accuracy on the {len(frames):,} frames of other clips: {found:.4f}")


def score(folder: Path, file: Path) -> None:
    network, names = ClassifierFeatures.load(folder), load_animations().names
    scores = {}
    for split in get_args(Split):
        captions = ClipCaptions.of(split)
        shown = random_captions(captions, N, f"scored/{split}")
        real = renders(random_captions(captions, REAL, f"real/{split}"), f"real/{split}", PART)
        measured = clip_scores(network, names, renders(shown, f"scored/{split}", PART), real, shown)
        few = random_captions(captions, CONDITIONS, f"diversity/{split}")
        twice = few.select(torch.arange(2 * CONDITIONS) % CONDITIONS)
        own, other = (clip_features(network, renders(twice, f"diversity/{k}", PART)) for k in ("own", "real"))
        values = {name: measurement.value for name, measurement in measured.items()}
        scores[split] = values | {
            "relative_diversity": relative_diversity(own, other, CONDITIONS),
            "n": N,
            "n_real": REAL,
        }
    write_text(json.dumps(scores, indent=1) + "\n", file)
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=REFERENCES / "emoji_video")
    parser.add_argument("--scores", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    score(given.folder, given.scores) if given.scores else train(given.folder)
