"""What makes files that training and solvers read: encoded prompts, pairs, preferences, statistics, ratios."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from fewstep.api import Source, load
from fewstep.distill.devices import pick_device
from fewstep.errors import UserError
from fewstep.eval.draw import How, draw
from fewstep.eval.references import load_reference
from fewstep.eval.rewards import find_reward
from fewstep.models.condition import Condition
from fewstep.models.guidance import Guidance
from fewstep.models.hub.encode import encode_pictures, encode_prompts
from fewstep.models.hub.encoded import read_prompts
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.store import place_of, reserve, write_tensors, write_text
from fewstep.pictures import to_bytes
from fewstep.samplers.dc_solver import Searched, goals, search
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.sample import SampleNoise, plan
from fewstep.samplers.statistics import estimate

SEARCH_SEED = 12345  # of the samples that solvers are tuned on: far from those that people compare


def encode(
    teacher: Source, prompts: Source, out: Source, *, sizes: Sequence[tuple[int, int]] = (), frames: int = 1,
    batch: int = 16, rows: int = 512, device: str = "auto", progress: Callable[[int, int], None] | None = None,
) -> int:  # fmt: skip
    """Encodes the prompts of a text file, one a line, with a pipeline's text encoders, for ``data.kind=prompts``; of a
    folder of pictures (videos, with ``frames``) with captions beside them (``a.png``, ``a.txt``), also these, with its
    VAE, each at that of the ``sizes`` (height, width) which is nearest in proportions.

    Returns the number of prompts or files. What is there already is kept. Raises ``UserError`` on a line that is empty
    or not UTF-8, on a pipeline without text encoders, and on a folder of other prompts.
    """
    folder, given, place = PipelineFolder.open(place_of(teacher)), Path(prompts), pick_device(device)
    if given.is_dir():
        return encode_pictures(
            folder, given, Path(out), sizes=sizes, frames=frames, batch=batch, rows=rows, device=place,
            progress=progress,
        )  # fmt: skip
    lines = read_prompts(given)
    encode_prompts(folder, lines, Path(out), batch=batch, rows=rows, device=place, progress=progress)
    return len(lines)


def make_pairs(
    source: Source, file: Source, *, n: int = 10_000, solver: str = "heun", steps: int = 18, guidance: float = 1.0,
    seed: int = 0, device: str = "auto", progress: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Noise and what a teacher's solver makes of it, ``n`` pairs with labels in turn, as a safetensors file."""
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}.")
    reserve(file)
    model = load(source, device)
    labels = model.labels(n)
    samples = draw(model, labels, How(solver, steps, guidance, seed=seed), progress=progress)
    noise = SampleNoise(seed, range(n), model.config.shape, torch.device("cpu"))()
    start = float(model.denoiser.schedule.sigma(torch.tensor(1.0, dtype=torch.float64)))
    write_tensors({"noise": start * noise, "x0": samples.x0, "labels": labels}, Path(file))


def make_preferences(
    source: Source, file: Source, *, reward: str, n: int = 2_000, candidates: int = 4, solver: str | None = None,
    steps: int | None = None, guidance: float = 1.0, reference: str = "fashion", seed: int = 0, device: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Preference pairs as a safetensors file: of ``candidates`` samples for each of ``n`` labels, that of the highest
    ``reward`` is the ``winner`` and that of the lowest the ``loser``.

    A student uses its own rule unless told otherwise; a teacher needs ``solver`` and ``steps``. Raises ``UserError`` on
    an unknown reward or fewer than two candidates.
    """
    judge = find_reward(reward)
    if n < 1 or candidates < 2:
        raise UserError(f"A pair needs two candidates and n at least 1, got {candidates} and {n}.")
    reserve(file)
    model = load(source, device)
    network = load_reference(reference, "train", model.device).network
    labels = model.labels(n)
    how = How(solver or "student", steps, guidance, seed=seed)
    x0 = torch.stack([
        draw(
            model, labels, how, first=k * n,
            progress=partial(lambda before, done: progress(before + done), k * n) if progress else None,
        ).x0
        for k in range(candidates)
    ])  # fmt: skip
    rewards = torch.stack([judge(network, to_bytes(images), labels) for images in x0])
    each = torch.arange(n)
    pairs = {"winner": x0[rewards.argmax(0), each], "loser": x0[rewards.argmin(0), each], "labels": labels}
    write_tensors(pairs, Path(file))


def make_statistics(
    source: Source, file: Source, *, n: int = 1024, intervals: int = 120, guidance: float = 1.0, seed: int = 0,
    device: str = "auto", progress: Callable[[int, int], None] | None = None,
) -> None:  # fmt: skip
    """The statistics that DPM-Solver-v3 needs of a class-conditional model, over ``n`` of its own samples. The solver
    finds them as ``statistics.safetensors`` beside the model's weights. Goes on where it stopped."""
    reserve(file)
    model = load(source, device)
    labels = model.labels(n)
    x0 = draw(model, labels, How("heun", 16, guidance, seed=SEARCH_SEED + seed)).x0
    condition = Condition.of_labels(labels, model.config.classes)
    estimate(
        model.denoiser, x0.to(model.device), condition.to(model.device), Path(file), guidance=Guidance(guidance),
        intervals=intervals, seed=seed, progress=progress,
    )  # fmt: skip


def search_ratios(
    source: Source, file: Source, *, steps: Sequence[int], guidance: Sequence[float], order: int = 2, n: int = 32,
    seed: int = 0, device: str = "auto", progress: Callable[[int, int], None] | None = None,
) -> None:  # fmt: skip
    """Searches DC-Solver's ratios for every number of steps and scale, against runs of twenty times the steps. The
    solver finds them as ``dc_solver.json`` beside the model's weights."""
    reserve(file)
    model = load(source, device)
    labels = model.labels(n)
    condition = Condition.of_labels(labels, model.config.classes).to(model.device)
    noise = SampleNoise(SEARCH_SEED + seed, range(n), model.config.shape, model.device)()
    found: list[Searched] = []
    wanted = [(count, scale) for scale in guidance for count in steps]
    for done, (count, scale) in enumerate(wanted, start=1):
        times = plan("unipc_2", count, model.config).times
        predict = Predictor(model.denoiser, condition, Guidance(scale))
        x = predict.nodes(times)[0].sigma * noise
        ratios = search(predict, x, times, goals(predict, x, times), order=order)
        found.append(Searched(steps=count, guidance=scale, order=order, ratios=ratios))
        if progress is not None:
            progress(done, len(wanted))
    write_text(json.dumps([one.model_dump() for one in found], indent=1) + "\n", Path(file))
