"""The images and the report of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.api.models import Source, load, teacher_of_run
from fewstep.core.errors import UserError
from fewstep.core.files import read_prompts
from fewstep.core.image_data import KINDS as IMAGE_KINDS
from fewstep.core.image_data import captions_of
from fewstep.core.tables import read_texts
from fewstep.distill.config import DataConfig
from fewstep.distill.data.emoji import CAPTIONS
from fewstep.distill.data.stored_files import stored_captions
from fewstep.distill.run_folder import run_settings
from fewstep.eval.emoji import shuffled
from fewstep.eval.report.comparison import write_comparison
from fewstep.eval.report.html import write_report
from fewstep.models.emoji import Captions
from fewstep.models.hub.encoded import PROMPTS


def compare_images(
    run: Source, device: str = "auto", columns: int = 20, seed: int = 0, guidance: float | None = None
) -> Path:
    """Writes ``samples/comparison.png``: teacher and student of a run from the same noise, one row each, for all
    classes or for prompts spread over the training prompts (of videos the first frames, and all frames in
    ``comparison.mp4`` where PyAV is installed); and ``samples/diversity.png``: several noises for some conditions.

    The teacher is shown at 16 Euler steps with ``guidance`` (by default 1.5, and 2 for prompts) and, unguided, at as
    many evaluations as the student; a teacher that is itself a student, by its own rule.
    """
    folder = Path(run)
    settings = run_settings(folder)
    student = load(folder, device)
    teacher = teacher_of_run(folder, device)
    prompted = student.config.takes_prompts
    prompts = _training_prompts(DataConfig().model_dump() | (settings.get("data") or {})) if prompted else []
    return write_comparison(
        student, teacher, prompts, folder / "samples", columns=columns, seed=seed, guidance=guidance
    )


def _training_prompts(data: Mapping[str, Any]) -> list[str]:
    """The prompts of a run's data. Raises ``UserError`` if it is a source of the user's own."""
    if data["kind"] in CAPTIONS:
        captions: Captions = CAPTIONS[data["kind"]][0].of("train")
        return shuffled(captions).texts
    if data["path"] is None:
        raise UserError(f"The prompts of data.kind={data['kind']} are not known: use fewstep sample with --prompts.")
    path = Path(data["path"])
    if data["kind"] == "tensors":
        return stored_captions(path)
    if data["kind"] in IMAGE_KINDS:
        return captions_of(DataConfig.model_validate(data).images)
    return read_prompts(path / PROMPTS) if path.is_dir() else read_texts(path)


def report(run: Source) -> Path:
    """Writes ``report.html`` into a run folder and returns its path."""
    return write_report(Path(run))
