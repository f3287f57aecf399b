"""Teacher and student of a run side by side, from the same noise: the images of its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.core.image_files import has_av
from fewstep.core.image_grid import SMALL, comparison, save_image, save_sample
from fewstep.models.loading import Model
from fewstep.models.model_config import ModelConfig
from fewstep.samplers.generate import ImageGenerator
from fewstep.samplers.plan import SamplingConfig

TEACHER_STEPS = 16
ANIMATED, FPS_SMALL = "comparison.gif", 8  # of small videos
COLUMN = 96  # pixels: the width of small images below their prompts
DIVERSITY_CONDITIONS, DIVERSITY_SEEDS = 4, 10


class Row(NamedTuple):
    """A model, and how it is sampled for a row of images."""

    label: str
    model: Model
    sampling: SamplingConfig


def write_comparison(
    student: Model, teacher: Model | None, prompts: Sequence[str], folder: Path, *, columns: int, seed: int,
    guidance: float | None,
) -> Path:  # fmt: skip
    """Writes ``comparison.png``, with one column per condition and noise, and ``diversity.png``, with one row per
    condition and model and one column per noise. Returns the first. A student is also shown with fewer evaluations.

    Videos are shown by their first frames, and moving: small ones in ``comparison.gif``, others in ``comparison.mp4``
    if PyAV is installed.
    """
    teachers, students = _teacher_rows(student, teacher, seed, guidance), _student_rows(student, seed)
    rows = [*teachers, *students]
    if prompts:
        count = min(columns, len(prompts))
        names = [prompts[k * len(prompts) // count] for k in range(count)]
        conditions = list(range(count))
    else:
        names = _class_names(student.config)
        conditions = student.labels(columns).sort().values.tolist()
    generators = {row.label: ImageGenerator(row.model, names if prompts else ()) for row in rows}
    images = [(row.label, generators[row.label](conditions, row.sampling)) for row in rows]
    shown = [(label, _first_frames(each)) for label, each in images]
    scale = max(1, round(COLUMN / shown[0][1].shape[-1])) if prompts else None
    save_image(comparison(shown, scale, captions=names if prompts else ()), folder / "comparison.png")
    if images[0][1].ndim == 5:
        titles = names if prompts else ()
        if images[0][1].shape[-1] <= SMALL:
            save_sample(_moving(images, scale, titles), folder / ANIMATED, fps=FPS_SMALL)
        elif has_av():
            save_sample(_moving(images, scale, titles), folder / "comparison.mp4")
    chosen = dict.fromkeys(k * len(names) // DIVERSITY_CONDITIONS for k in range(DIVERSITY_CONDITIONS))
    diversity = [
        (f"{names[k]}: {row.label}", _first_frames(generators[row.label]([k] * DIVERSITY_SEEDS, row.sampling)))
        for k in chosen
        for row in (rows[0], students[0])
    ]
    save_image(comparison(diversity), folder / "diversity.png")
    return folder / "comparison.png"


def _class_names(config: ModelConfig) -> list[str]:
    """What is written over the images of each class; one name for an unconditional model."""
    return list(config.class_names or [f"class {label}" for label in range(config.classes)] or ["unconditional"])


def teacher_sampling(teacher: Model, seed: int, guidance: float | None = None) -> SamplingConfig:
    """How a teacher is shown beside its student: guided Euler steps, or a student's own rule if it is one itself."""
    if teacher.config.few_step:
        return SamplingConfig(seed=seed)
    scale = guidance or (1.0 if teacher.config.unconditional else 1.5 if teacher.config.classes else 2.0)
    return SamplingConfig("euler", TEACHER_STEPS, scale, seed=seed)


def _student_rows(student: Model, seed: int) -> list[Row]:
    """A student at its own number of evaluations, and at half of it and so on, as far as it supports them."""
    few_step = student.config.few_step
    own, counts = (len(few_step.times), few_step.counts) if few_step else (4, ())
    fewer = [own >> k for k in range(1, own.bit_length()) if not counts or own >> k in counts]
    steps = {own: None} | {count: count for count in fewer}
    return [
        Row(f"student, {_evaluations(nfe)}", student, SamplingConfig("student", given, seed=seed))
        for nfe, given in steps.items()
    ]


def _teacher_rows(student: Model, teacher: Model | None, seed: int, guidance: float | None) -> list[Row]:
    if teacher is None:
        return []
    if teacher_few_step := teacher.config.few_step:
        own = SamplingConfig("student", None, seed=seed)
        return [Row(f"teacher, {_evaluations(len(teacher_few_step.times))}", teacher, own)]
    nfe = len(student.config.few_step.times) if student.config.few_step else 4
    guided = teacher_sampling(teacher, seed, guidance)
    return [
        Row(f"teacher, {TEACHER_STEPS * (1 if guided.guidance == 1 else 2)} evaluations", teacher, guided),
        Row(f"teacher, {_evaluations(nfe)}", teacher, SamplingConfig("euler", nfe, seed=seed)),
    ]


def _evaluations(count: int) -> str:
    return f"{count} evaluation{'s' * (count > 1)}"


def _first_frames(images: Tensor) -> Tensor:
    """The first frames of videos [N, F, C, H, W]; images unchanged."""
    return images[:, 0] if images.ndim == 5 else images


def _moving(rows: Sequence[tuple[str, Tensor]], scale: int | None, captions: Sequence[str]) -> Tensor:
    """The rows of videos as one video on white, uint8 [F, 3, H, W], with even sides, which H.264 requires."""
    frames = []
    for k in range(rows[0][1].shape[1]):
        image = comparison([(label, videos[:, k]) for label, videos in rows], scale, captions=captions)
        page = Image.new("RGBA", (image.width + image.width % 2, image.height + image.height % 2), "white")
        page.alpha_composite(image)
        frames.append(torch.from_numpy(np.array(page.convert("RGB"))).permute(2, 0, 1))
    return torch.stack(frames)
