"""Creates the classifier of the reference ``emoji``, about two minutes on one core, and scores renders with it.

    python benchmarks/make_emoji_reference.py eval/reference/emoji
    python benchmarks/make_emoji_reference.py eval/reference/emoji --scores results/emoji/renders.json

The first command trains it on renders of all captions and stores it in float16. The second, with a classifier that is
there, writes the scores of new renders, which are those of a perfect generator.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from store_half import store_half

from fewstep.core.keyed_random import KeyedRandom
from fewstep.eval.emoji import SPLITS, drawing_classes, in_turn, renders, shuffled
from fewstep.eval.evaluate_reference import emoji_metrics
from fewstep.eval.networks.classifier import WEIGHTS, accuracy, save_classifier, train_classifier
from fewstep.eval.references import load_reference
from fewstep.eval.score_files import Score, write_scores
from fewstep.models.emoji import SHAPE, EmojiCaptions

TRAINED, TESTED, EPOCHS, WIDTHS = 12_000, 4_000, 5, (32, 64, 128, 128)
N = 1_024


def random_captions(n: int, purpose: str) -> EmojiCaptions:
    every = EmojiCaptions.all()
    return every.select(KeyedRandom(0, 0, purpose, 0).integers(n, len(every)))


def train(folder: Path) -> None:
    captions, tested = random_captions(TRAINED, "classifier/train"), random_captions(TESTED, "classifier/test")
    network = train_classifier(
        renders(captions, "classifier/train"), drawing_classes(captions), epochs=EPOCHS, seed=0, widths=WIDTHS,
        progress=lambda step, steps, loss: print(f"{step} of {steps}: {loss:.3f}") if step % 50 == 0 else None,
    )  # fmt: skip
    network.half().float()  # as it is stored
    found = accuracy(network, renders(tested, "classifier/test"), drawing_classes(tested))
    record = {"renders": TRAINED, "epochs": EPOCHS, "seed": 0, "test_accuracy": found}
    save_classifier(network, folder, name="emoji", shape=SHAPE, training=record)
    store_half(folder / WEIGHTS, folder / WEIGHTS)
    print(f"Accuracy on {TESTED:,} other renders: {found:.4f}")


def score(file: Path) -> None:
    scores = []
    for name, split in SPLITS.items():
        reference = load_reference(name)
        captions = in_turn(shuffled(EmojiCaptions.of(split)), N)
        measured = emoji_metrics(reference, renders(captions, "benchmark"), captions)
        scores += [
            Score(
                model="renders", role="images", solver="", nfe=0, steps=0, guidance=1.0, seed=0, seconds=0.0,
                metric=metric, n=N, reference=f"{name}/test", reference_sha256=reference.sha256,
                features_sha256=reference.network.sha256, **measurement._asdict(),
            )
            for metric, measurement in measured.items()
        ]  # fmt: skip
    write_scores(scores, file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scores", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    score(given.scores) if given.scores else train(given.folder)
