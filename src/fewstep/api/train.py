"""Training: distil a teacher, or pretrain a network on data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.api.models import Source
from fewstep.core.errors import UserError
from fewstep.distill.build import build_inputs
from fewstep.distill.config import Config
from fewstep.distill.config_files import load_config
from fewstep.distill.data import batch
from fewstep.distill.processes import join_world
from fewstep.distill.run_folder import RunFolder, run_config
from fewstep.distill.trainer import Callback, Validator
from fewstep.eval.references import load_reference
from fewstep.eval.validation import PromptValidation, Validation
from fewstep.models.denoiser import Denoiser
from fewstep.models.loading import Model
from fewstep.samplers.plan import SamplingConfig


def train(
    config: Config | Source | None = None, *overrides: str, resume: Source | None = None,
    teacher: Model | Denoiser | None = None, data: batch.Source | None = None, callbacks: Sequence[Callback] = (),
) -> Path:  # fmt: skip
    """Distils a teacher (or, for a config with ``model:``, pretrains a network) and returns the run folder.

    ``overrides`` are ``"key=value"`` strings for a config file. ``resume`` continues the run in that folder, with its
    own config. ``teacher`` and ``data`` are the user's own objects, instead of those that the config names. Raises
    ``UserError`` on a mistake in the config and ``Interrupted`` after Ctrl-C. To train without a folder, use
    ``Trainer``.
    """
    if resume is not None:
        if config is not None or overrides:
            raise UserError("With resume the run's own config is used, so neither a config nor key=value is accepted.")
        settings = run_config(resume)
    elif config is None:
        raise UserError("Give a config, or a run folder to resume.")
    elif isinstance(config, Config) and overrides:
        raise UserError(
            f"Overrides such as {overrides[0]!r} are for a config file; Config.model_copy(update=...) changes a Config."
        )
    else:
        settings = config if isinstance(config, Config) else load_config(config, overrides)
    return train_run(settings, resume, teacher=teacher, data=data, callbacks=callbacks).folder


def train_run(
    config: Config, resume: Source | None, *, teacher: Model | Denoiser | None = None,
    data: batch.Source | None = None, callbacks: Sequence[Callback] = (),
) -> RunFolder:  # fmt: skip
    """The same, returning the run with its trainer."""
    world, device = join_world(config.device)
    inputs = build_inputs(config, device, teacher, data)
    if resume:
        run = RunFolder.reopen(resume, device, world, inputs=inputs)
    else:
        run = RunFolder.create(config, device, world, inputs)
    run.train(_validator(config, run), callbacks)
    return run


def _validator(config: Config, run: RunFolder) -> Validator | None:
    settings, inputs = config.validation, run.trainer.inputs
    if not settings.every:
        return None
    sampling = SamplingConfig(settings.solver, settings.steps, settings.guidance)
    if inputs.prompts is not None and inputs.pipeline is not None:
        return PromptValidation(sampling, settings.images, inputs.pipeline, inputs.prompts, run.folder)
    reference = load_reference(settings.reference, "train", run.trainer.device)
    return Validation(sampling, settings.n, reference, run.folder)
