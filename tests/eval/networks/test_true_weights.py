"""Checks that need the true weights, which are not shipped: without them a test is skipped with a warning that names
what is missing. Put the files into a folder of ``$FEWSTEP_WEIGHTS`` (see docs/evaluation.md) to run them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fewstep.core.errors import UserError
from fewstep.eval.evaluate_protocol import ProtocolEvaluator
from fewstep.eval.networks.inception import PORT, Inception
from fewstep.eval.networks.weights import WeightsLocator
from fewstep.eval.protocol import Protocol

CIFAR = "FEWSTEP_CIFAR10"  # a folder of the 50,000 training images as PNG
STATISTICS = "cifar10_clean_train_32.npz"


def skip_without(missing: str) -> None:
    warnings.warn(f"NOT CHECKED, missing: {missing}", stacklevel=2)
    pytest.skip(missing)


def inception(mode: str) -> Inception:
    try:
        return Inception.load(mode, WeightsLocator.from_environment())
    except UserError as error:
        skip_without(str(error))
        raise


def test_the_file_of_pytorch_fid_has_the_hash_in_its_name() -> None:
    port = inception("legacy_pytorch")
    assert port.sha256.startswith(PORT.rpartition("-")[2].removesuffix(".pth"))


def test_both_files_contain_the_same_network() -> None:
    """Features of images that need no resizing differ only by the scaling of the inputs (128 or 127.5)."""
    script, port = inception("legacy_tensorflow"), inception("legacy_pytorch")
    coarse = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, (299, 299), mode="bicubic").clamp(0, 1).mul(255).byte()
    a, b = (torch.cat([n(n.prepare(image)[None]) for image in images]) for n in (script, port))
    assert F.cosine_similarity(a, b).min() > 0.999
    assert ((a - b).norm() / a.norm()).item() < 0.03


def test_cifar10_has_no_distance_from_the_statistics_that_clean_fid_publishes() -> None:
    inception("clean")
    folder = Path(os.environ.get(CIFAR, "no"))
    locator = WeightsLocator.from_environment()
    if not folder.is_dir():
        skip_without(f"${CIFAR}, a folder of CIFAR-10's training images")
    if locator.find_local(STATISTICS) is None:
        skip_without(f"{STATISTICS} in $FEWSTEP_WEIGHTS (from clean-fid's server)")
    protocol = Protocol(name="cifar10", metrics=("fid",), reference=STATISTICS, n=50_000)
    assert ProtocolEvaluator(protocol, locator).measure(protocol.open_images(folder))["fid"].value < 0.01
