"""Inception in clean-fid's modes against clean-fid, on the same random weights in the real files' formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_sets import write_images

from fewstep.core.errors import UserError
from fewstep.eval.feature_statistics import collect_statistics, read_statistics, write_statistics
from fewstep.eval.images import ImageSet
from fewstep.eval.metrics.frechet import frechet_distance
from fewstep.eval.networks import inception
from fewstep.eval.networks.inception import Inception, InceptionClasses
from fewstep.eval.networks.weights import WeightsLocator

pytest.importorskip("cleanfid")
MODES = ("clean", "legacy_pytorch", "legacy_tensorflow")


def clean_fid_network(mode: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """clean-fid's network of a mode with the same weights."""
    from cleanfid import features, inception_pytorch
    from cleanfid.inception_torchscript import InceptionV3W

    def script(path: str, download: bool, resize_inside: bool) -> InceptionV3W:
        return InceptionV3W(str(weights), download=False, resize_inside=resize_inside)

    state = torch.load(weights / inception.PORT, weights_only=True)
    monkeypatch.setattr(features, "InceptionV3W", script)
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: state)
    return features.build_feature_extractor(mode, torch.device("cpu"), use_dataparallel=False)


@pytest.mark.parametrize("mode", MODES)
def test_fid_equals_clean_fids_and_statistics_are_exchanged_in_both_directions(
    mode: str, inception_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cleanfid import fid

    folders = [write_images(tmp_path / name, 10, seed) for seed, name in enumerate("ab")]
    theirs = clean_fid_network(mode, inception_weights, monkeypatch)
    feats = [
        fid.get_folder_features(
            str(folder), theirs, 0, batch_size=8, device=torch.device("cpu"), mode=mode, verbose=False
        )
        for folder in folders
    ]
    # few images span few dimensions; within their subspace scipy's root is fast
    subspace = np.linalg.qr(np.concatenate(feats).T)[0]
    expected = fid.fid_from_feats(*(each @ subspace for each in feats))

    network = Inception.load(mode, WeightsLocator((inception_weights,)))
    ours = [collect_statistics({"x": network}, ImageSet.open(folder), frozenset({"x"}))["x"] for folder in folders]
    assert frechet_distance(ours[0].statistics, ours[1].statistics) == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(ours[0].features(), torch.from_numpy(feats[0]), rtol=1e-3, atol=1e-4)

    np.savez(tmp_path / "theirs.npz", mu=feats[1].mean(0), sigma=np.cov(feats[1], rowvar=False))
    read = read_statistics(tmp_path / "theirs.npz", network)
    assert frechet_distance(ours[0].statistics, read.statistics) == pytest.approx(expected, rel=1e-3)
    write_statistics(ours[1], tmp_path / "ours.npz")
    written = np.load(tmp_path / "ours.npz")  # as clean-fid reads it
    np.testing.assert_allclose(written["mu"], feats[1].mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(written["sigma"], np.cov(feats[1], rowvar=False), rtol=1e-2, atol=1e-4)


def test_the_classes_are_probabilities_without_the_bias_of_the_last_layer(inception_weights: Path) -> None:
    network = Inception.load("legacy_tensorflow", WeightsLocator((inception_weights,)))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    probabilities = InceptionClasses(network)(images)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    torch.testing.assert_close(probabilities, F.softmax(network(images) @ network.network.output.weight.T, dim=1))


@pytest.mark.parametrize("size", [(28, 28), (300, 300), (299, 299), (400, 60), (31, 1500)])
def test_resizing_equals_clean_fids(size: tuple[int, int]) -> None:
    from cleanfid.resize import build_resizer

    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    theirs = build_resizer("clean")(image.permute(1, 2, 0).numpy())
    ours = inception.resize_antialiased(image, 299).permute(1, 2, 0).numpy()
    assert np.abs(ours - theirs).max() < 2e-4  # of 255; clean-fid multiplies in double precision


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(UserError, match="mode of Inception 'cleann'; did you mean 'clean'"):
        Inception.load("cleann", WeightsLocator())
