"""Evaluation against clean-fid and scipy: same process, threads and inputs.

``python benchmarks/evaluation_speed.py OUT.json`` measures the host's part (decode, resize, statistics) with a network
that does nothing, the full pipeline with a random Inception of mode ``legacy_pytorch``'s architecture, and the Fréchet
distance of full-rank statistics of 2048 features.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor

from fewstep.core.environment import environment
from fewstep.core.torchvision_compat import import_torchvision
from fewstep.eval.feature_statistics import collect_statistics
from fewstep.eval.images import ImageSet
from fewstep.eval.metrics.frechet import Statistics, frechet_distance
from fewstep.eval.networks.inception import SIDE, resize_antialiased

THREADS, SIZE, BATCH, FEATURES = 2, 256, 50, 2048


class CleanFeatures:
    """clean-fid's preparation, followed by any network."""

    name, sha256, dimension = "bench", "", FEATURES

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        self.network = network

    def prepare(self, image: Tensor) -> Tensor:
        return resize_antialiased(image, SIDE)

    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images)


def first_pixels(images: Tensor) -> Tensor:
    """A network without cost."""
    return images.flatten(1)[:, :FEATURES].clone()


def write_images(folder: Path, n: int) -> Path:
    """Random images of ``SIZE`` x ``SIZE`` as PNG."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for k in range(n):
        coarse = torch.rand(1, 3, SIZE // 8, SIZE // 8, generator=generator)
        fine = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic")[0] + 0.02 * torch.randn(3, SIZE, SIZE)
        Image.fromarray((fine.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{k:05d}.png")
    return folder


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Medians of paired rounds."""
    rows = []
    for _ in range(rounds):
        seconds = []
        for work in (ours, theirs):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        rows.append(seconds)
    return {
        "seconds_ours": statistics.median(a for a, _ in rows),
        "seconds_theirs": statistics.median(b for _, b in rows),
        "times_as_fast": statistics.median(b / a for a, b in rows),
        "rounds": rounds,
    }


def against_clean_fid(folder: Path, network: Callable[[Tensor], Tensor], rounds: int) -> dict[str, float]:
    from cleanfid import fid

    def theirs() -> tuple[np.ndarray, np.ndarray]:
        features = fid.get_folder_features(
            str(folder), network, 0, batch_size=BATCH, device=torch.device("cpu"), mode="clean", verbose=False
        )
        return np.mean(features, axis=0), np.cov(features, rowvar=False)

    def ours() -> Statistics:
        return collect_statistics({"x": CleanFeatures(network)}, ImageSet.open(folder))["x"].statistics

    mean, covariance = theirs()
    measured = ours()
    assert np.allclose(measured.mean.numpy(), mean, rtol=1e-4, atol=1e-3)
    assert np.allclose(measured.covariance.numpy(), covariance, rtol=1e-4, atol=1e-3)
    return compare(ours, theirs, rounds) | {"images": len(list(folder.iterdir()))}


def inception() -> Callable[[Tensor], Tensor]:
    torchvision = import_torchvision()
    torch.manual_seed(0)
    network = torchvision.models.inception_v3(aux_logits=False, weights=None, init_weights=False).eval()
    network.fc = torch.nn.Identity()
    return torch.no_grad()(lambda images: network(images / 127.5 - 1))


def against_scipy(rounds: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.1, 2, FEATURES, dtype=torch.float64)
    a, b = (
        Statistics.of(torch.randn(3000, FEATURES, generator=generator, dtype=torch.float64) * spread) for _ in range(2)
    )

    def theirs() -> float:
        root = sqrtm(a.covariance.numpy() @ b.covariance.numpy())
        trace = a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root.real)
        return float((a.mean - b.mean).square().sum() + trace)

    values = frechet_distance(a, b), theirs()
    assert abs(values[0] / values[1] - 1) < 1e-6
    return compare(lambda: frechet_distance(a, b), theirs, rounds) | {"relative_difference": values[0] / values[1] - 1}


def main(out: Path) -> None:
    torch.set_num_threads(THREADS)
    import_torchvision()
    with tempfile.TemporaryDirectory() as folder:
        many, few = write_images(Path(folder) / "many", 2000), write_images(Path(folder) / "few", 100)
        result = {
            "host": against_clean_fid(many, first_pixels, 5),
            "whole": against_clean_fid(few, inception(), 9),
            "frechet": against_scipy(5),
        }
    out.write_text(json.dumps(result | environment(torch.device("cpu")), indent=1) + "\n", encoding="utf-8")
    for name, part in result.items():
        print(name, part)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
