"""Loading a model: the student of a run, a saved model, a bundled one, a diffusers pipeline, one of the user's own."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.devices import pick_device
from fewstep.core.errors import UserError
from fewstep.core.image_files import to_bytes
from fewstep.distill.run_folder import run_settings
from fewstep.models.loading import Model, load_model, pipeline_of
from fewstep.models.model_config import Size
from fewstep.samplers.generate import SampleNoise

Source = str | Path


def load(
    source: Source, device: str = "auto", size: Size | None = None, dtype: torch.dtype | None = None, *,
    from_file: bool = False,
) -> Model:  # fmt: skip
    """The student of a run folder, a model folder, a bundled model by name, a diffusers pipeline by folder or hub id,
    or a model of the user's own by registered or dotted name, on its device.

    ``size`` (height, width, frames in pixels) and the weights' ``dtype`` are for pipelines, as in ``load_model``.
    ``from_file``: ``source`` was read from a run or a saved model, so that it causes no import. Raises ``UserError`` if
    there is no such model, or if the run has no student yet.
    """
    model = load_model(model_folder(source), size=size, dtype=dtype, from_file=from_file)
    model.denoiser.to(pick_device(device))
    return model


def model_folder(source: Source) -> Source:
    """The folder of a run's student; any other source as it is. Raises ``UserError`` if the run has no student yet."""
    folder = Path(source)
    if (folder / "config.yaml").is_file():
        if not (folder / "student" / "config.json").is_file():
            raise UserError(
                f"The run {folder} has no student yet: it is not finished. Resume it with "
                f"fewstep train --resume {shlex.quote(str(folder))}"
            )
        return folder / "student"
    return source


def teacher_of_run(source: Source, device: str = "auto") -> Model | None:
    """The teacher of a run, or of the run that contains a model folder, as its config names it; None without one."""
    path = Path(source)
    run = next((folder for folder in (path, *path.parents[:2]) if (folder / "config.yaml").is_file()), None)
    if run is None or not path.exists():
        return None
    settings = run_settings(run)
    size = tuple(settings["size"]) if settings.get("size") else None
    return load(settings["teacher"], device, size, from_file=True) if settings.get("teacher") else None


def noise_image(model: Model, prompts: bool) -> Tensor:
    """An image of noise, uint8 [1, C, H, W] (or a video), decoded as the samples of a model of prompts or labels are:
    to try a reward before anything is sampled."""
    noise = SampleNoise(0, [0], model.config.shape, torch.device("cpu"))()
    if not prompts:
        return to_bytes(noise)
    folder = pipeline_of(model)
    return folder.decode_images(folder.decoder().to(model.device), noise)
