"""Creating the files that training reads: encoded prompts, ODE pairs, preference pairs, references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from fewstep.api.models import Source, load
from fewstep.core.devices import pick_device
from fewstep.core.errors import UserError
from fewstep.core.files import check_writable, read_prompts, write_tensors
from fewstep.core.image_files import to_bytes
from fewstep.distill.data.readers import read_idx
from fewstep.eval import references
from fewstep.eval.rewards.registry import find_reward
from fewstep.models.hub.encode import encode_images, encode_prompts
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.loading import resolve_path
from fewstep.samplers.generate import SampleNoise, generate
from fewstep.samplers.plan import SamplingConfig


def encode(
    teacher: Source, prompts: Source, out: Source, *, sizes: Sequence[tuple[int, int]] = (), frames: int = 1,
    batch: int = 16, rows: int = 512, device: str = "auto", progress: Callable[[int, int], None] | None = None,
) -> int:  # fmt: skip
    """Encodes the prompts of a text file, one per line, with a pipeline's text encoders, for ``data.kind=prompts``. Of
    a folder of images (or videos, with ``frames``) with captions beside them (``a.png``, ``a.txt``), encodes these too,
    with the pipeline's VAE, each at the nearest of the ``sizes`` (height, width).

    Returns the number of prompts or files. Existing shards are kept. Raises ``UserError`` on a line that is empty or
    not UTF-8, on a pipeline without text encoders, and on a folder of other prompts.
    """
    folder, given, place = PipelineFolder.open(resolve_path(teacher)), Path(prompts), pick_device(device)
    if given.is_dir():
        return encode_images(
            folder, given, Path(out), sizes=sizes, frames=frames, batch=batch, rows=rows, device=place,
            progress=progress,
        )  # fmt: skip
    lines = read_prompts(given)
    encode_prompts(folder, lines, Path(out), batch=batch, rows=rows, device=place, progress=progress)
    return len(lines)


def make_ode_pairs(
    source: Source, file: Source, *, n: int = 10_000, sampling: SamplingConfig | None = None, device: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Writes ``n`` pairs of noise and what a teacher's solver maps it to, with labels in turn, as a safetensors file.
    The default is 18 Heun steps."""
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}.")
    check_writable(file)
    model = load(source, device)
    labels = model.labels(n)
    sampling = sampling or SamplingConfig("heun", 18)
    samples = generate(model, labels, sampling, progress=progress)
    noise = SampleNoise(sampling.seed, range(n), model.config.shape, torch.device("cpu"))()
    start = float(model.denoiser.schedule.sigma(torch.tensor(1.0, dtype=torch.float64)))
    write_tensors({"noise": start * noise, "x0": samples.x0, "labels": labels}, Path(file))


def make_preferences(
    source: Source, file: Source, *, reward: str, n: int = 2_000, candidates: int = 4,
    sampling: SamplingConfig | None = None, reference: str = "fashion", device: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Writes preference pairs as a safetensors file: of ``candidates`` samples for each of ``n`` labels, the one with
    the highest ``reward`` is the ``winner`` and the one with the lowest the ``loser``.

    Raises ``UserError`` on an unknown reward or fewer than two candidates.
    """
    judge = find_reward(reward)
    if n < 1 or candidates < 2:
        raise UserError(f"A pair needs two candidates and n at least 1, got {candidates} and {n}.")
    check_writable(file)
    model = load(source, device)
    network = references.load_reference(reference, "train", model.device).network
    labels = model.labels(n)
    sampling = sampling or SamplingConfig()
    x0 = torch.stack([
        generate(
            model, labels, sampling, numbers=range(k * n, (k + 1) * n),
            progress=partial(lambda before, done: progress(before + done), k * n) if progress else None,
        ).x0
        for k in range(candidates)
    ])  # fmt: skip
    rewards = torch.stack([judge(network, to_bytes(images), labels) for images in x0])
    each = torch.arange(n)
    pairs = {"winner": x0[rewards.argmax(0), each], "loser": x0[rewards.argmin(0), each], "labels": labels}
    write_tensors(pairs, Path(file))


def make_reference(
    data: Source, out: Source, *, epochs: int = 6, seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Trains a classifier on the images of a folder of idx files and writes a reference folder: its features of real
    images, and some of the images. Returns the classifier's accuracy and the score of real training images."""
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another folder with --out.")
    train, test = read_idx(data, "train"), read_idx(data, "test")
    return references.build_reference(folder, folder.name, train, test, epochs=epochs, seed=seed, progress=progress)
