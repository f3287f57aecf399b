"""Loading a model: the student of a run, a saved model, a bundled one, a diffusers pipeline, one of the user's own."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.devices import pick_device
from fewstep.core.errors import UserError
from fewstep.core.image_files import to_images
from fewstep.distill.checkpoint import checkpoints, step_of
from fewstep.distill.checkpoint_student import is_checkpoint, load_student, newest_checkpoint, student_config
from fewstep.distill.run_folder import run_settings
from fewstep.eval.references import is_reference
from fewstep.models.loading import Model, load_model, pipeline_of, read_config, resolve_path
from fewstep.models.model_config import ModelConfig, Size
from fewstep.samplers.generate import SampleNoise

Source = str | Path
OF_MODELS = ("config.json", "model_index.json", "fewstep.json")  # files at the top of a model's folder


def load(
    source: Source, device: str = "auto", size: Size | None = None, dtype: torch.dtype | None = None, *,
    from_file: bool = False,
) -> Model:  # fmt: skip
    """The student of a run folder or of one of its checkpoints, a model folder, a bundled model by name, a diffusers
    pipeline by folder or hub id, or a model of the user's own by registered or dotted name, on its device. Of a run
    that is not finished, it is the student of its newest checkpoint.

    ``size`` (height, width, frames in pixels) and the weights' ``dtype`` are for pipelines, as in ``load_model``.
    ``from_file``: ``source`` was read from a run or a saved model, so that it causes no import. Raises ``UserError`` if
    there is no such model, or if the run has neither a student nor a checkpoint yet.
    """
    refuse_reference(source)
    checkpoint = checkpoint_of(source)
    if checkpoint is None:
        model = load_model(source, size=size, dtype=dtype, from_file=from_file)
    else:
        model = load_student(checkpoint, size, dtype)
    model.denoiser.to(pick_device(device))
    return model


def refuse_reference(source: Source) -> None:
    """Raises ``UserError`` on a reference in place of a model or of images."""
    if is_reference(Path(source)):
        raise UserError(
            f"{source} is a reference of fewstep data reference, not a model: give it with --reference, or as "
            "validation.reference in a config."
        )


def checkpoint_of(source: Source) -> Path | None:
    """The checkpoint that stands for ``source``: itself, or the newest one of a run that is not finished; None for any
    other source. Raises ``UserError`` if such a run has none yet, or if its student lacks its config."""
    folder = Path(source)
    if is_checkpoint(folder):
        return folder
    if not is_run(folder) or resolve_path(folder) != folder:
        return None
    if (student := folder / "student").is_dir():  # written whole, so the run was finished
        raise UserError(
            f"{student / 'config.json'} is missing, so {student} is no model. Restore the file, or give one of "
            f"the checkpoints in {folder / 'checkpoints'}."
        )
    if not checkpoints(folder / "checkpoints"):
        raise UserError(
            f"The run {folder} has no student yet, and no checkpoint. Continue it with "
            f"fewstep train --resume {shlex.quote(str(folder))}"
        )
    return newest_checkpoint(folder)


def name_of(source: Source) -> str:
    """What a model is called in tables: its folder's name; of a checkpoint the run's, with the step."""
    checkpoint, run = checkpoint_of(source), run_of(source)
    if checkpoint is None or run is None:
        return Path(os.path.abspath(source)).name
    return f"{run.resolve().name}, step {step_of(checkpoint)}"


def config_of(source: Source) -> ModelConfig | None:
    """The config with which a model was saved; None for a pipeline, and for a model of the user's own."""
    if (checkpoint := checkpoint_of(source)) is not None:
        return student_config(checkpoint)
    folder = resolve_path(source)
    saved = (folder / "config.json").is_file() and not (folder / "fewstep.json").is_file()
    return read_config(folder) if saved else None


def run_of(source: Source) -> Path | None:
    """The run folder of a run, of its student or of one of its checkpoints; None for any other source."""
    folder = Path(source)
    if is_checkpoint(folder):
        folder = folder.absolute().parent.parent
    elif folder.name in ("student", "best") and not (folder / "config.yaml").is_file():
        folder = folder.parent
    return folder if is_run(folder) else None


def is_run(folder: Path) -> bool:
    """Whether a folder is a run: it has a run's config, and is not a model, which may have any ``config.yaml``."""
    return (folder / "config.yaml").is_file() and not any((folder / name).is_file() for name in OF_MODELS)


def teacher_of_run(source: Source, device: str = "auto") -> Model | None:
    """The teacher of a run, or of the run that contains a model folder, as its config names it; None without one."""
    if (run := run_of(source)) is None:
        return None
    settings = run_settings(run)
    size = tuple(settings["size"]) if settings.get("size") else None
    if not settings.get("teacher"):
        return None
    try:
        return load(settings["teacher"], device, size, from_file=True)
    except UserError as error:
        raise UserError(f"The teacher of {run}, as its config.yaml names it: {error}") from error


def noise_image(model: Model) -> Tensor:
    """An image of noise, uint8 [1, C, H, W] (or a video), decoded as the samples of a model are: to try a reward before
    anything is sampled."""
    noise = SampleNoise(0, [0], model.config.shape, torch.device("cpu"))()
    if not model.config.takes_prompts or model.config.vocabulary is not None:
        return to_images(noise)
    folder = pipeline_of(model)
    return folder.decode_images(folder.decoder().to(model.device), noise)
