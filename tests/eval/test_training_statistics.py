"""The statistics of the training images of a reference, by which training chooses its best student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from file_readers import training_statistics
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, write_tensors
from fewstep.eval.build_reference import stored_statistics
from fewstep.eval.references import load_reference

DIMENSION = 4  # of the features


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A reference of which only the training images are known."""
    training_statistics(tmp_path)
    return tmp_path


def test_they_are_those_of_the_features(folder: Path) -> None:
    features = torch.randn(9, DIMENSION, generator=torch.Generator())
    write_tensors({"features": features}, folder / "train.safetensors")  # as in references of earlier versions
    earlier = load_reference(str(folder), "train")
    assert earlier.features.equal(features)
    write_tensors(stored_statistics(earlier.statistics), folder / "train.safetensors")
    found = load_reference(str(folder), "train")
    assert found.features.shape == (0, DIMENSION)
    assert found.statistics.mean.equal(features.double().mean(0))
    assert found.statistics.covariance.equal(earlier.statistics.covariance)
    assert found.statistics.count == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": None}, "not a readable file of the statistics of training images .*mean"),
        ({"mean": torch.zeros(3)}, "train.safetensors .*A mean .D. and a covariance"),
        ({"covariance": -torch.eye(DIMENSION)}, "train.safetensors .*variance below 0"),
        ({"covariance": torch.eye(DIMENSION) + 3 * torch.eye(DIMENSION).flip(0)}, "train.safetensors.*no.* covariance"),
        ({"mean": torch.zeros(DIMENSION, dtype=torch.complex64)}, "must be floating-point numbers"),
        ({"count": torch.zeros(2)}, "train.safetensors is not a readable file"),
        ({"mean": torch.zeros(3), "covariance": torch.eye(3)}, f"dimension 3, but its network has {DIMENSION}"),
    ],
)
def test_damaged_ones_are_refused(folder: Path, changes: dict[str, Tensor | None], message: str) -> None:
    tensors = {**read_tensors(folder / "train.safetensors"), **changes}
    write_tensors({name: x for name, x in tensors.items() if x is not None}, folder / "train.safetensors")
    with pytest.raises(UserError, match=message):
        load_reference(str(folder), "train")
