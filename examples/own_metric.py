"""Adds a metric from outside the package: MUSIQ (arXiv 2108.05997), a network of pyiqa (pip install pyiqa).

Score a folder: ``python examples/own_metric.py IMAGES``; or name the metric in a protocol (``metrics: [fid, musiq]``)
and import this file from its folder: ``fewstep --import own_metric eval ...``."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import fewstep
from fewstep.api.evaluate import evaluate_images
from fewstep.core.torchvision_compat import import_torchvision
from fewstep.eval.image_sources import list_images
from fewstep.eval.metrics.metric import Metric
from fewstep.eval.networks.weights import LoadedWeights, reading_weights
from fewstep.eval.protocol import Protocol

FILE = "musiq_koniq_ckpt-e95806b9.pth"
URL = f"https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main/{FILE}"


@dataclass(frozen=True)
class Musiq(LoadedWeights):
    """One number per image, about 0 to 100: the features of a network whose output is the score itself."""

    name: str = "pyiqa_musiq"
    dimension: int = 1

    def prepare(self, image):  # uint8 [3, H, W], one at a time
        return image

    @torch.no_grad()
    def __call__(self, images):  # uint8 [N, 3, H, W] -> [N, 1]
        return self.network(images.to(self.device) / 255).reshape(-1, 1)


@fewstep.register("network", "pyiqa_musiq")
def load(protocol, locator, device):
    import_torchvision()
    import pyiqa

    file = locator.find(FILE, URL)
    with reading_weights(file, "MUSIQ"):
        network = pyiqa.create_metric("musiq", device=torch.device(device), pretrained_model_path=str(file))
    return Musiq.from_file(file, network, device)


MUSIQ = fewstep.register("metric", "musiq")(Metric(
    "musiq", "pyiqa_musiq", "higher", 2, lambda inputs: float(inputs.images.statistics.mean),
    error=lambda inputs: float(inputs.images.statistics.covariance / inputs.images.statistics.count) ** 0.5,
    error_of="standard error of the mean over images",
))  # fmt: skip

if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
    n = max(2, len(list_images(source).names))
    (score,) = evaluate_images(source, Protocol(name="musiq", metrics=("musiq",), n=n))
    print(f"musiq {score.value:.3f} ± {score.error:.3f} ({score.n} images, {score.error_of})")
