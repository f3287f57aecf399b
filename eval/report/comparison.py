"""A run's teacher and student side by side, from the same noise: the pictures of its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.core.image_files import has_av
from fewstep.core.image_grid import comparison, save_picture, save_sample
from fewstep.models.loading import Model
from fewstep.samplers.generate import ImageGenerator
from fewstep.samplers.plan import SamplingConfig

TEACHER_STEPS = 16
CONDITIONS, NOISES = 4, 10  # of the picture of diversity


class Row(NamedTuple):
    """A model and how it is sampled."""

    label: str
    model: Model
    sampling: SamplingConfig


def compare(
    student: Model, teacher: Model | None, prompts: Sequence[str], folder: Path, *, columns: int, seed: int,
    guidance: float | None,
) -> Path:  # fmt: skip
    """Writes ``comparison.png`` (for videos their first frames and, where PyAV is installed, ``comparison.mp4``), a
    column a condition and noise, and ``diversity.png``, a row a condition with several noises. Returns the first."""
    rows = _rows(student, teacher, seed, guidance)
    if classes := student.config.classes:
        names = [f"class {label}" for label in range(classes)]
        shown = student.labels(columns).sort().values.tolist()
    else:
        count = min(columns, len(prompts))
        names = [prompts[k * len(prompts) // count] for k in range(count)]
        shown = list(range(count))
    generators = {row.label: ImageGenerator(row.model, () if classes else names) for row in rows}
    pictures = [(row.label, generators[row.label](shown, row.sampling)) for row in rows]
    save_picture(comparison([(label, _first(several)) for label, several in pictures]), folder / "comparison.png")
    if pictures[0][1].ndim == 5 and has_av():
        _save_video(pictures, folder / "comparison.mp4")
    chosen = [k * len(names) // CONDITIONS for k in range(CONDITIONS)]
    several = [
        (f"{names[condition]}: {row.label}", _first(generators[row.label]([condition] * NOISES, row.sampling)))
        for condition in dict.fromkeys(chosen)
        for row in (rows[0], rows[-1])
    ]
    save_picture(comparison(several), folder / "diversity.png")
    return folder / "comparison.png"


def _rows(student: Model, teacher: Model | None, seed: int, guidance: float | None) -> list[Row]:
    few = student.config.few_step
    own, by_itself = len(few.times) if few else 4, SamplingConfig("student", None, seed=seed)
    rows = [Row(f"student, {own} evaluations", student, by_itself)]
    if teacher is None:
        return rows
    if given := teacher.config.few_step:
        return [Row(f"teacher, {len(given.times)} evaluations", teacher, by_itself), *rows]
    scale = guidance or (1.5 if student.config.classes else 2.0)
    return [
        Row(
            f"teacher, {2 * TEACHER_STEPS} evaluations",
            teacher,
            SamplingConfig("euler", TEACHER_STEPS, scale, seed=seed),
        ),
        Row(f"teacher, {own} evaluations", teacher, SamplingConfig("euler", own, seed=seed)),
        *rows,
    ]


def _first(pictures: Tensor) -> Tensor:
    """Of videos [N, F, C, H, W] the first frames."""
    return pictures[:, 0] if pictures.ndim == 5 else pictures


def _save_video(rows: Sequence[tuple[str, Tensor]], file: Path) -> None:
    """The rows of videos as one video, on white; its sides are even, as H.264 wants them."""
    frames = []
    for k in range(rows[0][1].shape[1]):
        picture = comparison([(label, videos[:, k]) for label, videos in rows])
        page = Image.new("RGBA", (picture.width + picture.width % 2, picture.height + picture.height % 2), "white")
        page.alpha_composite(picture)
        frames.append(torch.from_numpy(np.array(page.convert("RGB"))).permute(2, 0, 1))
    save_sample(torch.stack(frames), file)
