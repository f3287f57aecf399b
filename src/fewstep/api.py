"""The Python interface: what the command line does, as functions. What measures is in ``measure``, what makes files
that others read in ``make``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fewstep.distill.config import Config, load_config
from fewstep.distill.devices import join_world, pick_device
from fewstep.distill.run import Progress, Run
from fewstep.errors import UserError
from fewstep.eval.draw import How, Painter, planned
from fewstep.eval.pictures import save_sample
from fewstep.eval.references import load_reference
from fewstep.eval.scores import read_scores
from fewstep.eval.tables import markdown
from fewstep.eval.validation import PromptValidation, Validation
from fewstep.models.hub.export import Form
from fewstep.models.hub.export import export as export_model
from fewstep.models.store import Model, Size, load_model, pipeline_of
from fewstep.pictures import require_av

Source = str | Path


def train(
    config: Config | Source, *overrides: str, resume: Source | None = None, progress: Progress | None = None
) -> Path:
    """Distils (or, for a config with ``model:``, pretrains) and returns the run folder.

    ``overrides`` are ``"key=value"`` strings. ``resume`` continues the run in that folder, whose own config then
    counts. Raises ``UserError`` on a mistake in the config and ``Interrupted`` after a Ctrl-C.
    """
    if not isinstance(config, Config):
        config = load_config(config, overrides)
    return train_run(config, resume, progress).folder


def train_run(config: Config, resume: Source | None, progress: Progress | None) -> Run:
    world, device = join_world(config.device)
    run = Run.reopen(resume, device, world) if resume else Run.create(config, device, world)
    settings = run.config.validation
    validate: Validation | PromptValidation | None = None
    if settings.every and run.prompts is not None and run.pipeline is not None:
        validate = PromptValidation(settings, run.pipeline, run.prompts, run.folder)
    elif settings.every:
        reference = load_reference(settings.reference, "train", device)
        validate = Validation(settings, reference, run.folder)
    run.train(validate, progress)
    return run


def load(source: Source, device: str = "auto", size: Size | None = None) -> Model:
    """The student of a run folder, a model folder, an embedded model by name, or a diffusers pipeline, on its device.
    ``size`` (height, width, frames in pixels) is for pipelines.

    Raises ``UserError`` if there is no such model, or the run has no student yet.
    """
    folder = Path(source)
    if (folder / "config.yaml").is_file():
        if not (folder / "student" / "config.json").is_file():
            raise UserError(
                f"The run {folder} has no student yet: it did not finish. Continue it with --resume {folder}."
            )
        source = folder / "student"
    model = load_model(source, size=size)
    model.denoiser.to(pick_device(device))
    return model


def sample(
    source: Source | Model,
    *,
    n: int = 80,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    steps: int | None = None,
    solver: str | None = None,
    guidance: float = 1.0,
    grid: str = "time",
    seed: int = 0,
    device: str = "auto",
) -> Tensor:
    """``n`` images, uint8 [n, C, H, W]; the labels are repeated in turn (all classes, if none are given). Of a
    text-conditioned model, an image for each of ``prompts`` instead, or a video, uint8 [n, F, 3, H, W].

    A student uses its own rule and times unless told otherwise; a teacher defaults to 32 Euler steps.
    """
    model = source if isinstance(source, Model) else load(source, device)
    how = _how(model, solver, steps, guidance, grid, seed)
    if prompts is not None or model.config.backbone.get("name") == "diffusers":
        if not prompts:
            raise UserError("This model takes prompts: give at least one.")
        planned(model, how)  # refuses, before anything is loaded or encoded
        return Painter(model, prompts)(range(len(prompts)), how)
    classes = model.config.classes
    wanted = list(range(classes)) if labels is None else list(labels)
    wrong = [label for label in wanted if not 0 <= label < classes]
    if wrong or not wanted:
        raise UserError(f"Labels must be between 0 and {classes - 1}, got {wrong or 'none'}.")
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}.")
    return Painter(model)(torch.tensor(wanted)[torch.arange(n) % len(wanted)], how)


def sample_files(
    source: Source | Model, prompts: Sequence[str], folder: Source, *, seeds: Sequence[int] = (0,), batch: int = 8,
    steps: int | None = None, solver: str | None = None, guidance: float = 1.0, grid: str = "time",
    video: Literal["gif", "mp4"] = "gif", device: str = "auto", progress: Callable[[int, int], None] | None = None,
) -> list[Path]:  # fmt: skip
    """A file for each prompt and seed, ``00000-0.png`` (of a video model ``.gif`` or ``.mp4``), whatever the batch.
    Those that are there already are kept, so that a run can be continued. ``progress`` is told how many of how many."""
    model = source if isinstance(source, Model) else load(source, device)
    pipeline_of(model)  # refuses another model
    how = _how(model, solver, steps, guidance, grid, 0)
    planned(model, how)  # refuses, before anything is loaded or encoded
    suffix = video if len(model.config.shape) == 4 else "png"
    if suffix == "mp4":
        require_av()
    files = {seed: [Path(folder) / f"{number:05d}-{seed}.{suffix}" for number in range(len(prompts))] for seed in seeds}
    left = {seed: [number for number, file in enumerate(own) if not file.is_file()] for seed, own in files.items()}
    written = sum(len(own) - len(left[seed]) for seed, own in files.items())
    paint = Painter(model, prompts, batch) if any(left.values()) else None
    for seed, numbers in left.items():
        for low in range(0, len(numbers), batch):
            some = numbers[low : low + batch]
            assert paint is not None
            for number, picture in zip(some, paint(some, how._replace(seed=seed), some), strict=True):
                save_sample(picture, files[seed][number])
            written += len(some)
            if progress is not None:
                progress(written, len(prompts) * len(files))
    return [file for own in files.values() for file in own]


def _how(model: Model, solver: str | None, steps: int | None, guidance: float, grid: str, seed: int) -> How:
    """The solver and steps wanted or, by default, a student's own rule and times, a teacher's 32 Euler steps."""
    few = model.config.few_step
    rule, count = solver or ("student" if few else "euler"), steps if steps is not None or few else 32
    return How(rule, count, guidance, grid, seed)


def export(run: Source, form: Form, out: Source, device: str = "cpu") -> Path:
    """A student as a diffusers pipeline, its denoiser alone (``merged``), a LoRA file, or one for ComfyUI, compared
    with the student before it gets its name. A run's config and scores go into the model card."""
    folder, card = Path(run), ""
    if (folder / "config.yaml").is_file():
        card = f"## Config\n\n```yaml\n{(folder / 'config.yaml').read_text(encoding='utf-8')}```\n"
        if (folder / "eval.json").is_file():
            card += f"\n## Scores\n\n{markdown(read_scores(folder / 'eval.json'))}"
    return export_model(load(run, device), form, Path(out), card)
