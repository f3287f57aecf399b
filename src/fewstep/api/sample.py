"""Sampling: images of class labels as one tensor, images or videos of prompts as files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.api.models import Source, load
from fewstep.core.errors import UserError
from fewstep.core.files import write_text
from fewstep.core.image_files import require_av
from fewstep.core.image_grid import save_sample
from fewstep.core.json_files import read_json_object
from fewstep.core.limits import MOST_AT_ONCE, check_count
from fewstep.eval.hashes import json_sha256, model_sha256
from fewstep.models.hub.encoded import ENCODERS, fingerprint
from fewstep.models.loading import Model, pipeline_of
from fewstep.samplers.generate import ImageGenerator
from fewstep.samplers.plan import SamplingConfig, plan

RECORD, SAMPLE = "samples.json", re.compile(r"\d{5,}--?\d+\.(png|gif|mp4)")  # files in a folder of samples


def sample(
    source: Source | Model,
    *,
    n: int = 80,
    labels: Sequence[int | str] | None = None,
    prompts: Sequence[str] | None = None,
    sampling: SamplingConfig | None = None,
    device: str = "auto",
) -> Tensor:
    """``n`` images, uint8 [n, C, H, W], or videos, uint8 [n, F, C, H, W]. ``labels``, numbers or class names, repeat in
    turn (default: all classes); an unconditional model takes none. Of a model that takes prompts, one sample per prompt
    of ``prompts``.

    ``sampling`` says how; by default a student uses its own rule and times, and a teacher 32 Euler steps. Raises
    ``UserError`` on a request that does not fit the model.
    """
    model = source if isinstance(source, Model) else load(source, device)
    sampling = sampling or SamplingConfig()
    if prompts is not None or model.config.takes_prompts:
        prompts = _listed(prompts)
        if labels is not None:
            raise UserError("labels do not act beside prompts, of which each gives one sample: leave one of them out.")
        plan(model, sampling)  # refuses, before anything is loaded or encoded
        return ImageGenerator(model, prompts)(range(len(prompts)), sampling)
    if model.config.unconditional and labels is not None:
        raise UserError("This model is unconditional: leave labels out.")
    classes = max(1, model.config.classes)
    wanted = list(range(classes)) if labels is None else [model.config.label_of(label) for label in labels]
    if not wanted:
        raise UserError("Give at least one label.")
    check_count("n", n, MOST_AT_ONCE)
    return ImageGenerator(model)(torch.tensor(wanted)[torch.arange(n) % len(wanted)], sampling)


def sample_files(
    source: Source | Model, prompts: Sequence[str], folder: Source, *, seeds: Sequence[int] = (0,), batch: int = 8,
    sampling: SamplingConfig | None = None, video: Literal["gif", "mp4"] = "gif", device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:  # fmt: skip
    """Writes one file per prompt and seed, ``00000-0.png`` (of a video model ``.gif`` or ``.mp4``), whatever the batch;
    ``seeds`` replace that of ``sampling``. Existing files are kept, so that an interrupted call can be continued, also
    with other seeds; ``samples.json`` records what they show. ``progress`` receives (files done, files in all). Raises
    ``UserError`` on a folder with samples of other prompts, of another model or another way to sample it, also if
    another call begins to write them there meanwhile."""
    prompts = _listed(prompts)
    model = source if isinstance(source, Model) else load(source, device)
    if model.config.vocabulary is None:
        pipeline_of(model)  # refuses another model
    sampling = sampling or SamplingConfig()
    plan(model, sampling)  # refuses, before anything is loaded, encoded or written
    if model.config.vocabulary is not None:
        model.config.vocabulary.encode(prompts)
    suffix = video if len(model.config.shape) == 4 else "png"
    if suffix == "mp4":
        require_av()
    files = {seed: [Path(folder) / f"{number:05d}-{seed}.{suffix}" for number in range(len(prompts))] for seed in seeds}
    left = {seed: [number for number, file in enumerate(own) if not file.is_file()] for seed, own in files.items()}
    written = sum(len(own) - len(left[seed]) for seed, own in files.items())
    record = _claim(Path(folder), model, prompts, sampling)
    images_of = ImageGenerator(model, prompts, batch) if any(left.values()) else None
    for seed, numbers in left.items():
        for low in range(0, len(numbers), batch):
            some = numbers[low : low + batch]
            assert images_of is not None
            images = images_of(some, replace(sampling, seed=seed), some)
            if _record_in(Path(folder)) != record:
                raise UserError(f"Stopped: another command writes other samples to {folder}. Choose another one.")
            for number, image in zip(some, images, strict=True):
                save_sample(image, files[seed][number])
            written += len(some)
            if progress is not None:
                progress(written, len(prompts) * len(files))
    return [file for own in files.values() for file in own]


def _listed(prompts: Sequence[str] | None) -> Sequence[str]:
    """The prompts. Raises ``UserError`` if there are none, or a text instead of a list."""
    if not prompts or isinstance(prompts, str):
        raise UserError("This model takes prompts: give at least one in prompts, a list.")
    return prompts


def _claim(folder: Path, model: Model, prompts: Sequence[str], sampling: SamplingConfig) -> dict[str, Any]:
    """Records what a folder's samples show, and returns the record; if it contains some, checks that it is the same."""
    encoders = fingerprint(pipeline_of(model), (*ENCODERS, "vae")) if model.config.vocabulary is None else {}
    made_from = [model_sha256(model), encoders, replace(sampling, seed=0).as_dict(), list(prompts)]
    record, before = {"made_from": json_sha256(made_from)}, _record_in(folder)
    if before is not None and before.keys() != record.keys():
        raise UserError(f"{folder / RECORD} is not a record of samples, and is kept; choose another folder.")
    names = (file.name for file in folder.glob("*-*"))
    if before != record and any(map(SAMPLE.fullmatch, names)):
        raise UserError(
            f"{folder} contains samples of other prompts, of another model or of another way to sample it; choose "
            "another folder."
        )
    write_text(json.dumps(record) + "\n", folder / RECORD)
    return record


def _record_in(folder: Path) -> dict[str, Any] | None:
    """The record of a folder's samples; None without one. Raises ``UserError`` if it is damaged."""
    return read_json_object(folder / RECORD) if (folder / RECORD).is_file() else None
