"""Evaluation against clean-fid and scipy: same process, threads and inputs. ``python tests/bench_eval.py OUT.json``

The host's path (decode, resize, statistics) with a network that does nothing, the whole path with a random Inception in
mode legacy_pytorch's architecture, and the Fréchet distance of full-rank statistics of 2048 features.
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
from fewstep.eval.feature_statistics import collect
from fewstep.eval.images import ImageSet
from fewstep.eval.metrics.frechet import Statistics, frechet_distance
from fewstep.eval.networks.inception import SIDE, resized

THREADS, SIZE, BATCH, FEATURES = 2, 256, 50, 2048


class Clean:
    """clean-fid's preparation, and any network after it."""

    name, sha256, dimension = "bench", "", FEATURES

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        self.network = network

    def prepare(self, image: Tensor) -> Tensor:
        return resized(image, SIDE)

    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images)


def nothing(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :FEATURES].clone()


def write_pictures(folder: Path, n: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for k in range(n):
        coarse = torch.rand(1, 3, SIZE // 8, SIZE // 8, generator=generator)
        fine = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic")[0] + 0.02 * torch.randn(3, SIZE, SIZE)
        Image.fromarray((fine.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{k:05d}.png")
    return folder


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> dict[str, float]:
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
        return collect({"x": Clean(network)}, ImageSet.open(folder))["x"].statistics

    mean, covariance = theirs()
    found = ours()
    assert np.allclose(found.mean.numpy(), mean, rtol=1e-4, atol=1e-3)
    assert np.allclose(found.covariance.numpy(), covariance, rtol=1e-4, atol=1e-3)
    return paired(ours, theirs, rounds) | {"images": len(list(folder.iterdir()))}


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
    return paired(lambda: frechet_distance(a, b), theirs, rounds) | {"relative_difference": values[0] / values[1] - 1}


def main(out: Path) -> None:
    torch.set_num_threads(THREADS)
    import_torchvision()
    with tempfile.TemporaryDirectory() as folder:
        many, few = write_pictures(Path(folder) / "many", 2000), write_pictures(Path(folder) / "few", 100)
        result = {
            "host": against_clean_fid(many, nothing, 5),
            "whole": against_clean_fid(few, inception(), 9),
            "frechet": against_scipy(5),
        }
    out.write_text(json.dumps(result | environment(torch.device("cpu")), indent=1) + "\n", encoding="utf-8")
    for name, part in result.items():
        print(name, part)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
